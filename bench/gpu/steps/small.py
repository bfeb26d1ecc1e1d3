"""Step 7: the kernels between attention and matrix products, and quantised products and experts beside torch's."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor

from bench.gpu.reporting import attempt, report, step_options
from bench.gpu.timing import Stopwatch, input_sets, nearest_limit
from bench.profiling.cost_model import Mixture
from bench.profiling.peaks import LimitSizes, measure_limits
from engine.execution.decode_state import padding_rows
from kernels import dispatch
from kernels.decode_step import Column, advance_decode, prepare_decode
from kernels.expert_mlp import expert_mlp
from kernels.gated_activation import gated_activation
from kernels.integers import ceil_div
from kernels.kv_write import write_kv
from kernels.paged_layout import LayerCache
from kernels.quantized_matmul import quantized_matmul, quantized_weight
from kernels.rms_norm import add_rms_norm, rms_norm
from kernels.sampling import argmax, sample
from kernels.sampling_fallback import Filters

LARGEST = {"int4": 16, "int8": 256, "e4m3": 120}


@dataclass(frozen=True, slots=True)
class Sizes:
    vocabulary: int
    rows: Sequence[int]
    hidden: int
    inner: int
    kinds: Sequence[str]
    mixture: tuple[int, int, int, int]
    """Experts, those of a token, hidden and inner size."""


FULL = Sizes(151_936, (1, 16, 256, 2048), 4096, 14_336, ("int4", "int8", "e4m3"), (128, 8, 2048, 768))
DRY = Sizes(300, (2,), 64, 48, ("int8",), (4, 2, 32, 16))


class Bench:
    def __init__(self, device: torch.device, dtype: torch.dtype, sizes: LimitSizes, repeats: int) -> None:
        self.device, self.dtype = device, dtype
        self.limits = measure_limits(device, dtype, sizes)
        self.stopwatch = Stopwatch(device, repeats)

    def random(self, *shape: int) -> Tensor:
        return torch.randn(*shape, dtype=self.dtype, device=self.device)

    def timed(self, what: str, works: Sequence[Callable[[], object]], moved: float, flops: float = 0.0) -> None:
        with attempt(what):
            seconds = self.stopwatch.time(works)
            limit, share = nearest_limit(flops, moved, seconds, self.limits)
            report(what, seconds=seconds, share=share, limit=limit)

    def sampler(self, rows: int, vocabulary: int) -> None:
        logits = self.random(rows, vocabulary) * 4
        self.timed(f"greedy, {rows}", [partial(argmax, logits)], logits.nbytes)
        self.timed(f"torch's argmax, {rows}", [partial(torch.argmax, logits, dim=-1)], logits.nbytes)
        ones = torch.ones(rows, device=self.device)
        whole = torch.arange(rows, device=self.device)
        for name, top_k, top_p in (
            ("temperature", vocabulary, 1.0),
            ("top-k 50", 50, 1.0),
            ("top-p 0.9", vocabulary, 0.9),
        ):
            work = partial(
                sample, logits, ones, whole * 0 + top_k, ones * top_p, ones * 0, whole, whole, whole,
                filters=Filters(top_k=top_k if top_k < vocabulary else 0, top_p=top_p < 1.0, min_p=False),
            )  # fmt: skip
            self.timed(f"{name}, {rows}", [work], logits.nbytes)

    def element_wise(self, rows: int, hidden: int, inner: int) -> None:
        x, residual, weight = self.random(rows, hidden), self.random(rows, hidden), self.random(hidden)
        self.timed(f"RMS norm, {rows} x {hidden:,}", [partial(rms_norm, x, weight, 1e-6)], 2 * x.nbytes)
        work = partial(add_rms_norm, x, residual, weight, 1e-6)
        self.timed(f"add and RMS norm, {rows} x {hidden:,}", [work], 4 * x.nbytes)
        wide = self.random(rows, 2 * inner)
        self.timed(f"gate, {rows} x {inner:,}", [partial(gated_activation, wide, "silu")], 1.5 * wide.nbytes)
        cache = LayerCache(*self.random(2, rows, 1, 8, 128))
        key, value = self.random(2, rows, 8, 128)
        slots = torch.randperm(rows, device=self.device)
        self.timed(f"write, {rows}", [partial(write_kv, key, value, cache, slots)], 4 * key.nbytes)

    def decode_step(self, rows: int) -> None:
        """A decode step's rows before and after the model, beside the small torch kernels that do the same."""
        state = padding_rows(rows, 1000, self.device)
        state[:, Column.TOKENS_LEFT] = 1 << 40
        order = torch.randperm(rows, device=self.device)
        tables = torch.zeros(rows, 16, dtype=torch.int32, device=self.device)
        chosen = order.clone()

        def step() -> None:
            prepare_decode(state, order, tables, block_size=64, padding_slot=0, samples=True)
            # Positions would leave the tables.
            state[:, Column.POSITION] = 0
            advance_decode(state, order, chosen)

        moved = 2.0 * state.nbytes
        self.timed(f"prepare and advance, {rows}", [step], moved)
        with mock.patch.object(dispatch, "use_triton", return_value=False):
            self.timed(f"torch's prepare and advance, {rows}", [step], moved)

    def product(self, kind: str, rows: int, inputs: int, outputs: int) -> None:
        """A linear layer with quantised weights, beside torch's with plain ones."""
        group = 128 if kind == "int4" else inputs
        x = self.random(rows, inputs)

        def weights() -> Callable[[], object]:
            numbers = torch.randint(LARGEST[kind], (outputs, inputs), dtype=torch.uint8, device=self.device)
            scales = torch.rand(ceil_div(inputs, group), outputs, device=self.device)
            weight = quantized_weight(numbers, scales, kind=kind, group_size=group)
            return partial(quantized_matmul, x, weight)

        flops = 2.0 * rows * inputs * outputs
        plain = outputs * inputs * self.dtype.itemsize
        moved = {"int4": 0.5, "int8": 1.0, "e4m3": 1.0}[kind] * outputs * inputs + rows * (inputs + outputs) * 2
        title = f"{rows} x {inputs:,} to {outputs:,}"
        self.timed(f"product, {kind}, {title}", [weights() for _ in range(input_sets(plain // 2))], moved, flops)
        others = [partial(F.linear, x, self.random(outputs, inputs)) for _ in range(input_sets(plain))]
        self.timed(f"torch's product, {title}", others, plain + rows * (inputs + outputs) * 2, flops)

    def experts(self, rows: int, size: tuple[int, int, int, int]) -> None:
        experts, per_token, hidden, inner = size
        x, logits = self.random(rows, hidden), self.random(rows, experts)
        gate_up, down = self.random(experts, 2 * inner, hidden), self.random(experts, hidden, inner)
        asked = Mixture(experts, per_token, hidden, inner, self.dtype.itemsize).products([rows])
        work = partial(expert_mlp, x, logits, gate_up, down, per_token, normalized=True)
        self.timed(f"experts, {rows} x {per_token} of {experts}", [work], asked.bytes, asked.flops)


def main() -> None:
    options = step_options()
    torch.set_grad_enabled(False)
    if options.is_dry:
        bench, sizes = Bench(torch.device("cpu"), torch.float32, LimitSizes(1 << 16, 64), 1), DRY
    else:
        bench, sizes = Bench(torch.device("cuda"), torch.bfloat16, LimitSizes(1 << 30, 8192), 20), FULL
    for rows in sizes.rows:
        with attempt(f"sampler, {rows}"):
            bench.sampler(rows, sizes.vocabulary)
        with attempt(f"decode step, {rows}"):
            bench.decode_step(rows)
        with attempt(f"element-wise, {rows}"):
            bench.element_wise(rows, sizes.hidden, sizes.inner)
    for rows, kind in itertools.product(sizes.rows, sizes.kinds):
        with attempt(f"product, {kind}, {rows}"):
            bench.product(kind, rows, sizes.hidden, sizes.inner)
    for rows in sizes.rows:
        with attempt(f"experts, {rows}"):
            bench.experts(rows, sizes.mixture)


if __name__ == "__main__":
    main()
