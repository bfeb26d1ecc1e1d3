"""A job's progress is written by the transactions that claim, settle and reap: minutes, failures by kind, events."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from uuid import UUID

import pytest

from jobs.fingerprints import GROUPS_A_JOB, OTHER, Failure
from jobs.queries import job_events
from jobs.queries.claiming import ClaimedRequest
from jobs.queries.rescue import reap_worker
from jobs.queries.settling import Outcome, settle, settle_open
from jobs.states import RequestState
from jobs.tables.fleet import NO_WORKER
from tests.support.rows import ANSWER, Rows, answered


@pytest.fixture(autouse=True)
def _oracle(rows: Rows) -> Iterator[None]:
    """Hold the rows against the oracle after each test."""
    yield
    rows.check()


def fail(rows: Rows, claimed: Sequence[ClaimedRequest], failures: Sequence[Failure]) -> int:
    outcomes = [
        Outcome(request.token, RequestState.FAILED, ANSWER, failure=failure)
        for request, failure in zip(claimed, failures, strict=True)
    ]
    with rows.database.begin() as connection:
        return settle(connection, outcomes).written


def events(rows: Rows, job_id: UUID) -> list[tuple[object, ...]]:
    found = rows.query("SELECT number, kind, detail FROM job_events WHERE job_id = :id ORDER BY number", id=job_id)
    return [tuple(row) for row in found]


def test_minutes_count_what_was_settled(rows: Rows) -> None:
    first, second = rows.job(5, tenant="a"), rows.job(2, tenant="b")
    claimed = rows.claim(rows.worker()).requests
    rows.settle(claimed[:4])
    rows.settle(claimed[4:], RequestState.FAILED)
    for job_id, lines in ((first, 5), (second, 2)):
        job = rows.job_row(job_id)
        (sums,) = rows.query(
            "SELECT sum(lines), sum(failed), sum(prompt_tokens), sum(cached_tokens), sum(completion_tokens),"
            " count(*) FROM job_minutes WHERE job_id = :id",
            id=job_id,
        )
        assert tuple(sums)[:5] == (
            lines,
            job.failed,
            job.prompt_tokens,
            job.cached_tokens,
            job.completion_tokens,
        )
        assert sums[5] <= 2  # the test may cross from one minute into the next


def test_minutes_count_no_line_that_the_fence_stops(rows: Rows) -> None:
    job_id = rows.job(2)
    claimed = rows.claim(rows.worker()).requests
    rows.settle(claimed)
    rows.settle(claimed)
    assert rows.query("SELECT sum(lines) FROM job_minutes WHERE job_id = :id", id=job_id)[0][0] == 2


def test_days_count_lines_by_tenant_and_by_the_worker_that_held_them(rows: Rows) -> None:
    rows.job(5, tenant="a")
    rows.job(2, tenant="b")
    first, second = rows.worker(), rows.worker()
    claimed = rows.claim(first, 5).requests
    rows.settle(claimed[:3])
    rows.settle(claimed[3:], RequestState.FAILED)
    rows.settle(claimed)  # the fence stops these
    rows.settle(rows.claim(second).requests)
    cancelled = rows.job(4, tenant="b")
    rows.cancel(cancelled, tenant="b")
    rows.settle_due()
    counted: dict[tuple[str, object], tuple[int, int]] = {}
    for row in rows.query(
        "SELECT t.name, d.worker_id, sum(d.lines)::int, sum(d.failed)::int FROM tenant_days d"
        " JOIN tenants t ON t.id = d.tenant_id GROUP BY 1, 2"
    ):
        counted[str(row[0]), row[1]] = (row[2], row[3])  # type: ignore[assignment]
    assert sum(lines for lines, _ in counted.values()) == 11
    assert sum(failed for _, failed in counted.values()) == 2
    assert {worker for _, worker in counted} == {first, second, NO_WORKER}
    assert counted["b", NO_WORKER] == (4, 0)


def test_day_has_each_kind_of_failure_once(rows: Rows) -> None:
    rows.job(3)
    rows.job(2, tenant="b")
    claimed = rows.claim(rows.worker()).requests
    kinds = [Failure.of("too_long", "1 token"), Failure.of("broken", "no reason")]
    fail(rows, claimed[:2], kinds)
    fail(rows, claimed[2:], [kinds[0]] * 3)
    found = rows.query("SELECT DISTINCT tenant_id, fingerprint FROM tenant_failures")
    assert {row.fingerprint for row in found} == {kind.fingerprint for kind in kinds}
    assert len({row.tenant_id for row in found}) == 2


def test_failures_are_grouped_by_kind(rows: Rows) -> None:
    job_id = rows.job(6)
    claimed = rows.claim(rows.worker()).requests
    long = [Failure.of("too_long", f"{tokens} tokens") for tokens in (10, 200, 3000)]
    fail(rows, claimed[:3], [long[0], Failure.of("broken", "no reason"), long[1]])
    fail(rows, claimed[3:4], [long[2]])
    rows.settle(claimed[4:])
    groups = rows.query(
        "SELECT fingerprint, code, message, lines, first_line, last_at > first_at AS went_on FROM failure_groups"
        " WHERE job_id = :id ORDER BY lines DESC",
        id=job_id,
    )
    assert [tuple(row)[1:] for row in groups] == [
        ("too_long", "# tokens", 3, 1, True),
        ("broken", "no reason", 1, 2, False),
    ]
    by_line = rows.query("SELECT line, fingerprint FROM results WHERE job_id = :id ORDER BY line", id=job_id)
    alike, other = groups[0].fingerprint, groups[1].fingerprint
    assert [row.fingerprint for row in by_line] == [alike, other, alike, alike, None, None]


def test_failures_that_the_fence_stops_are_not_counted(rows: Rows) -> None:
    rows.job(2)
    claimed = rows.claim(rows.worker()).requests
    failure = Failure.of("broken", "no reason")
    assert fail(rows, claimed, [failure] * 2) == 2
    assert fail(rows, claimed, [failure] * 2) == 0
    assert [row.lines for row in rows.query("SELECT lines FROM failure_groups")] == [2]


def test_failures_of_too_many_kinds_share_a_group(rows: Rows) -> None:
    job_id = rows.job(GROUPS_A_JOB + 5)
    claimed = rows.claim(rows.worker(), limit=GROUPS_A_JOB + 5).requests
    kinds = [Failure(f"kind_{number}", "") for number in range(GROUPS_A_JOB + 3)]
    fail(rows, claimed[:-2], kinds)
    # One of the first kinds goes on being counted, a late one does not get a group of its own.
    fail(rows, claimed[-2:], [kinds[0], kinds[-1]])
    groups = {row.fingerprint: row.lines for row in rows.query("SELECT fingerprint, lines FROM failure_groups")}
    assert len(groups) == GROUPS_A_JOB + 1
    assert groups[OTHER] == 4
    assert groups[kinds[0].fingerprint] == 2
    counted = rows.query("SELECT fingerprint, count(*) AS lines FROM results GROUP BY fingerprint")
    assert {row.fingerprint: row.lines for row in counted} == groups
    assert rows.job_row(job_id).failed == GROUPS_A_JOB + 5


def test_results_say_when_and_where_a_line_ended(rows: Rows) -> None:
    job_id, worker_id = rows.job(3), rows.worker()
    claimed = rows.claim(worker_id, limit=2).requests
    with rows.database.begin() as connection:
        settle(connection, [replace(answered(claimed[0]), is_truncated=True), answered(claimed[1])])
    rows.execute("UPDATE jobs SET state = 'cancelling' WHERE id = :id", id=job_id)
    with rows.database.begin() as connection:
        settle_open(connection, job_id, limit=10)
    found = rows.query(
        "SELECT r.line, r.worker_id, r.is_truncated, q.claimed_at <= r.settled_at AS in_order"
        " FROM results r JOIN requests q USING (job_id, line) ORDER BY line"
    )
    assert [tuple(row) for row in found] == [
        (1, worker_id, True, True),
        (2, worker_id, False, True),
        (3, None, False, None),
    ]


def test_first_claim_of_a_job_is_an_event(rows: Rows) -> None:
    job_id, worker_id = rows.job(4), rows.worker()
    rows.claim(worker_id, limit=1)
    rows.claim(rows.worker(), limit=1)
    ((number, kind, detail),) = events(rows, job_id)
    assert (number, kind) == (job_events.FIRST_CLAIM, "claimed")
    assert detail == {"worker": str(worker_id), "host": "test", "device": "cpu"}


def test_lost_worker_is_an_event_of_each_job_that_it_held(rows: Rows) -> None:
    first, second, waiting = rows.job(3, tenant="a"), rows.job(2, tenant="b"), rows.job(2, tenant="c")
    worker_id = rows.worker()
    rows.execute("UPDATE jobs SET paused_at = clock_timestamp() WHERE id = :id", id=waiting)
    rows.claim(worker_id)
    rows.lapse(worker_id)
    with rows.database.begin() as connection:
        assert reap_worker(connection, max_deaths=3) is not None
    for job_id, lines in ((first, 3), (second, 2)):
        _, (number, kind, detail) = events(rows, job_id)
        assert (number, kind) == (2, "worker_lost")
        assert isinstance(detail, dict)
        assert (detail["worker"], detail["lines"]) == (str(worker_id), lines)
    assert events(rows, waiting) == []


def test_given_up_lines_are_grouped(rows: Rows) -> None:
    rows.job(2)
    worker_id = rows.worker()
    rows.claim(worker_id)
    rows.lapse(worker_id)
    with rows.database.begin() as connection:
        reap_worker(connection, max_deaths=1)
    assert [(row.code, row.lines) for row in rows.query("SELECT code, lines FROM failure_groups")] == [
        ("worker_died", 2)
    ]


def test_events_of_a_job_are_bounded(rows: Rows, monkeypatch: pytest.MonkeyPatch) -> None:
    job_id = rows.job(1)
    monkeypatch.setattr(job_events, "MOST", 4)
    with rows.database.begin() as connection:
        for turn in range(6):
            job_events.add(connection, job_id, "priority", {"to": turn})
    assert [number for number, _, _ in events(rows, job_id)] == [2, 3, 4]


def test_claim_passes_over_a_paused_job(rows: Rows) -> None:
    paused, other = rows.job(2), rows.job(2)
    rows.execute("UPDATE jobs SET paused_at = clock_timestamp() WHERE id = :id", id=paused)
    worker_id = rows.worker()
    assert {request.job_id for request in rows.claim(worker_id).requests} == {other}
    rows.execute("UPDATE requests SET deaths = 2 WHERE job_id = :id", id=paused)
    assert rows.claim(worker_id).requests == ()
    rows.execute("UPDATE jobs SET paused_at = NULL")
    assert {request.job_id for request in rows.claim(worker_id, is_idle=True).requests} == {paused}
