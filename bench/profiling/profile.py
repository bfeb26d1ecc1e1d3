"""Where a step's time goes, and how much is computed and read in it.

with profiled(engine) as profile:
    engine.generate(...)
profile.parts[LINEARS].seconds, .flops, .bytes
"""

# Inside the block the methods below are patched for ones that switch a stopwatch to their part and back, so that each
# second of the host counts once, for the innermost part:
#

#     step                                 loop
#       schedule                           scheduler
#       run, decode                        on the CPU  other model operations    on a GPU  launch
#         linear layers, experts' products             linears
#         what the attention backend                   attention
#         begins, and calls
#       read what was decoded                                                              waiting
#       sample                             sampling
#       decode                             text
#
# On the CPU every token is decoded in a step of its own, because a multi-step batch is one piece to the host. On a GPU
# profiling does not change execution: CUDA graphs stay on and no synchronization is added; kernels are in
# `profile.kernels`, from torch's profiler (`device.py`). The methods are put back at the end of the block.

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from time import perf_counter
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from torch.profiler import ProfilerActivity

from bench.profiling.cost_model import attention_work, linears, mixtures, positions_seen
from bench.profiling.device import Kernel, RooflineMeter, busy_seconds
from bench.profiling.peaks import DevicePeaks, measure_limits
from engine.attention import AttentionLayer, AttentionMetadata, RotaryAttention, StepAttention
from engine.attention.kv_cache import KVCache
from engine.batch import Batch, MultiStepBatch, PendingTokens
from engine.engine import Engine
from engine.execution.model_runner import ModelRunner
from engine.linears.packed import PackedLinear
from engine.linears.quantized import QuantizedLinear
from kernels.rms_norm import HeadNorms

LOOP = "loop"
SCHEDULER = "scheduler"
MODEL = "other model operations"
LINEARS = "linears"
ATTENTION = "attention"
LAUNCH = "launch"
WAITING = "waiting"
SAMPLING = "sampling"
TEXT = "text"

_ON_CPU = (LINEARS, ATTENTION, MODEL, SAMPLING, SCHEDULER, TEXT, LOOP)
_ON_GPU = (LAUNCH, WAITING, SAMPLING, SCHEDULER, TEXT, LOOP)


@dataclass(slots=True)
class Part:
    """The host's time for one part of all steps together."""

    seconds: float = 0.0
    calls: int = 0
    flops: int = 0
    """Multiplications and additions that its shapes ask for; counted for linears and attention."""

    bytes: int = 0
    """Weights, keys, values and activations, each read or written once; counted for linears and attention."""


@dataclass(slots=True)
class Profile:
    """What the parts, and a GPU's kernels, took while the profile lasted, by name."""

    parts: Mapping[str, Part]
    """On a GPU, sampling is what steps that need the host take to choose tokens, until these are there: it waits for
    the model, too. Other steps choose theirs on the device."""

    limits: DevicePeaks
    """Measured when the profile began."""

    kernels: Mapping[str, Kernel] = field(default_factory=dict)
    """On a GPU: what ran there, the longest first. Filled when the profile ends."""

    elapsed: float = 0.0
    """Seconds from the first step's beginning to the last one's end."""

    device_seconds: float = 0.0
    """In which a GPU ran at least one kernel or copy."""

    @property
    def steps(self) -> int:
        """Calls of `Engine.step`; on a GPU one may be of several decode steps."""
        return self.parts[LOOP].calls

    @property
    def seconds(self) -> float:
        """In steps, all in all."""
        return sum(part.seconds for part in self.parts.values())

    @property
    def device_share(self) -> float:
        """Share of the time in which a GPU had something to do, 0 to 1."""
        return self.device_seconds / self.elapsed if self.elapsed else 0.0

    def of_bandwidth(self, part: Part | Kernel) -> float:
        """How fast a part moved its bytes, as a share of the rate at which the device copies."""
        return part.bytes / part.seconds / self.limits.bytes_per_second if part.seconds else 0.0

    def of_flops(self, part: Part | Kernel) -> float:
        """How fast a part multiplied, as a share of the rate of a large matrix product."""
        return part.flops / part.seconds / self.limits.flops_per_second if part.seconds else 0.0


