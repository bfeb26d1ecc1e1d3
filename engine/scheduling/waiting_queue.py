"""The queue of sequences that are not in the batch."""

from __future__ import annotations

import heapq

from engine.scheduling.sequence import Sequence, Status

_Entry = tuple[tuple[int, int, int], Sequence]


class WaitingQueue:
    """A heap by order of service. Each operation costs O(log n), also for an abort in the middle of a million.

    A sequence that is aborted stays in the heap until it surfaces, or until the dead outnumber the living.
    """

    def __init__(self) -> None:
        self._heap: list[_Entry] = []
        self._num_dead = 0

    def __len__(self) -> int:
        return len(self._heap) - self._num_dead

    def push(self, sequence: Sequence) -> None:
        heapq.heappush(self._heap, (sequence.key, sequence))

    def peek(self) -> Sequence:
        """The next in order; the queue must not be empty."""
        self._bury()
        return self._heap[0][1]

    def pop(self) -> Sequence:
        self._bury()
        return heapq.heappop(self._heap)[1]

    def discard(self, sequence: Sequence) -> None:
        """Take a queued sequence out. Its status must have left WAITING before."""
        assert sequence.status is not Status.WAITING
        self._num_dead += 1
        if self._num_dead > 64 and self._num_dead * 2 > len(self._heap):
            self._heap = [entry for entry in self._heap if entry[1].status is Status.WAITING]
            heapq.heapify(self._heap)
            self._num_dead = 0

    def _bury(self) -> None:
        while self._heap and self._heap[0][1].status is not Status.WAITING:
            heapq.heappop(self._heap)
            self._num_dead -= 1

    def check(self) -> None:
        """Audit; raises AssertionError."""
        dead = sum(sequence.status is not Status.WAITING for _, sequence in self._heap)
        if dead != self._num_dead:
            raise AssertionError(f"{dead} dead sequences are queued, {self._num_dead} are counted")
        if len({key for key, _ in self._heap}) != len(self._heap):
            raise AssertionError("a sequence is queued twice")
        for _, sequence in self._heap:
            if sequence.status is Status.WAITING and (sequence.num_computed_tokens or sequence.table.blocks):
                raise AssertionError("a waiting sequence has something in the KV cache")
