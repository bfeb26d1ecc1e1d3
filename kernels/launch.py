"""A kernel with all that it is launched with, as a value.

Wrappers build launches and run them; the test that compiles ahead of time, without a GPU, builds the same launches and
compiles them. So what is compiled there is what runs.

Triton compiles a kernel anew for an integer that is 1 or that 16 divides, and for a pointer that 16 bytes divide. So
kernels name their counts in `do_not_specialize`, and callers align sections of packed tensors (`ALIGNMENT`).
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kernels.integers import ceil_div

# Bytes: where a tensor starts that shares memory with others, it is at a multiple of them.
ALIGNMENT = 16


def aligned(count: int, itemsize: int) -> int:
    """The least number of elements, `count` or more, after which the next section of a packed tensor is aligned."""
    each = ALIGNMENT // itemsize
    return ceil_div(count, each) * each


@dataclass(frozen=True, slots=True)
class Launch:
    """One launch. A wrapper never reads a device value to build it: grids are upper bounds known from shapes."""

    kernel: Any
    """What `triton.jit` made."""

    grid: tuple[int, ...]
    arguments: Mapping[str, Any]
    """Tensors, numbers, and None for a tensor that the constants say is not used."""

    constants: Mapping[str, Any]
    num_warps: int = 4
    num_stages: int = 2

    def run(self) -> None:
        if 0 in self.grid:
            return
        self.kernel[self.grid](**self.arguments, **self.constants, num_warps=self.num_warps, num_stages=self.num_stages)
