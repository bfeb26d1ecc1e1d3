"""Which implementation of an op runs: the Triton kernel, or its fallback in plain torch.

Every public op of this package asks `use_triton` and takes the same arguments and gives the same result either way.
"""

from __future__ import annotations

import torch


def use_triton(tensor: torch.Tensor) -> bool:
    """True on a GPU. Triton's interpreter on the CPU is for tests, which replace this function.

    Ops call it through this module, so that one replacement reaches all of them.
    """
    return tensor.is_cuda
