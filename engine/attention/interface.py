"""Attention over the paged cache, as models see it and as implementations provide it.

    model layer  --q, k, v-->  StepAttention  --writes k, v-->  KVCache
                                              --attends------>  one of the backends

A backend is chosen once (`make_backend`); each step it turns the step's layout into a `StepAttention`, which all layers
of the model call in turn. It is passed down through the model, so that two engines in one process cannot mix.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from engine.attention.kv_cache import KVCache
from engine.attention.layer import AttentionLayer
from kernels.paged_layout import AttentionMetadata
from kernels.rms_norm import HeadNorms


@dataclass(frozen=True, slots=True)
class DecodeMetadata:
    """A step in which each of S sequences has one new token; everything is on the device."""

    positions: Tensor
    """`[S]` int64: where each token stands. A row that is only padding stands at 0."""

    lengths: Tensor
    """`[S]` int32: how many tokens each attends to, itself among them; 0 for padding, whose result is not read."""

    block_tables: Tensor
    """`[S, blocks]` int32, padded with zeros."""

    slots: Tensor
    """`[S]` int64: where its key and value go; several rows of padding may have the same."""

    def on_host(self) -> AttentionMetadata:
        """The same for implementations that plan on the host; it waits for the device."""
        return AttentionMetadata(
            starts=self.positions.cpu().numpy(),
            query_lens=np.ones(len(self.positions), np.int64),
            block_tables=self.block_tables.cpu().numpy().astype(np.int64),
            slots=self.slots,
        )


class StepAttention(Protocol):
    """One step's attention, called once by every layer."""

    def __call__(
        self, layer: AttentionLayer, query: Tensor, key: Tensor, value: Tensor, sinks: Tensor | None = None
    ) -> Tensor:
        """Store key `[T, KH, D]` and value `[T, KH, Dv]`, and attend with query `[T, H, D]`; returns `[T, H, Dv]`.

        All tokens are stored before any attends. `sinks` `[H]` are logits that take weight and give nothing.
        """


class RotaryAttention(ABC):
    """What a `StepAttention` may be besides: one that rotates queries and keys itself (see `models/rotary.py`)."""

    @abstractmethod
    def rotate_and_attend(
        self,
        layer: AttentionLayer,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        interleaved: bool,
        norms: HeadNorms | None,
    ) -> Tensor:
        """As the call, of query and key rotated by angles `[T, 1, R / 2]`: the rotated key goes into the cache only.

        With `norms`, query and key are those before the norms of their heads.
        """


class AttentionBackend(Protocol):
    """One way to compute attention over the paged cache."""

    def prepare(self, layout: AttentionMetadata, cache: KVCache) -> StepAttention:
        """What the layers of this step call."""


@runtime_checkable
class CapturableAttention(Protocol):
    """A backend whose decode steps need nothing from the host, so that a CUDA graph can hold them."""

    def reserve(self, layers: Sequence[AttentionLayer], *, kv_dtype: torch.dtype, max_sequences: int) -> None:
        """Make the buffers for decodes of up to so many sequences: they stay where they are from then on."""

    def prepare_decode(self, layout: DecodeMetadata, cache: KVCache) -> StepAttention:
        """As `AttentionBackend.prepare`; reads no tensor on the host, and what outlives the step was reserved."""
