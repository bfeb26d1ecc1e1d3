"""Ranks that capture graphs together, as threads around made-up devices."""

from __future__ import annotations

import threading

import pytest
import torch

from engine.device.agreed_capture import AgreedCapture
from engine.device.cuda_graphs import CapturedRunner, Work
from tests.support.rank_threads import Meeting, ThreadGroup

ROOM = 100


class Device:
    """Has so much memory, of which a graph takes one, and raises instead of some captures."""

    def __init__(self, free: int, errors: dict[int, RuntimeError]) -> None:
        self.free = free
        self.errors = errors
        self.captures = 0

    def free_bytes(self) -> int:
        return self.free

    def capture(self, work: Work) -> Work:
        self.captures += 1
        if self.captures in self.errors:
            raise self.errors[self.captures]
        self.free -= 1
        return work


def captured_by(devices: list[Device]) -> list[list[int]]:
    """The keys of four that each rank has a graph for, or runs without."""
    meeting = Meeting(len(devices))
    runs: list[list[int]] = [[] for _ in devices]

    def work(rank: int, key: int) -> None:
        # As a sum in a layer: all ranks must come here, and with the same key.
        parts = ThreadGroup(meeting, rank)._exchange(torch.tensor(key))
        assert all(int(part) == key for part in parts)
        runs[rank].append(key)

    def serve(rank: int) -> None:
        try:
            runner = CapturedRunner(AgreedCapture(devices[rank], ThreadGroup(meeting, rank)), ROOM)
            for key in range(4):
                if not runner.prepare(key, lambda key=key: work(rank, key)):  # type: ignore[misc]
                    break
            runs[rank].append(sum(runner._failures.values()))
            runs[rank].append(len(runner._graphs))
        except BaseException:
            meeting.barrier.abort()
            raise

    threads = [threading.Thread(target=serve, args=(rank,)) for rank in range(len(devices))]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return runs


@pytest.mark.parametrize(
    ("errors", "num_graphs"),
    [({}, 4), ({2: RuntimeError("a slip")}, 3), ({2: torch.OutOfMemoryError("full")}, 1)],
    ids=["none", "failure", "memory"],
)
def test_graph_that_one_rank_cannot_capture_is_kept_by_none(errors: dict[int, RuntimeError], num_graphs: int) -> None:
    one, other = captured_by([Device(ROOM, {}), Device(ROOM - 3, errors)])
    assert one == other
    assert one[-1] == num_graphs
