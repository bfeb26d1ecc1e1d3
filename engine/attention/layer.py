"""The shape of one layer's attention."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from kernels.paged_layout import Scoring


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

    def scoring(self, sinks: Tensor | None = None) -> Scoring:
        """What kernels are told of it; `sinks` as for `StepAttention`."""
        return Scoring(self.scale, self.sliding_window, self.soft_cap, sinks)
