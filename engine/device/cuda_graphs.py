"""Running the same work again and again: a CUDA graph where there is a GPU, a plain call elsewhere.

A graph is a callable that reads and writes tensors at fixed places. Capturing one takes longer than running it, so it
is captured when its key comes up for the second time; the first run is the warm-up that capturing needs anyway.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Hashable
from typing import Protocol

import torch

logger = logging.getLogger(__name__)

_STEPS = ((64, 8), (256, 16), (512, 32))
_COARSE = 128


def batch_size(count: int) -> int:
    """The size of a graph that `count` rows run in: few sizes, and little padding at any of them.

    1, 2, 4, 8; multiples of 8 to 64, of 16 to 256, of 32 to 512; then of 128, without an end.
    """
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = next((step for most, step in _STEPS if count <= most), _COARSE)
    return -(-count // step) * step


class GraphRunner(Protocol):
    """Runs work that is the same whenever its key is."""

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        """Start `work`. Tensors from outside that it reads or writes must stay where they are, for one key."""


class EagerRunner:
    """Calls the work, each time."""

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        del key
        work()


class CudaGraphRunner:
    """Captures work as CUDA graphs, one a key, with one pool of memory for all."""

    def __init__(self, device: torch.device, max_bytes: int) -> None:
        """The pool grows to `max_bytes`, more or less; what comes up after that runs without a graph."""
        self._device = device
        self._max_bytes = max_bytes
        self._seen: set[Hashable] = set()
        self._graphs: dict[Hashable, torch.cuda.CUDAGraph | None] = {}
        self._pool = torch.cuda.graph_pool_handle()
        self.num_bytes = 0
        """Device memory that capturing has taken."""

    def run(self, key: Hashable, work: Callable[[], None]) -> None:
        if key not in self._seen:
            self._seen.add(key)
            work()
            return
        if key not in self._graphs:
            self._graphs[key] = self._capture(key, work)
        graph = self._graphs[key]
        if graph is None:
            work()
        else:
            graph.replay()

    def _capture(self, key: Hashable, work: Callable[[], None]) -> torch.cuda.CUDAGraph | None:
        """None where memory does not suffice, or something in the work cannot be captured."""
        if self.num_bytes >= self._max_bytes:
            return None
        torch.cuda.synchronize(self._device)
        before = torch.cuda.memory_reserved(self._device)
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, pool=self._pool):
                work()
        except torch.OutOfMemoryError:
            logger.warning("no memory for a CUDA graph of %s: it runs without one", key)
            self._max_bytes = self.num_bytes
            return None
        except RuntimeError as error:
            # If it is the device that is broken, running without a graph says so.
            logger.warning("no CUDA graph of %s can be captured, it runs without one: %s", key, error)
            return None
        self.num_bytes += torch.cuda.memory_reserved(self._device) - before
        return graph