@contextlib.contextmanager
def profiled(engine: Engine) -> Iterator[Profile]:
    """Measure the steps that run while it lasts: what the host and the device take for what, beside their limits.

        with profiled(engine) as profile:
            engine.generate(...)
        profile.device_share, profile.parts["scheduler"].seconds, profile.kernels["matrix products"].seconds

    It begins by measuring the limits, which takes a fraction of a second and, on a GPU, 0.9 GiB. Warm up before it
    does. On a GPU the profiler keeps an event a kernel until the end: a minute makes millions. Raises TypeError
    where the runner is not a `ModelRunner`.
    """
    runner = engine.runner
    if not isinstance(runner, ModelRunner):
        raise TypeError("only an engine that runs a model can be profiled")
    is_gpu = runner.device.type == "cuda"
    limits = measure_limits(runner.device, runner.dtype)
    profile = Profile({name: Part() for name in (_ON_GPU if is_gpu else _ON_CPU)}, limits)
    watch = _Stopwatch(profile)
    with contextlib.ExitStack() as stack:
        _watch_host(engine, watch, stack)
        if is_gpu:
            stack.enter_context(_device_watched(runner, watch, profile))
        else:
            _watch_model(engine, runner, watch, stack)
        yield profile


def _watch_host(engine: Engine, watch: _Stopwatch, stack: contextlib.ExitStack) -> None:
    for owner, method, part in (
        (engine, "step", LOOP),
        (engine.scheduler, "schedule", SCHEDULER),
        (engine.sampler, "sample", SAMPLING),
        (engine.sampler, "score", SAMPLING),
    ):
        stack.enter_context(mock.patch.object(owner, method, watch.timed(part, getattr(owner, method))))
    if engine.tokenizer is not None:
        stack.enter_context(mock.patch.object(engine.tokenizer, "decode", watch.timed(TEXT, engine.tokenizer.decode)))


def _watch_model(engine: Engine, runner: ModelRunner, watch: _Stopwatch, stack: contextlib.ExitStack) -> None:
    """On a CPU, where all of a call's work is done when the call returns."""
    stack.enter_context(mock.patch.object(engine.scheduler.decode_steps, "num_steps_for", return_value=(1, [])))
    stack.enter_context(mock.patch.object(runner, "run", watch.timed(MODEL, runner.run)))
    stack.enter_context(mock.patch.object(runner.backend, "prepare", _prepare(watch, runner)))
    for module in linears(runner.model):
        stack.enter_context(mock.patch.object(module, "forward", _linear(watch, module, runner.dtype)))
    for mlp in mixtures(runner.model):
        stack.enter_context(mock.patch.object(mlp, "product", _expert_product(watch, mlp.product)))


@contextlib.contextmanager
def _device_watched(runner: ModelRunner, watch: _Stopwatch, profile: Profile) -> Iterator[None]:
    """On a GPU, where the host starts work, does other things, and waits."""
    meter = RooflineMeter(runner)
    run, run_and_sample, decode = (
        watch.timed(LAUNCH, start) for start in (runner.run, runner.run_and_sample, runner.decode)
    )

    def run_counted(batch: Batch) -> Tensor:
        logits: Tensor = run(batch)
        meter.ran(batch)
        return logits

    def run_and_sample_counted(batch: Batch, decodes: MultiStepBatch) -> PendingTokens:
        tokens: PendingTokens = run_and_sample(batch, decodes)
        meter.ran(batch, draws=True)
        return _TimedTokens(tokens, watch)

    def decode_counted(decodes: MultiStepBatch) -> PendingTokens:
        return _TimedTokens(meter.watched(decodes, decode(decodes)), watch)

    torch.cuda.synchronize(runner.device)
    with (
        mock.patch.object(runner, "run", run_counted),
        mock.patch.object(runner, "run_and_sample", run_and_sample_counted),
        mock.patch.object(runner, "decode", decode_counted),
        torch.profiler.profile(activities=[ProfilerActivity.CUDA]) as profiler,
    ):
        yield
        torch.cuda.synchronize(runner.device)
    events = profiler.events() or []
    profile.kernels = meter.kernels(events)
    profile.device_seconds = busy_seconds(events)


@dataclass(frozen=True, slots=True)
class _TimedTokens:
    """Tokens on their way, with the time that the host waits for them."""

    tokens: PendingTokens
    watch: _Stopwatch

    def wait(self) -> npt.NDArray[np.int64]:
        with self.watch.running(WAITING):
            return self.tokens.wait()


