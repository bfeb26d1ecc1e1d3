"""Decodes whose sequences begin with the same blocks: found on the device, and attended to as one product."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest
import torch

from kernels.paged_decode import DecodePlan, plan_decode
from kernels.paged_layout import Scoring
from kernels.prefix_groups import find_shared_prefixes
from kernels.shared_prefix import paged_decode_with_shared_prefixes, prefix_groups
from tests.unit.kernels.paged_steps import TOLERANCE, PagedStep, make_step
from tests.unit.kernels.references import paged_decode_reference

BLOCK_SIZE = 16


def share(step: PagedStep, sequences: Sequence[int], num_blocks: int) -> None:
    """Let `sequences` begin with the first one's blocks."""
    tables = step.sequences.block_tables
    tables[list(sequences), :num_blocks] = tables[sequences[0], :num_blocks].clone()


def decode(step: PagedStep, *, target_splits: int = 3, **options: Any) -> tuple[torch.Tensor, list[int]]:
    """The output, poisoned before, and the positions that each group of neighbours shares."""
    (_, heads, head_dim), (kv_heads, value_dim) = step.query.shape, step.cache.values.shape[2:]
    shape = {"num_heads": heads, "num_kv_heads": kv_heads, "head_dim": head_dim, "value_dim": value_dim}
    device, size = step.query.device, len(step.sequences.seq_lens) + 3
    kv_dtype = step.cache.keys.dtype
    groups = prefix_groups(size, **shape, dtype=step.query.dtype, kv_dtype=kv_dtype, device=device, least=32, chunk=64)
    plan = DecodePlan.allocate(
        size, **shape, kv_dtype=kv_dtype, window=None, device=device, target_splits=target_splits, groups=groups
    )
    plan.partial.fill_(float("nan"))
    plan.partial_lse.fill_(float("nan"))
    find_shared_prefixes(groups, step.sequences, step.cache.block_size)
    plan_decode(plan, step.sequences.seq_lens, step.sequences.query_starts)
    out = step.poisoned_out()
    scoring = Scoring(**{"scale": 0.2, **options})
    paged_decode_with_shared_prefixes(step.query, step.cache, step.sequences, plan, out, scoring)
    return out, groups.positions[: -(-len(step.sequences.seq_lens) // groups.members)].tolist()


def check(step: PagedStep, shared: Sequence[int], **options: Any) -> None:
    """`shared`: positions that are found, group by group."""
    out, found = decode(step, **options)
    assert found == list(shared)
    expected = step.poisoned_out()
    options.pop("target_splits", None)
    paged_decode_reference(step.query, step.cache, step.sequences, expected, Scoring(**{"scale": 0.2, **options}))
    tolerance = TOLERANCE[step.query.dtype]
    torch.testing.assert_close(out, expected, atol=tolerance, rtol=tolerance, equal_nan=True)


def grouped_step(lengths: Sequence[int], device: torch.device, **options: Any) -> PagedStep:
    """Sequences for groups of four in the interpreter: four heads on a KV head, 16 rows a program."""
    return make_step(
        lengths, [1] * len(lengths), device=device, **{"heads": 8, "kv_heads": 2, "head_dim": 16, **options}
    )


def groups_of_four(device: torch.device) -> bool:
    return device.type == "cpu"


@pytest.fixture(autouse=True)
def interpreted(device: torch.device) -> None:
    if not groups_of_four(device):
        pytest.skip("sizes of groups are the interpreter's here; test_shared_prefix_of_a_large_batch runs on a GPU")


def test_group_shares_the_blocks_that_all_its_members_begin_with(device: torch.device) -> None:
    step = grouped_step([200, 170, 161, 200], device)
    share(step, [0, 1, 2, 3], 10)
    check(step, [160])


def test_last_token_is_never_shared(device: torch.device) -> None:
    step = grouped_step([160, 160, 160, 160], device)
    share(step, [0, 1, 2, 3], 10)
    check(step, [144])


def test_groups_that_share_little_or_differ_are_left_to_decode(device: torch.device) -> None:
    step = grouped_step([100, 100, 100, 100, 90, 80, 70, 60, 100, 100], device)
    share(step, [0, 1, 2], 6)  # the fourth has blocks of its own
    share(step, [4, 5, 6, 7], 1)  # one block is below the least
    share(step, [8, 9], 4)
    check(step, [0, 0, 64])


def test_padding_belongs_to_any_group_and_becomes_zeros(device: torch.device) -> None:
    step = grouped_step([0, 100, 0, 100, 0, 0], device)
    share(step, [1, 3], 5)
    check(step, [80, 0])
    out, _ = decode(step)
    assert (out[[0, 2, 4, 5]] == 0).all()


def test_single_sequence_and_groups_with_prompts_share_nothing(device: torch.device) -> None:
    alone = grouped_step([100, 0, 0, 0], device)
    check(alone, [0])
    mixed = make_step([100, 100, 100], [1, 2, 1], device=device, heads=8, kv_heads=2, head_dim=16)
    share(mixed, [0, 1, 2], 4)
    check(mixed, [0])


@pytest.mark.parametrize("target_splits", [1, 20])
def test_shared_and_own_positions_are_split_and_joined(target_splits: int, device: torch.device) -> None:
    step = grouped_step([400, 330, 500, 321], device)
    share(step, [0, 1, 2, 3], 20)
    check(step, [320], target_splits=target_splits)


@pytest.mark.parametrize(("heads", "kv_heads", "head_dim"), [(3, 1, 24), (4, 4, 16), (7, 1, 33)])
def test_shared_prefix_with_each_shape_of_heads(heads: int, kv_heads: int, head_dim: int, device: torch.device) -> None:
    step = grouped_step([90] * 6, device, heads=heads, kv_heads=kv_heads, head_dim=head_dim)
    share(step, range(6), 4)
    members = 16 // (heads // kv_heads)
    whole, rest = divmod(6, members)
    check(step, [64] * whole + [64 if rest > 1 else 0] * (rest > 0))


def test_shared_prefix_with_soft_caps_and_sinks(device: torch.device) -> None:
    step = grouped_step([100, 90, 80, 70], device)
    share(step, [0, 1, 2, 3], 4)
    sinks = torch.randn(8, generator=torch.Generator().manual_seed(0)).to(device)
    check(step, [64], soft_cap=1.5, sinks=sinks)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("float8", [False, True], ids=["", "float8"])
def test_shared_prefix_in_each_type(dtype: torch.dtype, float8: bool, device: torch.device) -> None:
    step = grouped_step([100, 90, 80, 70], device, dtype=dtype, float8=float8)
    share(step, [0, 1, 2, 3], 4)
    check(step, [64])


@pytest.mark.parametrize("block_size", [8, 64])
def test_shared_prefix_with_each_block_size(block_size: int, device: torch.device) -> None:
    step = grouped_step([200, 190, 180, 170], device, block_size=block_size)
    share(step, [0, 1, 2, 3], 128 // block_size)
    check(step, [128])
