"""Attention whose result for a token depends on its sequence alone, to the last bit.

    out = sum_t  sum_{p in tile t}  exp(s_p - m) v_p  /  ...         tile t: positions 32 t .. 32 t + 31

Keys and values are read in tiles that begin at absolute positions, so that neither chunks nor cached prefixes nor the
size of a block move their bounds, and tiles are added up from the first to the last by an online softmax (Milakov &
Gimelshein, arXiv 1805.02867).
"""

# Queries come in pieces of 8 rows of one sequence, filled up where there are fewer: a decode is a piece with one row,
# and goes through the very products that a prompt's rows go through. All is float32. A tile in which a row may look
# at nothing leaves its sums as they are: it multiplies by one and adds zero.

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.attention.interface import StepAttention
from engine.attention.kv_cache import KVCache
from engine.attention.layer import AttentionLayer
from engine.device.threads import Threads
from kernels.kv_write import write_kv_reference
from kernels.paged_layout import AttentionMetadata, LayerCache

_POSITIONS = 32
_ROWS = 8
# Below what any score is, and yet a number: the difference of two infinities would be none.
_LOWEST = torch.finfo(torch.float32).min


class DeterministicAttention:
    """Fixed tiles in plain torch, on the CPU."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads

    def prepare(self, layout: AttentionMetadata, cache: KVCache) -> StepAttention:
        return _Step(layout, cache, self._threads)


@dataclass(frozen=True, slots=True)
class _Tile:
    """The positions `32 t .. 32 t + 31` of the pieces that look at some of them."""

    pieces: Tensor | None
    """`[a]`; None: all, in order. An even number, so that no vector ends inside of a row."""

    slots: Tensor
    """`[a, 32]`; positions that a piece does not reach repeat its last."""

    unseen: Tensor
    """`[a, 1, 1, 8, 32]`: where a row must not look."""


@dataclass(frozen=True, slots=True)
class _Plan:
    """Pieces and tiles of one step, for all layers with the same window."""

    rows: Tensor
    """`[A * 8]`: rows of the query."""

    kept: Tensor
    """Which of them are no padding."""

    tiles: Sequence[_Tile]


class _Step:
    def __init__(self, layout: AttentionMetadata, cache: KVCache, threads: Threads) -> None:
        self._layout = layout
        self._cache = cache
        self._threads = threads
        self._plans: dict[int | None, _Plan] = {}

    def __call__(
        self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """As the interface has it; rows beyond the layout's tokens are padding: not stored, and zero in the result."""
        cache = self._cache.layers[layer.index]
        num_tokens = len(self._layout.slots)
        write_kv_reference(key[:num_tokens], value[:num_tokens], cache, self._layout.slots)
        plan = self._plan_for(layer.sliding_window)
        attended = self._attend(layer, query, cache, plan, sinks)
        out = query.new_zeros(len(query), layer.num_heads, layer.value_dim)
        return out.index_copy_(0, plan.rows[plan.kept], attended[plan.kept].to(query.dtype))

    def _attend(
        self, layer: AttentionLayer, query: Tensor, cache: LayerCache, plan: _Plan, sinks: Tensor | None
    ) -> Tensor:
        """Of every row of every piece: `[A * 8, H, Dv]`, float32."""
        heads, dim = layer.num_kv_heads, layer.head_dim
        group = layer.num_heads // heads
        num_pieces = len(plan.rows) // _ROWS
        shape = (num_pieces, heads, group, _ROWS)
        # [A, 8, KH, G, D] -> [A, KH, G, 8, D]
        queries = query.index_select(0, plan.rows).float().view(num_pieces, _ROWS, heads, group, dim)
        queries = queries.permute(0, 2, 3, 1, 4).contiguous()
        most = torch.full((*shape, 1), _LOWEST)
        total = torch.zeros(*shape, 1)
        result = torch.zeros(*shape, layer.value_dim)
        for tile in plan.tiles:
            mine = queries if tile.pieces is None else queries[tile.pieces]
            with self._threads.all():
                tile_keys, tile_values = _read(cache.keys, tile.slots), _read(cache.values, tile.slots)
                scores = torch.bmm(mine.view(-1, group * _ROWS, dim), tile_keys.transpose(1, 2))
            scores = scores.view(*mine.shape[:-1], _POSITIONS).mul_(layer.scale)
            if layer.soft_cap is not None:
                scores = layer.soft_cap * torch.tanh(scores / layer.soft_cap)
            scores.masked_fill_(tile.unseen, float("-inf"))

            before = most if tile.pieces is None else most[tile.pieces]
            now = torch.maximum(before, scores.amax(dim=-1, keepdim=True))
            kept = (before - now).exp_()
            weights = scores.sub_(now).exp_()
            with self._threads.all():
                added = torch.bmm(weights.view(-1, group * _ROWS, _POSITIONS), tile_values)
            added, weight = added.view(*mine.shape[:-1], -1), weights.sum(dim=-1, keepdim=True)
            if tile.pieces is None:
                most, total, result = now, total.mul_(kept).add_(weight), result.mul_(kept).add_(added)
            else:
                most[tile.pieces] = now
                total[tile.pieces] = total[tile.pieces].mul_(kept).add_(weight)
                result[tile.pieces] = result[tile.pieces].mul_(kept).add_(added)
        if sinks is not None:
            sink = sinks.float().view(1, heads, group, 1, 1).expand_as(most)
            highest = torch.maximum(most, sink)
            kept = (most - highest).exp_()
            total = total.mul_(kept).add_((sink - highest).exp_())
            result = result.mul_(kept)
        return (result / total).permute(0, 3, 1, 2, 4).reshape(-1, layer.num_heads, layer.value_dim)

    def _plan_for(self, sliding_window: int | None) -> _Plan:
        if sliding_window not in self._plans:
            self._plans[sliding_window] = _plan(self._layout, self._cache.block_size, sliding_window)
        return self._plans[sliding_window]


