"""Where a request's time goes, from `Engine.add` to its end: a few readings of a clock, none for a token."""

from __future__ import annotations

import time
from collections.abc import Callable

from engine.outputs import RequestTiming

Clock = Callable[[], float]


class RequestClock:
    """Is told when a request moves on. With several completions a phase begins with the first that enters it.

    added ── grammar ── queued ── (queue) ── admitted ── prefill ── first token ── decode ── ended
                                                 └── preempted, while none of its completions is in the batch ──┘
    """

    __slots__ = (
        "_added",
        "_admitted",
        "_clock",
        "_first_token",
        "_in_batch",
        "_lost",
        "_lost_before_token",
        "_out_since",
        "_preemptions",
        "_queued",
    )

    def __init__(self, clock: Clock = time.monotonic) -> None:
        self._clock = clock
        self._added = self._queued = clock()
        self._admitted: float | None = None
        self._first_token: float | None = None
        self._in_batch = 0  # completions
        self._out_since: float | None = None  # preempted, and none is in the batch
        self._lost = self._lost_before_token = 0.0  # seconds preempted
        self._preemptions = 0

    @property
    def has_token(self) -> bool:
        return self._first_token is not None

    def compiled(self) -> None:
        """Its grammar is there."""
        self._queued = self._clock()

    def admitted(self) -> None:
        """A completion enters the batch."""
        self._in_batch += 1
        if self._admitted is None:
            self._admitted = self._clock()
        elif self._out_since is not None:
            self._lost += self._clock() - self._out_since
            self._out_since = None

    def preempted(self) -> None:
        """A completion leaves the batch, and will come back."""
        self._preemptions += 1
        self._in_batch -= 1
        if self._in_batch == 0:
            self._out_since = self._clock()

    def left(self) -> None:
        """A completion leaves the batch for good."""
        self._in_batch -= 1

    def sampled(self) -> None:
        """The first token is known; of several steps at once, when the host looks at them."""
        self._first_token = self._clock()
        self._lost_before_token = self._lost

    def timing(self) -> RequestTiming:
        """The phases of a request that ends now."""
        now = self._clock()
        if self._admitted is None:
            # It waits still, or failed before its grammar was there.
            return RequestTiming(grammar=self._queued - self._added, queue=now - self._queued)
        lost = self._lost + (0.0 if self._out_since is None else now - self._out_since)
        first_token = now if self._first_token is None else self._first_token
        lost_before_token = lost if self._first_token is None else self._lost_before_token
        return RequestTiming(
            grammar=self._queued - self._added,
            queue=self._admitted - self._queued,
            prefill=first_token - self._admitted - lost_before_token,
            decode=now - first_token - (lost - lost_before_token),
            preempted=lost,
            preemptions=self._preemptions,
        )
