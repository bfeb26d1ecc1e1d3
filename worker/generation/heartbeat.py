"""The heartbeat: keeps this worker's lease, and registers anew where it was lost."""

from __future__ import annotations

import logging
import math
import os
import socket
import threading
import time
from collections.abc import Callable, Mapping, Sequence

from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from jobs.database import brief
from jobs.errors import LeaseLost
from jobs.ids import new_id
from jobs.queries import workers
from jobs.queries.workers import WorkerIdentity
from jobs.requests import ModelLimits
from jobs.settings import Settings
from jobs.states import Wanted
from worker.generation.lease import Lease
from worker.generation.rates import Rates
from worker.generation.vital_thread import OnCrash, VitalThread

MINUTE = 60.0  # seconds between two rows of counters

logger = logging.getLogger(__name__)


class Heartbeat:
    """Registers the worker and renews its lease from a thread of its own, beside engine and broker.

    A heartbeat that matches no row means that this worker was taken for dead: the worker registers anew under
    another id, and `on_change` lets the claim loop drop what the old one held. `on_wanted` is told, from this thread,
    what an operator wants of the worker, once for each change. `turn` tells which model's it is.
    """

    def __init__(
        self,
        database: Database,
        lease: Lease,
        settings: Settings,
        *,
        device: str,
        turn: Callable[[], str],
        stats: Callable[[], Mapping[str, object]],
        on_change: Callable[[], None],
        on_wanted: Callable[[Wanted | None], None],
        on_crash: OnCrash,
    ) -> None:
        self._database = database
        self._lease = lease
        self._settings = settings
        self._device = device
        self._turn = turn
        self._stats = stats
        self._on_change = on_change
        self._on_wanted = on_wanted
        self._wanted: Wanted | None = None
        self._rates = Rates()
        self._minute_kept = -math.inf  # monotonic
        self._on_crash = on_crash
        self._closing = threading.Event()
        self.thread: VitalThread | None = None

    def start(self, models: Sequence[ModelLimits]) -> None:
        """Register as a worker of `models`, as soon as Postgres answers, and keep the lease from then on."""
        self.thread = VitalThread("heartbeat", lambda: self._run(models), self._on_crash)
        self.thread.start()

    def stop_beating(self) -> None:
        """Send no more heartbeats. The lease runs out by itself, unless the worker's row is ended."""
        self._closing.set()

    def close(self) -> None:
        """Stop, and wait for a heartbeat that is under way."""
        self.stop_beating()
        if self.thread is not None:
            self.thread.join(timeout=self._settings.lease)

    def _run(self, models: Sequence[ModelLimits]) -> None:
        assert self.thread is not None
        while not self._closing.is_set():
            began = time.monotonic()
            self.thread.note_progress()
            try:
                self._beat(models, began)
            except LeaseLost:
                logger.warning("this worker was taken for dead; it registers anew")
                self._lease.lose()
                continue
            except SQLAlchemyError as error:
                logger.warning("no heartbeat: %s", brief(error))
            self.thread.note_waiting()
            self._closing.wait(max(0.0, self._settings.heartbeat_interval - (time.monotonic() - began)))

    def _beat(self, models: Sequence[ModelLimits], began: float) -> None:
        worker_id = self._lease.worker_id
        wanted = self._wanted
        with self._database.begin() as connection:
            if worker_id is not None:
                stats = self._rates.added_to(self._stats())
                wanted = workers.heartbeat(connection, worker_id, lease=self._settings.lease, stats=stats)
                if began - self._minute_kept >= MINUTE:
                    workers.keep_minute(connection, worker_id)
                    self._minute_kept = began
            else:
                worker_id = new_id()
                identity = WorkerIdentity(worker_id, socket.gethostname(), os.getpid(), self._device)
                first, *others = sorted(models, key=lambda model: model.name != self._turn())
                workers.register(connection, identity, first, others=others, lease=self._settings.lease, wanted=wanted)
        is_new = self._lease.worker_id != worker_id
        self._lease.take(worker_id, began)
        if is_new:
            self._on_change()
        if wanted is not self._wanted:
            self._wanted = wanted
            self._on_wanted(wanted)
