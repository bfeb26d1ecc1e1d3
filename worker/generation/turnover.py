"""How fast an engine's places change hands: what has to be queued so that none is empty while more are claimed."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

WINDOW = 10.0  # seconds over which ends are averaged: those of equally long requests come all at once
AHEAD = 1.0  # seconds of ends that are queued: several claims, and no long wait for what has a higher priority


class Turnover:
    """Counts sequences that ended in the last `WINDOW` seconds in which there was work."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self._began = clock()
        self._ends: deque[tuple[float, int]] = deque()
        self._num_ends = 0

    def begin(self) -> None:
        """Work came to an engine that had none. A rest shorter than `AHEAD` is a wait for a claim, and counts."""
        now = self._clock()
        if not self._ends or now - self._ends[-1][0] > AHEAD:
            self._began = now
            self._ends.clear()
            self._num_ends = 0

    def count(self, ended: int) -> None:
        """So many sequences have just ended."""
        if ended > 0:
            self._ends.append((self._clock(), ended))
            self._num_ends += ended

    @property
    def ahead(self) -> int:
        """How many sequences end in `AHEAD` seconds, at the mean rate of the window."""
        now = self._clock()
        while self._ends and self._ends[0][0] < now - WINDOW:
            self._num_ends -= self._ends.popleft()[1]
        return int(self._num_ends * AHEAD / min(WINDOW, max(AHEAD, now - self._began)))
