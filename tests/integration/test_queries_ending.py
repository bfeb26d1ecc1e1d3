"""Jobs that are cancelled or out of time, against the real Postgres."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from uuid import UUID

import orjson
import pytest

from jobs.queries.settling import jobs_to_settle, settle_open
from jobs.states import JobState
from tests.support.rows import Rows

RECEIVER = "https://receiver.example/hook"


@pytest.fixture(autouse=True)
def _oracle(rows: Rows) -> Iterator[None]:
    """Hold the rows against the oracle after each test."""
    yield
    rows.check()


def test_cancelled_job_keeps_finished_results(rows: Rows) -> None:
    job_id, worker_id = rows.job(6), rows.worker()
    running = rows.claim(worker_id, limit=4).requests
    rows.settle(running[:2])
    assert rows.cancel(job_id) is JobState.CANCELLING
    assert rows.claim(worker_id).requests == ()
    with rows.database.begin() as connection:
        assert jobs_to_settle(connection, limit=10) == [job_id]
        settled = settle_open(connection, job_id, limit=100)
    assert (settled.written, settled.ended_jobs) == (4, (job_id,))
    assert rows.states(job_id) == ["completed"] * 2 + ["cancelled"] * 4
    # The worker's answers come too late.
    assert rows.settle(running[2:]).written == 0
    job = rows.job_row(job_id)
    assert (job.state, job.completed, job.cancelled) == ("cancelled", 2, 4)
    body = orjson.loads(bytes(rows.query("SELECT body FROM results WHERE seq = 3")[0].body))
    assert body == {"response": None, "error": {"code": "job_cancelled", "message": body["error"]["message"]}}


def test_settle_open_ends_a_job_in_chunks(rows: Rows) -> None:
    job_id = rows.job(10)
    rows.cancel(job_id)
    written = []
    for _ in range(4):
        with rows.database.begin() as connection:
            written.append(settle_open(connection, job_id, limit=4).written)
    assert written == [4, 4, 2, 0]
    assert rows.job_row(job_id).state == "cancelled"


def test_settle_open_leaves_a_job_that_is_neither_cancelled_nor_late(rows: Rows) -> None:
    job_id = rows.job(2, window="1h")
    with rows.database.begin() as connection:
        assert jobs_to_settle(connection, limit=10) == []
        assert settle_open(connection, job_id, limit=10).written == 0
        assert settle_open(connection, UUID(int=1), limit=10).written == 0


def test_cancel_returns_the_state(rows: Rows) -> None:
    done, staged = rows.job(1), rows.job(1, published=False)
    rows.finish(done)
    running = rows.job(1)
    assert rows.cancel(done) is JobState.COMPLETED
    assert rows.cancel(staged) is None
    assert rows.cancel(running, tenant="stranger") is None
    assert rows.cancel(running) is JobState.CANCELLING
    assert rows.cancel(running) is JobState.CANCELLING


@pytest.mark.parametrize("attempt", range(6))
def test_job_ends_once_when_it_is_cancelled_while_it_completes(rows: Rows, attempt: int) -> None:
    job_id = rows.job(20, webhook=RECEIVER)
    claimed = rows.claim(rows.worker(), limit=20).requests
    start = threading.Barrier(2)

    def complete() -> None:
        start.wait()
        for half in (claimed[:10], claimed[10:]):
            rows.settle(half)

    def cancel() -> None:
        start.wait()
        rows.cancel(job_id)
        with rows.database.begin() as connection:
            settle_open(connection, job_id, limit=100)

    with ThreadPoolExecutor(2) as pool:
        for future in [pool.submit(complete), pool.submit(cancel)]:
            future.result()
    job = rows.job_row(job_id)
    assert job.state in ("completed", "cancelled")
    assert job.completed + job.cancelled == 20
    assert len(rows.query("SELECT 1 FROM events")) == 1


def test_writer_may_end_a_job_that_is_being_cancelled(rows: Rows) -> None:
    job_id = rows.job(2)
    claimed = rows.claim(rows.worker()).requests
    rows.cancel(job_id)
    assert rows.settle(claimed).ended_jobs == (job_id,)
    assert rows.job_row(job_id).state == "cancelled"


def test_job_expires_when_its_window_is_over(rows: Rows) -> None:
    job_id = rows.job(3, window="1h")
    claimed = rows.claim(rows.worker(), limit=2).requests
    rows.settle(claimed[:1])
    rows.execute("UPDATE jobs SET expires_at = clock_timestamp() WHERE id = :id", id=job_id)
    with rows.database.begin() as connection:
        assert jobs_to_settle(connection, limit=10) == [job_id]
        settle_open(connection, job_id, limit=10)
    assert rows.states(job_id) == ["completed", "expired", "expired"]
    assert rows.job_row(job_id).state == "expired"
    assert [row.type for row in rows.query("SELECT type FROM events")] == ["job.expired"]


def test_job_is_completed_when_it_finishes_after_its_window_and_before_the_sweep(rows: Rows) -> None:
    job_id = rows.job(1, window="1h")
    claimed = rows.claim(rows.worker()).requests
    rows.execute("UPDATE jobs SET expires_at = clock_timestamp() WHERE id = :id", id=job_id)
    rows.settle(claimed)
    assert rows.job_row(job_id).state == "completed"
