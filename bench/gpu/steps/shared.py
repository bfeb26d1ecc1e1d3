"""Attention of decodes that begin with the same blocks: each sequence by itself, and groups as matrix products.

The share is that of the copy rate, of the bytes that differ: what is shared counts once for each prompt.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial

import torch

from bench.gpu.reporting import attempt, report, step_options
from bench.gpu.steps.paged_inputs import GPT2_LARGE, QWEN3, TINY, Heads, PagedInputs
from bench.gpu.timing import Stopwatch
from bench.profiling.peaks import DevicePeaks, LimitSizes, measure_limits
from kernels.paged_decode import DecodePlan, paged_decode, plan_decode
from kernels.paged_layout import Scoring
from kernels.prefix_groups import PrefixGroups, find_shared_prefixes
from kernels.shared_prefix import paged_decode_with_shared_prefixes, prefix_groups


@dataclass(frozen=True, slots=True)
class Batch:
    """`prompts` prompts of `shared` tokens, with `samples` sequences each that go on by `own` tokens."""

    prompts: int
    samples: int
    shared: int
    own: int

    def __str__(self) -> str:
        return f"{self.prompts} x {self.samples:,} of {self.shared:,} + {self.own:,}"

    def inputs(self, heads: Heads, block_size: int, device: torch.device, dtype: torch.dtype) -> PagedInputs:
        lengths = [self.shared + self.own] * (self.prompts * self.samples)
        made = PagedInputs.random(heads, lengths, block_size, device=device, dtype=dtype)
        tables = made.sequences.block_tables.view(self.prompts, self.samples, -1)
        num_shared = self.shared // block_size
        tables[:, :, :num_shared] = tables[:, :1, :num_shared].clone()
        return replace(made, sequences=replace(made.sequences, block_tables=tables.flatten(0, 1)))


FULL = (Batch(8, 512, 1024, 64), Batch(1, 1024, 512, 64), Batch(16, 16, 4096, 256), Batch(256, 1, 1024, 64))
DRY = (Batch(2, 8, 32, 5),)


def work(
    heads: Heads, inputs: PagedInputs, dtype: torch.dtype, shares: bool, least: int
) -> tuple[Callable[[], None], PrefixGroups | None]:
    """A layer's launches over a plan that is made here, once."""
    count, device = len(inputs.sequences.seq_lens), inputs.query.device
    groups = None
    if shares:
        groups = prefix_groups(
            count,
            num_heads=heads.num_heads,
            num_kv_heads=heads.num_kv_heads,
            head_dim=heads.dim,
            value_dim=heads.dim,
            dtype=dtype,
            kv_dtype=dtype,
            device=device,
            least=least,
        )
        find_shared_prefixes(groups, inputs.sequences, inputs.cache.block_size)
    plan = DecodePlan.allocate(
        count,
        num_heads=heads.num_heads,
        num_kv_heads=heads.num_kv_heads,
        head_dim=heads.dim,
        value_dim=heads.dim,
        kv_dtype=dtype,
        window=None,
        device=device,
        groups=groups,
    )
    plan_decode(plan, inputs.sequences.seq_lens, inputs.sequences.query_starts)
    run = paged_decode if groups is None else paged_decode_with_shared_prefixes
    out, scoring = torch.empty_like(inputs.query), Scoring(heads.dim**-0.5)
    return partial(run, inputs.query, inputs.cache, inputs.sequences, plan, out, scoring), groups


def compare(
    heads: Heads, batch: Batch, block_size: int, least: int, limits: DevicePeaks, stopwatch: Stopwatch,
    device: torch.device, dtype: torch.dtype,
) -> None:  # fmt: skip
    inputs = batch.inputs(heads, block_size, device, dtype)
    positions = batch.prompts * (batch.shared + batch.samples * batch.own)
    moved = positions * heads.num_kv_heads * heads.dim * 2 * dtype.itemsize
    for shares in (False, True):
        what = f"{heads.name} b{block_size}, {batch}: {'groups' if shares else 'each by itself'}"
        with attempt(what):
            run, groups = work(heads, inputs, dtype, shares, least)
            seconds = stopwatch.time([run])
            found = {} if groups is None else {"groups_that_share": int((groups.positions > 0).sum())}
            report(what, seconds=seconds, share=moved / seconds / limits.bytes_per_second, limit="copy", **found)


def main() -> None:
    options = step_options()
    torch.set_grad_enabled(False)
    if options.is_dry:
        device, dtype = torch.device("cpu"), torch.float32
        limits = measure_limits(device, dtype, LimitSizes(1 << 16, 64))
        for batch in DRY:
            compare(TINY, batch, 16, 16, limits, Stopwatch(device, 1), device, dtype)
        return
    device, dtype = torch.device("cuda"), torch.bfloat16
    limits = measure_limits(device, dtype, LimitSizes(1 << 30, 8192))
    for batch, heads in itertools.product(FULL, (QWEN3, GPT2_LARGE)):
        compare(heads, batch, 64, 256, limits, Stopwatch(device, 20), device, dtype)


if __name__ == "__main__":
    main()
