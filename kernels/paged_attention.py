"""Attention of new tokens over a paged KV cache, in plain torch.

    out[t, h] = sum_p softmax_p( cap( scale * q[t, h] . k[p, h // G] ) ) v[p, h // G]
    cap(x)    = c * tanh(x / c) with a soft cap c, else x

over positions p <= t's position of t's own sequence, with a sliding window of w only p > t's position - w. H query
heads in KH groups of G share a key-value head; attention sinks add `exp(sink[h])` to the softmax's denominator.
"""

# A step mixes prefill chunks of many tokens with decodes of one. The plan, made once for all layers that have the same
# window, cuts it into tiles: each a rectangle of some sequences of like size, whose keys and values are gathered
# through the block tables and multiplied densely.
#
#     tile:  rows  [S, R]   which rows of the query           (sequences padded to R rows by repeating their last)
#            slots [S, M]   which slots of the cache           (padded to M by repeating the sequence's own first)
#            mask  [S, 1, R, M]   added to the scores: 0, or -inf where a row must not look
#
# Padding never names another sequence's slots: a weight of 0 times another's NaN would still be NaN.

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from kernels.kv_write import read_kv
from kernels.paged_layout import LayerCache, Scoring

# Rows of one sequence in a tile: enough for a dense product, few enough that a prompt's first rows do not
# multiply with its last keys.
_MAX_ROWS = 256
# Elements of the mask, and gathered slots, in a tile: what keeps its memory small against the model's.
_MAX_MASK = 1 << 22
_MAX_SLOTS = 1 << 13
# How much of a tile may be padding.
_MAX_PADDING = 0.2


@dataclass(frozen=True, slots=True)
class Tile:
    """Some rows of some sequences, and the slots that they look at; see the top of the module."""

    rows: Tensor
    slots: Tensor
    mask: Tensor | None
    kept: Tensor | None
    """Which of the `S * R` rows are no padding; None when all are."""


@dataclass(frozen=True, slots=True)
class _Piece:
    """Rows of one sequence at positions `start .. start + num_rows`, that look no further back than `first`."""

    sequence: int
    row: int
    start: int
    num_rows: int
    first: int

    @property
    def num_slots(self) -> int:
        return self.start + self.num_rows - self.first


