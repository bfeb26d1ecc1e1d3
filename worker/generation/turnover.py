"""How fast an engine's places change hands: what has to be queued so that none is empty while more are claimed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW = 10.0  # seconds over which ends are averaged: those of equally long requests come all at once
AHEAD = 1.0  # seconds of ends that are queued: several claims, and no long wait for what has a higher priority


class Turnover:
    """Counts sequences that ended in the last `WINDOW` seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._ends: deque[tuple[float, int]] = deque()
        self._num_ends = 0

    def count(self, ended: int) -> None:
        """So many sequences have just ended."""
        if ended > 0:
            self._ends.append((self._clock(), ended))
            self._num_ends += ended

    @property
    def ahead(self) -> int:
        """How many sequences end in `AHEAD` seconds, at the mean rate of the window."""
        oldest = self._clock() - WINDOW
        while self._ends and self._ends[0][0] < oldest:
            self._num_ends -= self._ends.popleft()[1]
        return int(self._num_ends * AHEAD / WINDOW)
