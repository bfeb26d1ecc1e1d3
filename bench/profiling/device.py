"""What a GPU did while an engine was profiled: the time of its kernels, and how much their shapes asked for.

Times are those of the kernels themselves, by torch's profiler, in CUDA graphs as well as outside of them. What was
asked for is counted from the batches that the engine ran, multi-step ones included (`cost_model.py`); padding rows ask
for nothing.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt
import torch
from torch.autograd import DeviceType  # type: ignore[attr-defined]
from torch.autograd.profiler_util import FunctionEvent

from bench.profiling.cost_model import (
    TORCH_PRODUCT,
    Cost,
    KernelCost,
    Mixture,
    attention_work,
    measure_costs,
    mixtures_by_rows,
    positions_seen,
)
from engine.batch import NO_TOKEN, Batch, MultiStepBatch, PendingTokens
from engine.execution.model_runner import ModelRunner

PRODUCTS = "matrix products"
DECODES = "attention, decodes"
PROMPTS = "attention, prompts"
PLANS = "attention, plans"
EXPERTS = "experts, products"
ROUTING = "experts, routing"
EXPERT_SUMS = "experts, sums"
SAMPLING = "sampling"
COPIES = "copies and fills"
OTHERS = "other kernels"

_FAMILIES = {
    "_decode_kernel": DECODES,
    "_combine_splits_kernel": DECODES,
    "_prefill_kernel": PROMPTS,
    "_plan_kernel": PLANS,
    "_attend_shared_kernel": DECODES,
    "_find_kernel": PLANS,
    "_product_kernel": EXPERTS,
    "_choose_kernel": ROUTING,
    "_arrange_kernel": ROUTING,
    "_sum_kernel": EXPERT_SUMS,
    "_sample_kernel": SAMPLING,
    "_maxima_of_parts_kernel": SAMPLING,
    "_masses_of_tiles_kernel": SAMPLING,
    "_choose_from_parts_kernel": SAMPLING,
    TORCH_PRODUCT: PRODUCTS,
}

_BY_STEP = frozenset((DECODES, PROMPTS, PLANS, EXPERTS, ROUTING))
"""What depends on more than the number of tokens, and is counted step by step."""

_PRODUCT = re.compile(r"gemm|gemv|cublas|cutlass|nvjet|xmma|splitk|^Cijk_", re.IGNORECASE)
"""In the names of kernels by cuBLAS, CUTLASS, rocBLAS and hipBLASLt."""

_SIZES = (2, 64, 512)
"""Tokens of a step with which a model's costs are measured: kernels may be others for few tokens than for many."""


@dataclass(slots=True)
class Kernel:
    """One kernel, or several that do one thing; all launches together."""

    seconds: float = 0.0
    launches: int = 0
    flops: float = 0.0
    """Multiplications and additions that the shapes ask for; 0 where they are not counted."""

    bytes: float = 0.0
    """Weights, keys, values and activations, each read or written once; 0 where they are not counted."""


@dataclass(slots=True)
class _Counted:
    steps: int = 0
    tokens: int = 0
    logits: int = 0


