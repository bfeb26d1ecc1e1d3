"""Decode attention where neighbours of a step begin with the same blocks: these are read once for a whole group.

    shared    M sequences times G heads are the rows of one matrix product over the group's shared positions
    decode    each sequence by itself over the rest of its positions
    combine   joins both, as it joins splits

The queries of a group are the rows that `paged_prefill` has for one prompt's tokens, and all of them see every shared
position, so that no mask is needed (Hydragen: Juravsky et al., arXiv 2402.05099). Off unless a plan is made for it.
"""

from __future__ import annotations

import torch
from torch import Tensor

from kernels.device import Device, device_of
from kernels.float8 import as_bits
from kernels.integers import ceil_div
from kernels.launch import Launch
from kernels.paged_decode import DecodePlan, decode_launches, decode_tiles, padded
from kernels.paged_layout import LayerCache, Scoring, StepSequences
from kernels.paged_prefill import _attend_tiles, prefill_tiles
from kernels.prefix_groups import PrefixGroups, shared_chunks
from kernels.triton_compat import tl, triton


@triton.jit(do_not_specialize=["num_sequences", "table_stride", "first_place"])
def _attend_shared_kernel(
    query,
    key_cache,
    value_cache,
    block_tables,
    seq_lens,
    query_starts,
    positions,
    leaders,
    key_scales,
    value_scales,
    partial,
    partial_lse,
    scale,
    soft_cap,
    query_stride,
    query_head_stride,
    num_sequences,
    table_stride,
    first_place,
    NUM_HEADS: tl.constexpr,
    NUM_KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    VALUE_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    HAS_SOFT_CAP: tl.constexpr,
    FLOAT8: tl.constexpr,
    NATIVE_FLOAT8: tl.constexpr,
    SCALES_VALUES: tl.constexpr,
    UPCAST: tl.constexpr,
    MEMBERS: tl.constexpr,
    MAX_CHUNKS: tl.constexpr,
    CHUNK: tl.constexpr,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    DIMS: tl.constexpr,
    VALUE_DIMS: tl.constexpr,
):
    kv_head = tl.program_id(0)
    chunk = tl.program_id(1)
    group = tl.program_id(2)
    shared = tl.load(positions + group)
    chunks = shared_chunks(shared, MAX_CHUNKS, CHUNK)
    if chunk >= chunks:
        return
    GROUP: tl.constexpr = NUM_HEADS // NUM_KV_HEADS
    row = tl.arange(0, ROWS)
    sequence = group * MEMBERS + row // GROUP
    head = kv_head * GROUP + row % GROUP
    is_row = (row < MEMBERS * GROUP) & (sequence < num_sequences)
    is_row &= tl.load(seq_lens + sequence, mask=is_row, other=0) > 0
    query_row = tl.load(query_starts + sequence, mask=is_row, other=0).to(tl.int64)
    dim = tl.arange(0, DIMS)
    value_dim = tl.arange(0, VALUE_DIMS)
    q = tl.load(
        query + query_row[:, None] * query_stride + head[:, None] * query_head_stride + dim[None, :],
        mask=is_row[:, None] & (dim < HEAD_DIM)[None, :],
        other=0.0,
    )
    if UPCAST:
        q = q.to(tl.float32)
    tiles = shared // TILE
    highest, total, acc = _attend_tiles(
        tiles * chunk // chunks,
        tiles * (chunk + 1) // chunks,
        q,
        row,
        shared,
        tl.full([ROWS], float("-inf"), tl.float32),
        tl.full([ROWS], 0.0, tl.float32),
        tl.full([ROWS, VALUE_DIMS], 0.0, tl.float32),
        key_cache,
        value_cache,
        key_scales,
        value_scales,
        block_tables + tl.load(leaders + group).to(tl.int64) * table_stride,
        kv_head,
        scale,
        soft_cap,
        NUM_KV_HEADS,
        HEAD_DIM,
        VALUE_DIM,
        BLOCK_SIZE,
        0,
        HAS_SOFT_CAP,
        FLOAT8,
        NATIVE_FLOAT8,
        SCALES_VALUES,
        TILE,
        DIMS,
        VALUE_DIMS,
        False,
    )
    place = (first_place + sequence.to(tl.int64) * MAX_CHUNKS + chunk) * NUM_HEADS + head
    tl.store(
        partial + place[:, None] * VALUE_DIM + value_dim[None, :],
        acc / total[:, None],
        mask=is_row[:, None] & (value_dim < VALUE_DIM)[None, :],
    )
    tl.store(partial_lse + place, highest + tl.log2(total), mask=is_row)


