"""The claim loop: takes as many requests as the engine has room for, when notified or at the next poll."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Collection, Sequence
from typing import Protocol
from uuid import UUID

from sqlalchemy import Engine as Database
from sqlalchemy.exc import SQLAlchemyError

from jobs.database import brief
from jobs.errors import LeaseLost
from jobs.queries.claiming import Claim, ClaimedRequest, claim, claims_of, release
from jobs.queries.demand import read_demand
from jobs.queries.settling import ClaimToken
from jobs.queries.traces import job_traces
from jobs.queries.workers import turn_to
from jobs.settings import Settings
from worker.generation.claim_spans import ClaimSpans
from worker.generation.lease import Lease
from worker.generation.turns import Turns
from worker.generation.vital_thread import OnCrash, VitalThread

logger = logging.getLogger(__name__)

MOST_UNWRITTEN = 10_000  # results; while Postgres takes no more of them, nothing is claimed


class Consumer(Protocol):
    """The side of the worker's engines that the claim loop sees."""

    @property
    def names(self) -> Sequence[str]:
        """The models that are served in turn."""

    @property
    def present(self) -> str | None:
        """The model whose turn it is; None while it is being loaded."""

    def switch_to(self, model: str) -> None:
        """End the present model's turn, of which nothing runs any more, and begin another's. Returns at once."""

    def free_capacity(self) -> int:
        """How many more requests the engine wants queued now."""

    def live_capacity(self) -> int:
        """How many more requests may be queued whose callers wait."""

    def held(self) -> Sequence[ClaimedRequest]:
        """The requests that are in the engine or on their way to it."""

    def submit(self, requests: Sequence[ClaimedRequest]) -> Sequence[ClaimedRequest]:
        """Turn requests into tokens and queue them. Returns those that were not taken."""

    def abort(self, requests: Sequence[ClaimedRequest]) -> None:
        """Drop requests without an outcome: this worker's claims of them are over."""


