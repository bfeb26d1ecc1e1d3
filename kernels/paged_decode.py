"""Attention of one new token per sequence over a paged KV cache.

    out[s, h] = sum_p softmax_p( cap( scale * q[s, h] . k[p, h // G] ) ) v[p, h // G]       p < length of s
    cap(x)    = c * tanh(x / c) with a soft cap c, else x

Sinks add `exp(sink[h])` to the softmax's denominator; a sliding window of w leaves the last w positions.
"""

# Reading the keys and values is nearly all of the work, so each is read once for all G query heads of its group (they
# are the rows of one matrix product), and long sequences are split over many programs ("flash decoding": Dao et al.,
# 2023; the combination of partial softmaxes: Milakov and Gimelshein, arXiv 1805.02867).
#
#     plan      tile:  TILE positions of one sequence
#               chunk: as many tiles as make about the wanted number of items
#               item:  one split of one sequence, at most a chunk long;  number of items <= sequences + wanted items
#     decode    one program an item and KV head (or several heads: `heads_of_program`), on a grid of that upper bound;
#               those beyond the last item end at once
#     join      the last of a sequence's splits to arrive joins all of them, head by head; where neighbours share a
#               prefix (`shared_prefix.py`), a launch of its own joins their splits with what the group shares
#
# The plan is made on the device, from lengths on the device, once for all layers that share window and KV heads: no
# length is read on the CPU, and a CUDA graph captured once serves any lengths.
#
# A sequence counts as a decode if it has exactly one new token (`query_starts[s + 1] - query_starts[s] == 1`); others
# are left to `paged_prefill`, in the same buffers. A decode of length 0 is padding: it has one item without a tile, its
# row becomes zeros, and no key is read.

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as cached
from typing import Any

import torch
from torch import Tensor

from kernels.device import Device, device_of
from kernels.float8 import as_bits, from_e4m3, power_of_two
from kernels.integers import ceil_div
from kernels.launch import Launch
from kernels.paged_layout import LayerCache, Scoring, StepSequences
from kernels.prefix_groups import PrefixGroups, shared_chunks
from kernels.triton_compat import LOG2_E, tl, triton

# Sequences that the planning program looks at at a time.
_PLAN_BLOCK = 1024
# Items that the work is cut into, for each program that runs at a time: several waves, so that the last one, which is
# seldom full, is a small part of the time. Bounded for a multiprocessor: partial results cost reading and writing.
_WAVES = 8
_PROGRAMS_PER_SM = (16, 32)
# Waves that are left at least where programs take several heads.
_LEAST_WAVES = 16
# No split has fewer tiles: partial results, a tile's worth of work each, stay a small part of the reading.
_MIN_TILES = 4
# Bytes of shared memory that a program takes besides its tiles of keys and values: exchanges between warps, and what
# the driver keeps.
_SHARED_BESIDES = 8192
# Splits that a joining program reads at a time, and programs beyond which it takes several heads.
_JOIN_BLOCK = 16
_JOIN_PROGRAMS = 4096


