"""What nobody waits for: uploads that were cut, jobs that are old, rows of deleted jobs, bells to ring again."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import Connection, text


def waiting_jobs(connection: Connection, *, limit: int) -> list[tuple[UUID, str]]:
    """`(job_id, model)` of jobs with requests that wait, one a model: their workers may have missed the bell."""
    rows = connection.execute(
        text(
            "SELECT DISTINCT ON (j.model) j.id, j.model FROM jobs j "
            "WHERE j.state = 'in_progress' AND j.ended_at IS NULL "
            "  AND EXISTS (SELECT 1 FROM requests r WHERE r.job_id = j.id AND r.state = 'pending') "
            "ORDER BY j.model, j.id LIMIT :limit"
        ),
        {"limit": limit},
    )
    return [(row.id, row.model) for row in rows]


def delete_job(connection: Connection, tenant_id: UUID, job_id: UUID) -> bool:
    """Hide a job at its end from now on; `remove_deleted` takes its rows. False where there is none to hide."""
    return (
        connection.execute(
            text(
                "UPDATE jobs SET deleted_at = clock_timestamp() WHERE id = :job_id AND tenant_id = :tenant_id "
                "AND ended_at IS NOT NULL AND deleted_at IS NULL"
            ),
            {"job_id": job_id, "tenant_id": tenant_id},
        ).rowcount
        == 1
    )


def collect_abandoned(connection: Connection, *, staging_timeout: float) -> int:
    """Give up uploads that stored nothing for `staging_timeout` seconds: cut, or their API process is gone."""
    # Their keys are free again, so that a retry of the same request can succeed.
    count: int = connection.execute(
        text(
            "WITH abandoned AS ( "
            "  UPDATE jobs SET deleted_at = clock_timestamp() WHERE state = 'validating' AND deleted_at IS NULL "
            "    AND staged_at < clock_timestamp() - make_interval(secs => :timeout) RETURNING id "
            "), freed AS (DELETE FROM idempotency_keys k USING abandoned a WHERE k.job_id = a.id) "
            "SELECT count(*) FROM abandoned"
        ),
        {"timeout": staging_timeout},
    ).scalar_one()
    return count


def retire_old(connection: Connection, *, retention: float) -> int:
    """Hide jobs that ended longer than `retention` seconds ago."""
    return connection.execute(
        text(
            "UPDATE jobs SET deleted_at = clock_timestamp() WHERE deleted_at IS NULL "
            "AND ended_at < clock_timestamp() - make_interval(secs => :retention)"
        ),
        {"retention": retention},
    ).rowcount


def remove_deleted(connection: Connection, *, limit: int) -> bool:
    """Remove up to `limit` lines of one deleted job, the job last. False where nothing was left to remove."""
    # Two couriers take different jobs.
    job_id = connection.execute(
        text("SELECT id FROM jobs WHERE deleted_at IS NOT NULL ORDER BY deleted_at LIMIT 1 FOR UPDATE SKIP LOCKED")
    ).scalar()
    if job_id is None:
        return False
    removed = 0
    for table in ("requests", "bodies", "results"):
        removed += connection.execute(
            text(
                f"DELETE FROM {table} WHERE ctid = ANY(ARRAY("
                f"SELECT ctid FROM {table} WHERE job_id = :job_id LIMIT :limit))"
            ),
            {"job_id": job_id, "limit": limit},
        ).rowcount
    if removed == 0:
        # Events, deliveries and idempotency keys go with the row.
        connection.execute(text("DELETE FROM jobs WHERE id = :job_id"), {"job_id": job_id})
    return True


def forget_workers(connection: Connection, *, retention: float) -> int:
    """Drop rows of workers that ended longer than `retention` seconds ago."""
    return connection.execute(
        text(
            "DELETE FROM workers WHERE ended_at < clock_timestamp() - make_interval(secs => :retention) "
            "AND NOT EXISTS (SELECT 1 FROM requests r WHERE r.worker_id = workers.id AND r.state = 'running')"
        ),
        {"retention": retention},
    ).rowcount