class RooflineMeter:
    """Counts what an engine's steps ask of a runner's device, and puts the device's time beside it."""

    def __init__(self, runner: ModelRunner) -> None:
        """Runs a few tokens through the model."""
        self._runner = runner
        sizes = [size for size in _SIZES if size < runner.max_model_len] or [1]
        self._costs: Mapping[int, Mapping[str, KernelCost]] = {size: measure_costs(runner, size) for size in sizes}
        self._counted = {size: _Counted() for size in sizes}
        self._looked: defaultdict[str, Cost] = defaultdict(Cost)
        """What attention, experts and sampling were asked for."""
        self._layers = Counter(replace(layer, index=0) for layer in runner.model.attention_layers)
        self._mixtures, self._last_mixtures = mixtures_by_rows(runner)

    def ran(self, batch: Batch, *, draws: bool = False) -> None:
        """Count a batch; where it `draws`, its tokens are drawn from logits as the model gives them, else converted."""
        starts = np.array([entry.start for entry in batch.entries])
        lengths = np.array([len(entry.token_ids) for entry in batch.entries])
        num_logits = sum(entry.num_logits for entry in batch.entries)
        self._count(batch.num_tokens, 1, batch.num_tokens, num_logits)
        self._route(self._mixtures, np.array([batch.num_tokens]))
        self._route(self._last_mixtures, np.array([num_logits]))
        dtype = self._runner.dtype if draws else torch.float32
        self._looked[SAMPLING] += Cost(bytes=num_logits * self._runner.vocab_size * dtype.itemsize)
        alone = lengths == 1
        self._count_attention(DECODES, starts[alone], lengths[alone])
        self._count_attention(PROMPTS, starts[~alone], lengths[~alone])

    def decoded(self, batch: MultiStepBatch, sampled: npt.NDArray[np.int64]) -> None:
        """Count a multi-step batch, now that its tokens `[entries, num_steps]` are there."""
        is_sampled = sampled != NO_TOKEN
        steps = is_sampled.sum(axis=1)
        num_tokens = int(steps.sum())
        self._count(len(batch.entries), batch.num_steps, num_tokens, num_tokens)
        self._route(self._mixtures + self._last_mixtures, is_sampled.sum(axis=0))
        self._looked[SAMPLING] += Cost(bytes=num_tokens * self._runner.vocab_size * self._runner.dtype.itemsize)
        # As many tokens one after the other, each of which reads all that is before it anew.
        self._count_attention(DECODES, np.array([entry.position for entry in batch.entries]), steps, is_read_anew=True)

    def watched(self, batch: MultiStepBatch, decoding: PendingTokens) -> PendingTokens:
        """The decoding, counted when it is read."""
        return _Watched(self, batch, decoding)

    def kernels(self, events: Iterable[FunctionEvent]) -> dict[str, Kernel]:
        """The device's events by kernel, the longest first, beside what was asked for."""
        asked = self._asked()
        found: defaultdict[str, Kernel] = defaultdict(Kernel)
        for event in device_events(events):
            kernel = found[self._family(event.name)]
            kernel.seconds += (event.time_range.end - event.time_range.start) / 1e6
            kernel.launches += 1
        for name, kernel in found.items():
            kernel.flops, kernel.bytes = asked[name].flops, asked[name].bytes
        return dict(sorted(found.items(), key=lambda item: -item[1].seconds))

    def _family(self, name: str) -> str:
        if name in _FAMILIES or any(name in known for known in self._costs.values()):
            return _FAMILIES.get(name, _title(name))
        if name.startswith(("Memcpy", "Memset")):
            return COPIES
        return PRODUCTS if _PRODUCT.search(name) else OTHERS

    def _count(self, num_rows: int, steps: int, tokens: int, logits: int) -> None:
        fitting = [size for size in self._counted if size <= num_rows]
        counted = self._counted[max(fitting, default=min(self._counted))]
        counted.steps += steps
        counted.tokens += tokens
        counted.logits += logits

    def _route(self, mixtures: Counter[Mixture], tokens: npt.NDArray[np.int64]) -> None:
        """Steps of so many tokens each went through the mixtures."""
        for mixture, count in mixtures.items():
            self._looked[ROUTING] += mixture.routing(int(tokens.sum())) * count
            self._looked[EXPERTS] += mixture.products(tokens) * count

    def _count_attention(
        self,
        kernel: str,
        starts: npt.NDArray[np.int64],
        lengths: npt.NDArray[np.int64],
        *,
        is_read_anew: bool = False,
    ) -> None:
        dtype, kv_dtype = self._runner.dtype, self._runner.cache.layers[0].keys.dtype
        for layer, count in self._layers.items():
            looks, seen = positions_seen(starts, lengths, layer.sliding_window)
            read = looks if is_read_anew else seen
            work = attention_work(layer, looks, read, int(lengths.sum()), dtype=dtype, kv_dtype=kv_dtype)
            self._looked[kernel] += work * count

    def _asked(self) -> defaultdict[str, Cost]:
        asked = defaultdict(Cost, self._looked)
        for size, counted in self._counted.items():
            for kernel, cost in self._costs[size].items():
                family = _FAMILIES.get(kernel, _title(kernel))
                if family not in _BY_STEP:
                    asked[family] += cost.of(counted.steps, counted.tokens, counted.logits)
        return asked


@dataclass(frozen=True, slots=True)
class _Watched:
    meter: RooflineMeter
    batch: MultiStepBatch
    decoding: PendingTokens

    def wait(self) -> npt.NDArray[np.int64]:
        sampled = self.decoding.wait()
        self.meter.decoded(self.batch, sampled)
        return sampled


def device_events(events: Iterable[FunctionEvent]) -> Iterable[FunctionEvent]:
    """What ran on the device: kernels, copies and fills."""
    return (event for event in events if event.device_type == DeviceType.CUDA and not event.is_user_annotation)


def busy_seconds(events: Iterable[FunctionEvent]) -> float:
    """How long at least one kernel or copy ran."""
    spans = ((event.time_range.start, event.time_range.end) for event in device_events(events))
    return covered(list(spans)) / 1e6


def covered(spans: Sequence[tuple[float, float]]) -> float:
    """The length of the union of spans (start, end)."""
    total, reached = 0.0, float("-inf")
    for start, end in sorted(spans):
        total += max(0.0, end - max(start, reached))
        reached = max(reached, end)
    return total


def _title(kernel: str) -> str:
    """A Triton kernel's name, to be read."""
    return kernel.strip("_").removesuffix("_kernel").replace("_", " ")