def plan_tiles(
    starts: Sequence[int],
    query_lens: Sequence[int],
    block_tables: np.ndarray,
    block_size: int,
    *,
    sliding_window: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> list[Tile]:
    """Tiles that together hold each of the step's rows once.

    Sequence s has `query_lens[s] >= 1` new tokens at positions from `starts[s]`; its rows follow those of sequence
    s - 1 in the query. `block_tables` is `[S, blocks]`, int64, each row padded with anything. `dtype` is that of the
    query, which the mask must have.
    """
    pieces = sorted(_pieces(starts, query_lens, sliding_window), key=lambda piece: (piece.num_rows, piece.num_slots))
    return [
        _tile(group, block_tables, block_size, sliding_window=sliding_window, device=device, dtype=dtype)
        for group in _groups(pieces)
    ]


def _pieces(starts: Sequence[int], query_lens: Sequence[int], sliding_window: int | None) -> Iterator[_Piece]:
    row = 0
    for sequence, (start, length) in enumerate(zip(starts, query_lens, strict=True)):
        # A long context makes for fewer rows at a time.
        step = max(1, min(_MAX_ROWS, _MAX_MASK // (start + length)))
        for done in range(0, length, step):
            first = 0 if sliding_window is None else max(0, start + done - sliding_window + 1)
            yield _Piece(sequence, row + done, start + done, min(step, length - done), first)
        row += length


def _groups(pieces: Sequence[_Piece]) -> Iterator[list[_Piece]]:
    """Neighbours in order of size, as long as they fill most of their common rectangle."""
    group: list[_Piece] = []
    filled = width = 0
    for piece in pieces:
        size, wider = len(group) + 1, max(width, piece.num_slots)
        area = size * piece.num_rows * wider
        mine = piece.num_rows * piece.num_slots
        if group and (filled + mine < (1 - _MAX_PADDING) * area or area > _MAX_MASK or size * wider > _MAX_SLOTS):
            yield group
            group, filled, wider = [], 0, piece.num_slots
        group.append(piece)
        filled, width = filled + mine, wider
    if group:
        yield group


def _tile(
    group: Sequence[_Piece],
    block_tables: np.ndarray,
    block_size: int,
    *,
    sliding_window: int | None,
    device: torch.device,
    dtype: torch.dtype,
) -> Tile:
    sequences = np.array([piece.sequence for piece in group])
    row, start, num_rows, first, num_slots = (
        np.array([getattr(piece, name) for piece in group], dtype=np.int64)[:, None]
        for name in ("row", "start", "num_rows", "first", "num_slots")
    )
    row_offsets = np.arange(num_rows.max())[None]
    slot_offsets = np.arange(num_slots.max())[None]
    is_row, is_slot = row_offsets < num_rows, slot_offsets < num_slots

    row_offsets = np.minimum(row_offsets, num_rows - 1)
    row_positions = start + row_offsets
    slot_positions = first + np.where(is_slot, slot_offsets, 0)
    blocks = np.take_along_axis(block_tables[sequences], slot_positions // block_size, axis=1)
    slots = blocks * block_size + slot_positions % block_size

    seen = (slot_positions[:, None, :] <= row_positions[:, :, None]) & is_slot[:, None, :]
    if sliding_window is not None:
        seen &= slot_positions[:, None, :] > row_positions[:, :, None] - sliding_window

    def to_device(array: np.ndarray) -> Tensor:
        return torch.from_numpy(array).to(device, non_blocking=True)

    return Tile(
        rows=to_device(row + row_offsets),
        slots=to_device(slots),
        mask=None
        if seen.all()
        else torch.zeros(seen.shape, dtype=dtype, device=device)
        .masked_fill_(to_device(~seen), float("-inf"))
        .unsqueeze(1),
        kept=None if is_row.all() else to_device(np.flatnonzero(is_row)),
    )


def paged_attention_reference(query: Tensor, cache: LayerCache, tiles: Sequence[Tile], scoring: Scoring) -> Tensor:
    """Attention of the rows `query` `[T, H, D]` over a cache of the query's type; returns `[T, H, Dv]`.

    `tiles` come from `plan_tiles`, for the same window, and hold every row once; the new tokens' own keys and values
    are already in the cache.
    """
    num_tokens, num_heads, _ = query.shape
    value_dim = cache.values.shape[-1]
    out = query.new_empty(num_tokens, num_heads, value_dim)
    for tile in tiles:
        num_sequences, num_rows = tile.rows.shape
        rows = tile.rows.view(-1)
        tile_query = query.index_select(0, rows).view(num_sequences, num_rows, num_heads, -1)
        key, value = read_kv(cache.keys, tile.slots), read_kv(cache.values, tile.slots)
        if scoring.soft_cap is None and scoring.sinks is None:
            result = _fused(tile_query, key, value, tile.mask, scoring.scale)
        else:
            result = _by_steps(tile_query, key, value, tile.mask, scoring)
        result = result.reshape(-1, num_heads, value_dim)
        if tile.kept is not None:
            rows, result = rows.index_select(0, tile.kept), result.index_select(0, tile.kept)
        out.index_copy_(0, rows, result)
    return out


def _fused(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Torch's own fused attention: query `[S, R, H, D]`, key `[S, M, KH, D]`; returns `[S, R, H, Dv]`."""
    num_sequences, num_rows, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    key, value = key.transpose(1, 2), value.transpose(1, 2)
    if num_rows == 1:
        # All heads of a group see the same: they are the rows of one product, and the keys are read once.
        grouped = query.view(num_sequences, num_kv_heads, num_heads // num_kv_heads, head_dim)
        result = F.scaled_dot_product_attention(grouped, key, value, attn_mask=mask, scale=scale)
        return result.reshape(num_sequences, 1, num_heads, -1)
    result = F.scaled_dot_product_attention(
        query.transpose(1, 2), key, value, attn_mask=mask, scale=scale, enable_gqa=num_heads != num_kv_heads
    )
    return result.transpose(1, 2)


def _by_steps(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scoring: Scoring) -> Tensor:
    """The formula as it stands, for what the fused one lacks; shapes as in `_fused`."""
    num_sequences, num_rows, num_heads, head_dim = query.shape
    num_kv_heads = key.shape[2]
    grouped = query.view(num_sequences, num_rows, num_kv_heads, num_heads // num_kv_heads, head_dim)
    scores = torch.einsum("srkgd,smkd->skgrm", grouped, key).float() * scoring.scale
    if scoring.soft_cap is not None:
        scores = scoring.soft_cap * torch.tanh(scores / scoring.soft_cap)
    if mask is not None:
        scores = scores + mask.unsqueeze(1)
    if scoring.sinks is not None:
        sink = scoring.sinks.float().view(1, num_kv_heads, -1, 1, 1).expand(*scores.shape[:-1], 1)
        weights = torch.cat((scores, sink), dim=-1).softmax(dim=-1)[..., :-1]
    else:
        weights = scores.softmax(dim=-1)
    return torch.einsum("skgrm,smkd->srkgd", weights.to(value.dtype), value).flatten(2, 3)
