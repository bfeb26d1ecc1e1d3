"""Requests and jobs end, against the real Postgres: the fence, the races, the counters, the one event."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from uuid import UUID

import orjson
import pytest

from jobs.queries.claiming import ClaimedRequest
from jobs.queries.settling import ClaimToken, error_body, settle
from jobs.states import RequestState
from tests.support.rows import ANSWER, Rows, answered

RECEIVER = "https://receiver.example/hook"


@pytest.fixture(autouse=True)
def _oracle(rows: Rows) -> Iterator[None]:
    """Hold the rows against the oracle after each test."""
    yield
    rows.check()


def test_settle_numbers_and_counts_a_group(rows: Rows) -> None:
    job_id, worker_id = rows.job(5), rows.worker()
    claimed = rows.claim(worker_id).requests
    settled = rows.settle(claimed[3:])
    assert settled.written == 2
    assert settled.ended_jobs == ()
    rows.settle(claimed[:1], RequestState.FAILED)
    job = rows.job_row(job_id)
    assert (job.completed, job.failed, job.last_seq, job.state) == (2, 1, 3, "in_progress")
    assert (job.prompt_tokens, job.cached_tokens, job.completion_tokens) == (12, 3, 6)
    results = rows.query("SELECT seq, line, state, body FROM results ORDER BY seq")
    assert [(row.seq, row.line, row.state) for row in results] == [
        (1, 4, "completed"),
        (2, 5, "completed"),
        (3, 1, "failed"),
    ]
    assert bytes(results[0].body) == ANSWER


def test_settle_stores_any_byte_of_a_body(rows: Rows) -> None:
    rows.job(1)
    (request,) = rows.claim(rows.worker()).requests
    body = bytes(range(256))
    with rows.database.begin() as connection:
        settle(connection, [replace(answered(request), body=body)])
    assert bytes(rows.query("SELECT body FROM results")[0].body) == body


def test_settle_writes_nothing_when_the_group_is_empty(rows: Rows) -> None:
    with rows.database.begin() as connection:
        assert settle(connection, []).written == 0


def test_settle_ends_every_job_of_a_group(rows: Rows) -> None:
    jobs = [rows.job(2, tenant=tenant) for tenant in ("a", "b", "c")]
    settled = rows.settle(rows.claim(rows.worker()).requests)
    assert settled.written == 6
    assert set(settled.ended_jobs) == set(jobs)


@pytest.mark.parametrize(
    "what_is_stale",
    [
        lambda token: token._replace(epoch=token.epoch - 1),
        lambda token: token._replace(epoch=token.epoch + 1),
        lambda token: token._replace(holder=UUID(int=1)),
        lambda token: token._replace(holder=None),
        lambda token: token._replace(line=99),
        lambda token: token._replace(job_id=UUID(int=1)),
    ],
    ids=["older epoch", "newer epoch", "another's", "pending", "no such line", "no such job"],
)
def test_settle_leaves_out_a_stale_outcome(rows: Rows, what_is_stale: Callable[[ClaimToken], ClaimToken]) -> None:
    job_id = rows.job(2)
    first, second = rows.claim(rows.worker()).requests
    with rows.database.begin() as connection:
        stale = replace(answered(first), token=what_is_stale(first.token))
        settled = settle(connection, [stale, answered(second)])
    assert settled.written == 1
    assert rows.states(job_id) == ["running", "completed"]


def test_settle_writes_nothing_when_a_group_is_repeated(rows: Rows) -> None:
    job_id = rows.job(2)
    claimed = rows.claim(rows.worker()).requests
    assert rows.settle(claimed).written == 2
    again = rows.settle(claimed)
    assert (again.written, again.ended_jobs) == (0, ())
    assert rows.job_row(job_id).last_seq == 2


def test_settle_writes_nothing_of_a_reaped_worker(rows: Rows) -> None:
    job_id, zombie, heir = rows.job(4), rows.worker(), rows.worker()
    stale = rows.claim(zombie).requests
    rows.lapse(zombie)
    assert rows.reap() == (zombie, 4, 0)
    fresh = rows.claim(heir).requests
    assert [request.epoch for request in fresh] == [2, 2, 2, 2]
    assert rows.settle(stale).written == 0
    assert rows.settle(fresh).written == 4
    assert rows.job_row(job_id).completed == 4


def test_settle_writes_the_newer_of_two_claims_in_one_group(rows: Rows) -> None:
    # Postgres was away, the worker registered anew, and both lives' answers wait in its writer.
    rows.job(2)
    first, second = rows.worker(), rows.worker()
    stale = rows.claim(first).requests
    rows.lapse(first)
    rows.reap()
    fresh = rows.claim(second).requests
    with rows.database.begin() as connection:
        settled = settle(connection, [answered(request) for pair in zip(stale, fresh, strict=True) for request in pair])
    assert settled.written == 2


def test_settle_writes_an_outcome_once_when_the_group_holds_it_twice(rows: Rows) -> None:
    rows.job(1)
    (request,) = rows.claim(rows.worker()).requests
    with rows.database.begin() as connection:
        assert settle(connection, [answered(request), answered(request)]).written == 1


@pytest.mark.parametrize("attempt", range(5))
def test_concurrent_writers_end_a_job_once(rows: Rows, attempt: int) -> None:
    job_id = rows.job(2, webhook=RECEIVER)
    one, two = (rows.claim(rows.worker(), limit=1).requests for _ in range(2))
    start = threading.Barrier(2)

    def write(claimed: tuple[ClaimedRequest, ...]) -> int:
        with rows.database.begin() as connection:
            start.wait()
            return len(settle(connection, [answered(request) for request in claimed]).ended_jobs)

    with ThreadPoolExecutor(2) as pool:
        assert sum(pool.map(write, [one, two])) == 1
    job = rows.job_row(job_id)
    assert (job.state, job.completed, job.last_seq) == ("completed", 2, 2)
    assert len(rows.query("SELECT 1 FROM events")) == 1
    assert len(rows.query("SELECT 1 FROM deliveries")) == 1


def test_settle_waits_for_another_writer_of_the_job(rows: Rows) -> None:
    # Without the lock on the job's row each would see the other's request as open, and the job would never end.
    job_id = rows.job(2)
    one, two = (rows.claim(rows.worker(), limit=1).requests for _ in range(2))
    with ThreadPoolExecutor(1) as pool:
        with rows.database.begin() as connection:
            assert settle(connection, [answered(one[0])]).ended_jobs == ()
            second = pool.submit(rows.settle, two)
            rows.await_blocked()
        assert second.result().ended_jobs == (job_id,)


def test_concurrent_writers_of_many_jobs_never_deadlock(rows: Rows) -> None:
    for _ in range(4):
        rows.job(40)
    groups = []
    for _ in range(8):
        worker_id = rows.worker()
        groups.append([rows.claim(worker_id, limit=5).requests for _ in range(4)])
    start = threading.Barrier(8)

    def write(mine: list[tuple[ClaimedRequest, ...]]) -> None:
        start.wait()
        for number, claimed in enumerate(mine):
            # Each in another order.
            outcomes = [answered(request) for request in claimed]
            with rows.database.begin() as connection:
                settle(connection, outcomes[::-1] if number % 2 else outcomes)

    with ThreadPoolExecutor(8) as pool:
        list(pool.map(write, groups))
    assert {row.state for row in rows.query("SELECT state FROM jobs")} == {"completed"}


def test_job_is_completed_when_lines_failed(rows: Rows) -> None:
    job_id = rows.job(2)
    rows.settle(rows.claim(rows.worker()).requests, RequestState.FAILED)
    job = rows.job_row(job_id)
    assert (job.state, job.failed) == ("completed", 2)
    assert job.ended_at is not None


def test_ended_job_has_no_delivery_without_a_webhook(rows: Rows) -> None:
    rows.finish(rows.job())
    assert [row.type for row in rows.query("SELECT type FROM events")] == ["job.completed"]
    assert rows.query("SELECT 1 FROM deliveries") == []


def test_ended_job_has_no_delivery_of_an_event_that_was_not_asked_for(rows: Rows) -> None:
    job_id = rows.job(webhook=RECEIVER)
    rows.execute("UPDATE jobs SET webhook_events = ARRAY['job.expired']")
    rows.finish(job_id)
    assert rows.query("SELECT 1 FROM deliveries") == []


def test_error_body_is_a_result_line() -> None:
    assert orjson.loads(error_body("a_code", "Words.")) == {
        "response": None,
        "error": {"code": "a_code", "message": "Words."},
    }
