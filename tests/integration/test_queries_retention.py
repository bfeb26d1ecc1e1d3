"""Housekeeping against the real Postgres: cut uploads, old and deleted jobs, old workers, lost notifications."""

from __future__ import annotations

from uuid import UUID

from jobs.queries import reading, retention, submission
from jobs.requests import StagedLine
from tests.support.rows import MODEL, Rows

TABLES = ("jobs", "requests", "bodies", "results", "line_events", "events", "deliveries", "idempotency_keys")


def test_upload_is_collected_when_it_stores_nothing(rows: Rows) -> None:
    cut, alive = rows.job(2, published=False), rows.job(2, published=False)
    rows.execute("UPDATE jobs SET staged_at = clock_timestamp() - interval '1 hour' WHERE id = :id", id=cut)
    tenant_id = rows.tenant().id
    with rows.database.begin() as connection:
        assert submission.reserve(connection, tenant_id, "key", cut).is_ours
    assert _collect(rows) == 1
    assert _collect(rows) == 0
    with rows.database.begin() as connection:
        # The key is free for a retry of the same request.
        assert submission.find_reservation(connection, tenant_id, "key") is None
        # An upload that still goes on learns of it.
        assert not submission.stage_lines(connection, cut, [StagedLine(3, "late", 0, b"{}")])
        assert not submission.publish(connection, cut)
        assert submission.publish(connection, alive)
    _remove(rows, limit=100)
    assert {row.job_id for row in rows.query("SELECT job_id FROM requests")} == {alive}
    rows.check()


def test_upload_is_not_collected_while_it_goes_on(rows: Rows) -> None:
    job_id = rows.job(1, published=False)
    rows.execute("UPDATE jobs SET staged_at = clock_timestamp() - interval '1 hour'")
    with rows.database.begin() as connection:
        assert submission.stage_lines(connection, job_id, [StagedLine(2, "more", 0, b"{}")])
    assert _collect(rows) == 0


def test_published_job_is_not_collected(rows: Rows) -> None:
    rows.job(1)
    rows.execute("UPDATE jobs SET staged_at = clock_timestamp() - interval '1 hour'")
    assert _collect(rows) == 0


def test_deleted_job_is_hidden_at_once_and_removed_in_chunks(rows: Rows) -> None:
    gone, kept = rows.job(10, webhook="https://receiver.example"), rows.job(2)
    rows.finish(gone)
    rows.finish(kept)
    rows.execute(
        "INSERT INTO line_events SELECT job_id, line, epoch, 'lost', clock_timestamp(), gen_random_uuid() FROM requests"
    )
    tenant_id = rows.tenant().id
    with rows.database.begin() as connection:
        assert retention.delete_job(connection, tenant_id, gone)
        assert not retention.delete_job(connection, tenant_id, gone)
        assert reading.get_job(connection, tenant_id, gone) is None
    counts = []
    while _remove_once(rows, limit=4):
        counts.append(_count(rows, gone))
    assert counts == [7, 3, 1, 0]
    for table in TABLES:
        column = "id" if table == "jobs" else "job_id"
        if table != "deliveries":
            assert rows.query(f"SELECT 1 FROM {table} WHERE {column} = :id", id=gone) == [], table
    assert rows.query("SELECT 1 FROM deliveries") == []
    assert rows.states(kept) == ["completed", "completed"]
    rows.check()


def test_job_is_not_deleted_by_a_stranger_or_before_its_end(rows: Rows) -> None:
    job_id = rows.job(1)
    with rows.database.begin() as connection:
        assert not retention.delete_job(connection, rows.tenant().id, job_id)
    rows.finish(job_id)
    stranger = rows.tenant("stranger").id
    with rows.database.begin() as connection:
        assert not retention.delete_job(connection, stranger, job_id)
    assert rows.job_row(job_id).deleted_at is None


def test_two_couriers_remove_different_jobs(rows: Rows) -> None:
    for _ in range(2):
        rows.finish(rows.job(1))
    rows.execute("UPDATE jobs SET deleted_at = clock_timestamp()")
    with rows.database.begin() as one, rows.database.begin() as other:
        assert retention.remove_deleted(one, limit=10)
        assert retention.remove_deleted(other, limit=10)
        assert not _remove_once(rows, limit=10)
    _remove(rows, limit=10)
    assert rows.query("SELECT 1 FROM jobs") == []
    assert rows.query("SELECT 1 FROM requests") == []


def test_jobs_are_retired_when_they_are_old(rows: Rows) -> None:
    old, young, running = rows.job(1), rows.job(1), rows.job(1)
    worker_id = rows.worker()
    for _ in range(2):
        rows.settle(rows.claim(worker_id, limit=1).requests)
    rows.execute("UPDATE jobs SET ended_at = clock_timestamp() - interval '2 days' WHERE id = :id", id=old)
    with rows.database.begin() as connection:
        assert retention.retire_old(connection, retention=86400) == 1
    assert rows.job_row(old).deleted_at is not None
    assert rows.job_row(young).deleted_at is None
    assert rows.job_row(running).deleted_at is None


def test_worker_rows_are_forgotten_when_they_are_old_and_hold_nothing(rows: Rows) -> None:
    rows.job(1)
    alive, recent, long_ago, holding = (rows.worker() for _ in range(4))
    rows.claim(holding)
    rows.execute("UPDATE workers SET ended_at = clock_timestamp() WHERE id = :id", id=recent)
    for worker_id in (long_ago, holding):
        rows.execute("UPDATE workers SET ended_at = clock_timestamp() - interval '2 h' WHERE id = :id", id=worker_id)
    with rows.database.begin() as connection:
        assert retention.forget_workers(connection, retention=3600) == 1
    assert {row.id for row in rows.query("SELECT id FROM workers")} == {alive, recent, holding}


def test_waiting_jobs_are_the_oldest_of_each_model(rows: Rows) -> None:
    taken, waiting, _ = rows.job(1), rows.job(1), rows.job(1)
    rows.job(1, published=False)
    with rows.database.begin() as connection:
        assert retention.waiting_jobs(connection, limit=10) == [(taken, MODEL.name)]
    rows.claim(rows.worker(), limit=1)
    with rows.database.begin() as connection:
        assert retention.waiting_jobs(connection, limit=10) == [(waiting, MODEL.name)]
    rows.claim(rows.worker(), limit=10)
    with rows.database.begin() as connection:
        assert retention.waiting_jobs(connection, limit=10) == []


def _collect(rows: Rows) -> int:
    with rows.database.begin() as connection:
        return retention.collect_abandoned(connection, staging_timeout=60, open_job_expiry=600)


def _remove_once(rows: Rows, *, limit: int) -> bool:
    with rows.database.begin() as connection:
        return retention.remove_deleted(connection, limit=limit)


def _remove(rows: Rows, *, limit: int) -> None:
    while _remove_once(rows, limit=limit):
        pass


def _count(rows: Rows, job_id: UUID) -> int:
    """Rows that are left of a job's requests, and of the job itself."""
    return len(
        rows.query("SELECT 1 FROM requests WHERE job_id = :id UNION ALL SELECT 1 FROM jobs WHERE id = :id", id=job_id)
    )
