"""Changes of a job by its owner while it runs: pause, resume, priority, name. Each takes the job's lock."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import Connection, text

from jobs.errors import JobNotOpen
from jobs.ids import JOB_PREFIX, public_id
from jobs.queries import audit, job_events
from jobs.queries.audit import Actor, AuditAction
from jobs.states import JobState


def pause(connection: Connection, tenant_id: UUID, job_id: UUID, *, by: Actor | None = None) -> bool:
    """Let no claim choose the job from now on; what runs goes on. False if this tenant has no such job.

    The completion window goes on. A job that is paused stays as it is. Raises `JobNotOpen`.
    """
    return _set_paused(connection, tenant_id, job_id, is_paused=True, by=by)


def resume(connection: Connection, tenant_id: UUID, job_id: UUID, *, by: Actor | None = None) -> bool:
    """The reverse of `pause`."""
    return _set_paused(connection, tenant_id, job_id, is_paused=False, by=by)


def _set_paused(connection: Connection, tenant_id: UUID, job_id: UUID, *, is_paused: bool, by: Actor | None) -> bool:
    state = _lock(connection, tenant_id, job_id)
    if state is None:
        return False
    if state != JobState.IN_PROGRESS:
        raise JobNotOpen(public_id(JOB_PREFIX, job_id), state)
    # Only where it changes something: each change is one event.
    changed = connection.execute(
        text("""
            UPDATE jobs SET paused_at = CASE WHEN :is_paused THEN clock_timestamp() END
            WHERE id = :job_id AND (paused_at IS NULL) = :is_paused
        """),
        {"job_id": job_id, "is_paused": is_paused},
    )
    if changed.rowcount == 1:
        job_events.add(connection, job_id, "paused" if is_paused else "resumed")
        action = AuditAction.JOB_PAUSED if is_paused else AuditAction.JOB_RESUMED
        audit.record(connection, by, action, public_id(JOB_PREFIX, job_id), tenant_id=tenant_id)
    return True


def change(
    connection: Connection,
    tenant_id: UUID,
    job_id: UUID,
    *,
    priority: int | None,
    name: str | None,
    by: Actor | None = None,
) -> bool:
    """Set what is given. False if this tenant has no such job. Raises `JobNotOpen` for a priority that comes too late.

    The next claim goes by the new priority; lines that run keep the old one.
    """
    state = _lock(connection, tenant_id, job_id)
    if state is None:
        return False
    # What it has now.
    before = connection.execute(text("SELECT priority, name FROM jobs WHERE id = :job_id"), {"job_id": job_id}).one()
    changes: dict[str, object] = {}
    if priority is not None and priority != before.priority:
        if state != JobState.IN_PROGRESS:
            raise JobNotOpen(public_id(JOB_PREFIX, job_id), state)
        job_events.add(connection, job_id, "priority", {"from": before.priority, "to": priority})
        changes["priority"] = priority
    if name is not None and name != before.name:
        job_events.add(connection, job_id, "renamed", {"from": before.name, "to": name})
        changes["name"] = name
    if changes:
        target = public_id(JOB_PREFIX, job_id)
        audit.record(connection, by, AuditAction.JOB_CHANGED, target, tenant_id=tenant_id, detail=changes)
    # Both at once; what is not given stays.
    connection.execute(
        text(
            "UPDATE jobs SET priority = coalesce(:priority, priority), name = coalesce(:name, name) WHERE id = :job_id"
        ),
        {"job_id": job_id, "priority": priority, "name": name},
    )
    return True


def _lock(connection: Connection, tenant_id: UUID, job_id: UUID) -> JobState | None:
    # The lock of `settling.lock_jobs`, on a published job of this tenant.
    state = connection.execute(
        text("""
            SELECT state FROM jobs
            WHERE id = :job_id AND tenant_id = :tenant_id AND in_progress_at IS NOT NULL AND deleted_at IS NULL
            FOR NO KEY UPDATE
        """),
        {"job_id": job_id, "tenant_id": tenant_id},
    ).scalar()
    return None if state is None else JobState(state)
