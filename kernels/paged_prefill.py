"""Attention of many new tokens per sequence over a paged KV cache: prompts, chunks of prompts, mixed steps.

    out[t, h] = sum_p softmax_p( cap( scale * q[t, h] . k[p, h // G] ) ) v[p, h // G]       p <= position of t
    cap(x)    = c * tanh(x / c) with a soft cap c, else x

Sinks add `exp(sink[h])` to the softmax's denominator; a sliding window of w leaves p > position of t - w.
"""

# As in FlashAttention (Dao, arXiv 2307.08691) a block of queries passes over the keys once, with a running maximum and
# sum; the G query heads of a KV head are rows of the same block.
#
#     rows of a block    token 0 head 0 .. token 0 head G-1, token 1 head 0 ..          BLOCK_Q = ROWS // G tokens
#     tiles of keys      |- before every window: skipped -|- all rows see all: no masks -|- the diagonal: masks -|
#
# Which blocks a step has is found on the device, once for all layers: blocks are numbered such that sequence s has
# those from `query_starts[s] // BLOCK_Q + s`, which leaves room for its last, partly filled one, and block b finds its
# sequence by binary search. The grid, `T // BLOCK_Q + S`, follows from shapes alone, and no length is read on the CPU.
#
# Sequences with one new token are left to `paged_decode`, where the same buffers serve. Its loop over tiles is like the
# one here but for the masks, and stands by itself: that one function for both compiles to the registers and the shared
# memory on record (`compiled_kernels.json`) has not been tried.

from __future__ import annotations

from dataclasses import dataclass
from functools import cache as cached

import torch
from torch import Tensor

from kernels.device import Device, device_of
from kernels.float8 import as_bits, from_e4m3, power_of_two
from kernels.integers import ceil_div
from kernels.launch import Launch
from kernels.paged_decode import attention_constants, padded
from kernels.paged_layout import LayerCache, Scoring, StepSequences
from kernels.triton_compat import LOG2_E, tl, triton

# Blocks of queries that one planning program finds.
_PLAN_BLOCK = 128


