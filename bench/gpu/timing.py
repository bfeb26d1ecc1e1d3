"""How long work takes on a GPU, without launches and planning, which a step does once for all layers.

A CUDA graph holds what is timed, several times over: its kernels run back to back, as in a step, and the host has no
part in the time. Several sets of inputs take turns, so that no cache helps.
"""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence

import torch

from bench.profiling.peaks import DevicePeaks, seconds_of

IN_A_GRAPH = 16
"""Runs of a piece of work that a graph holds, at least."""


class Stopwatch:
    """Median seconds of a piece of work on a device."""

    def __init__(self, device: torch.device, repeats: int) -> None:
        self._device, self._repeats = device, repeats

    def time(self, works: Sequence[Callable[[], object]]) -> float:
        """Of the same work on several sets of inputs, which take turns."""
        for work in works:
            work()
        if self._device.type != "cuda":
            turns = (works[turn % len(works)] for turn in range(self._repeats))
            return statistics.median(seconds_of(self._device, work) for work in turns)
        count = max(len(works), IN_A_GRAPH)
        graph = torch.cuda.CUDAGraph()
        torch.cuda.synchronize(self._device)
        with torch.cuda.graph(graph):
            for turn in range(count):
                works[turn % len(works)]()
        graph.replay()
        return statistics.median(seconds_of(self._device, graph.replay) for _ in range(self._repeats)) / count


def nearest_limit(flops: float, moved: float, seconds: float, limits: DevicePeaks) -> tuple[str, float]:
    """Which of the two rates keeps the work longer ("copy" or "matmul"), and the share of it that was reached."""
    shares = {
        "copy": moved / seconds / limits.bytes_per_second,
        "matmul": flops / seconds / limits.flops_per_second,
    }
    limit = max(shares, key=lambda name: shares[name])
    return limit, shares[limit]


def input_sets(num_bytes: int) -> int:
    """How many sets of inputs no cache holds."""
    return max(1, min(16, (256 << 20) // num_bytes)) if num_bytes > 1 << 20 else 2
