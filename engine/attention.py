"""Attention over the paged cache, as models see it and as implementations provide it.

    model layer  --q, k, v-->  StepAttention  --writes k, v-->  KVCache
                                              --attends------>  one of the backends

A backend is chosen once (`make_backend`); each step it turns the step's layout into a `StepAttention`, which all layers
of the model call in turn. It is passed down through the model, so that two engines in one process cannot mix.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from engine.config import EngineConfig
from engine.kv_cache import KVCache
from kernels.kv_write import write_kv_torch
from kernels.paged_attention import Tile, paged_attention_torch, plan_tiles


@dataclass(frozen=True, slots=True)
class AttentionLayer:
    """What attention one layer of a model needs."""

    index: int
    """Its place in the KV cache."""

    num_heads: int
    num_kv_heads: int
    head_dim: int
    """Of queries and keys."""

    value_dim: int
    scale: float
    sliding_window: int | None = None
    """A token sees itself and the `sliding_window - 1` before it."""

    soft_cap: float | None = None
    """Scores x become `soft_cap * tanh(x / soft_cap)`."""


@dataclass(frozen=True, slots=True)
class StepLayout:
    """Where the tokens of one step stand; S sequences, T tokens, sequence by sequence."""

    starts: npt.NDArray[np.int64]
    """`[S]`: position of each sequence's first new token."""

    query_lens: npt.NDArray[np.int64]
    """`[S]`: its new tokens, at least one."""

    block_tables: npt.NDArray[np.int64]
    """`[S, blocks]`, padded with zeros."""

    slots: Tensor
    """`[T]` int64, on the device: where each token's key and value go."""


class StepAttention(Protocol):
    """One step's attention, called once by every layer."""

    def __call__(
        self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """Store key `[T, KH, D]` and value `[T, KH, Dv]`, and attend with query `[T, H, D]`; returns `[T, H, Dv]`.

        All tokens are stored before any attends. `sinks` `[H]` are logits that take weight and give nothing.
        """


class AttentionBackend(Protocol):
    """One way to compute attention over the paged cache."""

    def begin(self, layout: StepLayout, cache: KVCache) -> StepAttention:
        """What the layers of this step call."""


class TorchAttention:
    """Plain torch, on any device."""

    def begin(self, layout: StepLayout, cache: KVCache) -> StepAttention:
        return _TorchStep(layout, cache)


class _TorchStep:
    def __init__(self, layout: StepLayout, cache: KVCache) -> None:
        self._layout = layout
        self._cache = cache
        self._tiles: dict[int | None, list[Tile]] = {}

    def __call__(
        self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        keys, values = self._cache.layers[layer.index]
        write_kv_torch(key, value, keys, values, self._layout.slots)
        return paged_attention_torch(
            query,
            keys,
            values,
            self._tiles_for(layer.sliding_window, query),
            scale=layer.scale,
            soft_cap=layer.soft_cap,
            sinks=sinks,
        )

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


def make_backend(config: EngineConfig, device: torch.device) -> AttentionBackend:
    """The implementation that the configuration asks for; "auto" takes the best there is for the device."""
    del config, device  # one implementation serves all so far
    return TorchAttention()
