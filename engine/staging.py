"""Memory for weights that stay only until they are packed.

Fresh memory costs more time than what is written to it, and what the C library keeps of freed weights of several sizes
leaves holes. So a weight that is gone leaves its memory to the next of the same size.
"""

from __future__ import annotations

import sys
from collections import defaultdict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Bytes: less is not worth it, and more is given back at once.
_LEAST, _MOST = 2**20, 2**26
# Of a buffer that no tensor uses: ours, the loop's, and the one that counts.
_IDLE = 3


class Staging:
    """Hands out memory on the CPU. What a tensor of it still uses is nobody else's."""

    def __init__(self) -> None:
        self._buffers: dict[int, list[npt.NDArray[np.uint8]]] = defaultdict(list)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor with anything in it."""
        size = shape.numel() * dtype.itemsize
        if not _LEAST <= size <= _MOST:
            return torch.empty(shape, dtype=dtype)
        buffers = self._buffers[size]
        for buffer in buffers:
            if sys.getrefcount(buffer) == _IDLE:
                break
        else:
            buffer = np.empty(size, np.uint8)
            buffers.append(buffer)
        return torch.from_numpy(buffer).view(dtype).view(shape)
