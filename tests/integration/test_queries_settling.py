"""Requests and jobs end, against the real Postgres: the fence, the races, the counters, the one event."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from uuid import UUID

import orjson
import pytest
from sqlalchemy import Connection

from jobs.queries.claiming import ClaimedRequest, claim, release
from jobs.queries.settling import (
    ClaimToken,
    cancel_job,
    error_body,
    jobs_to_settle,
    reap_worker,
    release_dead_worker,
    settle,
    settle_open,
)
from jobs.queries.workers import end
from jobs.states import JobState, RequestState
from tests.support.processes import await_condition
from tests.support.rows import ANSWER, MODEL, Rows, answered

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
    assert _reap(rows) == (zombie, 4, 0)
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
    _reap(rows)
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
            _await_blocked(rows)
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


# Cancel and expiry


def test_cancelled_job_keeps_finished_results(rows: Rows) -> None:
    job_id, worker_id = rows.job(6), rows.worker()
    running = rows.claim(worker_id, limit=4).requests
    rows.settle(running[:2])
    assert _cancel(rows, job_id) is JobState.CANCELLING
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
    _cancel(rows, job_id)
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
    assert _cancel(rows, done) is JobState.COMPLETED
    assert _cancel(rows, staged) is None
    assert _cancel(rows, running, tenant="stranger") is None
    assert _cancel(rows, running) is JobState.CANCELLING
    assert _cancel(rows, running) is JobState.CANCELLING


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
        _cancel(rows, job_id)
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
    _cancel(rows, job_id)
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


# Death


def test_worker_is_not_reaped_before_its_lease_is_over(rows: Rows) -> None:
    rows.job(1)
    rows.claim(rows.worker())
    assert _reap(rows) is None


def test_request_runs_alone_then_is_given_up_when_its_workers_die(rows: Rows) -> None:
    job_id = rows.job(3)

    def die_with(limit: int, *, is_idle: bool = True) -> list[int]:
        worker_id = rows.worker()
        claim = rows.claim(worker_id, limit=limit, is_idle=is_idle)
        rows.lapse(worker_id)
        assert _reap(rows) is not None
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
    assert _reap(rows) == (worker_id, 0, 1)
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
        while (reaped := _reap(rows)) is not None:
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
            _await_blocked(rows)
        ending.result()
    assert rows.states(job_id) == ["pending", "pending"]


def test_reaper_passes_by_a_worker_whose_claim_is_under_way(rows: Rows) -> None:
    rows.job(2)
    worker_id = rows.worker(lease=0.2)
    with _claim_under_way(rows, worker_id):
        await_condition(lambda: _is_over(rows, worker_id), "end of the lease")
        assert _reap(rows) is None
    assert _reap(rows) == (worker_id, 2, 0)


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
            _reap(rows)
    assert epochs == [1, 2, 3, 4]
    assert rows.states(job_id) == ["pending"]


def test_error_body_is_a_result_line() -> None:
    assert orjson.loads(error_body("a_code", "Words.")) == {
        "response": None,
        "error": {"code": "a_code", "message": "Words."},
    }


def _cancel(rows: Rows, job_id: UUID, *, tenant: str = "default") -> JobState | None:
    tenant_id = rows.tenant(tenant).id
    with rows.database.begin() as connection:
        return cancel_job(connection, tenant_id, job_id)


def _reap(rows: Rows) -> tuple[UUID, int, int] | None:
    with rows.database.begin() as connection:
        buried = reap_worker(connection, max_deaths=3)
    return None if buried is None else (buried.worker_id, buried.freed, buried.given_up)


@contextmanager
def _claim_under_way(rows: Rows, worker_id: UUID) -> Iterator[Connection]:
    """A claim of everything, not yet committed."""
    with rows.database.begin() as connection:
        assert claim(connection, worker_id, MODEL.name, limit=100, is_idle=True, solo_after_deaths=2).requests
        yield connection


def _await_blocked(rows: Rows) -> None:
    """Wait until some connection to this database waits for a lock."""
    statement = "SELECT 1 FROM pg_stat_activity WHERE datname = current_database() AND wait_event_type = 'Lock'"
    await_condition(lambda: bool(rows.query(statement)), "a statement that waits for a lock")


def _is_over(rows: Rows, worker_id: UUID) -> bool:
    statement = "SELECT 1 FROM workers WHERE id = :id AND lease_expires_at < clock_timestamp()"
    return bool(rows.query(statement, id=worker_id))
