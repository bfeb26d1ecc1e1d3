"""Which neighbours of a decode step begin with the same blocks: found on the device, by comparing block tables.

    sequences   0 1 2 … M-1 | M … 2M-1 | …       groups of M neighbours, as many as one program has query rows for
    table       7 3 9 4     | 5 5 5              a group shares the blocks that all its members begin with

Padding (length 0) belongs to any group. A group shares nothing where one of its members is no decode, or where it has
fewer than two.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from kernels.integers import ceil_div
from kernels.launch import Launch
from kernels.paged_layout import StepSequences
from kernels.triton_compat import tl, triton

LEAST_SHARED = 256
"""Positions below which a group is left to the decode kernel: a launch's and a join's cost would not come back."""

CHUNK = 512
"""Shared positions of one program; fewer programs where sequences have no room for as many partial results."""

MOST_CHUNKS = 8
# Sequences times chunks: partial results that there is memory for.
_MOST_PARTIALS = 4096
# Block numbers that are compared at a time.
_WIDTH = 16


@dataclass(frozen=True, slots=True)
class PrefixGroups:
    """What groups of neighbours share; filled by `find_shared_prefixes`."""

    members: int
    """Neighbours in a group, M."""

    max_chunks: int
    """Programs, at most, that a group's shared positions are split over."""

    granule: int
    """Shared positions are a multiple of it: of both kernels' tiles."""

    least: int
    chunk: int
    positions: Tensor
    """`[groups]` int32: how many positions each group shares; 0 for none."""

    leaders: Tensor
    """`[groups]` int32: a member whose table names the shared blocks."""

    @classmethod
    def allocate(
        cls,
        max_sequences: int,
        *,
        members: int,
        granule: int,
        device: torch.device,
        least: int = LEAST_SHARED,
        chunk: int = CHUNK,
    ) -> PrefixGroups:
        groups = ceil_div(max_sequences, members)
        positions, leaders = torch.zeros(2, groups, dtype=torch.int32, device=device)
        max_chunks = min(MOST_CHUNKS, max(1, _MOST_PARTIALS // max_sequences))
        return cls(members, max_chunks, granule, least, chunk, positions, leaders)


@triton.jit
def shared_chunks(positions, MAX_CHUNKS: tl.constexpr, CHUNK: tl.constexpr):
    """How many programs attend to so many shared positions."""
    return tl.where(positions > 0, tl.minimum(tl.maximum(positions // CHUNK, 1), MAX_CHUNKS), 0)


@triton.jit(do_not_specialize=["num_sequences", "table_stride"])
def _find_kernel(
    block_tables,
    seq_lens,
    query_starts,
    positions,
    leaders,
    num_sequences,
    table_stride,
    BLOCK_SIZE: tl.constexpr,
    GRANULE: tl.constexpr,
    LEAST: tl.constexpr,
    MEMBERS: tl.constexpr,
    LANES: tl.constexpr,
    WIDTH: tl.constexpr,
):
    group = tl.program_id(0)
    lane = tl.arange(0, LANES)
    sequence = group * MEMBERS + lane
    is_member = (lane < MEMBERS) & (sequence < num_sequences)
    start = tl.load(query_starts + sequence, mask=is_member, other=0)
    end = tl.load(query_starts + sequence + 1, mask=is_member, other=1)
    length = tl.load(seq_lens + sequence, mask=is_member, other=0).to(tl.int32)
    is_live = is_member & (length > 0)
    others = tl.sum((is_member & (end - start != 1)).to(tl.int32))
    count = tl.sum(is_live.to(tl.int32))
    # Each member keeps its last token, at least, for itself.
    least = tl.min(tl.where(is_live, length - 1, 2147483647))
    limit = tl.where((others == 0) & (count >= 2), least // BLOCK_SIZE, 0)
    leader = tl.min(tl.where(is_live, sequence, num_sequences))
    base = limit * 0
    while base < limit:
        column = base + tl.arange(0, WIDTH)
        inside = column < limit
        own = tl.load(block_tables + leader.to(tl.int64) * table_stride + column, mask=inside, other=0)
        compared = is_live[:, None] & inside[None, :]
        place = sequence.to(tl.int64)[:, None] * table_stride + column[None, :]
        theirs = tl.load(block_tables + place, mask=compared, other=0)
        differs = tl.max(((theirs != own[None, :]) & compared).to(tl.int32), 0)
        limit = tl.min(tl.where(differs > 0, column, limit))
        base += WIDTH
    shared = limit * BLOCK_SIZE // GRANULE * GRANULE
    tl.store(positions + group, tl.where(shared >= LEAST, shared, 0))
    tl.store(leaders + group, leader)


def find_shared_prefixes(groups: PrefixGroups, sequences: StepSequences, block_size: int) -> None:
    """Fill `groups` for a step: one small kernel, once for all layers."""
    find_launch(groups, sequences, block_size).run()


def find_launch(groups: PrefixGroups, sequences: StepSequences, block_size: int) -> Launch:
    num_sequences = len(sequences.seq_lens)
    return Launch(
        _find_kernel,
        (ceil_div(num_sequences, groups.members),),
        {
            "block_tables": sequences.block_tables,
            "seq_lens": sequences.seq_lens,
            "query_starts": sequences.query_starts,
            "positions": groups.positions,
            "leaders": groups.leaders,
            "num_sequences": num_sequences,
            "table_stride": sequences.block_tables.stride(0),
        },
        {
            "BLOCK_SIZE": block_size,
            "GRANULE": groups.granule,
            "LEAST": groups.least,
            "MEMBERS": groups.members,
            "LANES": triton.next_power_of_2(groups.members),
            "WIDTH": _WIDTH,
        },
    )
