"""Decode attention against its reference."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from kernels import paged_decode as paged_decode_module
from kernels.paged_decode import DecodePlan, heads_of_program, paged_decode, plan_decode
from kernels.paged_layout import Scoring
from tests.unit.kernels.paged_steps import TOLERANCE, PagedStep, make_step
from tests.unit.kernels.references import paged_decode_reference

LENGTHS = (1, 37, 0, 16, 5)


def decode(
    step: PagedStep, *, window: int | None = None, target_splits: int | None = None, **options: Any
) -> torch.Tensor:
    """The kernel's output, poisoned before."""
    heads, (kv_heads, value_dim) = step.query.shape[1], step.cache.values.shape[2:]
    plan = DecodePlan.allocate(
        len(step.sequences.seq_lens) + 3,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=step.query.shape[2],
        value_dim=value_dim,
        kv_dtype=step.cache.keys.dtype,
        window=window,
        device=step.query.device,
        target_splits=target_splits,
    )
    plan.partial.fill_(float("nan"))
    plan.partial_lse.fill_(float("nan"))
    plan.item_sequence.fill_(2**24)
    plan_decode(plan, step.sequences.seq_lens, step.sequences.query_starts)
    out = step.poisoned_out()
    paged_decode(step.query, step.cache, step.sequences, plan, out, Scoring(**{"scale": 0.2, **options}, window=window))
    return out


def expected(step: PagedStep, **options: Any) -> torch.Tensor:
    out = step.poisoned_out()
    paged_decode_reference(step.query, step.cache, step.sequences, out, Scoring(**{"scale": 0.2, **options}))
    return out


def check(step: PagedStep, *, target_splits: int | None = None, **options: Any) -> None:
    tolerance = TOLERANCE[step.query.dtype]
    torch.testing.assert_close(
        decode(step, target_splits=target_splits, **options),
        expected(step, **options),
        atol=tolerance,
        rtol=tolerance,
        equal_nan=True,
    )


def test_decode_equals_dense_attention_over_all_lengths(device: torch.device) -> None:
    check(make_step(LENGTHS, [1] * 5, device=device))


def test_padding_rows_become_zeros_and_read_nothing(device: torch.device) -> None:
    step = make_step([0, 3, 0], [1, 1, 1], device=device, heads=2, kv_heads=1, head_dim=16)
    out = decode(step)
    assert (out[[0, 2]] == 0).all()
    assert out[1].isfinite().all()


def test_decode_leaves_sequences_with_more_or_no_new_tokens_alone(device: torch.device) -> None:
    step = make_step([9, 20, 5, 7], [3, 1, 0, 1], device=device, heads=2, kv_heads=1, head_dim=16)
    out = decode(step)
    assert out[:3].isnan().all()
    assert out[3:].isfinite().all()
    check(step)


@pytest.mark.parametrize("block_size", [8, 16, 128])
def test_decode_equals_dense_attention_with_each_block_size(block_size: int, device: torch.device) -> None:
    check(make_step([41], [1], device=device, heads=2, kv_heads=1, head_dim=16, block_size=block_size))


