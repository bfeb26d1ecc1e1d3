"""From the host to the device without waiting."""

from __future__ import annotations

from typing import Any

import numpy.typing as npt
import torch
from torch import Tensor


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """The array on the device; on the CPU it shares the memory.

    To a GPU it goes by way of a pinned copy, a fresh one each time, since the last may still be on its way. Memory that
    is not pinned would be waited for.
    """
    host = torch.from_numpy(array)
    if device.type == "cpu":
        return host
    return host.pin_memory().to(device, non_blocking=True)
