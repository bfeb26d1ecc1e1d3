"""Attention over the paged cache against attention spelled out over each sequence by itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from kernels.cpu.library import Library
from kernels.cpu.paged_attention import paged_attention
from kernels.kv_write import write_kv_reference
from kernels.paged_attention import paged_attention_reference, plan_tiles
from kernels.paged_layout import AttentionMetadata, LayerCache, Scoring
from tests.unit.kernels.cpu_variants import computing_with, cpu_library

TOLERANCE = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 2e-3}


@dataclass(frozen=True)
class Step:
    """One step over a cache: sequences with `starts[s]` tokens in it and `query_lens[s]` new ones."""

    starts: Sequence[int]
    query_lens: Sequence[int]
    query: Tensor
    cache: LayerCache
    block_tables: np.ndarray
    keys: Sequence[Tensor]
    """Of each sequence, all positions: `[length, KH, D]`."""

    values: Sequence[Tensor]


def make_step(
    starts: Sequence[int],
    query_lens: Sequence[int],
    *,
    heads: int = 6,
    kv_heads: int = 3,
    head_dim: int = 80,
    value_dim: int | None = None,
    block_size: int = 16,
    dtype: torch.dtype = torch.float32,
) -> Step:
    torch.manual_seed(0)
    lengths = [start + new for start, new in zip(starts, query_lens, strict=True)]
    widths = [-(-length // block_size) for length in lengths]
    order = torch.randperm(sum(widths) + 3).tolist()
    block_tables = np.zeros((len(starts), max(widths)), np.int64)
    # Positions that were never written must not matter.
    caches = [
        torch.full((len(order), block_size, kv_heads, dim), float("nan"), dtype=dtype)
        for dim in (head_dim, value_dim or head_dim)
    ]
    keys, values = [], []
    for row, (length, width) in enumerate(zip(lengths, widths, strict=True)):
        blocks = [order.pop() for _ in range(width)]
        block_tables[row, :width] = blocks
        positions = torch.arange(length)
        slots = torch.tensor(blocks)[positions // block_size] * block_size + positions % block_size
        key, value = (torch.randn(length, kv_heads, cache.shape[-1], dtype=dtype) for cache in caches)
        write_kv_reference(key, value, LayerCache(*caches), slots)
        keys.append(key)
        values.append(value)
    query = torch.randn(sum(query_lens), heads, head_dim, dtype=dtype)
    return Step(starts, query_lens, query, LayerCache(*caches), block_tables, keys, values)


Attend = Callable[..., Tensor]


def attend_in_torch(step: Step, *, window: int | None = None, scale: float = 0.2, **options: Any) -> Tensor:
    tiles = plan_tiles(
        step.starts,
        step.query_lens,
        step.block_tables,
        step.cache.block_size,
        sliding_window=window,
        device=torch.device("cpu"),
        dtype=step.query.dtype,
    )
    return paged_attention_reference(step.query, step.cache, tiles, Scoring(scale, window, **options))


def attend_in_cpp(library: Library) -> Attend:
    def attend(step: Step, *, window: int | None = None, scale: float = 0.2, **options: Any) -> Tensor:
        positions = [start + torch.arange(new) for start, new in zip(step.starts, step.query_lens, strict=True)]
        size = step.cache.block_size
        slots = torch.cat(
            [
                torch.from_numpy(table)[its // size] * size + its % size
                for table, its in zip(step.block_tables, positions, strict=True)
            ]
        )
        # The kernel writes the new tokens itself: take them out of the cache first.
        new = []
        for cache in step.cache.tensors:
            flat = cache.view(-1, *cache.shape[2:])
            new.append(flat[slots])
            flat[slots] = float("nan")
        # Slices of one tensor, as a fused projection gives them.
        key, value = new if new[0].shape != new[1].shape else torch.stack(new, dim=1).unbind(1)
        layout = AttentionMetadata(np.array(step.starts), np.array(step.query_lens), step.block_tables, slots)
        return paged_attention(library, step.query, key, value, step.cache, layout, Scoring(scale, window, **options))

    return attend


@pytest.fixture(
    params=["torch", "native", *(pytest.param(name, marks=pytest.mark.slow) for name in ("generic", "wide"))],
    scope="module",
)
def attend(request: pytest.FixtureRequest) -> Attend:
    """Each implementation: the reference in torch, and the C++ kernel in its variants."""
    return attend_in_torch if request.param == "torch" else attend_in_cpp(cpu_library(request.param))


def attend_densely(
    step: Step,
    *,
    window: int | None = None,
    scale: float = 0.2,
    soft_cap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """The formula in float64, sequence by sequence."""
    results = []
    row = 0
    for start, new, key, value in zip(step.starts, step.query_lens, step.keys, step.values, strict=True):
        query = step.query[row : row + new].double()
        row += new
        group = query.shape[1] // key.shape[1]
        key, value = key.double().repeat_interleave(group, 1), value.double().repeat_interleave(group, 1)
        scores = torch.einsum("qhd,khd->hqk", query, key) * scale
        if soft_cap is not None:
            scores = soft_cap * torch.tanh(scores / soft_cap)
        distance = (start + torch.arange(new))[:, None] - torch.arange(start + new)
        scores[:, (distance < 0) | (distance >= (window or 10**9))] = -torch.inf
        if sinks is not None:
            scores = torch.cat((scores, sinks.double()[:, None, None].expand(-1, new, 1)), dim=-1)
        weights = scores.softmax(-1)[..., : start + new]
        results.append(torch.einsum("hqk,khd->qhd", weights, value))
    return torch.cat(results)


MIXED = ([0, 37, 5, 120, 0, 63, 64], [1, 1, 30, 1, 77, 1, 2])


@pytest.mark.parametrize("window", [None, 1, 9, 64, 1000])
@pytest.mark.parametrize("block_size", [1, 16, 64])
def test_paged_attention_equals_dense_attention_on_mixed_steps(
    attend: Attend, block_size: int, window: int | None
) -> None:
    step = make_step(*MIXED, block_size=block_size)
    torch.testing.assert_close(
        attend(step, window=window).double(), attend_densely(step, window=window), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize(
    ("heads", "kv_heads", "head_dim", "value_dim"),
    [(1, 1, 8, 8), (12, 12, 64, 64), (6, 3, 80, 80), (7, 1, 33, 33), (5, 5, 24, 16), (8, 2, 96, 128)],
)
def test_paged_attention_equals_dense_attention_with_each_shape_of_heads(
    attend: Attend, heads: int, kv_heads: int, head_dim: int, value_dim: int, dtype: torch.dtype
) -> None:
    step = make_step(*MIXED, heads=heads, kv_heads=kv_heads, head_dim=head_dim, value_dim=value_dim, dtype=dtype)
    result = attend(step)
    assert result.dtype is dtype
    torch.testing.assert_close(result.double(), attend_densely(step), atol=TOLERANCE[dtype], rtol=TOLERANCE[dtype])


@pytest.mark.parametrize("window", [None, 9])
def test_paged_attention_equals_dense_attention_with_soft_caps_and_sinks(attend: Attend, window: int | None) -> None:
    step = make_step(*MIXED)
    sinks = torch.randn(6)
    for options in ({"soft_cap": 1.5}, {"sinks": sinks}, {"soft_cap": 1.5, "sinks": sinks}):
        torch.testing.assert_close(
            attend(step, window=window, **options).double(),
            attend_densely(step, window=window, **options),
            atol=1e-5,
            rtol=1e-5,
        )


def test_paged_attention_equals_dense_attention_on_decodes_of_all_lengths(attend: Attend) -> None:
    step = make_step(list(range(200)), [1] * 200, heads=2, kv_heads=1, head_dim=16)
    torch.testing.assert_close(attend(step).double(), attend_densely(step), atol=1e-5, rtol=1e-5)


def test_paged_attention_equals_dense_attention_on_long_prompts(attend: Attend) -> None:
    step = make_step([100, 0], [700, 513], heads=2, kv_heads=1, head_dim=16)
    torch.testing.assert_close(attend(step).double(), attend_densely(step), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("dtype", list(TOLERANCE))
def test_cpp_attention_gives_the_same_bits_with_any_number_of_threads(dtype: torch.dtype) -> None:
    attend = attend_in_cpp(cpu_library("native"))
    found = []
    for threads in (1, 2, 5):
        step = make_step(*MIXED, dtype=dtype)
        with computing_with(threads):
            found.append(attend(step))
    assert torch.equal(found[1], found[0])
    assert torch.equal(found[2], found[0])


@pytest.mark.parametrize("window", [None, 100])
def test_rows_of_a_prompt_do_not_depend_on_the_company_it_is_in(window: int | None) -> None:
    """The C++ kernel takes more rows together where there are more to choose from."""
    attend = attend_in_cpp(cpu_library("native"))
    others = 4 * torch.get_num_threads()  # enough for the largest units
    step = make_step([150] + [0] * others, [200] + [64] * others, heads=3, kv_heads=1, head_dim=16)
    in_company = attend(step, window=window)[:200]
    alone = Step(
        step.starts[:1],
        step.query_lens[:1],
        step.query[:200],
        step.cache,
        step.block_tables[:1],
        step.keys[:1],
        step.values[:1],
    )
    assert torch.equal(in_company, attend(alone, window=window))


def test_nan_in_one_sequence_does_not_change_others(attend: Attend) -> None:
    step = make_step([50, 20, 7], [1, 1, 4])
    block = int(step.block_tables[0, 0])
    step.cache.keys[block] = float("nan")
    step.cache.values[block] = float("nan")
    result = attend(step)
    assert result[0].isnan().all()
    torch.testing.assert_close(result[1:].double(), attend_densely(step)[1:], atol=1e-5, rtol=1e-5)
