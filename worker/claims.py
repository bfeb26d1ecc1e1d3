"""The claim loop: takes as many requests as the engine has room for, when the bell rings or the poll comes round."""

from __future__ import annotations

import logging
import threading
from collections.abc import Sequence
from typing import Protocol
from uuid import UUID

from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from jobs.database import brief
from jobs.errors import LeaseLost
from jobs.queries.claiming import Claim, ClaimedRequest, claim, give_back, still_held
from jobs.settings import Settings
from worker.lease import Lease

logger = logging.getLogger(__name__)


class Consumer(Protocol):
    """The side of the engine owner that the claim loop sees."""

    def room(self) -> int:
        """How many more requests the engine wants queued now."""

    def held(self) -> Sequence[ClaimedRequest]:
        """The requests that are in the engine or on their way to it."""

    def submit(self, requests: Sequence[ClaimedRequest]) -> None:
        """Turn requests into tokens and queue them."""

    def abort(self, requests: Sequence[ClaimedRequest]) -> None:
        """Forget requests: their outcome is somebody else's now."""


class ClaimLoop:
    """Claims from a thread of its own, so that tokenising and Postgres never hold up the engine."""

    def __init__(self, database: Database, lease: Lease, settings: Settings, *, model: str, consumer: Consumer) -> None:
        self._database = database
        self._lease = lease
        self._settings = settings
        self._model = model
        self._consumer = consumer
        self._bell = threading.Event()
        self._closing = threading.Event()
        self._runs_solo = False
        self._found_all = False
        self._thread = threading.Thread(target=self._run, name="claims", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def ring(self) -> None:
        """Look now: there may be new work."""
        self._bell.set()

    def refill(self) -> None:
        """Look now if the last look left work behind: the engine has room again."""
        if not self._found_all:
            self._bell.set()

    def close(self) -> None:
        """Claim nothing more. A claim that is under way is given back, or has reached the engine."""
        self._closing.set()
        self._bell.set()
        if self._thread.is_alive():
            self._thread.join(timeout=self._settings.lease)

    def _run(self) -> None:
        while not self._closing.is_set():
            self._bell.clear()
            try:
                self._drop_what_is_lost()
                took = self._claim()
            except LeaseLost:
                took = 0  # the heartbeat finds out too, and starts anew
            except SQLAlchemyError as error:
                logger.warning("no claim: %s", brief(error))
                took = 0
            if took == 0:
                self._bell.wait(self._settings.poll_interval)

    def _drop_what_is_lost(self) -> None:
        """Requests that were cancelled, expired or freed under us need no more of the engine's time."""
        held = self._consumer.held()
        worker_id = self._lease.worker_id
        if not held or worker_id is None:
            return
        with self._database.connect() as connection:
            ours = still_held(connection, worker_id)
        lost = [
            request for request in held if request.holder != worker_id or (request.job_id, request.line) not in ours
        ]
        if lost:
            self._consumer.abort(lost)

    def _claim(self) -> int:
        worker_id = self._lease.worker_id
        is_idle = not self._consumer.held()
        if worker_id is None or not self._lease.is_good or (self._runs_solo and not is_idle):
            return 0
        self._runs_solo = False
        room = min(self._consumer.room(), self._settings.claim_limit)
        if room <= 0:
            return 0
        claimed = self._take(worker_id, room, is_idle)
        self._found_all = len(claimed.requests) < room
        if not claimed.requests:
            return 0
        if self._closing.is_set():
            with self._database.begin() as connection:
                give_back(connection, claimed.requests)
            return 0
        self._runs_solo = claimed.is_solo
        self._consumer.submit(claimed.requests)
        return len(claimed.requests)

    def _take(self, worker_id: UUID, room: int, is_idle: bool) -> Claim:
        with self._database.begin() as connection:
            return claim(
                connection,
                worker_id,
                self._model,
                limit=room,
                is_idle=is_idle,
                solo_after_deaths=self._settings.solo_after_deaths,
            )