def _read(cache: Tensor, slots: Tensor) -> Tensor:
    """Keys or values `[N, B, KH, D]` at slots `[a, 32]`, as float32 `[a * KH, 32, D]`."""
    heads, dim = cache.shape[2:]
    rows = slots[:, None, :] * heads + torch.arange(heads)[:, None]
    return cache.view(-1, dim).index_select(0, rows.view(-1)).view(-1, _POSITIONS, dim).float()


def _plan(layout: AttentionMetadata, block_size: int, sliding_window: int | None) -> _Plan:
    # Of each piece: its sequence, its first row, that row's position, and how many rows it has.
    pieces: list[tuple[int, int, int, int]] = []
    row = 0
    for sequence, (start, length) in enumerate(zip(layout.starts.tolist(), layout.query_lens.tolist(), strict=True)):
        pieces += [(sequence, row + done, start + done, min(_ROWS, length - done)) for done in range(0, length, _ROWS)]
        row += length
    num_real = len(pieces)
    if num_real % 2:
        pieces.append(pieces[-1])
    sequences, first_rows, first_positions, lengths = np.array(pieces, dtype=np.int64).T
    offsets = np.minimum(np.arange(_ROWS), lengths[:, None] - 1)
    positions = first_positions[:, None] + offsets
    is_real = (np.arange(_ROWS) < lengths[:, None]) & (np.arange(len(pieces)) < num_real)[:, None]

    last = first_positions + lengths - 1
    lowest = np.zeros_like(last) if sliding_window is None else np.maximum(0, first_positions - sliding_window + 1)
    first_tile, last_tile = lowest // _POSITIONS, last // _POSITIONS
    tiles = []
    for tile in range(int(first_tile.min()), int(last_tile.max()) + 1):
        active = np.flatnonzero((first_tile <= tile) & (tile <= last_tile))
        if not len(active):
            continue
        are_all = len(active) == len(pieces)
        if len(active) % 2:
            active = np.append(active, active[-1])
        tile_positions = tile * _POSITIONS + np.arange(_POSITIONS)
        reached = np.minimum(tile_positions, last[active, None])
        blocks = np.take_along_axis(layout.block_tables[sequences[active]], reached // block_size, axis=1)
        unseen = tile_positions > positions[active, :, None]
        if sliding_window is not None:
            unseen |= tile_positions <= positions[active, :, None] - sliding_window
        tiles.append(
            _Tile(
                pieces=None if are_all else torch.from_numpy(active),
                slots=torch.from_numpy(blocks * block_size + reached % block_size),
                unseen=torch.from_numpy(unseen)[:, None, None],
            )
        )
    return _Plan(
        rows=torch.from_numpy((first_rows[:, None] + offsets).reshape(-1)),
        kept=torch.from_numpy(np.flatnonzero(is_real)),
        tiles=tiles,
    )
