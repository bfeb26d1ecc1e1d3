"""The writer: settles outcomes in groups, one fenced transaction each."""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable

from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from jobs.database import brief
from jobs.queries.settling import ClaimToken, Outcome, settle
from worker.generation.lease import Lease
from worker.generation.vital_thread import OnCrash, VitalThread

logger = logging.getLogger(__name__)

GROUP = 1000  # outcomes in one transaction at most
GROUP_BYTES = 16 << 20  # of their bodies, after which a group takes no other: a statement has to fit into Postgres
RETRY_AFTER = 1.0  # seconds


class Writer:
    """Takes outcomes from the engine thread and puts them into Postgres from a thread of its own.

    An outcome waits at most `interval` seconds for others to share its transaction, or until `flush_soon()` is called
    because the engine is idle. While Postgres is away outcomes are kept; the claim loop bounds them, since it claims
    nothing while many are `unwritten`. A repeat after a lost reply writes nothing twice, because of `settle`'s fence.
    """

    def __init__(
        self,
        database: Database,
        lease: Lease,
        *,
        interval: float,
        on_crash: OnCrash,
        on_all_written: Callable[[], None] = lambda: None,
    ) -> None:
        self._database = database
        self._lease = lease
        self._interval = interval
        self._on_all_written = on_all_written
        self._outcomes: deque[Outcome] = deque()
        self._arrived = threading.Condition()
        self._closing = threading.Event()
        self._flush_now = threading.Event()
        self._in_flight: list[Outcome] = []
        self.thread = VitalThread("writer", self._run, on_crash)

    def start(self) -> None:
        self.thread.start()

    def put(self, outcome: Outcome) -> None:
        """Hand over an outcome. Never blocks on the database."""
        with self._arrived:
            self._outcomes.append(outcome)
            self._arrived.notify_all()

    def flush_soon(self) -> None:
        """Write what is there now: nothing is under way that it could wait for."""
        self._flush_now.set()

    def unwritten(self) -> set[ClaimToken]:
        """The requests whose outcomes are not known to be in Postgres yet."""
        with self._arrived:
            return {outcome.token for outcome in (*self._in_flight, *self._outcomes)}

    def flush(self, timeout: float) -> bool:
        """Wait until everything is written. False where that took longer than `timeout` seconds."""
        with self._arrived:
            return self._arrived.wait_for(lambda: not self._outcomes and not self._in_flight, timeout)

    def close(self, timeout: float) -> bool:
        """Write what is left and end. False where that took longer than `timeout` seconds; the rest is not written."""
        self._closing.set()
        self._flush_now.set()
        with self._arrived:
            self._arrived.notify_all()
        self.thread.join(timeout)
        return not self.thread.is_alive()

    def _run(self) -> None:
        while True:
            self.thread.note_waiting()
            with self._arrived:
                self._arrived.wait_for(lambda: self._outcomes or self._closing.is_set())
                if not self._outcomes:
                    return
            # Others that finish in the next moments share the transaction.
            self._flush_now.wait(self._interval)
            if not self._closing.is_set():
                self._flush_now.clear()
            with self._arrived:
                group = self._in_flight = self._next_group()
            self._write(group)
            with self._arrived:
                self._in_flight = []
                is_all = not self._outcomes
                self._arrived.notify_all()
            if is_all:
                self._on_all_written()

    def _next_group(self) -> list[Outcome]:
        group: list[Outcome] = []
        size = 0
        while self._outcomes and len(group) < GROUP and size < GROUP_BYTES:
            group.append(self._outcomes.popleft())
            size += len(group[-1].body)
        return group

    def _write(self, group: list[Outcome]) -> None:
        while True:
            self.thread.note_progress()
            # Without a good lease nothing is written. A worker that lost it for good finds the fence closed afterwards.
            if self._lease.is_good:
                try:
                    with self._database.begin() as connection:
                        settled = settle(connection, group)
                except SQLAlchemyError as error:
                    logger.warning("%d results wait, Postgres does not take them: %s", len(group), brief(error))
                else:
                    if settled.written < len(group):
                        logger.info("%d results were not wanted any more", len(group) - settled.written)
                    return
            elif self._closing.is_set():
                logger.warning("%d results are left to other workers: the lease is over", len(group))
                return
            time.sleep(RETRY_AFTER)
