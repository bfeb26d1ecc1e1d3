"""Requests of workers that died or ended, against the real Postgres."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from uuid import UUID

import orjson
import pytest
from sqlalchemy import Connection

from jobs.queries.claiming import claim, release
from jobs.queries.rescue import reap_worker, release_dead_worker
from jobs.queries.workers import end
from tests.support.processes import await_condition
from tests.support.rows import MODEL, Rows


@pytest.fixture(autouse=True)
def _oracle(rows: Rows) -> Iterator[None]:
    """Hold the rows against the oracle after each test."""
    yield
    rows.check()


def test_worker_is_not_reaped_before_its_lease_is_over(rows: Rows) -> None:
    rows.job(1)
    rows.claim(rows.worker())
    assert rows.reap() is None


def test_request_runs_alone_then_is_given_up_when_its_workers_die(rows: Rows) -> None:
    job_id = rows.job(3)

    def die_with(limit: int, *, is_idle: bool = True) -> list[int]:
        worker_id = rows.worker()
        claim = rows.claim(worker_id, limit=limit, is_idle=is_idle)
        rows.lapse(worker_id)
        assert rows.reap() is not None
        return [request.line for request in claim.requests]

    assert die_with(2) == [1, 2]
    assert die_with(1) == [1]
    # Line 1 saw two deaths: now only an idle worker may have it, and it gets nothing else beside it.
    worker_id = rows.worker()
    busy = rows.claim(worker_id, limit=10, is_idle=False)
    assert (busy.requests, busy.wants_idle) == ((), True)
    alone = rows.claim(worker_id, limit=10, is_idle=True)
    assert alone.is_solo
    assert [request.line for request in alone.requests] == [1]
    # While it is tried, its neighbours go to others.
    assert [request.line for request in rows.claim(rows.worker(), limit=10).requests] == [2, 3]
    rows.lapse(worker_id)
    assert rows.reap() == (worker_id, 0, 1)
    assert rows.states(job_id) == ["failed", "running", "running"]
    error = orjson.loads(bytes(rows.query("SELECT body FROM results")[0].body))["error"]
    assert error["code"] == "worker_died"


def test_job_ends_when_its_last_request_is_given_up(rows: Rows) -> None:
    job_id, worker_id = rows.job(1), rows.worker()
    rows.claim(worker_id)
    rows.lapse(worker_id)
    with rows.database.begin() as connection:
        assert reap_worker(connection, max_deaths=1) is not None
    job = rows.job_row(job_id)
    assert (job.state, job.failed) == ("completed", 1)


def test_deaths_are_counted_for_suspects_only(rows: Rows) -> None:
    rows.job(4)
    worker_id = rows.worker()
    held = rows.claim(worker_id).requests
    with rows.database.begin() as connection:
        suspects = [request.token for request in held[1:3]]
        assert release_dead_worker(connection, worker_id, max_deaths=3, suspects=suspects).freed == 4
    deaths = rows.query("SELECT state, deaths FROM requests ORDER BY line")
    assert [(row.state, row.deaths) for row in deaths] == [("pending", n) for n in (0, 1, 1, 0)]
    events = rows.query("SELECT line, epoch, kind, worker_id FROM line_events ORDER BY line")
    kinds = ("given_back", "lost", "lost", "given_back")
    assert [tuple(row) for row in events] == [(line, 1, kind, worker_id) for line, kind in enumerate(kinds, 1)]
    rows.check()


def test_concurrent_reapers_reap_each_worker_once(rows: Rows) -> None:
    rows.job(40)
    for _ in range(8):
        worker_id = rows.worker()
        rows.claim(worker_id, limit=5)
        rows.lapse(worker_id)
    start = threading.Barrier(4)

    def reap() -> list[UUID]:
        start.wait()
        mine = []
        while (reaped := rows.reap()) is not None:
            mine.append(reaped[0])
        return mine

    with ThreadPoolExecutor(4) as pool:
        reaped = [worker_id for mine in pool.map(lambda _: reap(), range(4)) for worker_id in mine]
    assert len(reaped) == len(set(reaped)) == 8
    assert [(row.deaths, row.count) for row in rows.query("SELECT deaths, count(*) FROM requests GROUP BY 1")] == [
        (1, 40)
    ]


@pytest.mark.parametrize("how", [release_dead_worker, end], ids=["release_dead_worker", "end"])
def test_end_of_a_worker_waits_for_its_claim(rows: Rows, how: Callable[..., object]) -> None:
    # Else the claim's rows would be left with an owner that no reaper looks at any more.
    job_id, worker_id = rows.job(2), rows.worker()

    def end_it() -> None:
        with rows.database.begin() as connection:
            how(connection, worker_id, **({"max_deaths": 3} if how is release_dead_worker else {}))

    with ThreadPoolExecutor(1) as pool:
        with _claim_under_way(rows, worker_id):
            ending = pool.submit(end_it)
            rows.await_blocked()
        ending.result()
    assert rows.states(job_id) == ["pending", "pending"]


def test_reaper_passes_by_a_worker_whose_claim_is_under_way(rows: Rows) -> None:
    rows.job(2)
    worker_id = rows.worker(lease=1.0)
    with _claim_under_way(rows, worker_id):
        await_condition(lambda: _is_over(rows, worker_id), "end of the lease")
        assert rows.reap() is None
    assert rows.reap() == (worker_id, 2, 0)


def test_epochs_strictly_rise(rows: Rows) -> None:
    job_id = rows.job(1)
    epochs = []
    for how in ("give back", "reap", "end", "give back"):
        worker_id = rows.worker()
        claimed = rows.claim(worker_id, solo_after_deaths=9).requests
        epochs.append(claimed[0].epoch)
        with rows.database.begin() as connection:
            if how == "give back":
                release(connection, [request.token for request in claimed])
            elif how == "end":
                end(connection, worker_id)
        if how == "reap":
            rows.lapse(worker_id)
            rows.reap()
    assert epochs == [1, 2, 3, 4]
    assert rows.states(job_id) == ["pending"]


@contextmanager
def _claim_under_way(rows: Rows, worker_id: UUID) -> Iterator[Connection]:
    """A claim of everything, not yet committed."""
    with rows.database.begin() as connection:
        assert claim(connection, worker_id, MODEL.name, limit=100, is_idle=True, solo_after_deaths=2).requests
        yield connection


def _is_over(rows: Rows, worker_id: UUID) -> bool:
    statement = "SELECT 1 FROM workers WHERE id = :id AND lease_expires_at < clock_timestamp()"
    return bool(rows.query(statement, id=worker_id))
