"""Attention of prompts and chunks against its reference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kernels.device import device_of
from kernels.paged_layout import Scoring
from kernels.paged_prefill import PrefillPlan, paged_prefill, plan_prefill, prefill_tiles
from tests.unit.kernels.paged_steps import TOLERANCE, PagedStep, make_step
from tests.unit.kernels.references import paged_prefill_reference

SMALL = {"heads": 2, "kv_heads": 1, "head_dim": 16}


def plan_of(step: PagedStep) -> PrefillPlan:
    heads, (kv_heads, value_dim) = step.query.shape[1], step.cache.values.shape[2:]
    group = heads // kv_heads
    device = step.query.device
    tiles = prefill_tiles(group, step.query.shape[2], value_dim, step.query.dtype, device_of(device))
    plan = PrefillPlan.allocate(
        len(step.query) + len(step.sequences.seq_lens) + 9, block_q=tiles.block_q(group), device=device
    )
    plan.block_sequence.fill_(2**24)
    plan.block_first.fill_(2**24)
    plan_prefill(plan, step.sequences.query_starts, len(step.query))
    return plan


def prefill(step: PagedStep, **options: Any) -> torch.Tensor:
    """The kernel's output, poisoned before."""
    out = step.poisoned_out()
    paged_prefill(step.query, step.cache, step.sequences, plan_of(step), out, Scoring(**{"scale": 0.2, **options}))
    return out


def check(step: PagedStep, **options: Any) -> None:
    expected = step.poisoned_out()
    paged_prefill_reference(step.query, step.cache, step.sequences, expected, Scoring(**{"scale": 0.2, **options}))
    tolerance = TOLERANCE[step.query.dtype]
    torch.testing.assert_close(prefill(step, **options), expected, atol=tolerance, rtol=tolerance, equal_nan=True)


def test_prefill_equals_dense_attention_over_prompts_and_chunks(device: torch.device) -> None:
    # Whole prompts, chunks after cached tokens, decodes and empty sequences, which are left alone.
    check(make_step([2, 40, 21, 0, 17, 16], [2, 9, 1, 0, 17, 8], device=device, **SMALL))


def test_prefill_equals_dense_attention_when_chunks_begin_around_the_end_of_a_tile(device: torch.device) -> None:
    """Tiles of 16, 32 and 64 positions end at 63. A tile is read without masks only where the first row sees all."""
    starts = [61, 62, 63, 64]
    check(make_step([start + 4 for start in starts], [4] * len(starts), device=device, **SMALL))


def test_prefill_leaves_decodes_alone(device: torch.device) -> None:
    step = make_step([3, 0, 9], [1, 1, 1], device=device, **SMALL)
    assert prefill(step).isnan().all()


@pytest.mark.parametrize("block_size", [8, 32])
def test_prefill_equals_dense_attention_with_each_block_size(block_size: int, device: torch.device) -> None:
    check(make_step([45], [11], device=device, block_size=block_size, **SMALL))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim"), [(3, 1, 33, 33), (2, 2, 80, 24), (16, 1, 16, 64), (5, 1, 192, 128)]
)
def test_prefill_equals_dense_attention_with_each_shape_of_heads(
    heads: int, kv_heads: int, head_dim: int, value_dim: int, device: torch.device
) -> None:
    check(make_step([13], [4], device=device, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_prefill_equals_dense_attention_in_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    check(make_step([20], [7], device=device, dtype=dtype, **SMALL))


@pytest.mark.parametrize("window", [1, 9, 16, 1000])
def test_prefill_equals_dense_attention_with_windows(window: int, device: torch.device) -> None:
    check(make_step([50], [25], device=device, **SMALL), window=window)


def test_prefill_equals_dense_attention_with_soft_caps_and_sinks(device: torch.device) -> None:
    step = make_step([30, 6], [5, 6], device=device, **SMALL)
    sinks = torch.tensor([0.5, 4.0], device=device)
    check(step, soft_cap=1.5, sinks=sinks)
    check(step, sinks=sinks, window=7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_prefill_equals_dense_attention_with_float8_caches(dtype: torch.dtype, device: torch.device) -> None:
    check(make_step([20], [5], device=device, float8=True, dtype=dtype, **SMALL))


@pytest.mark.parametrize(
    "new_tokens", [[1], [0, 0, 5], [16, 1, 0, 33, 2, 8], [1] * 40 + [3, 0], [7] * 130], ids=lambda news: str(len(news))
)
def test_prefill_plan_names_every_block_once(new_tokens: Sequence[int], device: torch.device) -> None:
    starts = torch.tensor([0, *new_tokens]).cumsum(0).to(torch.int32).to(device)
    plan = PrefillPlan.allocate(sum(new_tokens) // 8 + len(new_tokens), block_q=8, device=device)
    plan.block_sequence.fill_(-7)
    plan_prefill(plan, starts, sum(new_tokens))
    blocks = list(zip(plan.block_sequence.tolist(), plan.block_first.tolist(), strict=True))
    assert all(sequence >= -1 for sequence, _ in blocks)
    assert [block for block in blocks if block[0] >= 0] == [
        (sequence, first) for sequence, new in enumerate(new_tokens) if new > 1 for first in range(0, new, 8)
    ]


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16])
def test_prefill_equals_dense_attention_over_the_whole_matrix(
    group: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    step = make_step(
        [9, 130, 0, 77, 1, 33],
        [9, 20, 0, 1, 1, 2],
        device=device,
        heads=2 * group,
        kv_heads=2,
        head_dim=48 + group,
        block_size=block_size,
        dtype=dtype,
    )
    for options in ({}, {"window": 33}, {"soft_cap": 2.0, "sinks": torch.randn(2 * group, device=device)}):
        check(step, **options)