@triton.jit(do_not_specialize=["num_sequences", "target_splits"])
def _plan_kernel(
    seq_lens,
    query_starts,
    item_sequence,
    item_split,
    num_items,
    num_splits,
    first_item,
    shared,
    num_sequences,
    target_splits,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    MIN_TILES: tl.constexpr,
    BLOCK: tl.constexpr,
    MEMBERS: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    lanes = tl.arange(0, BLOCK)
    total = 0
    for base in range(0, num_sequences, BLOCK):
        sequence = base + lanes
        total += tl.sum(_tiles_of(seq_lens, query_starts, shared, sequence, num_sequences, TILE, WINDOW, MEMBERS))
    chunk = tl.maximum((total + target_splits - 1) // target_splits, MIN_TILES)

    count = 0
    for base in range(0, num_sequences, BLOCK):
        sequence = base + lanes
        tiles = _tiles_of(seq_lens, query_starts, shared, sequence, num_sequences, TILE, WINDOW, MEMBERS)
        splits = (tiles + chunk - 1) // chunk
        if MEMBERS == 0:
            splits = tl.maximum(splits, _is_padding(seq_lens, query_starts, sequence, num_sequences).to(tl.int32))
        first = count + tl.cumsum(splits, 0) - splits
        all_splits = splits
        if MEMBERS:
            positions = tl.load(shared + sequence // MEMBERS, mask=tiles > 0, other=0)
            all_splits += shared_chunks(positions, MAX_CHUNKS, CHUNK)
        tl.store(num_splits + sequence, all_splits, mask=sequence < num_sequences)
        tl.store(first_item + sequence, first, mask=sequence < num_sequences)
        for split in range(0, tl.max(splits)):
            tl.store(item_sequence + first + split, sequence, mask=split < splits)
            tl.store(item_split + first + split, tl.full([BLOCK], 0, tl.int32) + split, mask=split < splits)
        count += tl.sum(splits)
    tl.store(num_items, count)


@triton.jit
def _tiles_of(
    seq_lens,
    query_starts,
    shared,
    sequence,
    num_sequences,
    TILE: tl.constexpr,
    WINDOW: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """How many tiles each sequence has for itself that is a decode; 0 for others."""
    inside = sequence < num_sequences
    start = tl.load(query_starts + sequence, mask=inside, other=0)
    end = tl.load(query_starts + sequence + 1, mask=inside, other=0)
    length = tl.load(seq_lens + sequence, mask=inside, other=0).to(tl.int32)
    tiles = (length + TILE - 1) // TILE
    if WINDOW:
        tiles -= tl.maximum(length - WINDOW, 0) // TILE
    if MEMBERS:
        positions = tl.load(shared + sequence // MEMBERS, mask=inside & (length > 0), other=0)
        tiles -= positions // TILE
    return tl.where(end - start == 1, tiles, 0)


@triton.jit
def _is_padding(seq_lens, query_starts, sequence, num_sequences):
    """Which sequences are decodes of length 0."""
    inside = sequence < num_sequences
    start = tl.load(query_starts + sequence, mask=inside, other=0)
    end = tl.load(query_starts + sequence + 1, mask=inside, other=0)
    return (end - start == 1) & (tl.load(seq_lens + sequence, mask=inside, other=1) == 0)


@triton.jit
def _join_splits(
    partial,
    partial_lse,
    sinks,
    head,
    item,
    splits,
    own_splits,
    group_place,
    NUM_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_DIMS: tl.constexpr,
    MEMBERS: tl.constexpr,
):
    """One head's attention `[VALUE_DIMS]` from the partial results of its splits, which lie from `item` on; with
    MEMBERS those after `own_splits` are its group's and lie from `group_place` on."""
    lane = tl.arange(0, BLOCK)
    value_dim = tl.arange(0, VALUE_DIMS)
    highest = float("-inf")
    total = 0.0
    acc = tl.full([VALUE_DIMS], 0.0, tl.float32)
    for base in range(0, splits, BLOCK):
        is_split = base + lane < splits
        place = item + base + lane
        if MEMBERS:
            place = tl.where(base + lane < own_splits, place, group_place + base + lane - own_splits)
        place = place * NUM_HEADS + head
        lse = tl.load(partial_lse + place, mask=is_split, other=float("-inf"))
        part = tl.load(
            partial + place[:, None] * VALUE_DIM + value_dim[None, :],
            mask=is_split[:, None] & (value_dim < VALUE_DIM)[None, :],
            other=0.0,
        )
        higher = tl.maximum(highest, tl.max(lse, 0))
        shrink = tl.exp2(highest - higher)
        weights = tl.exp2(lse - higher)
        total = total * shrink + tl.sum(weights, 0)
        acc = acc * shrink + tl.sum(part * weights[:, None], 0)
        highest = higher
    if HAS_SINKS:
        sink = tl.load(sinks + head).to(tl.float32) * LOG2_E
        higher = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.exp2(sink - higher)
        acc *= shrink
    return acc / total


@triton.jit(do_not_specialize=["table_stride"])
def _decode_kernel(
    query,
    key_cache,
    value_cache,
    block_tables,
    seq_lens,
    query_starts,
    item_sequence,
    item_split,
    num_items,
    num_splits,
    sinks,
    key_scales,
    value_scales,
    partial,
    partial_lse,
    arrivals,
    shared,
    out,
    scale,
    soft_cap,
    query_stride,
    query_head_stride,
    table_stride,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    FLOAT8: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    SCALES_VALUES: tl.constexpr,
    UPCAST: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    VALUE_DIMS: tl.constexpr,
    JOIN_BLOCK: tl.constexpr,
    HEADS_EACH: tl.constexpr,
    MEMBERS: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    item = tl.program_id(1)
    if item >= tl.load(num_items):
        return
    sequence = tl.load(item_sequence + item)
    split = tl.load(item_split + item)
    length = tl.load(seq_lens + sequence).to(tl.int32)
    splits = tl.load(num_splits + sequence)
    row = tl.load(query_starts + sequence).to(tl.int64)

    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    member = tl.arange(0, ROWS)
    is_head = member < GROUP
    dim = tl.arange(0, DIMS)
    value_dim = tl.arange(0, VALUE_DIMS)
    lane = tl.arange(0, TILE)
    table = block_tables + sequence.to(tl.int64) * table_stride
    first_tile = tl.maximum(length - WINDOW, 0) // TILE if WINDOW else 0
    own_splits = splits
    if MEMBERS:
        # What the group shares is read once for all of it (`shared_prefix.py`).
        positions = tl.load(shared + sequence // MEMBERS)
        first_tile = positions // TILE
        own_splits -= shared_chunks(positions, MAX_CHUNKS, CHUNK)
    tiles = (length + TILE - 1) // TILE - first_tile
    begin = first_tile + tiles * split // own_splits
    end = first_tile + tiles * (split + 1) // own_splits

    for place_of_head in range(HEADS_EACH):
        kv_head = tl.program_id(0) * HEADS_EACH + place_of_head
        head = kv_head * GROUP + member
        q = tl.load(
            query + row * query_stride + head[:, None] * query_head_stride + dim[None, :],
            mask=is_head[:, None] & (dim < HEAD_DIM)[None, :],
            other=0.0,
        )
        if UPCAST:
            q = q.to(tl.float32)
        highest = tl.full([ROWS], float("-inf"), tl.float32)
        total = tl.full([ROWS], 0.0, tl.float32)
        acc = tl.full([ROWS, VALUE_DIMS], 0.0, tl.float32)
        for tile in range(begin, end):
            position = tile * TILE + lane
            # What lies outside may never have been written, and a weight of 0 times NaN would be NaN.
            inside = position < length
            if WINDOW:
                inside &= position >= length - WINDOW
            if BLOCK_SIZE % TILE == 0:
                # The tile lies in one block: one number is read, and its rows follow each other.
                block = tl.load(table + tile * TILE // BLOCK_SIZE).to(tl.int64)
                slot = block * BLOCK_SIZE + tile * TILE % BLOCK_SIZE + lane
            else:
                block = tl.load(table + position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
                slot = block * BLOCK_SIZE + position % BLOCK_SIZE
            place = slot * NUM_KV_HEADS + kv_head
            k = tl.load(
                key_cache + place[:, None] * HEAD_DIM + dim[None, :],
                mask=inside[:, None] & (dim < HEAD_DIM)[None, :],
                other=0,
            )
            v = tl.load(
                value_cache + place[:, None] * VALUE_DIM + value_dim[None, :],
                mask=inside[:, None] & (value_dim < VALUE_DIM)[None, :],
                other=0,
            )
            if FLOAT8:
                scale_place = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + position % BLOCK_SIZE
                key_scale = power_of_two(tl.load(key_scales + scale_place, mask=inside, other=0))
                value_scale = power_of_two(tl.load(value_scales + scale_place, mask=inside, other=0))
                k = from_e4m3(k, NATIVE_FLOAT8)
                v = from_e4m3(v, NATIVE_FLOAT8)
                if SCALES_VALUES:
                    v = v.to(tl.float32) * value_scale[:, None]
            k = k.to(q.dtype)
            v = v.to(q.dtype)
            scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale
            if FLOAT8:
                scores *= key_scale[None, :]
            if HAS_SOFT_CAP:
                # tanh by its definition, off by 1e-7 at most; 2 / e^80 is nothing already.
                scores = soft_cap * (1.0 - 2.0 / (tl.exp(tl.minimum(scores * (2.0 / soft_cap), 80.0)) + 1.0))
            scores = tl.where(inside[None, :], scores * LOG2_E, float("-inf"))
            # Every tile holds a position that counts, so the maximum is a number.
            higher = tl.maximum(highest, tl.max(scores, 1))
            weights = tl.exp2(scores - higher[:, None])
            shrink = tl.exp2(highest - higher)
            total = total * shrink + tl.sum(weights, 1)
            if FLOAT8 and not SCALES_VALUES:
                weights *= value_scale[None, :]
            acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
            highest = higher

        is_value = is_head[:, None] & (value_dim < VALUE_DIM)[None, :]
        # Padding has no tile: its row becomes zeros.
        total = tl.where(length > 0, total, 1.0)
        if splits == 1:
            if HAS_SINKS:
                sink = tl.load(sinks + head, mask=is_head, other=float("-inf")).to(tl.float32) * LOG2_E
                higher = tl.maximum(highest, sink)
                shrink = tl.exp2(highest - higher)
                total = total * shrink + tl.exp2(sink - higher)
                acc *= shrink[:, None]
            place = (row * NUM_HEADS + head) * VALUE_DIM
            tl.store(out + place[:, None] + value_dim[None, :], acc / total[:, None], mask=is_value)
        else:
            place = item.to(tl.int64) * NUM_HEADS + head
            tl.store(partial + place[:, None] * VALUE_DIM + value_dim[None, :], acc / total[:, None], mask=is_value)
            tl.store(partial_lse + place, highest + tl.log2(total), mask=is_head)
            if MEMBERS == 0:
                # All threads of a program have stored before it counts as arrived, and the last to arrive reads what
                # all programs before it have stored.
                tl.debug_barrier()
                arrival = arrivals + sequence.to(tl.int64) * NUM_KV_HEADS + kv_head
                if tl.atomic_add(arrival, 1, sem="acq_rel", scope="gpu") == splits - 1:
                    # The next layer counts from zero.
                    tl.store(arrival, 0)
                    first_item = (item - split).to(tl.int64)
                    for of_group in range(0, GROUP):
                        joined = _join_splits(
                            partial,
                            partial_lse,
                            sinks,
                            kv_head * GROUP + of_group,
                            first_item,
                            splits,
                            splits,
                            first_item,
                            NUM_HEADS,
                            VALUE_DIM,
                            HAS_SINKS,
                            JOIN_BLOCK,
                            VALUE_DIMS,
                            0,
                        )
                        joined_row = out + (row * NUM_HEADS + kv_head * GROUP + of_group) * VALUE_DIM
                        tl.store(joined_row + value_dim, joined, mask=value_dim < VALUE_DIM)


@triton.jit(do_not_specialize=["heads_each", "first_place"])
def _combine_splits_kernel(
    partial,
    partial_lse,
    seq_lens,
    query_starts,
    num_splits,
    first_item,
    sinks,
    shared,
    out,
    heads_each,
    first_place,
    NUM_HEADS: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    HAS_SINKS: tl.constexpr,
    BLOCK: tl.constexpr,
    VALUE_DIMS: tl.constexpr,
    MEMBERS: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
):
    """Joins the splits of a sequence with those of the prefix that its group shares."""
    sequence = tl.program_id(0)
    splits = tl.load(num_splits + sequence)
    if splits == 1:
        return
    row = tl.load(query_starts + sequence).to(tl.int64)
    value_dim = tl.arange(0, VALUE_DIMS)
    is_value = value_dim < VALUE_DIM
    first_head = tl.program_id(1) * heads_each
    if splits == 0:
        # Prefill writes its own rows; padding gets zeros.
        if (tl.load(query_starts + sequence + 1) - row == 1) & (tl.load(seq_lens + sequence) == 0):
            for head in range(first_head, tl.minimum(first_head + heads_each, NUM_HEADS)):
                zeros = tl.full([VALUE_DIMS], 0.0, out.dtype.element_ty)
                tl.store(out + (row * NUM_HEADS + head) * VALUE_DIM + value_dim, zeros, mask=is_value)
        return

    item = tl.load(first_item + sequence).to(tl.int64)
    own_splits = splits - shared_chunks(tl.load(shared + sequence // MEMBERS), MAX_CHUNKS, CHUNK)
    for head in range(first_head, tl.minimum(first_head + heads_each, NUM_HEADS)):
        joined = _join_splits(
            partial,
            partial_lse,
            sinks,
            head,
            item,
            splits,
            own_splits,
            first_place + sequence.to(tl.int64) * MAX_CHUNKS,
            NUM_HEADS,
            VALUE_DIM,
            HAS_SINKS,
            BLOCK,
            VALUE_DIMS,
            MEMBERS,
        )
        tl.store(out + (row * NUM_HEADS + head) * VALUE_DIM + value_dim, joined, mask=is_value)


@dataclass(frozen=True, slots=True)
class DecodeTiles:
    """How a decode launch is cut; from the hand table `decode_tiles`."""

    tile: int
    """Positions that are multiplied at a time."""

    num_warps: int
    num_stages: int


@cached
def decode_tiles(head_dim: int, value_dim: int, kv_dtype: torch.dtype, device: Device) -> DecodeTiles:
    """The table. Not yet tuned on a GPU: chosen so that two to four programs' pipelines fit a multiprocessor."""
    if device.is_interpreter:
        return DecodeTiles(tile=16, num_warps=4, num_stages=2)
    row_bytes = (padded(head_dim) + padded(value_dim)) * kv_dtype.itemsize
    if device.backend == "hip":
        # 64 KiB of shared memory, and no asynchronous copies to fill deeper pipelines.
        return DecodeTiles(tile=32 if row_bytes > 512 else 64, num_warps=4, num_stages=2 if row_bytes <= 1024 else 1)
    # Five stages are two tiles of keys and values: the block number is a load of its own before them, and Triton
    # divides the stages between the two. With fewer there is one tile, and loading and multiplying take turns.
    if row_bytes <= 256:
        return DecodeTiles(tile=64, num_warps=4, num_stages=5)
    has_room = device.shared_memory > 128 * 1024
    if row_bytes <= 512:
        return DecodeTiles(tile=64, num_warps=4, num_stages=5 if has_room else 3)
    if row_bytes <= 1024:
        return DecodeTiles(tile=32, num_warps=4, num_stages=5 if has_room else 3)
    return DecodeTiles(tile=16, num_warps=4, num_stages=2)


def programs_at_a_time(head_dim: int, value_dim: int, kv_dtype: torch.dtype, device: Device) -> int:
    """How many decode programs a multiprocessor has room for, by the shared memory of their tiles.

    Registers leave room for as many (`tests/unit/kernels/test_decode_plan.py`); numbers of float8 count as what they
    are widened to, because that takes the registers of as many.
    """
    tiles = decode_tiles(head_dim, value_dim, kv_dtype, device)
    row_bytes = (padded(head_dim) + padded(value_dim)) * max(2, kv_dtype.itemsize)
    # Triton divides stages between the block number and the tiles that it leads to.
    tiles_in_flight = max(1, (tiles.num_stages - 1) // 2)
    return max(1, device.shared_memory // (tiles_in_flight * tiles.tile * row_bytes + _SHARED_BESIDES))


def programs_per_sm(head_dim: int, value_dim: int, kv_dtype: torch.dtype, device: Device) -> int:
    """How many decode programs a multiprocessor is given in all."""
    least, most = _PROGRAMS_PER_SM
    return min(most, max(least, _WAVES * programs_at_a_time(head_dim, value_dim, kv_dtype, device)))


def heads_of_program(num_sequences: int, num_heads: int, num_kv_heads: int, at_a_time: int) -> int:
    """KV heads that a decode program takes, one after the other: 1, 2 or 4.

    Where each query head has keys of its own there are as many programs as heads and sequences, each of little work.
    As long as many waves of them are left, where `at_a_time` run at a time, several heads share what a program reads of
    its item before any key. From shapes alone, as a graph needs it; not yet tuned on a GPU.
    """
    if num_heads != num_kv_heads:
        return 1
    most = max(1, num_sequences * num_kv_heads // (_LEAST_WAVES * at_a_time))
    return max(each for each in (1, 2, 4) if num_kv_heads % each == 0 and each <= most)


@cached
def padded(dim: int) -> int:
    """The power of two that a tile has for `dim` numbers; matrix products need 16."""
    return max(16, triton.next_power_of_2(dim))


@dataclass(frozen=True, slots=True)
class DecodePlan:
    """Buffers for the items of a step; made once, filled by `plan_decode`, read by every layer of the same shape.

    S sequences at most; I items at most. All int32 but the partial results.
    """

    tile: int
    window: int | None
    target_splits: int
    item_sequence: Tensor
    """`[I]`; only the first `num_items` hold."""

    item_split: Tensor
    num_items: Tensor
    """`[1]`"""

    num_splits: Tensor
    """`[S]`"""

    first_item: Tensor
    partial: Tensor
    """float32, I * H * Dv numbers: results of splits, which later layers overwrite. Plans may share it."""

    partial_lse: Tensor
    """float32, I * H: their log2 of the sum of exponentials."""

    arrivals: Tensor
    """`[S * KH]`: how many splits of a sequence and KV head have been computed; zeros between launches."""

    groups: PrefixGroups | None = None
    """Neighbours that share a prefix: their partial results lie behind the items'. None: nothing is shared."""

    @property
    def max_sequences(self) -> int:
        return len(self.num_splits)

    @property
    def max_items(self) -> int:
        return len(self.item_sequence)

    @classmethod
    def allocate(
        cls,
        max_sequences: int,
        *,
        num_heads: int,
        num_kv_heads: int,
        head_dim: int,
        value_dim: int,
        kv_dtype: torch.dtype,
        window: int | None,
        device: torch.device,
        target_splits: int | None = None,
        target: Device | None = None,
        groups: PrefixGroups | None = None,
    ) -> DecodePlan:
        """Buffers for steps of up to `max_sequences` sequences, for layers of one shape.

        `target_splits` None: as many as keep the device busy.
        """
        if groups is not None and window is not None:
            raise ValueError("sequences share no prefix that a window leaves behind")
        target = target or device_of(device)
        programs = programs_per_sm(head_dim, value_dim, kv_dtype, target)
        wanted = target_splits or max(1, target.num_sms * programs // num_kv_heads)
        items = max_sequences + wanted
        partials = items + (max_sequences * groups.max_chunks if groups else 0)

        def ints(*shape: int) -> Tensor:
            return torch.zeros(shape, dtype=torch.int32, device=device)

        return cls(
            tile=decode_tiles(head_dim, value_dim, kv_dtype, target).tile,
            window=window,
            target_splits=wanted,
            item_sequence=ints(items),
            item_split=ints(items),
            num_items=ints(1),
            num_splits=ints(max_sequences),
            first_item=ints(max_sequences),
            partial=torch.empty(partials * num_heads * value_dim, dtype=torch.float32, device=device),
            partial_lse=torch.empty(partials * num_heads, dtype=torch.float32, device=device),
            arrivals=ints(max_sequences * num_kv_heads),
            groups=groups,
        )


def plan_decode(plan: DecodePlan, seq_lens: Tensor, query_starts: Tensor) -> None:
    """Fill `plan` for a step: one small kernel.

    `seq_lens` is `[S]`: tokens of each sequence, the new ones with it. `query_starts` is `[S + 1]`: each one's first
    row of the query. Both are integers on the device.
    """
    plan_launch(plan, seq_lens, query_starts).run()


def plan_launch(plan: DecodePlan, seq_lens: Tensor, query_starts: Tensor) -> Launch:
    num_sequences = len(seq_lens)
    if num_sequences > plan.max_sequences:
        raise ValueError(f"the plan has room for {plan.max_sequences} sequences, not {num_sequences}")
    return Launch(
        _plan_kernel,
        (1,),
        {
            "seq_lens": seq_lens,
            "query_starts": query_starts,
            "item_sequence": plan.item_sequence,
            "item_split": plan.item_split,
            "num_items": plan.num_items,
            "num_splits": plan.num_splits,
            "first_item": plan.first_item,
            "shared": plan.groups and plan.groups.positions,
            "num_sequences": num_sequences,
            "target_splits": plan.target_splits,
        },
        {
            "TILE": plan.tile,
            "WINDOW": plan.window or 0,
            "MIN_TILES": _MIN_TILES,
            "BLOCK": _PLAN_BLOCK,
            **_group_constants(plan.groups),
        },
    )


def paged_decode(
    query: Tensor,
    cache: LayerCache,
    sequences: StepSequences,
    plan: DecodePlan,
    out: Tensor,
    scoring: Scoring,
) -> None:
    """Write the rows of `out` `[T, H, Dv]` (contiguous) whose sequences have one new token; leave the others.

    query `[T, H, D]`, the last dimension contiguous; D and Dv up to 256. The cache has the query's type or is float8,
    and holds the new tokens' keys and values already. `plan` is filled for the same step and window.
    """
    for launch in decode_launches(query, cache, sequences, plan, out, scoring):
        launch.run()


def decode_launches(
    query: Tensor,
    cache: LayerCache,
    sequences: StepSequences,
    plan: DecodePlan,
    out: Tensor,
    scoring: Scoring,
    *,
    target: Device | None = None,
) -> tuple[Launch, ...]:
    """What `paged_decode` runs; with a plan that has groups, another launch joins their splits."""
    if plan.window != scoring.window:
        raise ValueError(f"the plan was made for a window of {plan.window}, not {scoring.window}")
    target = target or device_of(query.device)
    num_sequences = len(sequences.seq_lens)
    _, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, value_dim = cache.values.shape
    tiles = decode_tiles(head_dim, value_dim, cache.keys.dtype, target)
    shared = {
        "seq_lens": sequences.seq_lens,
        "query_starts": sequences.query_starts,
        "num_splits": plan.num_splits,
        "sinks": scoring.sinks,
        "partial": plan.partial,
        "partial_lse": plan.partial_lse,
        "shared": plan.groups and plan.groups.positions,
        "out": out,
    }
    at_a_time = target.num_sms * programs_at_a_time(head_dim, value_dim, cache.keys.dtype, target)
    heads_each = heads_of_program(num_sequences, num_heads, num_kv_heads, at_a_time)
    decode = Launch(
        _decode_kernel,
        (num_kv_heads // heads_each, num_sequences + plan.target_splits),
        shared
        | {
            "query": query,
            "key_cache": as_bits(cache.keys),
            "value_cache": as_bits(cache.values),
            "block_tables": sequences.block_tables,
            "item_sequence": plan.item_sequence,
            "item_split": plan.item_split,
            "num_items": plan.num_items,
            "arrivals": plan.arrivals,
            "key_scales": cache.key_scales,
            "value_scales": cache.value_scales,
            "scale": float(scoring.scale),
            "soft_cap": float(scoring.soft_cap or 0.0),
            "query_stride": query.stride(0),
            "query_head_stride": query.stride(1),
            "table_stride": sequences.block_tables.stride(0),
        },
        attention_constants(
            num_heads,
            num_kv_heads,
            head_dim,
            value_dim,
            block_size,
            plan.window,
            scoring.soft_cap is not None,
            scoring.sinks is not None,
            cache.is_float8,
            query.dtype,
            target,
            plan.tile,
            padded(num_heads // num_kv_heads),
        )
        | {"JOIN_BLOCK": _JOIN_BLOCK, "HEADS_EACH": heads_each}
        | _group_constants(plan.groups),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
    if plan.groups is None:
        return (decode,)
    heads_joined = 1
    while num_sequences * ceil_div(num_heads, heads_joined) > _JOIN_PROGRAMS and heads_joined < num_heads:
        heads_joined *= 2
    join = Launch(
        _combine_splits_kernel,
        (num_sequences, ceil_div(num_heads, heads_joined)),
        shared | {"first_item": plan.first_item, "heads_each": heads_joined, "first_place": plan.max_items},
        _combine_constants(num_heads, value_dim, scoring.sinks is not None) | _group_constants(plan.groups),
    )
    return decode, join


def _group_constants(groups: PrefixGroups | None) -> dict[str, int]:
    if groups is None:
        return {"MEMBERS": 0, "MAX_CHUNKS": 0, "CHUNK": 1}
    return {"MEMBERS": groups.members, "MAX_CHUNKS": groups.max_chunks, "CHUNK": groups.chunk}


@cached
def attention_constants(
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    block_size: int,
    window: int | None,
    has_soft_cap: bool,
    has_sinks: bool,
    is_float8: bool,
    dtype: torch.dtype,
    target: Device,
    tile: int,
    rows: int,
) -> dict[str, Any]:
    """Constants of a decode's and a prompt's kernel, whose programs take `rows` queries and `tile` positions at a time.

    Made once for each kind of layer: a step builds its launches hundreds of times.
    """
    return {
        "NUM_HEADS": num_heads,
        "NUM_KV_HEADS": num_kv_heads,
        "HEAD_DIM": head_dim,
        "VALUE_DIM": value_dim,
        "BLOCK_SIZE": block_size,
        "WINDOW": window or 0,
        "HAS_SOFT_CAP": has_soft_cap,
        "HAS_SINKS": has_sinks,
        "FLOAT8": is_float8,
        "NATIVE_FLOAT8": target.converts_float8,
        # A weight times a value's scale may be too small for float16.
        "SCALES_VALUES": dtype is torch.float16,
        "UPCAST": target.is_interpreter,
        "TILE": tile,
        "ROWS": rows,
        "DIMS": padded(head_dim),
        "VALUE_DIMS": padded(value_dim),
    }


@cached
def _combine_constants(num_heads: int, value_dim: int, has_sinks: bool) -> dict[str, Any]:
    return {
        "NUM_HEADS": num_heads,
        "VALUE_DIM": value_dim,
        "HAS_SINKS": has_sinks,
        "BLOCK": _JOIN_BLOCK,
        "VALUE_DIMS": padded(value_dim),
    }