class _Stopwatch:
    """Gives each moment to one part: the innermost that has begun and not ended. Outside of all it stands still."""

    def __init__(self, profile: Profile) -> None:
        self._profile = profile
        self._open: list[Part] = []
        self._since = 0.0
        self._began: float | None = None

    def timed(self, part: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, with its time given to the part."""

        def run(*args: Any, **options: Any) -> Any:
            with self.running(part):
                return function(*args, **options)

        return run

    @contextlib.contextmanager
    def running(self, name: str) -> Iterator[Part]:
        part = self._profile.parts[name]
        part.calls += 1
        self._switch()
        self._open.append(part)
        try:
            yield part
        finally:
            self._switch()
            self._open.pop()

    def _switch(self) -> None:
        now = perf_counter()
        if self._open:
            self._open[-1].seconds += now - self._since
        if self._began is None:
            self._began = now
        self._profile.elapsed = now - self._began
        self._since = now


def _linear(watch: _Stopwatch, module: nn.Module, dtype: torch.dtype) -> Callable[[Tensor], Tensor]:
    forward = module.forward
    inputs, outputs = module.in_features, module.out_features
    assert isinstance(inputs, int)
    assert isinstance(outputs, int)
    size = inputs * outputs
    weight_bytes = _weight_bytes(module, size, dtype)

    def run(hidden: Tensor, *activation: str | bool) -> Tensor:
        with watch.running(LINEARS) as part:
            result: Tensor = forward(hidden, *activation)
        part.flops += 2 * size * (hidden.numel() // inputs)
        part.bytes += weight_bytes + hidden.nbytes + result.nbytes
        return result

    return run


def _weight_bytes(module: nn.Module, size: int, dtype: torch.dtype) -> int:
    """What a linear layer reads of weights."""
    if isinstance(module, QuantizedLinear):
        return module.weight.num_bytes
    return module.weight.panels.nbytes if isinstance(module, PackedLinear) else size * dtype.itemsize


def _expert_product(
    watch: _Stopwatch, product: Callable[[Tensor, Tensor], Tensor]
) -> Callable[[Tensor, Tensor], Tensor]:
    def run(rows: Tensor, weight: Tensor) -> Tensor:
        with watch.running(LINEARS) as part:
            result = product(rows, weight)
        part.flops += 2 * weight.numel() * len(rows)
        part.bytes += weight.nbytes + rows.nbytes + result.nbytes
        return result

    return run


def _prepare(watch: _Stopwatch, runner: ModelRunner) -> Callable[[AttentionMetadata, KVCache], StepAttention]:
    prepare = runner.backend.prepare

    def run(layout: AttentionMetadata, cache: KVCache) -> StepAttention:
        with watch.running(ATTENTION):
            step = prepare(layout, cache)
        # Models ask what a step's attention can do.
        made = _WatchedTurning if isinstance(step, RotaryAttention) else _WatchedAttention
        return made(watch, step, layout, cache)

    return run


class _WatchedAttention:
    """A step's attention, with its time and what it asks for."""

    def __init__(self, watch: _Stopwatch, step: StepAttention, layout: AttentionMetadata, cache: KVCache) -> None:
        self._watch, self._step, self._layout, self._cache = watch, step, layout, cache

    def __call__(
        self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        with self._watch.running(ATTENTION) as part:
            result = self._step(layer, query, key, value, sinks)
        self._count(part, layer, query, key, value)
        return result

    def _count(self, part: Part, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor) -> None:
        looks, seen = positions_seen(self._layout.starts, self._layout.query_lens, layer.sliding_window)
        kv_dtype = self._cache.layers[layer.index].keys.dtype
        work = attention_work(layer, looks, seen, len(query), dtype=query.dtype, kv_dtype=kv_dtype)
        part.flops += int(work.flops)
        part.bytes += int(work.bytes) + key.nbytes + value.nbytes


class _WatchedTurning(_WatchedAttention, RotaryAttention):
    """The same of one that turns queries and keys."""

    def rotate_and_attend(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        interleaved: bool,
        norms: HeadNorms | None,
    ) -> Tensor:
        step = self._step
        assert isinstance(step, RotaryAttention)
        with self._watch.running(ATTENTION) as part:
            result = step.rotate_and_attend(layer, query, key, value, cos, sin, interleaved=interleaved, norms=norms)
        self._count(part, layer, query, key, value)
        return result
