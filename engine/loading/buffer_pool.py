"""Memory for weights that stay only until they are packed.

Fresh memory costs more time than what is written to it, and what the C library keeps of freed weights of several sizes
leaves holes. So a weight that is gone leaves its memory to the next of the same size.
"""

from __future__ import annotations

import weakref
from collections import defaultdict

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

# Bytes: less is not worth it, and more is given back at once.
_LEAST, _MOST = 2**20, 2**26

Buffer = npt.NDArray[np.uint8]


class BufferPool:
    """Hands out memory on the CPU. A buffer that a tensor still uses is never handed out again."""

    def __init__(self) -> None:
        self._buffers: dict[int, list[tuple[Buffer, weakref.ref[Buffer]]]] = defaultdict(list)

    def empty(self, shape: torch.Size, dtype: torch.dtype) -> Tensor:
        """A tensor with anything in it."""
        size = shape.numel() * dtype.itemsize
        if not _LEAST <= size <= _MOST:
            return torch.empty(shape, dtype=dtype)
        buffers = self._buffers[size]
        place = next((place for place, (_, lease) in enumerate(buffers) if lease() is None), len(buffers))
        buffer = buffers.pop(place)[0] if place < len(buffers) else np.empty(size, np.uint8)
        # Only the tensors made of the view keep it alive.
        lease = buffer.view()
        buffers.append((buffer, weakref.ref(lease)))
        return torch.from_numpy(lease).view(dtype).view(shape)
