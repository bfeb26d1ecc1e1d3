"""Attention in C++ on the CPU, over the cache as it lies."""

from __future__ import annotations

from torch import Tensor

from engine.attention.interface import AttentionMetadata, StepAttention
from engine.attention.kv_cache import KVCache
from engine.attention.layer import AttentionLayer
from kernels.cpu.library import Library
from kernels.cpu.paged_attention import paged_attention


class CpuAttention:
    """One kernel for prompts and decodes, with the threads that torch has."""

    def __init__(self, library: Library) -> None:
        self._library = library

    def prepare(self, layout: AttentionMetadata, cache: KVCache) -> StepAttention:
        return _CpuStep(self._library, layout, cache)


class _CpuStep:
    def __init__(self, library: Library, layout: AttentionMetadata, cache: KVCache) -> None:
        self._library = library
        self._layout = layout
        self._cache = cache

    def __call__(
        self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        layout = self._layout
        return paged_attention(
            self._library,
            query,
            key,
            value,
            *self._cache.layers[layer.index],
            layout.starts,
            layout.query_lens,
            layout.block_tables,
            layout.slots,
            scale=layer.scale,
            sliding_window=layer.sliding_window,
            soft_cap=layer.soft_cap,
            sinks=sinks,
        )
