"""Running the same work again and again: a CUDA graph where there is a GPU, a plain call elsewhere.

A graph is a callable that reads and writes tensors at fixed places. Capturing one takes longer than running it and
empties torch's caches, so it is done when a model is loaded, or for what comes up later, at its second time. The run
before a capture compiles the kernels.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Callable, Hashable, Iterator
from typing import Protocol

import torch

from kernels.integers import ceil_div

logger = logging.getLogger(__name__)

_STEPS = ((64, 8), (256, 16), (512, 32))
_COARSE = 128
_MOST_FAILURES = 2

Work = Callable[[], None]


def batch_size(count: int) -> int:
    """The size of a graph that `count` rows run in: few sizes, and little padding at any of them.

    1, 2, 4, 8; multiples of 8 to 64, of 16 to 256, of 32 to 512; then of 128, without an end.
    """
    if count <= 8:
        return 1 << (count - 1).bit_length()
    step = next((step for most, step in _STEPS if count <= most), _COARSE)
    return ceil_div(count, step) * step


def batch_sizes(most: int) -> Iterator[int]:
    """All sizes of graphs for up to `most` rows, from the largest down."""
    count = most
    while count > 0:
        yield batch_size(count)
        count = _next_smaller(batch_size(count))


def _next_smaller(size: int) -> int:
    """The largest count that fits into a smaller size."""
    if size <= 8:
        return size // 2
    return size - next((step for most, step in _STEPS if size <= most), _COARSE)


class GraphRunner(Protocol):
    """Runs work that is the same whenever its key is."""

    def run(self, key: Hashable, work: Work) -> None:
        """Start `work`. Tensors from outside that it reads or writes must stay where they are, for one key."""

    def prepare(self, key: Hashable, work: Work) -> bool:
        """Make ready to run `work`, which may be run for it. False where there is no memory for more."""


class EagerRunner:
    """Calls the work, each time."""

    def run(self, key: Hashable, work: Work) -> None:
        del key
        work()

    def prepare(self, key: Hashable, work: Work) -> bool:
        del key, work
        return False


class Capture(Protocol):
    """A device that captures graphs."""

    def free_bytes(self) -> int:
        """The device's memory that nothing has, with what torch holds in reserve given back."""

    def capture(self, work: Work) -> Work:
        """Capture `work`, which has run before; returns what runs it. Raises `RuntimeError` where it cannot be."""


class CudaCapture:
    """Captures with one pool of memory for all graphs of a device."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._pool = torch.cuda.graph_pool_handle()

    def free_bytes(self) -> int:
        torch.cuda.synchronize(self._device)
        torch.cuda.empty_cache()
        free, _ = torch.cuda.mem_get_info(self._device)
        return int(free)

    def capture(self, work: Work) -> Work:
        graph = torch.cuda.CUDAGraph()
        # Other threads may allocate and query during a capture, which by default would end it.
        with torch.cuda.graph(graph, pool=self._pool, capture_error_mode="thread_local"):
            work()
        return graph.replay


class CapturedRunner:
    """Replays graphs, one a key, as far as memory allows; the rest runs eagerly."""

    def __init__(self, device: Capture, max_bytes: int) -> None:
        """No graph is captured once all together have taken `max_bytes` of the device's memory."""
        self._device = device
        self._max_bytes = max_bytes
        self._graphs: dict[Hashable, Work] = {}
        self._seen: set[Hashable] = set()
        self._failures: Counter[Hashable] = Counter()
        self.num_bytes = 0
        """Device memory that graphs have taken: their tensors, and what the driver keeps of them."""

    def run(self, key: Hashable, work: Work) -> None:
        if key in self._graphs:
            self._graphs[key]()
        elif key not in self._seen or not self._may_capture(key) or not self._capture(key, work):
            self._seen.add(key)
            work()

    def prepare(self, key: Hashable, work: Work) -> bool:
        if key not in self._graphs and self._may_capture(key):
            self._seen.add(key)
            work()
            self._capture(key, work)
        return self.num_bytes < self._max_bytes

    def _may_capture(self, key: Hashable) -> bool:
        return self.num_bytes < self._max_bytes and self._failures[key] < _MOST_FAILURES

    def _capture(self, key: Hashable, work: Work) -> bool:
        """Capture and replay once. False where memory does not suffice, or something in the work cannot be captured."""
        before = self._device.free_bytes()
        try:
            replay = self._device.capture(work)
        except RuntimeError as error:
            self._failures[key] += 1
            if ran_out_of_memory(error):
                logger.warning("no memory for a CUDA graph of %s: it runs without one", key)
                self._max_bytes = self.num_bytes
            else:
                # If it is the device that is broken, running without a graph says so.
                logger.warning("no CUDA graph of %s can be captured, it runs without one: %s", key, error)
            return False
        replay()
        self._graphs[key] = replay
        # The first replay makes the driver take what it keeps of a graph.
        self.num_bytes += before - self._device.free_bytes()
        return True


def ran_out_of_memory(error: BaseException | None) -> bool:
    """Whether memory was what lacked: ending a capture that failed raises an error of its own over the first."""
    while error is not None:
        if isinstance(error, torch.OutOfMemoryError):
            return True
        error = error.__cause__ or error.__context__
    return False
