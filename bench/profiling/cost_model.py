"""What steps ask of a device: multiplications and additions, and bytes that have to move, by kernel.

A model's forward pass asks for  a  a step,  b  a token and  c  a row of logits, with any kernel: weights are read
once a step, the rest is rows. The three are found by running a few tokens through the model and looking at what its
linear layers and kernels are given. So they are right for any model, and for a CUDA graph, too, whose inside
cannot be observed. Two things depend on more and are computed from that: attention on how far each token looks back,
and a mixture of experts on how many of them a step's tokens choose.
"""

from __future__ import annotations

import contextlib
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from engine.attention import AttentionLayer
from engine.attention.kv_cache import position_bytes
from engine.batch import Batch, BatchEntry
from engine.execution.model_runner import ModelRunner
from engine.models.moe import SparseMLP
from kernels.integers import ceil_div
from kernels.launch import Launch

TORCH_PRODUCT = "torch product"
"""Stands for any kernel that torch multiplies matrices with."""


@dataclass(frozen=True, slots=True)
class Cost:
    """FLOPs and bytes."""

    flops: float = 0
    bytes: float = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.flops + other.flops, self.bytes + other.bytes)

    def __sub__(self, other: Cost) -> Cost:
        return self + other * -1

    def __mul__(self, count: float) -> Cost:
        return Cost(self.flops * count, self.bytes * count)


@dataclass(frozen=True, slots=True)
class KernelCost:
    """Of one kernel in a forward pass, all its launches together."""

    step: Cost
    token: Cost
    logits: Cost
    """For each row of logits."""

    def of(self, steps: int, tokens: int, logits: int) -> Cost:
        return self.step * steps + self.token * tokens + self.logits * logits


def measure_costs(runner: ModelRunner, num_tokens: int) -> Mapping[str, KernelCost]:
    """By kernel, as they are with about `num_tokens` tokens in a step; runs that many, three times.

    Each tensor that a kernel is given counts once, of the KV cache the rows of the step's tokens: a kernel that works
    in place moves more than that. What runs goes to the cache's spare block.
    """
    few, more, both = (
        _observed(runner, tokens, logits)
        for tokens, logits in ((num_tokens, 1), (num_tokens + 1, 1), (num_tokens + 1, 2))
    )
    found = {}
    for kernel in both:
        token = more[kernel] - few[kernel]
        logits = both[kernel] - more[kernel]
        found[kernel] = KernelCost(few[kernel] - token * num_tokens - logits, token, logits)
    return found


def _observed(runner: ModelRunner, num_tokens: int, num_logits: int) -> defaultdict[str, Cost]:
    """What one forward pass asks of each kernel."""
    observer = _Observer(runner, num_tokens)
    with observer.looking_on():
        _run(runner, num_tokens, num_logits)
    return observer.work


def _run(runner: ModelRunner, num_tokens: int, num_logits: int) -> None:
    """A forward pass over the cache's spare block."""
    blocks = [runner.cache.padding_block] * ceil_div(num_tokens, runner.cache.block_size)
    runner.run(Batch([BatchEntry([0] * num_tokens, 0, blocks, num_logits)]))