@triton.jit(do_not_specialize=["num_sequences", "num_blocks", "search_steps"])
def _plan_kernel(
    query_starts,
    block_sequence,
    block_first,
    num_sequences,
    num_blocks,
    search_steps,
    BLOCK_Q: tl.constexpr,
    BLOCK: tl.constexpr,
):
    block = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    # The last sequence whose first block is not beyond this one; `low` always is one such.
    low = tl.full([BLOCK], 0, tl.int32)
    high = tl.full([BLOCK], 0, tl.int32) + num_sequences
    for _ in range(search_steps):
        middle = (low + high) // 2
        start = tl.load(query_starts + middle)
        is_before = start // BLOCK_Q + middle <= block
        low = tl.where(is_before & (low < high), middle, low)
        high = tl.where(is_before, high, middle)
    start = tl.load(query_starts + low)
    new = tl.load(query_starts + low + 1) - start
    first = (block - start // BLOCK_Q - low) * BLOCK_Q
    is_block = (new > 1) & (first < new)
    tl.store(block_sequence + block, tl.where(is_block, low, -1), mask=block < num_blocks)
    tl.store(block_first + block, first, mask=block < num_blocks)


@triton.jit
def _attend_tiles(
    begin,
    end,
    q,
    position,
    length,
    highest,
    total,
    acc,
    key_cache,
    value_cache,
    key_scales,
    value_scales,
    table,
    kv_head,
    scale,
    soft_cap,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    FLOAT8: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    SCALES_VALUES: tl.constexpr,
    TILE: tl.constexpr,
    DIMS: tl.constexpr,
    VALUE_DIMS: tl.constexpr,
    MASKED: tl.constexpr,
):
    """Pass over tiles `begin .. end` of a sequence; without MASKED, every row sees every position in them."""
    lane = tl.arange(0, TILE)
    dim = tl.arange(0, DIMS)
    value_dim = tl.arange(0, VALUE_DIMS)
    for tile in range(begin, end):
        key_position = tile * TILE + lane
        inside = key_position < length
        if BLOCK_SIZE % TILE == 0:
            block = tl.load(table + tile * TILE // BLOCK_SIZE).to(tl.int64)
            slot = block * BLOCK_SIZE + tile * TILE % BLOCK_SIZE + lane
        else:
            if MASKED:
                block = tl.load(table + key_position // BLOCK_SIZE, mask=inside, other=0).to(tl.int64)
            else:
                block = tl.load(table + key_position // BLOCK_SIZE).to(tl.int64)
            slot = block * BLOCK_SIZE + key_position % BLOCK_SIZE
        place = slot * NUM_KV_HEADS + kv_head
        is_key = (dim < HEAD_DIM)[None, :]
        is_value = (value_dim < VALUE_DIM)[None, :]
        if MASKED:
            is_key &= inside[:, None]
            is_value &= inside[:, None]
        k = tl.load(key_cache + place[:, None] * HEAD_DIM + dim[None, :], mask=is_key, other=0)
        v = tl.load(value_cache + place[:, None] * VALUE_DIM + value_dim[None, :], mask=is_value, other=0)
        if FLOAT8:
            scale_place = (block * NUM_KV_HEADS + kv_head) * BLOCK_SIZE + key_position % BLOCK_SIZE
            if MASKED:
                key_scale = power_of_two(tl.load(key_scales + scale_place, mask=inside, other=0))
                value_scale = power_of_two(tl.load(value_scales + scale_place, mask=inside, other=0))
            else:
                key_scale = power_of_two(tl.load(key_scales + scale_place))
                value_scale = power_of_two(tl.load(value_scales + scale_place))
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
            scores = soft_cap * (1.0 - 2.0 / (tl.exp(tl.minimum(scores * (2.0 / soft_cap), 80.0)) + 1.0))
        scores *= LOG2_E
        if MASKED:
            sees = inside[None, :] & (key_position[None, :] <= position[:, None])
            if WINDOW:
                sees &= key_position[None, :] > position[:, None] - WINDOW
            scores = tl.where(sees, scores, float("-inf"))
        higher = tl.maximum(highest, tl.max(scores, 1))
        # A row may have seen nothing so far.
        finite = tl.where(higher == float("-inf"), 0.0, higher) if MASKED else higher
        weights = tl.exp2(scores - finite[:, None])
        shrink = tl.exp2(highest - finite)
        total = total * shrink + tl.sum(weights, 1)
        if FLOAT8 and not SCALES_VALUES:
            weights *= value_scale[None, :]
        acc = tl.dot(weights.to(v.dtype), v, acc * shrink[:, None], input_precision="ieee")
        highest = higher
    return highest, total, acc


@triton.jit(do_not_specialize=["table_stride"])
def _prefill_kernel(
    query,
    key_cache,
    value_cache,
    block_tables,
    seq_lens,
    query_starts,
    block_sequence,
    block_first,
    sinks,
    key_scales,
    value_scales,
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
):
    kv_head = tl.program_id(0)
    # Late blocks of a prompt look at the most: they start first, so that none is left alone at the end.
    block = tl.num_programs(1) - 1 - tl.program_id(1)
    sequence = tl.load(block_sequence + block)
    if sequence < 0:
        return
    first = tl.load(block_first + block)
    start = tl.load(query_starts + sequence)
    new = tl.load(query_starts + sequence + 1) - start
    length = tl.load(seq_lens + sequence).to(tl.int32)

    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    BLOCK_Q: tl.constexpr = ROWS // GROUP
    row = tl.arange(0, ROWS)
    token = first + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = (row < BLOCK_Q * GROUP) & (token < new)
    position = length - new + token
    dim = tl.arange(0, DIMS)
    value_dim = tl.arange(0, VALUE_DIMS)
    query_row = (start + token).to(tl.int64)
    q = tl.load(
        query + query_row[:, None] * query_stride + head[:, None] * query_head_stride + dim[None, :],
        mask=is_row[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)

    first_position = length - new + first
    last_position = length - new + tl.minimum(first + BLOCK_Q, new) - 1
    end = last_position // TILE + 1
    if WINDOW:
        begin = tl.maximum(first_position - WINDOW + 1, 0) // TILE
        diagonal = begin
    else:
        begin = 0
        # Tiles that end at the block's first position or before.
        diagonal = (first_position + 1) // TILE

    highest = tl.full([ROWS], float("-inf"), tl.float32)
    total = tl.full([ROWS], 0.0, tl.float32)
    acc = tl.full([ROWS, VALUE_DIMS], 0.0, tl.float32)
    table = block_tables + sequence.to(tl.int64) * table_stride
    if not WINDOW:
        highest, total, acc = _attend_tiles(
            begin,
            diagonal,
            q,
            position,
            length,
            highest,
            total,
            acc,
            key_cache,
            value_cache,
            key_scales,
            value_scales,
            table,
            kv_head,
            scale,
            soft_cap,
            NUM_KV_HEADS,
            HEAD_DIM,
            VALUE_DIM,
            BLOCK_SIZE,
            WINDOW,
            HAS_SOFT_CAP,
            FLOAT8,
            NATIVE_FLOAT8,
            SCALES_VALUES,
            TILE,
            DIMS,
            VALUE_DIMS,
            False,
        )
    highest, total, acc = _attend_tiles(
        diagonal,
        end,
        q,
        position,
        length,
        highest,
        total,
        acc,
        key_cache,
        value_cache,
        key_scales,
        value_scales,
        table,
        kv_head,
        scale,
        soft_cap,
        NUM_KV_HEADS,
        HEAD_DIM,
        VALUE_DIM,
        BLOCK_SIZE,
        WINDOW,
        HAS_SOFT_CAP,
        FLOAT8,
        NATIVE_FLOAT8,
        SCALES_VALUES,
        TILE,
        DIMS,
        VALUE_DIMS,
        True,
    )

    if HAS_SINKS:
        sink = tl.load(sinks + head, mask=is_row, other=0.0).to(tl.float32) * LOG2_E
        higher = tl.maximum(highest, sink)
        shrink = tl.exp2(highest - higher)
        total = total * shrink + tl.exp2(sink - higher)
        acc *= shrink[:, None]
    # A row of padding may have seen nothing.
    total = tl.where(total == 0.0, 1.0, total)
    place = (query_row * NUM_HEADS + head) * VALUE_DIM
    tl.store(
        out + place[:, None] + value_dim[None, :],
        acc / total[:, None],
        mask=is_row[:, None] & (value_dim < VALUE_DIM)[None, :],
    )


@dataclass(frozen=True, slots=True)
class PrefillTiles:
    """How a prefill launch is cut; from the hand table `prefill_tiles`."""

    rows: int
    """Query rows (tokens times heads of a group) of a program."""

    tile: int
    """Positions that are multiplied at a time."""

    num_warps: int
    num_stages: int

    def block_q(self, group: int) -> int:
        """Tokens in a block, for `group` query heads on a KV head."""
        return self.rows // group


@cached
def prefill_tiles(group: int, head_dim: int, value_dim: int, dtype: torch.dtype, device: Device) -> PrefillTiles:
    """The table, for queries of `dtype`. Not yet tuned on a GPU: chosen by shared memory and registers."""
    least = triton.next_power_of_2(group)
    if device.is_interpreter:
        return PrefillTiles(rows=max(16, least), tile=16, num_warps=4, num_stages=2)
    dims = max(padded(head_dim), padded(value_dim))
    if dtype is torch.float32:
        # No matrix unit multiplies it exactly: small tiles, for the registers' sake.
        return PrefillTiles(rows=max(32, least), tile=16 if dims > 64 else 32, num_warps=4, num_stages=1)
    if device.backend == "hip":
        if dims > 128:
            return PrefillTiles(rows=max(64, least), tile=32, num_warps=4, num_stages=1)
        return PrefillTiles(rows=max(128, least), tile=64, num_warps=4, num_stages=1)
    if dims > 128:
        if device.shared_memory < 128 * 1024:
            return PrefillTiles(rows=max(64, least), tile=32, num_warps=4, num_stages=1)
        return PrefillTiles(rows=max(128, least), tile=32, num_warps=8, num_stages=2)
    if dims > 64:
        stages = 5 if int(device.arch) >= 90 and device.shared_memory > 200 * 1024 else 2
        return PrefillTiles(rows=max(128, least), tile=64, num_warps=8, num_stages=stages)
    return PrefillTiles(
        rows=max(128, least), tile=64, num_warps=4, num_stages=5 if device.shared_memory > 128 * 1024 else 3
    )


@dataclass(frozen=True, slots=True)
class PrefillPlan:
    """The blocks of queries of a step, filled by `plan_prefill`; layers with the same `block_q` share it. int32."""

    block_q: int
    block_sequence: Tensor
    """`[blocks]`: whose tokens they are; -1 for a block that is none."""

    block_first: Tensor
    """`[blocks]`: each block's first token, counted from the sequence's first new one."""

    @property
    def max_blocks(self) -> int:
        return len(self.block_sequence)

    @classmethod
    def allocate(cls, max_blocks: int, *, block_q: int, device: torch.device) -> PrefillPlan:
        """Buffers for steps of T tokens and S sequences with `T // block_q + S` up to `max_blocks`."""
        first, second = torch.zeros(2, max_blocks, dtype=torch.int32, device=device)
        return cls(block_q, first, second)


def plan_prefill(plan: PrefillPlan, query_starts: Tensor, num_tokens: int) -> None:
    """Fill `plan` for a step of `num_tokens` rows (or fewer that count): one small kernel.

    `query_starts` is `[S + 1]`, on the device: each sequence's first row of the query, and the end of the last one's.
    """
    prefill_plan_launch(plan, query_starts, num_tokens).run()


def prefill_plan_launch(plan: PrefillPlan, query_starts: Tensor, num_tokens: int) -> Launch:
    num_sequences = len(query_starts) - 1
    num_blocks = num_tokens // plan.block_q + num_sequences
    if num_blocks > plan.max_blocks:
        raise ValueError(f"the plan has room for {plan.max_blocks} blocks, not {num_blocks}")
    return Launch(
        _plan_kernel,
        (ceil_div(num_blocks, _PLAN_BLOCK),),
        {
            "query_starts": query_starts,
            "block_sequence": plan.block_sequence,
            "block_first": plan.block_first,
            "num_sequences": num_sequences,
            "num_blocks": num_blocks,
            "search_steps": num_sequences.bit_length(),
        },
        {"BLOCK_Q": plan.block_q, "BLOCK": _PLAN_BLOCK},
    )


def paged_prefill(
    query: Tensor,
    cache: LayerCache,
    sequences: StepSequences,
    plan: PrefillPlan,
    out: Tensor,
    scoring: Scoring,
) -> None:
    """Write the rows of `out` `[T, H, Dv]` (contiguous) whose sequences have more than one new token; leave the others.

    Arguments as those of `paged_decode`; `plan` is filled for the same step. The new tokens' own keys and values are
    already in the cache.
    """
    prefill_launch(query, cache, sequences, plan, out, scoring).run()


def prefill_launch(
    query: Tensor,
    cache: LayerCache,
    sequences: StepSequences,
    plan: PrefillPlan,
    out: Tensor,
    scoring: Scoring,
    *,
    target: Device | None = None,
) -> Launch:
    """What `paged_prefill` runs."""
    target = target or device_of(query.device)
    num_tokens, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, value_dim = cache.values.shape
    group = num_heads // num_kv_heads
    tiles = prefill_tiles(group, head_dim, value_dim, query.dtype, target)
    if plan.block_q != tiles.block_q(group):
        raise ValueError(f"the plan was made for blocks of {plan.block_q} tokens, not {tiles.block_q(group)}")
    return Launch(
        _prefill_kernel,
        (num_kv_heads, num_tokens // plan.block_q + len(sequences.seq_lens)),
        {
            "query": query,
            "key_cache": as_bits(cache.keys),
            "value_cache": as_bits(cache.values),
            "block_tables": sequences.block_tables,
            "seq_lens": sequences.seq_lens,
            "query_starts": sequences.query_starts,
            "block_sequence": plan.block_sequence,
            "block_first": plan.block_first,
            "sinks": scoring.sinks,
            "key_scales": cache.key_scales,
            "value_scales": cache.value_scales,
            "out": out,
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
            scoring.window,
            scoring.soft_cap is not None,
            scoring.sinks is not None,
            cache.is_float8,
            query.dtype,
            target,
            tiles.tile,
            tiles.rows,
        ),
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
