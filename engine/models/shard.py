"""Which part of each weight a rank holds where several share a model: Megatron's division (arXiv 1909.08053).

    query, key, value, gate, up     rows (outputs): whole heads, inner features
    out, down                       columns (inputs) of the same; each rank's product is a summand
    embedding and head              rows: tokens of the vocabulary
    norms, routers, positions       whole, on every rank

Ranks need not get equal parts. Where there are fewer key-value heads than ranks, several ranks hold the same one.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from engine.device.collectives import Group
from engine.errors import ModelError
from kernels.integers import ceil_div


@dataclass(frozen=True, slots=True)
class Shard:
    """Which of the `size` rows or columns of a checkpoint's tensor a rank holds: those of `ranges`, in order."""

    size: int
    ranges: tuple[range, ...]

    @property
    def length(self) -> int:
        return sum(map(len, self.ranges))

    @property
    def is_whole(self) -> bool:
        return self.length == self.size

    @property
    def is_first(self) -> bool:
        """Whether rank 0 holds it."""
        return self.ranges[0].start == 0

    def times(self, count: int) -> Shard:
        """The shard where each row stands for `count`: a head for its dimensions."""
        return Shard(self.size * count, tuple(range(its.start * count, its.stop * count) for its in self.ranges))

    @staticmethod
    def stacked(shards: Sequence[Shard]) -> Shard:
        """Of tensors that a checkpoint holds as one, below each other."""
        ranges: list[range] = []
        size = 0
        for shard in shards:
            ranges += [range(size + its.start, size + its.stop) for its in shard.ranges]
            size += shard.size
        return Shard(size, tuple(ranges))

    def take(self, whole: Any, dim: int) -> Tensor:
        """Its part, along `dim`, of a tensor or of a safetensors slice, which reads no more than that."""
        before = (slice(None),) * dim
        parts = [whole[(*before, slice(its.start, its.stop))] for its in self.ranges]
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim)


@dataclass(frozen=True, slots=True)
class HeadShards:
    """A rank's query heads, and the key-value heads that they attend to: as many of the former to each of these."""

    queries: Shard
    kv: Shard


def shard(size: int, group: Group) -> Shard:
    """Parts as equal as can be; raises `ModelError` where there are more ranks than numbers."""
    if size < group.size:
        raise ModelError(f"{size} features of a layer cannot be divided among {group.size} ranks")
    return Shard(size, (range(group.rank * size // group.size, (group.rank + 1) * size // group.size),))


def shard_vocabulary(size: int, group: Group) -> Shard:
    """Equal parts, of which the last may be smaller: as `Group.all_gather` joins them."""
    each = ceil_div(size, group.size)
    return Shard(size, (range(min(size, group.rank * each), min(size, (group.rank + 1) * each)),))


def shard_heads(heads: int, kv_heads: int, group: Group) -> HeadShards:
    """Key-value heads with all their query heads, or a part of one's; raises `ModelError` where there are too few."""
    rank, size, queries = group.rank, group.size, heads // kv_heads
    if size <= kv_heads:
        kv = shard(kv_heads, group)
        return HeadShards(kv.times(queries), kv)
    held = rank * kv_heads // size
    first, end = (ceil_div(head * size, kv_heads) for head in (held, held + 1))
    if queries < end - first:
        raise ModelError(f"{heads} attention heads cannot be divided among {size} ranks")
    starts = [held * queries + place * queries // (end - first) for place in (rank - first, rank - first + 1)]
    return HeadShards(Shard(heads, (range(*starts),)), Shard(kv_heads, (range(held, held + 1),)))