class _Observer:
    """Looks at what a model's linear layers and kernels are given."""

    def __init__(self, runner: ModelRunner, num_tokens: int) -> None:
        self.work: defaultdict[str, Cost] = defaultdict(Cost)
        self._model = runner.model
        self._num_tokens = num_tokens
        self._slots = (runner.cache.num_blocks + 1) * runner.cache.block_size
        self._cache = {_place(part) for layer in runner.cache.layers for part in layer.tensors}
        self._multiplied: list[str] = []
        """Kernels that were given a weight of the linear layer that is running."""
        self._weights: set[int] = set()

    @contextlib.contextmanager
    def looking_on(self) -> Iterator[None]:
        run = Launch.run

        def observed(launch: Launch) -> None:
            self._launched(launch)
            run(launch)

        with contextlib.ExitStack() as stack:
            for module in linears(self._model):
                stack.enter_context(mock.patch.object(module, "forward", self._linear(module)))
            stack.callback(setattr, Launch, "run", run)
            Launch.run = observed  # type: ignore[method-assign, assignment]
            yield

    def _launched(self, launch: Launch) -> None:
        name: str = launch.kernel.__name__
        total = 0
        for argument in launch.arguments.values():
            if not isinstance(argument, Tensor):
                continue
            place = _place(argument)
            total += argument.nbytes // self._slots * self._num_tokens if place in self._cache else argument.nbytes
            if place in self._weights:
                self._multiplied.append(name)
        self.work[name] += Cost(bytes=total)

    def _linear(self, module: nn.Module) -> Callable[..., Any]:
        forward = module.forward
        inputs, outputs = module.in_features, module.out_features
        assert isinstance(inputs, int)
        assert isinstance(outputs, int)
        tensors = [*module.parameters(), *module.buffers()]

        def run(hidden: Tensor) -> Tensor:
            self._multiplied, self._weights = [], {_place(tensor) for tensor in tensors}
            result: Tensor = forward(hidden)
            flops = 2 * inputs * outputs * (hidden.numel() // inputs)
            if self._multiplied:  # by a kernel of ours, whose bytes were counted
                self.work[self._multiplied[-1]] += Cost(flops)
            else:
                weights = sum(tensor.nbytes for tensor in tensors)
                self.work[TORCH_PRODUCT] += Cost(flops, weights + hidden.nbytes + result.nbytes)
            self._weights = set()
            return result

        return run


def linears(model: nn.Module) -> Iterator[nn.Module]:
    """The model's linear layers, of any class."""
    return (module for module in model.modules() if isinstance(getattr(module, "in_features", None), int))


def _place(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


# Attention


def attention_work(
    layer: AttentionLayer, looks: int, seen: int, num_tokens: int, *, dtype: torch.dtype, kv_dtype: torch.dtype
) -> Cost:
    """Of one layer: its tokens look at `looks` positions together, for which `seen` keys and values are read once."""
    width = layer.head_dim + layer.value_dim
    return Cost(
        2 * layer.num_heads * width * looks,
        position_bytes(layer, kv_dtype) * seen + layer.num_heads * width * dtype.itemsize * num_tokens,
    )


def positions_seen(
    starts: Sequence[int] | npt.NDArray[np.int64], lengths: Sequence[int] | npt.NDArray[np.int64], window: int | None
) -> tuple[int, int]:
    """How many positions tokens look at together, and how many different ones their sequences do.

    Sequence i has `lengths[i]` new tokens from position `starts[i]` on; a token looks at itself and at what is before
    it, `window` positions at most.
    """
    starts, lengths = np.asarray(starts, np.int64), np.asarray(lengths, np.int64)
    ends = starts + lengths
    if window is None:
        looks = (ends * (ends + 1) - starts * (starts + 1)) // 2
        return int(looks.sum()), int(ends.sum())
    # The first tokens of a sequence have fewer than `window` positions to look at.
    few_before, few = np.minimum(starts, window), np.minimum(ends, window)
    looks = (few * (few + 1) - few_before * (few_before + 1)) // 2 + (lengths - (few - few_before)) * window
    seen = np.minimum(ends, lengths + window - 1)
    return int(looks.sum()), int(seen.sum())


# Mixtures of experts


@dataclass(frozen=True, slots=True)
class Mixture:
    """One layer's experts: gate and up, and down, of the sizes that all of them have."""

    num_experts: int
    per_token: int
    hidden: int
    inner: int
    itemsize: int
    """Bytes of a number, of weights and activations."""

    @classmethod
    def of(cls, mlp: SparseMLP) -> Mixture:
        num_experts, hidden, inner = mlp.down.shape
        return cls(num_experts, mlp.per_token, hidden, inner, mlp.down.dtype.itemsize)

    def routing(self, num_tokens: int) -> Cost:
        """Logits of all experts are read; choices and their weights are written, read again and put in order."""
        return Cost(bytes=(self.num_experts * self.itemsize + 16 * self.per_token) * num_tokens)

    def products(self, tokens: Sequence[int] | npt.NDArray[np.int64]) -> Cost:
        """Of steps with so many tokens each: what is multiplied by the experts that tokens choose, and those alone.

        How many different experts a step's tokens choose together is known on the device only. As many have to be read
        as chance would choose: each of n tokens leaves out an expert with the probability 1 - k / E. A router that
        prefers some experts reads fewer.
        """
        tokens = np.asarray(tokens, np.int64)
        total = int(tokens.sum())
        weights = 3 * self.hidden * self.inner
        chosen = float((self.num_experts * (1 - (1 - self.per_token / self.num_experts) ** tokens)).sum())
        # Rows are read once; each choice's products are written, and those in the middle read.
        activations = (self.hidden + self.per_token * (2 * self.inner + self.hidden)) * total
        return Cost(2 * weights * self.per_token * total, self.itemsize * (weights * chosen + activations))


def mixtures_by_rows(runner: ModelRunner) -> tuple[Counter[Mixture], Counter[Mixture]]:
    """The model's mixtures that every token of a step goes through, and those that only rows of logits do.

    After the last layer's attention no other rows are read; runs two tokens to see which mixtures that is true of.
    """
    rows: dict[SparseMLP, int] = {}

    def noting(mlp: SparseMLP) -> Callable[[Tensor], Tensor]:
        forward = mlp.forward

        def run(hidden: Tensor) -> Tensor:
            rows[mlp] = len(hidden)
            return forward(hidden)

        return run

    with contextlib.ExitStack() as stack:
        for mlp in mixtures(runner.model):
            stack.enter_context(mock.patch.object(mlp, "forward", noting(mlp)))
        _run(runner, 2, 1)
    all_rows, logit_rows = (Counter(Mixture.of(mlp) for mlp, seen in rows.items() if seen == n) for n in (2, 1))
    return all_rows, logit_rows


def mixtures(model: nn.Module) -> Iterator[SparseMLP]:
    """The model's mixtures that run here; transformers' own are not among them."""
    return (module for module in model.modules() if isinstance(module, SparseMLP))
