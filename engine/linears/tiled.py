"""Linear layers in tiles of a fixed number of rows: a row's result does not depend on the other rows."""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from engine.device.threads import Threads

ROWS = 32
"""Tokens in one pass: a multiple of the longest vector that torch computes with, so that no row is a remainder."""

_EXPERT_ROWS = 8
"""Few, since a pass of `ROWS` tokens spreads over many experts."""


class TiledLinear(nn.Module):
    """Runs a linear layer, or the layer that replaced it, on a fixed number of rows at a time."""

    def __init__(self, compute: nn.Module, layer: nn.Linear, threads: Threads) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self._compute = compute
        self._threads = threads

    def forward(self, hidden: Tensor) -> Tensor:
        """`[..., in]` to `[..., out]`."""
        rows = hidden.reshape(-1, self.in_features)
        with self._threads.all():
            tiles = [self._compute(tile) for tile in fixed_row_tiles(rows, ROWS)]
        return _joined(tiles, rows, self.out_features).view(*hidden.shape[:-1], self.out_features)


class TiledProduct:
    """`rows @ weight.T` for the experts of a mixture, each of which gets as many rows as are routed to it."""

    def __init__(self, threads: Threads) -> None:
        self._threads = threads

    def __call__(self, rows: Tensor, weight: Tensor) -> Tensor:
        """`[N, in]` and `[out, in]` to `[N, out]`."""
        with self._threads.all():
            tiles = [F.linear(tile, weight) for tile in fixed_row_tiles(rows, _EXPERT_ROWS)]
        return _joined(tiles, rows, len(weight))


def fixed_row_tiles(rows: Tensor, size: int) -> Iterator[Tensor]:
    """`[N, K]` in tiles of `size` rows, the last filled up with zeros; none when there are no rows.

    All begin on a boundary of 64 bytes: where data lie decides how some libraries compute.
    """
    for tile in torch.split(rows, size) if len(rows) else ():
        if len(tile) < size:
            yield F.pad(tile, (0, 0, 0, size - len(tile)))
        else:
            yield (
                tile
                if tile.is_contiguous() and tile.data_ptr() % 64 == 0
                else tile.clone(memory_format=torch.contiguous_format)
            )


def _joined(tiles: list[Tensor], rows: Tensor, width: int) -> Tensor:
    if not tiles:
        return rows.new_empty(0, width)
    return (tiles[0] if len(tiles) == 1 else torch.cat(tiles))[: len(rows)]
