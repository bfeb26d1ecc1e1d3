"""Housekeeping: lost notifications, interrupted uploads, old jobs, rows of deleted jobs, workers of long ago."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import Connection, text

from jobs.ids import JOB_PREFIX, public_id
from jobs.queries import audit
from jobs.queries.audit import Actor, AuditAction
from jobs.queries.planner import avoid_scans


def waiting_jobs(connection: Connection, *, limit: int) -> list[tuple[UUID, str]]:
    """`(job_id, model)` of the oldest job with pending requests of each model: its notification may be lost."""
    # EXISTS is answered by the partial index of pending requests.
    rows = connection.execute(
        text("""
            SELECT DISTINCT ON (j.model) j.id, j.model
            FROM jobs j
            WHERE j.state = 'in_progress' AND j.ended_at IS NULL AND j.paused_at IS NULL
              AND EXISTS (SELECT 1 FROM requests r WHERE r.job_id = j.id AND r.state = 'pending')
            ORDER BY j.model, j.id
            LIMIT :limit
        """),
        {"limit": limit},
    )
    return [(row.id, row.model) for row in rows]


def delete_job(connection: Connection, tenant_id: UUID, job_id: UUID, *, by: Actor | None = None) -> bool:
    """Hide a job at its end; `remove_deleted` removes its rows. False if there is none to hide."""
    # Only the owner's, and only a job that ended.
    hidden = connection.execute(
        text("""
            UPDATE jobs SET deleted_at = clock_timestamp()
            WHERE id = :job_id AND tenant_id = :tenant_id AND ended_at IS NOT NULL AND deleted_at IS NULL
        """),
        {"job_id": job_id, "tenant_id": tenant_id},
    )
    if hidden.rowcount == 0:
        return False
    audit.record(connection, by, AuditAction.JOB_DELETED, public_id(JOB_PREFIX, job_id), tenant_id=tenant_id)
    return True


def collect_abandoned(connection: Connection, *, staging_timeout: float, open_job_expiry: float) -> int:
    """Give up uploads that stored nothing for `staging_timeout` seconds: interrupted, or their API process died.

    A job that takes lines in several requests is given up where nothing was appended for `open_job_expiry` seconds.
    """
    # Hide the jobs, and free their keys so that a retry of the same request can succeed.
    count: int = connection.execute(
        text("""
            WITH abandoned AS (
                UPDATE jobs SET deleted_at = clock_timestamp()
                WHERE state = 'validating' AND deleted_at IS NULL
                  AND staged_at < clock_timestamp() - make_interval(
                      secs => CASE WHEN open_params IS NULL THEN :timeout ELSE :open_job_expiry END)
                RETURNING id
            ), freed AS (
                DELETE FROM idempotency_keys k USING abandoned a WHERE k.job_id = a.id
            )
            SELECT count(*) FROM abandoned
        """),
        {"timeout": staging_timeout, "open_job_expiry": open_job_expiry},
    ).scalar_one()
    return count


def retire_old(connection: Connection, *, retention: float) -> int:
    """Hide jobs that ended more than `retention` seconds ago. Returns how many."""
    # Ended jobs are in a partial index by their time.
    return connection.execute(
        text("""
            UPDATE jobs SET deleted_at = clock_timestamp()
            WHERE deleted_at IS NULL AND ended_at < statement_timestamp() - make_interval(secs => :retention)
        """),
        {"retention": retention},
    ).rowcount


def remove_deleted(connection: Connection, *, limit: int) -> bool:
    """Remove up to `limit` lines of one deleted job, the job itself last. False if nothing was left to remove."""
    # Two couriers take different jobs.
    job_id = connection.execute(
        text("SELECT id FROM jobs WHERE deleted_at IS NOT NULL ORDER BY deleted_at LIMIT 1 FOR UPDATE SKIP LOCKED")
    ).scalar()
    if job_id is None:
        return False
    # A chunk of each table that has no foreign key to the job.
    removed = connection.execute(
        text("""
            WITH removed_requests AS (
                DELETE FROM requests
                WHERE ctid = ANY(ARRAY(SELECT ctid FROM requests WHERE job_id = :job_id LIMIT :limit))
                RETURNING 1
            ), removed_bodies AS (
                DELETE FROM bodies
                WHERE ctid = ANY(ARRAY(SELECT ctid FROM bodies WHERE job_id = :job_id LIMIT :limit))
                RETURNING 1
            ), removed_results AS (
                DELETE FROM results
                WHERE ctid = ANY(ARRAY(SELECT ctid FROM results WHERE job_id = :job_id LIMIT :limit))
                RETURNING 1
            ), removed_line_events AS (
                DELETE FROM line_events
                WHERE ctid = ANY(ARRAY(SELECT ctid FROM line_events WHERE job_id = :job_id LIMIT :limit))
                RETURNING 1
            )
            SELECT (SELECT count(*) FROM removed_requests)
                 + (SELECT count(*) FROM removed_bodies)
                 + (SELECT count(*) FROM removed_results)
                 + (SELECT count(*) FROM removed_line_events)
        """),
        {"job_id": job_id, "limit": limit},
    ).scalar_one()
    if removed == 0:
        # Events, deliveries and idempotency keys are deleted with the row.
        connection.execute(text("DELETE FROM jobs WHERE id = :job_id"), {"job_id": job_id})
    return True


def forget_minutes(connection: Connection, *, retention: float) -> None:
    """Drop what is kept by minute and by day of workers and of claimed and settled lines, after `retention` seconds."""
    avoid_scans(connection)
    # Each worker's oldest minutes, by primary key.
    connection.execute(
        text("""
            DELETE FROM worker_minutes m USING workers w
            WHERE m.worker_id = w.id AND m.minute < statement_timestamp() - make_interval(secs => :retention)
        """),
        {"retention": retention},
    )
    # The minute, or the day, is the first part of the primary key.
    connection.execute(
        text("DELETE FROM wait_minutes WHERE minute < statement_timestamp() - make_interval(secs => :retention)"),
        {"retention": retention},
    )
    for table in ("tenant_days", "tenant_failures"):
        connection.execute(
            text(f"""
                DELETE FROM {table}
                WHERE day < ((statement_timestamp() - make_interval(secs => :retention)) AT TIME ZONE 'UTC')::date
            """),
            {"retention": retention},
        )


def forget_workers(connection: Connection, *, retention: float) -> int:
    """Drop rows of workers that ended more than `retention` seconds ago. Returns how many."""
    # A worker that still holds requests keeps its row.
    return connection.execute(
        text("""
            DELETE FROM workers w
            WHERE w.ended_at < statement_timestamp() - make_interval(secs => :retention)
              AND NOT EXISTS (SELECT 1 FROM requests r WHERE r.worker_id = w.id AND r.state = 'running')
        """),
        {"retention": retention},
    ).rowcount
