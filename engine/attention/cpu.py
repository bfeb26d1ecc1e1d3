"""Attention in C++ on the CPU, over the cache as it lies."""

from __future__ import annotations

from torch import Tensor

from engine.attention.interface import StepAttention
from engine.attention.kv_cache import KVCache
from engine.attention.layer import AttentionLayer
from kernels.cpu.library import Library
from kernels.cpu.paged_attention import paged_attention
from kernels.paged_layout import AttentionMetadata


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
        cache = self._cache.layers[layer.index]
        return paged_attention(self._library, query, key, value, cache, self._layout, layer.scoring(sinks))
