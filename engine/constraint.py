"""The seam for structured output: who may say which tokens come next in one sequence."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    import torch


class Constraint(Protocol):
    """One completion's grammar state. An exception from either method ends that request alone."""

    def fill(self, bitmask: torch.Tensor) -> None:
        """Say which tokens may come next.

        `bitmask` is int32 `[ceil(vocab_size / 32)]` on the CPU, filled with ones; bit `t % 32` of word `t // 32` allows
        token t. This is the layout that xgrammar and llguidance fill.
        """

    def accept(self, token_id: int) -> None:
        """Move on past a token that was chosen."""
