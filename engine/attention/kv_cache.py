"""Storage of keys and values: one tensor of blocks each, per layer.

    layers[i].keys   [N + 1, B, KH, D]        N blocks of B positions, and a padding block; scales of float8
    layers[i].values [N + 1, B, KH, Dv]       stand beside them (kernels/paged_layout.py)

Which block belongs to whom is the block manager's business; here is only how many there are room for.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from engine.attention.layer import AttentionLayer
from engine.config import EngineConfig
from kernels.paged_layout import LayerCache


@dataclass(frozen=True, slots=True)
class KVCache:
    """Keys and values of all layers."""

    layers: Sequence[LayerCache]
    block_size: int

    @classmethod
    def allocate(
        cls,
        layers: Sequence[AttentionLayer],
        num_blocks: int,
        block_size: int,
        *,
        dtype: torch.dtype,
        device: torch.device,
        takes_memory: bool = False,
    ) -> KVCache:
        """An empty cache. On the CPU, memory is taken as blocks are first used, or all at once if `takes_memory`."""
        num_blocks += 1

        def zeros(*shape: int, dtype: torch.dtype = dtype) -> Tensor:
            return _zeros((num_blocks, *shape), dtype, device, takes_memory)

        def scales(layer: AttentionLayer) -> Tensor | None:
            return zeros(layer.num_kv_heads, block_size, dtype=torch.uint8) if _has_scales(dtype) else None

        return cls(
            [
                LayerCache(
                    keys=zeros(block_size, layer.num_kv_heads, layer.head_dim),
                    values=zeros(block_size, layer.num_kv_heads, layer.value_dim),
                    key_scales=scales(layer),
                    value_scales=scales(layer),
                )
                for layer in layers
            ],
            block_size,
        )

    @property
    def num_blocks(self) -> int:
        """Without the padding block."""
        return len(self.layers[0].keys) - 1

    @property
    def padding_block(self) -> int:
        """The last: no sequence's, so that rows which are only padding can write somewhere."""
        return self.num_blocks


def cache_dtype(config: EngineConfig, dtype: torch.dtype) -> torch.dtype:
    """What keys and values of a model of type `dtype` are kept as."""
    return torch.float8_e4m3fn if config.kv_cache_dtype == "float8_e4m3" else dtype


def _zeros(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device, takes_memory: bool) -> Tensor:
    """Zeros, since a value that is weighted with zero must still be a number."""
    if device.type != "cpu" or takes_memory:
        return torch.zeros(*shape[:-1], shape[-1] * dtype.itemsize, dtype=torch.uint8, device=device).view(dtype)
    # torch writes its zeros; NumPy's come from the kernel, page by page, when they are first looked at.
    return torch.from_numpy(np.zeros(math.prod(shape) * dtype.itemsize, np.uint8)).view(dtype).view(shape)


def block_bytes(layers: Sequence[AttentionLayer], block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all layers."""
    return block_size * sum(position_bytes(layer, dtype) for layer in layers)


def position_bytes(layer: AttentionLayer, dtype: torch.dtype) -> int:
    """Bytes that the keys and values of one position take in one layer, their scales with them."""
    scales = 2 if _has_scales(dtype) else 0
    return layer.num_kv_heads * ((layer.head_dim + layer.value_dim) * dtype.itemsize + scales)


def _has_scales(dtype: torch.dtype) -> bool:
    return dtype is torch.float8_e4m3fn
