"""Single kernels beside the hardware's limits, measured in the same run, and beside what torch has.

Reading counts at the rate of a large copy on the device (bytes read plus bytes written), products at the rate of a
large bfloat16 matrix product. Inputs are random and fresh, and several sets of them take turns, so that no cache helps.

On a GPU a CUDA graph holds what is timed, several times over: its kernels run back to back, as in a step, and the host
has no part in the time. What a step does once for all layers, such as planning attention, is done before.
"""

from __future__ import annotations

import itertools
import statistics
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from bench.profiling.cost_model import Mixture
from bench.profiling.peaks import DevicePeaks, LimitSizes, measure_limits, seconds_of
from engine.attention import AttentionLayer, AttentionMetadata, CapturableAttention, DecodeMetadata, make_backend
from engine.attention.kv_cache import KVCache, position_bytes
from engine.config import EngineConfig
from engine.sampling.filters import Filters, sample_filtered
from kernels.device import has_kernels
from kernels.expert_mlp import expert_mlp, expert_mlp_torch
from kernels.quantized_matmul import (
    KINDS,
    QuantizedWeight,
    quantized_matmul,
    quantized_matmul_torch,
    quantized_weight,
)
from kernels.sampling import argmax

BLOCK = 64
IN_A_GRAPH = 16
"""Runs of a piece of work that a graph holds, at least."""


@dataclass(frozen=True, slots=True)
class Sizes:
    """How large everything is."""

    heads: Sequence[tuple[str, int, int, int]]
    """Name, query heads, KV heads, head size."""

    decodes: Sequence[tuple[int, int]]
    """Batch, tokens of each sequence."""

    prefills: Sequence[tuple[int, int]]
    vocabulary: tuple[int, int]
    """Rows, tokens."""

    product: tuple[int, int]
    """Inputs and outputs of a linear layer."""

    mixture: tuple[int, int, int, int]
    """Experts, those of a token, hidden and inner size."""

    rows: Sequence[int]
    """Of decodes, and of prompts."""

    limits: LimitSizes
    repeats: int


FULL = Sizes(
    heads=(("Qwen3-0.6B", 16, 8, 128), ("Llama-3.1-8B", 32, 8, 128), ("gpt2-large", 20, 20, 64)),
    decodes=((1, 1024), (16, 1024), (64, 1024), (256, 1024), (64, 4096), (8, 32_768)),
    prefills=((8, 1024), (1, 4096), (2, 4096), (1, 16_384)),
    vocabulary=(256, 151_936),
    product=(4096, 14_336),
    mixture=(128, 8, 2048, 768),
    rows=(1, 16, 64, 256, 2048),
    limits=LimitSizes(copy_bytes=4 << 30, matmul=8192),
    repeats=30,
)
DRY = Sizes(
    heads=(("tiny", 4, 2, 16),),
    decodes=((2, 70),),
    prefills=((2, 70),),
    vocabulary=(2, 1000),
    product=(64, 48),
    mixture=(4, 2, 32, 16),
    rows=(1, 5),
    limits=LimitSizes(copy_bytes=1 << 16, matmul=64),
    repeats=2,
)


@dataclass(frozen=True, slots=True)
class Timing:
    kernel: str
    shape: str
    seconds: float
    limit: str
    """"copy" or "matmul": what it is measured against."""

    share: float
    """Of the limit, 0 to 1."""

    others: dict[str, float] = field(default_factory=dict)
    """Seconds of what torch has for the same, by name."""


