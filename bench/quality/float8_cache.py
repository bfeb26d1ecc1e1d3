"""A KV cache of float8 on the CPU, where only its rounding can be had: keys and values are rounded and kept as float32.

The numbers are those that the kernels of GPUs keep (`kernels/float8.py`).
"""

from __future__ import annotations

from torch import Tensor

from engine.attention.interface import AttentionBackend, StepAttention
from engine.attention.kv_cache import KVCache
from engine.attention.layer import AttentionLayer
from kernels.float8 import dequantize_reference, quantize_reference
from kernels.paged_layout import AttentionMetadata


class Float8Rounding:
    """Attention by another backend, of rounded keys and values."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend

    def prepare(self, layout: AttentionMetadata, cache: KVCache) -> StepAttention:
        step = self._backend.prepare(layout, cache)

        def attend(
            layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
        ) -> Tensor:
            return step(layer, query, rounded_to_float8(key), rounded_to_float8(value), sinks)

        return attend


def rounded_to_float8(numbers: Tensor) -> Tensor:
    """`[T, KH, D]`, each head of each token rounded to float8 with its own scale."""
    stored, exponents = quantize_reference(numbers[None])
    return dequantize_reference(stored, exponents.transpose(1, 2))[0].to(numbers.dtype)