class ClaimLoop:
    """Claims from a thread of its own, so that tokenising and Postgres never hold up the engine.

    `unwritten` tells which requests are finished and not written yet. `turns` decides between several models.
    """

    def __init__(
        self,
        database: Database,
        lease: Lease,
        settings: Settings,
        *,
        consumer: Consumer,
        turns: Turns | None = None,
        unwritten: Callable[[], Collection[ClaimToken]],
        on_crash: OnCrash,
        spans: ClaimSpans | None = None,
    ) -> None:
        self._database = database
        self._lease = lease
        self._settings = settings
        self._consumer = consumer
        self._turns = turns
        self._spans = spans
        self._unwritten = unwritten
        self._wake = threading.Event()
        self._is_closing = False
        self._runs_solo = False
        self._found_all = False
        self._must_reconcile = True
        self._reconciled_at = 0.0  # monotonic
        self._on_drained: Callable[[], None] | None = None  # set while it pauses
        self.thread = VitalThread("claims", self._run, on_crash)

    def start(self) -> None:
        self.thread.start()

    def notify(self) -> None:
        """Look now: there may be new work, or what runs may be wanted no more."""
        self._must_reconcile = True
        self._wake.set()

    def claim_again_if_more(self) -> None:
        """Claim now if the last claim left work behind: the engine has room again."""
        if not self._found_all:
            self._wake.set()

    def pause(self, on_drained: Callable[[], None]) -> None:
        """Claim nothing more for now. `on_drained` is called once everything that was claimed is written."""
        self._on_drained = on_drained
        self._wake.set()

    def resume(self) -> None:
        """Claim again."""
        self._on_drained = None
        self._wake.set()

    def stop(self) -> None:
        """Claim nothing more. Takes no lock, so that a signal's handler may call it."""
        self._is_closing = True

    def close(self) -> None:
        """Stop, and wait: a claim that is under way is given back, or has reached the engine."""
        self.stop()
        self._wake.set()
        if self.thread.is_alive():
            self.thread.join(timeout=self._settings.lease)

    def _run(self) -> None:
        while not self._is_closing:
            self._wake.clear()
            self.thread.note_progress()
            try:
                self._reconcile_where_due()
                self.thread.note_progress()
                took = self._claim()
            except LeaseLost:
                took = 0  # the heartbeat finds out too, and starts anew
            except SQLAlchemyError as error:
                logger.warning("no claim: %s", brief(error))
                took = 0
                self._must_reconcile = True
            self.thread.note_waiting()
            if took == 0:
                self._wake.wait(self._settings.poll_interval)

    def _reconcile_where_due(self) -> None:
        """Once in a poll's time, so that no claim for an engine that takes many a second waits for it; and at once
        after a notification or an error."""
        now = time.monotonic()
        if self._must_reconcile or now - self._reconciled_at >= self._settings.poll_interval:
            self._must_reconcile = False
            self._reconcile_claims()
            self._reconciled_at = now

    def _reconcile_claims(self) -> None:
        """Make what this worker holds and what Postgres says it holds the same.

        Requests that were cancelled, expired or freed need no more of the engine's time: they are aborted. A claim
        whose commit succeeded while its answer was lost gave this worker requests that it never saw: they go back.
        """
        worker_id = self._lease.worker_id
        if worker_id is None:
            return
        held = self._consumer.held()
        with self._database.connect() as connection:
            claimed = claims_of(connection, worker_id)
        lost = [request for request in held if request.token not in claimed]
        if lost:
            self._consumer.abort(lost)
            self._note_given_back(lost)
        # In this order: a request goes from the engine to the writer to Postgres, and leaves a place after it has
        # reached the next. What was settled since `claimed` was read stops at the fence of `release`.
        unseen = claimed.difference(request.token for request in self._consumer.held()).difference(self._unwritten())
        if unseen:
            with self._database.begin() as connection:
                given_back = release(connection, unseen)
            if given_back:
                logger.warning(
                    "%d requests were claimed in a transaction whose answer was lost; they go back", given_back
                )

    def _claim(self) -> int:
        worker_id = self._lease.worker_id
        # What is finished and not written yet would be charged, too, if a request that runs alone ended the process. In
        # this order: a request reaches the writer before it leaves the engine.
        is_idle = not self._consumer.held() and not self._unwritten()
        on_drained = self._on_drained
        if on_drained is not None:
            if is_idle:
                self._on_drained = _no_news
                on_drained()
            return 0
        model = self._consumer.present
        if worker_id is None or model is None or not self._lease.is_good or (self._runs_solo and not is_idle):
            return 0
        if self._turns is not None and not self._keeps_turn(self._turns, worker_id, model, is_idle=is_idle):
            return 0
        self._runs_solo = False
        writable = MOST_UNWRITTEN - len(self._unwritten())
        capacity = min(self._consumer.free_capacity(), self._settings.claim_limit, writable)
        live_capacity = min(self._consumer.live_capacity(), self._settings.claim_limit, writable)
        if capacity <= 0 and live_capacity <= 0:
            return 0
        claimed = self._take(worker_id, model, max(0, capacity), max(0, live_capacity), is_idle)
        self._found_all = len(claimed.requests) < capacity and not claimed.is_cut
        if not claimed.requests:
            return 0
        if self._is_closing:
            with self._database.begin() as connection:
                release(connection, [request.token for request in claimed.requests])
            self._note_given_back(claimed.requests)
            return 0
        self._runs_solo = claimed.is_solo
        postponed = self._consumer.submit(claimed.requests)
        if postponed:
            with self._database.begin() as connection:
                release(connection, [request.token for request in postponed])
            self._note_given_back(postponed)
        return len(claimed.requests)

    def _keeps_turn(self, turns: Turns, worker_id: UUID, model: str, *, is_idle: bool) -> bool:
        """Whether the present model's turn goes on. If not, no line of it is claimed, and an idle worker switches."""
        with self._database.begin() as connection:
            demands = read_demand(connection, worker_id, self._consumer.names)
            following = turns.following(model, demands)
            if following is None:
                return True
            if not is_idle:
                return False
            turned = turn_to(connection, worker_id, following, beside_others=demands[following].is_served)
        if turned:
            turns.end_turn(model)
            self._consumer.switch_to(following)
        else:
            self.notify()  # another worker was quicker: what it leaves is looked at now
        return False

    def _take(self, worker_id: UUID, model: str, capacity: int, live_capacity: int, is_idle: bool) -> Claim:
        with self._database.begin() as connection:
            claimed = claim(
                connection,
                worker_id,
                model,
                limit=capacity,
                live_limit=live_capacity,
                max_bytes=self._settings.claim_bytes,
                is_idle=is_idle,
                solo_after_deaths=self._settings.solo_after_deaths,
            )
            traces = {}
            if self._spans is not None:
                traces = job_traces(connection, {request.job_id for request in claimed.requests})
        if self._spans is not None:
            self._spans.begin(claimed, model, traces)
        return claimed

    def _note_given_back(self, requests: Sequence[ClaimedRequest]) -> None:
        if self._spans is not None:
            self._spans.give_back(requests)


def _no_news() -> None:
    """In place of what was called once."""
