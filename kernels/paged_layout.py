"""What attention kernels are handed beside queries: a layer's cache, where a step's tokens stand, how scores are made.

S sequences, T new tokens, H query heads, KH key-value heads; a cache has N blocks of B positions.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class LayerCache:
    """Keys and values of one layer, in blocks."""

    keys: Tensor
    """`[N, B, KH, D]`, contiguous."""

    values: Tensor
    """`[N, B, KH, Dv]`, contiguous, of the keys' type."""

    key_scales: Tensor | None = None
    """`[N, KH, B]` uint8, contiguous: exponents of powers of two (`float8.py`). None unless keys are float8_e4m3fn."""

    value_scales: Tensor | None = None
    """As `key_scales`."""

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Keys and values, and the scales where there are any."""
        parts = (self.keys, self.values, self.key_scales, self.value_scales)
        return tuple(part for part in parts if part is not None)

    @property
    def is_float8(self) -> bool:
        return self.keys.dtype is torch.float8_e4m3fn

    @property
    def block_size(self) -> int:
        """Positions in a block, B."""
        return self.keys.shape[1]


@dataclass(frozen=True, slots=True)
class StepSequences:
    """The sequences of a step, on the device."""

    block_tables: Tensor
    """`[S, blocks]` integers; beyond a sequence's length, anything."""

    seq_lens: Tensor
    """`[S]` integers: tokens of each sequence, the new ones with it."""

    query_starts: Tensor
    """`[S + 1]` int32: each one's first row of the query, and the end of the last one's."""


@dataclass(frozen=True, slots=True)
class AttentionMetadata:
    """Where the tokens of one step stand, on the host; sequence by sequence."""

    starts: npt.NDArray[np.int64]
    """`[S]`: position of each sequence's first new token."""

    query_lens: npt.NDArray[np.int64]
    """`[S]`: its new tokens, at least one."""

    block_tables: npt.NDArray[np.int64]
    """`[S, blocks]`, padded with zeros."""

    slots: Tensor
    """`[T]` int64, on the device: where each token's key and value go."""


@dataclass(frozen=True, slots=True)
class Scoring:
    """How a layer's attention weighs positions: `softmax(cap(scale * q . k))` over those that a token sees."""

    scale: float
    window: int | None = None
    """A token sees itself and the `window - 1` before it; None: all before it."""

    soft_cap: float | None = None
    """Scores x become `soft_cap * tanh(x / soft_cap)`."""

    sinks: Tensor | None = None
    """`[H]`: logits that take weight and give nothing."""
