"""Claim, settle, give back, die, cancel, expire in any order, against the real Postgres and a model of what must be."""

from __future__ import annotations

import random
from dataclasses import dataclass, field
from uuid import UUID

import pytest
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    invariant,
    precondition,
    rule,
    run_state_machine_as_test,
)
from sqlalchemy import Connection

from jobs.errors import LeaseLost
from jobs.queries import workers
from jobs.queries.claiming import ClaimedRequest, claim, claims_of, release
from jobs.queries.rescue import reap_worker
from jobs.queries.settling import Outcome, cancel_job, jobs_to_settle, settle, settle_open
from jobs.states import JobState, RequestState
from tests.support.rows import MODEL, Rows, answered

MAX_DEATHS = 3
SOLO = 2

Line = tuple[UUID, int]


@dataclass
class KnownWorker:
    """What a worker believes; once its row is ended it is a zombie, and believes it still."""

    id: UUID
    held: list[ClaimedRequest] = field(default_factory=list)
    is_ended: bool = False


class Claims(RuleBasedStateMachine):
    """Every rule is one transaction on one connection; `Rows` is set by the test."""

    rows: Rows

    def __init__(self) -> None:
        super().__init__()
        self.rows.clear()
        self.workers: list[KnownWorker] = []
        self.jobs: list[UUID] = []
        self.epochs: dict[Line, int] = {}
        self.written: dict[Line, str] = {}  # what was written never changes
        self.deaths: dict[Line, int] = {}

    @initialize(lines=st.integers(1, 6))
    def begin(self, lines: int) -> None:
        self.submit(lines, "a", None)
        self.join()

    @precondition(lambda self: len(self.jobs) < 5)
    @rule(lines=st.integers(1, 6), tenant=st.sampled_from("ab"), window=st.sampled_from([None, "1h"]))
    def submit(self, lines: int, tenant: str, window: str | None) -> None:
        job_id = self.rows.job(lines, tenant=tenant, window=window, webhook="https://receiver.example")
        self.jobs.append(job_id)
        self.epochs |= {(job_id, line): 0 for line in range(1, lines + 1)}
        self.deaths |= {(job_id, line): 0 for line in range(1, lines + 1)}

    @precondition(lambda self: len(self.workers) < 6)
    @rule()
    def join(self) -> None:
        self.workers.append(KnownWorker(self.rows.worker()))

    @rule(data=st.data(), limit=st.integers(1, 4))
    def claim(self, data: st.DataObject, limit: int) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        with self.rows.database.begin() as connection:
            try:
                claimed = claim(
                    connection, worker.id, MODEL.name, limit=limit, is_idle=not worker.held, solo_after_deaths=SOLO
                )
            except LeaseLost:
                assert worker.is_ended
                return
        assert not worker.is_ended
        assert len(claimed.requests) <= limit
        for request in claimed.requests:
            line = (request.job_id, request.line)
            assert line not in self.written
            assert request.epoch > self.epochs[line]
            self.epochs[line] = request.epoch
            assert (self.deaths[line] >= SOLO) == claimed.is_solo
        if claimed.is_solo:
            assert len(claimed.requests) == 1
            assert not worker.held
        worker.held += claimed.requests

    @rule(data=st.data(), state=st.sampled_from([RequestState.COMPLETED, RequestState.FAILED]), shuffle=st.randoms())
    def answer(self, data: st.DataObject, state: RequestState, shuffle: random.Random) -> None:
        """Also what a zombie holds, and sometimes a group that was written before."""
        worker = data.draw(st.sampled_from(self.workers))
        if not worker.held:
            return
        group = data.draw(st.lists(st.sampled_from(worker.held), min_size=1, unique_by=lambda request: request.name))
        outcomes = [answered(request, state) for request in group]
        shuffle.shuffle(outcomes)
        expected = [outcome for outcome in outcomes if self._is_owed(outcome)]
        with self.rows.database.begin() as connection:
            settled = settle(connection, outcomes)
        assert settled.written == len(expected)
        self.written |= {(outcome.token.job_id, outcome.token.line): str(state) for outcome in expected}
        if not data.draw(st.booleans()):  # else the reply was lost, and the worker will repeat itself
            worker.held = [request for request in worker.held if request not in group]

    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        expected = [request for request in worker.held if self._is_owed(answered(request))]
        with self.rows.database.begin() as connection:
            assert release(connection, [request.token for request in worker.held]) == len(expected)
        worker.held = []

    @rule(data=st.data())
    def die(self, data: st.DataObject) -> None:
        """Fall silent and be reaped. It may come back as a zombie: what it held it still believes in."""
        alive = [worker for worker in self.workers if not worker.is_ended]
        if not alive:
            return
        worker = data.draw(st.sampled_from(alive))
        self.rows.lapse(worker.id)
        held = self._held(worker)
        with self.rows.database.begin() as connection:
            buried = reap_worker(connection, max_deaths=MAX_DEATHS)
        assert buried is not None
        assert buried.worker_id == worker.id
        assert buried.freed + buried.given_up == len(held)
        worker.is_ended = True
        for line in held:
            self.deaths[line] += 1
            if self.deaths[line] == MAX_DEATHS:
                self.written[line] = "failed"

    @rule(data=st.data())
    def sign_off(self, data: st.DataObject) -> None:
        alive = [worker for worker in self.workers if not worker.is_ended]
        if not alive:
            return
        worker = data.draw(st.sampled_from(alive))
        held = self._held(worker)
        with self.rows.database.begin() as connection:
            assert workers.end(connection, worker.id) == len(held)
        worker.is_ended = True

    @rule(data=st.data())
    def heartbeat(self, data: st.DataObject) -> None:
        worker = data.draw(st.sampled_from(self.workers))
        with self.rows.database.begin() as connection:
            try:
                workers.heartbeat(connection, worker.id, lease=60, stats={})
            except LeaseLost:
                assert worker.is_ended
            else:
                assert not worker.is_ended

    @rule(data=st.data())
    def cancel(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self.jobs))
        before = self.rows.job_row(job_id)
        with self.rows.database.begin() as connection:
            after = cancel_job(connection, before.tenant_id, job_id)
        assert after == (JobState.CANCELLING if before.ended_at is None else before.state)

    @rule(data=st.data())
    def run_out_of_time(self, data: st.DataObject) -> None:
        job_id = data.draw(st.sampled_from(self.jobs))
        self.rows.execute(
            "UPDATE jobs SET expires_at = clock_timestamp() WHERE id = :id AND expires_at IS NOT NULL", id=job_id
        )

    @rule(limit=st.integers(1, 4))
    def sweep(self, limit: int) -> None:
        with self.rows.database.begin() as connection:
            job_ids = jobs_to_settle(connection, limit=10)
        for job_id in job_ids:
            state = "cancelled" if self.rows.job_row(job_id).state == "cancelling" else "expired"
            open_before = self._open(job_id)
            with self.rows.database.begin() as connection:
                settled = settle_open(connection, job_id, limit=limit)
            closed = open_before - self._open(job_id)
            assert settled.written == len(closed) > 0
            self.written |= dict.fromkeys(closed, state)

    @invariant()
    def rows_make_sense(self) -> None:
        self.rows.check()

    @invariant()
    def what_was_written_stands(self) -> None:
        results = self.rows.query("SELECT job_id, line, state FROM results")
        assert {(row.job_id, row.line): row.state for row in results} == self.written

    @invariant()
    def deaths_are_charged_to_those_who_were_there(self) -> None:
        counted = self.rows.query("SELECT job_id, line, deaths FROM requests WHERE state IN ('pending', 'running')")
        assert all(row.deaths == self.deaths[row.job_id, row.line] for row in counted)

    def _is_owed(self, outcome: Outcome) -> bool:
        """Whether the fence must let this pass: its claim is the newest, and was not released or settled since."""
        row = self.rows.query(
            "SELECT state, epoch, worker_id FROM requests WHERE job_id = :job_id AND line = :line",
            job_id=outcome.token.job_id,
            line=outcome.token.line,
        )[0]
        worker = next(worker for worker in self.workers if worker.id == outcome.token.holder)
        owed = tuple(row) == ("running", outcome.token.epoch, outcome.token.holder)
        assert not (owed and worker.is_ended)
        return owed

    def _held(self, worker: KnownWorker) -> set[Line]:
        with self.rows.database.begin() as connection:
            return _still_held(connection, worker)

    def _open(self, job_id: UUID) -> set[Line]:
        statement = "SELECT line FROM requests WHERE job_id = :id AND state IN ('pending', 'running')"
        return {(job_id, row.line) for row in self.rows.query(statement, id=job_id)}


def _still_held(connection: Connection, worker: KnownWorker) -> set[Line]:
    return {(hold.job_id, hold.line) for hold in claims_of(connection, worker.id)}


def _walk(rows: Rows, examples: int, steps: int) -> None:
    machine = type("ClaimsOnThisDatabase", (Claims,), {"rows": rows})
    run_state_machine_as_test(
        machine,
        settings=settings(
            max_examples=examples,
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
        ),
    )


def test_claims_hold_their_invariants_over_random_operations(rows: Rows) -> None:
    _walk(rows, examples=12, steps=30)


@pytest.mark.slow
@pytest.mark.faults
@pytest.mark.timeout(1200)
def test_claims_hold_their_invariants_over_many_random_operations(rows: Rows) -> None:
    _walk(rows, examples=80, steps=50)
