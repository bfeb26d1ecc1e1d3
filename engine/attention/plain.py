"""Attention in plain torch: runs on any device, and what every faster backend is compared with."""

from __future__ import annotations

from torch import Tensor

from engine.attention.interface import StepAttention
from engine.attention.kv_cache import KVCache
from engine.attention.layer import AttentionLayer
from kernels.kv_write import write_kv_reference
from kernels.paged_attention import Tile, paged_attention_reference, plan_tiles
from kernels.paged_layout import AttentionMetadata


class TorchAttention:
    """Plain torch, on any device."""

    def prepare(self, layout: AttentionMetadata, cache: KVCache) -> StepAttention:
        return _TorchStep(layout, cache)


class _TorchStep:
    def __init__(self, layout: AttentionMetadata, cache: KVCache) -> None:
        self._layout = layout
        self._cache = cache
        self._tiles: dict[int | None, list[Tile]] = {}

    def __call__(
        self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        cache = self._cache.layers[layer.index]
        write_kv_reference(key, value, cache, self._layout.slots)
        tiles = self._tiles_for(layer.sliding_window, query)
        return paged_attention_reference(query, cache, tiles, layer.scoring(sinks))

    def _tiles_for(self, sliding_window: int | None, query: Tensor) -> list[Tile]:
        """Tiles of this step, which layers with the same window share."""
        if sliding_window not in self._tiles:
            self._tiles[sliding_window] = plan_tiles(
                self._layout.starts.tolist(),
                self._layout.query_lens.tolist(),
                self._layout.block_tables,
                self._cache.block_size,
                sliding_window=sliding_window,
                device=query.device,
                dtype=query.dtype,
            )
        return self._tiles[sliding_window]
