"""What a device can do at best: how fast it copies memory and multiplies large matrices, measured on the spot."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch

_REPEATS = 5


@dataclass(frozen=True, slots=True)
class DevicePeaks:
    """What the device reached in this run."""

    bytes_per_second: float
    """Of a large copy; what is read and what is written both count."""

    flops_per_second: float
    """Of a large square matrix product in the model's precision."""


@dataclass(frozen=True, slots=True)
class LimitSizes:
    """How large a copy and a product are measured."""

    copy_bytes: int
    matmul: int
    """Rows and columns."""


ON_GPU = LimitSizes(copy_bytes=256 << 20, matmul=8192)
"""Beyond what caches hold, and small enough for what a KV cache leaves of the memory: 0.9 GiB."""

ON_CPU = LimitSizes(copy_bytes=64 << 20, matmul=512)


def measure_limits(device: torch.device, dtype: torch.dtype, sizes: LimitSizes | None = None) -> DevicePeaks:
    """By the median of a few runs; raises `torch.OutOfMemoryError` where not even that much memory is left."""
    sizes = sizes or (ON_GPU if device.type == "cuda" else ON_CPU)
    with torch.inference_mode():
        copying, multiplying = _copying(device, sizes.copy_bytes), _multiplying(device, dtype, sizes.matmul)
    if device.type == "cuda":
        torch.cuda.empty_cache()
    return DevicePeaks(2 * sizes.copy_bytes / copying, 2 * sizes.matmul**3 / multiplying)


def _copying(device: torch.device, num_bytes: int) -> float:
    source = torch.ones(num_bytes, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    return _median(device, lambda: target.copy_(source))


def _multiplying(device: torch.device, dtype: torch.dtype, size: int) -> float:
    # Zeros would draw less power, and run at a higher clock, than what models hold.
    left, right = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    product = torch.empty_like(left)
    return _median(device, lambda: torch.mm(left, right, out=product))


def seconds_of(device: torch.device, work: Callable[[], object]) -> float:
    """What work takes: on a GPU between two events, the launch of the first kernel with it."""
    if device.type != "cuda":
        began = time.perf_counter()
        work()
        return time.perf_counter() - began
    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))  # type: ignore[no-untyped-call]
    start.record()
    work()
    end.record()
    end.synchronize()
    milliseconds: float = start.elapsed_time(end)
    return milliseconds / 1e3


def _median(device: torch.device, work: Callable[[], object]) -> float:
    work()
    return statistics.median(seconds_of(device, work) for _ in range(_REPEATS))
