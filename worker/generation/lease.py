"""This process's right to hold and write requests, and the clock that takes it away.

What becomes of the requests when the lease in Postgres runs out: `jobs.queries.rescue`.
"""

from __future__ import annotations

import threading
import time
from uuid import UUID


class Lease:
    """The worker's id in Postgres, and since when it was last known to be good.

    The lease itself is Postgres' word (`workers.lease_expires_at`). This is the cautious copy: measured on the
    monotonic clock from before the heartbeat was sent, and over `fence_after` seconds later, well ahead of the lease.
    """

    def __init__(self, *, fence_after: float) -> None:
        self._fence_after = fence_after
        self._lock = threading.Lock()
        self._worker_id: UUID | None = None
        self._good_since = 0.0
        self._is_over = False

    def take(self, worker_id: UUID, began: float) -> None:
        """A registration or heartbeat of `worker_id` that was begun at `began` (`time.monotonic()`) was good."""
        with self._lock:
            if not self._is_over:
                self._worker_id = worker_id
                self._good_since = began

    def lose(self) -> None:
        """Postgres says that this worker's row was ended."""
        with self._lock:
            self._worker_id = None

    def end(self) -> UUID | None:
        """End the lease for good, also against a heartbeat that is under way. Returns the worker's last id."""
        with self._lock:
            self._is_over = True
            ended, self._worker_id = self._worker_id, None
            return ended

    @property
    def worker_id(self) -> UUID | None:
        """This process's id as a worker, or None before it registered and between two registrations."""
        with self._lock:
            return self._worker_id

    @property
    def is_good(self) -> bool:
        """Whether this process may still claim and write."""
        with self._lock:
            return self._worker_id is not None and time.monotonic() - self._good_since < self._fence_after
