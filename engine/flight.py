"""A burst that has been started and not been looked at.

Where the runner works by itself, the next burst is started before the last one's tokens are looked at:

    device   | burst 1       | burst 2       | burst 3       |
    host     start 1, start 2, settle 1 ......, start 3, settle 2 ....

The second goes on from rows that the first left on the device. What the host finds in the first's tokens comes too late
for it: a sequence that a stop string ended goes on for nothing, and one that left the batch does too. Neither can harm
anybody. They write beyond what was accepted, into blocks that were theirs when the burst started; whoever gets such a
block later is started later, and so runs, and writes, after them.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from engine.batch import Burst, Decoding
from engine.scheduled import Scheduled
from engine.sequence import Status


@dataclass(frozen=True, slots=True)
class Flight:
    shares: Sequence[Scheduled]
    burst: Burst
    decoding: Decoding
    started: float
    """By `time.perf_counter`."""

    def arrivals(self, drawn: npt.NDArray[np.int64]) -> Iterator[tuple[Scheduled, list[int]]]:
        """What was drawn for each sequence that is still where it was when the burst started."""
        for share, entry, row in zip(self.shares, self.burst.entries, drawn.tolist(), strict=True):
            sequence = share.sequence
            if sequence.status is Status.RUNNING and sequence.admission == entry.admission:
                yield share, row

    def beyond(self) -> list[Scheduled] | None:
        """The shares of the burst that could follow without a look at this one; None if it would not be the same
        sequences, those that come to their greatest length in this one aside."""
        shares = []
        for share, entry in zip(self.shares, self.burst.entries, strict=True):
            sequence = share.sequence
            if sequence.status is not Status.RUNNING or sequence.admission != entry.admission:
                return None
            if share.tokens_left > self.burst.num_steps:
                shares.append(share.after(self.burst.num_steps))
        return shares