@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim"),
    [(3, 3, 24, 16), (5, 1, 33, 33), (16, 1, 64, 64), (7, 1, 192, 128), (2, 2, 256, 256)],
)
def test_decode_equals_dense_attention_with_each_shape_of_heads(
    heads: int, kv_heads: int, head_dim: int, value_dim: int, device: torch.device
) -> None:
    check(
        make_step(
            [19, 2], [1, 1], device=device, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim
        )
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_decode_equals_dense_attention_in_half_precision(dtype: torch.dtype, device: torch.device) -> None:
    check(make_step([37, 4], [1, 1], device=device, dtype=dtype))


@pytest.mark.parametrize("window", [1, 9, 16, 1000])
def test_decode_equals_dense_attention_with_windows(window: int, device: torch.device) -> None:
    check(make_step([50, 7], [1, 1], device=device, heads=2, kv_heads=1, head_dim=16), window=window)


@pytest.mark.parametrize("target_splits", [1, 12], ids=["one-split", "many-splits"])
def test_decode_equals_dense_attention_with_soft_caps_and_sinks(target_splits: int, device: torch.device) -> None:
    step = make_step([100, 7], [1, 1], device=device, heads=3, kv_heads=1, head_dim=16)
    sinks = torch.tensor([0.5, -3.0, 4.0], device=device)
    check(step, soft_cap=1.5, sinks=sinks, target_splits=target_splits)
    check(step, sinks=sinks, window=40, target_splits=target_splits)


@pytest.mark.parametrize("length", [33, 100, 131])
def test_decode_gives_the_same_when_long_sequences_are_split(length: int, device: torch.device) -> None:
    step = make_step([length, 2], [1, 1], device=device, heads=2, kv_heads=1, head_dim=16)
    whole = decode(step, target_splits=1)
    torch.testing.assert_close(decode(step, target_splits=8), whole, atol=1e-5, rtol=1e-5)
    check(step, target_splits=8)


@pytest.mark.parametrize("each", [2, 4])
def test_decode_equals_dense_attention_where_a_program_takes_several_heads(
    each: int, device: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(paged_decode_module, "heads_of_program", lambda *_: each)
    check(make_step(LENGTHS, [1] * 5, device=device, heads=4, kv_heads=4, head_dim=16))
    step = make_step([131, 7], [1, 1], device=device, heads=4, kv_heads=4, head_dim=16)
    check(step, target_splits=8, sinks=torch.tensor([0.5, -3.0, 4.0, 1.0], device=device))


def test_programs_take_several_heads_only_where_many_waves_are_left() -> None:
    at_a_time = 132 * 6
    gpt2_large = [heads_of_program(sequences, 20, 20, at_a_time) for sequences in (50, 1024, 2048, 4096, 100_000)]
    assert gpt2_large == [1, 1, 2, 4, 4]
    # Heads that share keys have enough to do; three heads cannot be paired.
    assert heads_of_program(100_000, 32, 8, at_a_time) == heads_of_program(100_000, 3, 3, at_a_time) == 1


def test_splits_are_counted_anew_by_each_layer(device: torch.device) -> None:
    """Whichever split of a sequence comes last joins them: two layers follow one plan."""
    step = make_step([131, 2, 0, 70], [1] * 4, device=device, heads=4, kv_heads=2, head_dim=16)
    plan = DecodePlan.allocate(
        4,
        num_heads=4,
        num_kv_heads=2,
        head_dim=16,
        value_dim=16,
        kv_dtype=torch.float32,
        window=None,
        device=device,
        target_splits=8,
    )
    plan_decode(plan, step.sequences.seq_lens, step.sequences.query_starts)
    assert plan.num_splits.tolist()[:4] == [3, 1, 1, 2]
    for _ in range(2):
        out = step.poisoned_out()
        paged_decode(step.query, step.cache, step.sequences, plan, out, Scoring(0.2))
        torch.testing.assert_close(out, expected(step), atol=1e-5, rtol=1e-5)
        assert not plan.arrivals.any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_decode_equals_dense_attention_with_float8_caches(dtype: torch.dtype, device: torch.device) -> None:
    check(make_step([37, 4], [1, 1], device=device, heads=4, kv_heads=2, head_dim=24, dtype=dtype, float8=True))


def test_decode_accepts_strided_queries(device: torch.device) -> None:
    step = make_step([9, 3], [1, 1], device=device, heads=2, kv_heads=2, head_dim=16)
    wide = torch.full((2, 5, 40), float("nan"), device=device)
    wide[:, 1:3, :16] = step.query
    strided = PagedStep(wide[:, 1:3, :16], step.cache, step.sequences)
    assert torch.equal(decode(strided), decode(step))


def test_decode_plan_covers_every_tile_once(device: torch.device) -> None:
    lengths = torch.tensor([0, 1, 16, 17, 1000, 4000, 33], dtype=torch.int32, device=device)
    starts = torch.tensor([0, 1, 2, 3, 4, 5, 6, 9], dtype=torch.int32, device=device)
    for wanted in (1, 5, 64):
        plan = DecodePlan.allocate(
            8,
            num_heads=1,
            num_kv_heads=1,
            head_dim=16,
            value_dim=16,
            kv_dtype=torch.float32,
            window=None,
            device=device,
            target_splits=wanted,
        )
        plan_decode(plan, lengths, starts)
        splits = plan.num_splits[:7].tolist()
        items = list(zip(plan.item_sequence.tolist(), plan.item_split.tolist(), strict=True))[: int(plan.num_items)]
        assert items == [(sequence, split) for sequence, count in enumerate(splits) for split in range(count)]
        # Padding has an item without tiles; what is no decode has none.
        assert splits[0] == 1
        assert [count > 0 for count in splits] == [True, True, True, True, True, True, False]
        assert len(items) <= 7 + wanted
        tiles = [-(-length // plan.tile) for length in lengths.tolist()]
        longest = max(-(-tile // max(1, count)) for tile, count in zip(tiles, splits, strict=True))
        assert longest <= max(2, -(-sum(tiles[:6]) // wanted))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(TOLERANCE), ids=str)
@pytest.mark.parametrize("block_size", [8, 16, 32, 64, 128])
@pytest.mark.parametrize("group", [1, 2, 3, 4, 5, 7, 8, 12, 16])
def test_decode_equals_dense_attention_over_the_whole_matrix(
    group: int, block_size: int, dtype: torch.dtype, device: torch.device
) -> None:
    step = make_step(
        [1, 130, 0, 77, 16],
        [1, 1, 1, 1, 1],
        device=device,
        heads=2 * group,
        kv_heads=2,
        head_dim=48 + group,
        block_size=block_size,
        dtype=dtype,
    )
    for options in ({}, {"window": 33}, {"soft_cap": 2.0, "sinks": torch.randn(2 * group, device=device)}):
        check(step, target_splits=7, **options)