def prefix_groups(
    max_sequences: int,
    *,
    num_heads: int,
    num_kv_heads: int,
    head_dim: int,
    value_dim: int,
    dtype: torch.dtype,
    kv_dtype: torch.dtype,
    device: torch.device,
    target: Device | None = None,
    **sizes: int,
) -> PrefixGroups:
    """Groups for layers of one shape, to make a `DecodePlan` with; not for windows.

    `sizes` are `least` and `chunk` of `PrefixGroups`.
    """
    target = target or device_of(device)
    group = num_heads // num_kv_heads
    tiles = prefill_tiles(group, head_dim, value_dim, dtype, target)
    return PrefixGroups.allocate(
        max_sequences,
        members=tiles.block_q(group),
        granule=max(tiles.tile, decode_tiles(head_dim, value_dim, kv_dtype, target).tile),
        device=device,
        **sizes,
    )


def paged_decode_with_shared_prefixes(
    query: Tensor, cache: LayerCache, sequences: StepSequences, plan: DecodePlan, out: Tensor, scoring: Scoring
) -> None:
    """As `paged_decode`, with a plan that has groups."""
    attend_shared_launch(query, cache, sequences, plan, scoring).run()
    for launch in decode_launches(query, cache, sequences, plan, out, scoring):
        launch.run()


def attend_shared_launch(
    query: Tensor,
    cache: LayerCache,
    sequences: StepSequences,
    plan: DecodePlan,
    scoring: Scoring,
    *,
    target: Device | None = None,
) -> Launch:
    """What reads the shared positions: its partial results lie behind those of the plan's items."""
    groups = plan.groups
    if groups is None or scoring.window is not None:
        raise ValueError("the plan has no groups of sequences that share a prefix")
    target = target or device_of(query.device)
    num_sequences = len(sequences.seq_lens)
    _, num_heads, head_dim = query.shape
    _, block_size, num_kv_heads, value_dim = cache.values.shape
    tiles = prefill_tiles(num_heads // num_kv_heads, head_dim, value_dim, query.dtype, target)
    if groups.members != tiles.block_q(num_heads // num_kv_heads):
        raise ValueError(f"groups have {groups.members} members, a program {tiles.block_q(num_heads // num_kv_heads)}")
    return Launch(
        _attend_shared_kernel,
        (num_kv_heads, groups.max_chunks, ceil_div(num_sequences, groups.members)),
        {
            "query": query,
            "key_cache": as_bits(cache.keys),
            "value_cache": as_bits(cache.values),
            "block_tables": sequences.block_tables,
            "seq_lens": sequences.seq_lens,
            "query_starts": sequences.query_starts,
            "positions": groups.positions,
            "leaders": groups.leaders,
            "key_scales": cache.key_scales,
            "value_scales": cache.value_scales,
            "partial": plan.partial,
            "partial_lse": plan.partial_lse,
            "scale": float(scoring.scale),
            "soft_cap": float(scoring.soft_cap or 0.0),
            "query_stride": query.stride(0),
            "query_head_stride": query.stride(1),
            "num_sequences": num_sequences,
            "table_stride": sequences.block_tables.stride(0),
            "first_place": plan.max_items,
        },
        {
            "NUM_HEADS": num_heads,
            "NUM_KV_HEADS": num_kv_heads,
            "HEAD_DIM": head_dim,
            "VALUE_DIM": value_dim,
            "BLOCK_SIZE": block_size,
            "HAS_SOFT_CAP": scoring.soft_cap is not None,
            "FLOAT8": cache.is_float8,
            "NATIVE_FLOAT8": target.converts_float8,
            "SCALES_VALUES": query.dtype is torch.float16,
            "UPCAST": target.is_interpreter,
            "MEMBERS": groups.members,
            "MAX_CHUNKS": groups.max_chunks,
            "CHUNK": groups.chunk,
            "TILE": tiles.tile,
            "ROWS": tiles.rows,
            "DIMS": padded(head_dim),
            "VALUE_DIMS": padded(value_dim),
        },
        num_warps=tiles.num_warps,
        num_stages=tiles.num_stages,
    )
