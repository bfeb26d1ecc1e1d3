"""Where a step's time goes, and how much was computed and read meanwhile.

    with profiled(engine) as profile:
        engine.generate(...)
    profile.parts[LINEARS].seconds, .flops, .bytes

While it lasts, the methods below are exchanged for ones that switch a stopwatch to their part and back, so that each
second counts once, for the innermost part:

    step                                             loop
      schedule                                       scheduler
      run                                            model
        linear layers                                linears
        what the attention backend begins, and calls attention
      sample                                         sampling
      decode                                         text

Afterwards all is as before: an engine that is not profiled pays nothing. While it lasts, every token is decoded in a
step of its own, since a burst of several is one piece to the host. On a GPU each switch waits for the device, which
makes the whole slower, and the parts true.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from engine.attention import AttentionLayer, StepAttention, StepLayout
from engine.engine import Engine
from engine.kv_cache import KVCache
from engine.linears.packed import PackedLinear
from engine.runner import ModelRunner

LOOP = "loop"
SCHEDULER = "scheduler"
MODEL = "other model operations"
LINEARS = "linears"
ATTENTION = "attention"
SAMPLING = "sampling"
TEXT = "text"


@dataclass(slots=True)
class Part:
    """One part of all steps together."""

    seconds: float = 0.0
    calls: int = 0
    flops: int = 0
    """Multiplications and additions that its shapes ask for; counted for linears and attention."""

    bytes: int = 0
    """Weights, keys, values and activations, each read or written once; counted for linears and attention."""


@dataclass(slots=True)
class Profile:
    """What the parts took while the profile lasted, by name."""

    parts: dict[str, Part] = field(
        default_factory=lambda: {name: Part() for name in (LINEARS, ATTENTION, MODEL, SAMPLING, SCHEDULER, TEXT, LOOP)}
    )

    @property
    def steps(self) -> int:
        return self.parts[LOOP].calls

    @property
    def seconds(self) -> float:
        """In steps, all in all."""
        return sum(part.seconds for part in self.parts.values())


@contextlib.contextmanager
def profiled(engine: Engine) -> Iterator[Profile]:
    """Profile the steps that run inside; the engine must have a `ModelRunner`."""
    runner = engine.runner
    if not isinstance(runner, ModelRunner):
        raise TypeError("only an engine that runs a model can be profiled")
    profile = Profile()
    watch = _Stopwatch(profile, runner.device)
    with contextlib.ExitStack() as stack:
        for owner, method, part in (
            (engine, "step", LOOP),
            (engine.scheduler, "schedule", SCHEDULER),
            (engine.sampler, "sample", SAMPLING),
            (engine.sampler, "score", SAMPLING),
            (runner, "run", MODEL),
        ):
            stack.enter_context(_exchanged(owner, method, watch.timed(part, getattr(owner, method))))
        stack.enter_context(_exchanged(engine.scheduler.lookahead, "choose", lambda *args, **options: (1, [])))
        if engine.text is not None:
            stack.enter_context(_exchanged(engine.text, "decode", watch.timed(TEXT, engine.text.decode)))
        stack.enter_context(_exchanged(runner.backend, "begin", _begin(watch, runner)))
        for module in runner.model.modules():
            if isinstance(getattr(module, "in_features", None), int):
                stack.enter_context(_exchanged(module, "forward", _linear(watch, module, runner.dtype)))
        yield profile


class _Stopwatch:
    """Gives each moment to one part: the innermost that has begun and not ended. Outside of all it stands still."""

    def __init__(self, profile: Profile, device: torch.device) -> None:
        self.parts = profile.parts
        self._device = device
        self._open: list[Part] = []
        self._since = 0.0

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time given to the part."""

        def run(*args: Any, **options: Any) -> Any:
            with self.running(part):
                return function(*args, **options)

        return run

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[Part]:
        part = self.parts[name]
        part.calls += 1
        self._switch()
        self._open.append(part)
        try:
            yield part
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        now = perf_counter()
        if self._open:
            self._open[-1].seconds += now - self._since
        self._since = now


@contextlib.contextmanager
def _exchanged(owner: Any, name: str, replacement: Callable[..., Any]) -> Iterator[None]:
    """Let an object have another method for a while, and then its class' own again."""
    setattr(owner, name, replacement)
    try:
        yield
    finally:
        delattr(owner, name)


def _linear(watch: _Stopwatch, module: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    forward = module.forward
    inputs, outputs = module.in_features, module.out_features
    assert isinstance(inputs, int)
    assert isinstance(outputs, int)
    size = inputs * outputs
    weight_bytes = _weight_bytes(module, size, dtype)

    def run(hidden: Tensor, *activation: str) -> Tensor:
        with watch.running(LINEARS) as part:
            result: Tensor = forward(hidden, *activation)
        part.flops += 2 * size * (hidden.numel() // inputs)
        part.bytes += weight_bytes + hidden.nbytes + result.nbytes
        return result

    return run


def _weight_bytes(module: nn.Module, size: int, dtype: torch.dtype) -> int:
    """What a linear layer reads of weights."""
    return module.weight.panels.nbytes if isinstance(module, PackedLinear) else size * dtype.itemsize


def _begin(watch: _Stopwatch, runner: ModelRunner) -> Callable[[StepLayout, KVCache], StepAttention]:
    begin = runner.backend.begin

    def run(layout: StepLayout, cache: KVCache) -> StepAttention:
        with watch.running(ATTENTION):
            step = begin(layout, cache)

        def attend(
            layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
        ) -> Tensor:
            with watch.running(ATTENTION) as part:
                result = step(layer, query, key, value, sinks)
            looks, seen = _positions(layout, layer.sliding_window)
            part.flops += 2 * layer.num_heads * (layer.head_dim + layer.value_dim) * looks
            row = layer.num_kv_heads * (layer.head_dim + layer.value_dim) * key.element_size()
            part.bytes += seen * row + query.nbytes + key.nbytes + value.nbytes + result.nbytes
            return result

        return attend

    return run


def _positions(layout: StepLayout, window: int | None) -> tuple[int, int]:
    """How many positions all tokens of a step look at together, and how many different ones its sequences do."""
    ends = layout.starts + layout.query_lens
    if window is None:
        looks = (ends * (ends + 1) - layout.starts * (layout.starts + 1)) // 2
        return int(looks.sum()), int(ends.sum())
    # The first tokens of a sequence have fewer than `window` positions to look at.
    few_before, few = np.minimum(layout.starts, window), np.minimum(ends, window)
    looks = (few * (few + 1) - few_before * (few_before + 1)) // 2 + (layout.query_lens - (few - few_before)) * window
    seen = np.minimum(ends, layout.query_lens + window - 1)
    return int(looks.sum()), int(seen.sum())