def measure(sizes: Sizes, device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    """All kernels; takes minutes on a GPU. One that fails is told of, and the others go on."""
    watch = _Watch(device, sizes.repeats)
    limits = measure_limits(device, dtype, sizes.limits)
    timings, failures = [], []
    with torch.inference_mode():
        for name, work in _works(sizes, device, dtype, limits, watch):
            try:
                timings.append(work())
            except Exception as error:  # noqa: BLE001 - whatever it is, it is this kernel's result
                failures.append({"kernel": name, "failure": f"{type(error).__name__}: {error}"})
    return {"limits": asdict(limits), "kernels": [asdict(timing) for timing in timings], "failures": failures}


def _works(
    sizes: Sizes, device: torch.device, dtype: torch.dtype, limits: DevicePeaks, watch: _Watch
) -> Iterator[tuple[str, Callable[[], Timing]]]:
    for head in sizes.heads:
        for size in sizes.decodes:
            yield f"attention, decode, {head[0]}: {size}", partial(_decode, head, size, device, dtype, limits, watch)
    for head in sizes.heads:
        for size in sizes.prefills:
            yield f"attention, prompts, {head[0]}: {size}", partial(_prefill, head, size, device, dtype, limits, watch)
    for head in sizes.heads:
        for size in sizes.decodes if device.type == "cuda" else ():  # float8 is kept for the Triton kernels only
            work = partial(_decode, head, size, device, dtype, limits, watch, kv_dtype=torch.float8_e4m3fn)
            yield f"attention, decode, float8, {head[0]}: {size}", work
    for rows in sizes.rows:
        for kind in KINDS:
            work = partial(_product, kind, sizes.product, rows, device, dtype, limits, watch)
            yield f"product, {kind}: {rows}", work
        yield f"experts: {rows}", partial(_experts, sizes.mixture, rows, device, dtype, limits, watch)
    logits = torch.randn(sizes.vocabulary, device=device) * 4
    yield "sampling, greedy", partial(_greedy, logits, limits, watch)
    for name, top_k, top_p in (("temperature", 0, 1.0), ("top-k 50", 50, 1.0), ("top-p 0.9", 0, 0.9)):
        yield f"sampling, {name}", partial(_random, name, logits, top_k, top_p, limits, watch)


class _Watch:
    """Median seconds of a piece of work on a device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device, self._repeats = device, repeats

    def time(self, works: Sequence[Callable[[], object]]) -> float:
        """Of the same work on several sets of inputs, which take turns."""
        for work in works:
            work()
        if self._device.type != "cuda":
            turns = (works[turn % len(works)] for turn in range(self._repeats))
            return statistics.median(seconds_of(self._device, work) for work in turns)
        count = max(len(works), IN_A_GRAPH)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.graph(graph):
            for turn in range(count):
                works[turn % len(works)]()
        graph.replay()
        return statistics.median(seconds_of(self._device, graph.replay) for _ in range(self._repeats)) / count


@dataclass(frozen=True, slots=True)
class _Paged:
    """A cache with sequences of equal length in it, their blocks strewn about."""

    cache: KVCache
    tables: Tensor
    query: Tensor
    key: Tensor
    value: Tensor

    @classmethod
    def random(
        cls,
        layer: AttentionLayer,
        batch: int,
        length: int,
        new: int,
        device: torch.device,
        dtype: torch.dtype,
        kv_dtype: torch.dtype,
    ) -> _Paged:
        blocks = -(-length // BLOCK)
        cache = KVCache.allocate([layer], batch * blocks, BLOCK, dtype=kv_dtype, device=device)
        for part in cache.layers[0]:
            part.copy_(torch.randn(part.shape, dtype=dtype, device=device))
        for part in itertools.chain(*cache.scales):
            part.fill_(127)  # 1
        tables = torch.randperm(batch * blocks, device=device).view(batch, blocks).to(torch.int32)
        shapes = ((layer.num_heads, layer.head_dim), *[(layer.num_kv_heads, layer.head_dim)] * 2)
        heads = [torch.randn(batch * new, *shape, dtype=dtype, device=device) for shape in shapes]
        return cls(cache, tables, *heads)


def _layer(head: tuple[str, int, int, int]) -> AttentionLayer:
    _, heads, kv_heads, dim = head
    return AttentionLayer(0, heads, kv_heads, dim, dim, dim**-0.5)


def _decode(
    head: tuple[str, int, int, int],
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    limits: DevicePeaks,
    watch: _Watch,
    *,
    kv_dtype: torch.dtype | None = None,
) -> Timing:
    """One layer of a decode step, the writing of the new key and value with it; the cache as `dtype`, or `kv_dtype`."""
    (batch, length), layer = size, _layer(head)
    backend = make_backend(EngineConfig(device=device.type), device)
    moved = batch * length * position_bytes(layer, kv_dtype or dtype)
    works = []
    for _ in range(_sets(moved)):
        paged = _Paged.random(layer, batch, length, 1, device, dtype, kv_dtype or dtype)
        last = torch.full((batch,), length - 1, device=device)
        slots = paged.tables[:, -1].long() * BLOCK + (length - 1) % BLOCK
        layout = DecodeMetadata(last, (last + 1).to(torch.int32), paged.tables, slots)
        works.append(_decode_work(backend, layout, paged, layer))
    key = torch.randn(batch, layer.num_kv_heads, length, layer.head_dim, dtype=dtype, device=device)
    query = torch.randn(batch, layer.num_heads, 1, layer.head_dim, dtype=dtype, device=device)
    seconds = watch.time(works)
    return Timing(
        "attention, decode" + (", float8" if kv_dtype else ""),
        f"{head[0]}: {batch} x {length:,}",
        seconds,
        "copy",
        moved / seconds / limits.bytes_per_second,
        _torch_attention(query, key, key.clone(), watch, is_causal=False),
    )


def _decode_work(backend: Any, layout: DecodeMetadata, paged: _Paged, layer: AttentionLayer) -> Callable[[], object]:
    step = (
        backend.begin_decode(layout, paged.cache)
        if isinstance(backend, CapturableAttention)
        else backend.begin(layout.on_host(), paged.cache)
    )
    return lambda: step(layer, paged.query, paged.key, paged.value)


def _prefill(
    head: tuple[str, int, int, int],
    size: tuple[int, int],
    device: torch.device,
    dtype: torch.dtype,
    limits: DevicePeaks,
    watch: _Watch,
) -> Timing:
    """One layer of a step that reads whole prompts."""
    (batch, length), layer = size, _layer(head)
    backend = make_backend(EngineConfig(device=device.type), device)
    paged = _Paged.random(layer, batch, length, length, device, dtype, dtype)
    tables = paged.tables.cpu().numpy().astype(np.int64)
    positions = np.arange(length)
    slots = torch.from_numpy((tables[:, positions // BLOCK] * BLOCK + positions % BLOCK).reshape(-1)).to(device)
    layout = AttentionMetadata(np.zeros(batch, np.int64), np.full(batch, length, np.int64), tables, slots)
    step = backend.begin(layout, paged.cache)
    seconds = watch.time([lambda: step(layer, paged.query, paged.key, paged.value)])
    flops = 4 * batch * layer.num_heads * layer.head_dim * length * (length + 1) / 2
    query, key, value = (
        part.view(batch, length, -1, layer.head_dim).transpose(1, 2) for part in (paged.query, paged.key, paged.value)
    )
    return Timing(
        "attention, prompts",
        f"{head[0]}: {batch} x {length:,}",
        seconds,
        "matmul",
        flops / seconds / limits.flops_per_second,
        _torch_attention(query, key, value, watch, is_causal=True),
    )


def _torch_attention(query: Tensor, key: Tensor, value: Tensor, watch: _Watch, *, is_causal: bool) -> dict[str, float]:
    """Seconds of torch's own on keys that lie in one piece: `[B, H, N, D]` and `[B, KH, M, D]`."""
    grouped = query.shape[1] != key.shape[1]
    found = {
        "SDPA": watch.time(
            [lambda: F.scaled_dot_product_attention(query, key, value, is_causal=is_causal, enable_gqa=grouped)]
        )
    }
    if query.is_cuda:  # compiled for the CPU, it takes a minute and says nothing
        found["flex"] = watch.time([_flex(query, key, value, is_causal=is_causal, grouped=grouped)])
    return found


def _flex(query: Tensor, key: Tensor, value: Tensor, *, is_causal: bool, grouped: bool) -> Callable[[], object]:
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    def causal(batch: Tensor, head: Tensor, row: Tensor, column: Tensor) -> Tensor:
        return row >= column

    mask = (
        create_block_mask(causal, None, None, query.shape[2], key.shape[2], device=str(query.device))
        if is_causal
        else None
    )
    compiled = torch.compile(flex_attention, dynamic=False)

    def run() -> object:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return compiled(query, key, value, block_mask=mask, enable_gqa=grouped)

    return run


def _nearest_limit(flops: float, moved: float, seconds: float, limits: DevicePeaks) -> tuple[str, float]:
    """Which of the two keeps the work longer, and its share."""
    shares = {
        "copy": moved / seconds / limits.bytes_per_second,
        "matmul": flops / seconds / limits.flops_per_second,
    }
    limit = max(shares, key=lambda name: shares[name])
    return limit, shares[limit]


def _product(
    kind: str,
    size: tuple[int, int],
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    limits: DevicePeaks,
    watch: _Watch,
) -> Timing:
    """A linear layer with quantized weights, beside torch's product with plain ones."""
    inputs, outputs = size
    group = 128 if kind == "int4" else inputs
    largest = {"int4": 16, "int8": 256, "e4m3": 120}[kind]
    multiply = quantized_matmul if device.type == "cuda" else quantized_matmul_torch
    x = torch.randn(rows, inputs, dtype=dtype, device=device)

    def weight() -> QuantizedWeight:
        numbers = torch.randint(largest, (outputs, inputs), dtype=torch.uint8, device=device)
        scales = torch.rand(-(-inputs // group), outputs, device=device)
        return quantized_weight(numbers, scales, kind=kind, group_size=group)

    weights = [weight() for _ in range(_sets(outputs * inputs))]
    seconds = watch.time([partial(multiply, x, one) for one in weights])
    plain = [torch.randn(outputs, inputs, dtype=dtype, device=device) for _ in range(_sets(outputs * inputs))]
    moved = weights[0].num_bytes + rows * (inputs + outputs) * dtype.itemsize
    return Timing(
        f"product, {kind}",
        f"{rows:,} x {inputs:,} to {outputs:,}",
        seconds,
        *_nearest_limit(2 * rows * inputs * outputs, moved, seconds, limits),
        {"matmul": watch.time([partial(F.linear, x, one) for one in plain])},
    )


def _experts(
    size: tuple[int, int, int, int],
    rows: int,
    device: torch.device,
    dtype: torch.dtype,
    limits: DevicePeaks,
    watch: _Watch,
) -> Timing:
    """A mixture of experts that all are as likely, with routing and sums; beside nothing, since torch has no like."""
    experts, per_token, hidden, inner = size
    multiply = expert_mlp if device.type == "cuda" else expert_mlp_torch
    x, logits = (torch.randn(rows, width, dtype=dtype, device=device) for width in (hidden, experts))
    gate_up, down = (
        torch.randn(experts, *shape, dtype=dtype, device=device) for shape in ((2 * inner, hidden), (hidden, inner))
    )
    seconds = watch.time([partial(multiply, x, logits, gate_up, down, per_token, normalized=True)])
    work = Mixture(experts, per_token, hidden, inner, dtype.itemsize).products([rows])
    return Timing(
        "experts",
        f"{rows:,} x {per_token} of {experts}, {hidden:,} x {inner:,}",
        seconds,
        *_nearest_limit(work.flops, work.bytes, seconds, limits),
    )


def _greedy(logits: Tensor, limits: DevicePeaks, watch: _Watch) -> Timing:
    """The best token of each row; the limit is reading the logits once."""
    by_torch = [lambda: logits.argmax(dim=-1)]
    if not has_kernels(logits):
        return _read_once("greedy", logits, watch.time(by_torch), limits)
    timing = _read_once("greedy", logits, watch.time([lambda: argmax(logits)]), limits)
    timing.others["argmax"] = watch.time(by_torch)
    return timing


def _random(name: str, logits: Tensor, top_k: int, top_p: float, limits: DevicePeaks, watch: _Watch) -> Timing:
    """Drawing one token a row; the limit is the same."""
    return _read_once(name, logits, watch.time([_drawing(logits, top_k, top_p)]), limits)


def _drawing(logits: Tensor, top_k: int, top_p: float) -> Callable[[], object]:
    rows, size = logits.shape

    def every(value: float, dtype: torch.dtype) -> Tensor:
        return torch.full((rows,), value, dtype=dtype, device=logits.device)

    settings: dict[str, Any] = {
        "temperature": every(1.0, torch.float32),
        "top_k": every(top_k or size, torch.int64),
        "top_p": every(top_p, torch.float32),
        "min_p": every(0.0, torch.float32),
        "filters": Filters(top_k=top_k, top_p=top_p < 1, min_p=False),
        "seeds": every(1, torch.int64),
        "positions": torch.arange(rows, device=logits.device),
        "indices": every(0, torch.int64),
    }
    # The kernel leaves the logits as they are.
    return lambda: sample_filtered(logits if has_kernels(logits) else logits.clone(), **settings, is_static=True)


def _read_once(name: str, logits: Tensor, seconds: float, limits: DevicePeaks) -> Timing:
    share = logits.nbytes / seconds / limits.bytes_per_second
    return Timing("sampling, " + name, f"{len(logits)} x {logits.shape[1]:,}", seconds, "copy", share)


def _sets(num_bytes: int) -> int:
    """How many sets of inputs no cache holds."""
    return max(1, min(16, (256 << 20) // num_bytes)) if num_bytes > 1 << 20 else 2
