"""Jobs that take lines in several requests until their owner finalizes them. Nothing of one runs before.

Such a job is `validating` and has `open_params`, the parameters of lines to come; it is published as any submission is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.errors import DuplicateCustomId, InvalidInput, JobNotFound, TooManyOpenJobs
from jobs.ids import JOB_PREFIX, public_id
from jobs.queries import audit, creations, submission
from jobs.queries.audit import Actor, AuditAction
from jobs.queries.creations import Claim
from jobs.requests import JobOptions, StagedLine

MOST_OPEN = 100
"""Open jobs of a tenant: what they hold is in no list."""


@dataclass(frozen=True, slots=True)
class OpenJob:
    """A job that takes lines, until `expires_at` unless more come."""

    id: UUID
    model: str
    priority: int
    metadata: dict[str, str]
    name: str | None
    completion_window: int | None
    total: int
    params: bytes
    """`jobs.requests.Params` as JSON."""
    created_at: datetime
    expires_at: datetime


def make(
    connection: Connection, tenant_id: UUID, options: JobOptions, params: bytes, job_id: UUID, claim: Claim | None
) -> None:
    """Open a job that has no line yet. Raises `TooManyOpenJobs`, `AlreadyMade`, `IdempotencyMismatch`."""
    creations.record(connection, claim, job_id, is_standing=_standing(connection, tenant_id))
    # Opens of a tenant take turns, so that each counts those before it. Inserting a row that refers to the tenant does
    # not wait for this lock.
    connection.execute(text("SELECT 1 FROM tenants WHERE id = :id FOR NO KEY UPDATE"), {"id": tenant_id})
    # By the partial index of open jobs.
    count = connection.execute(
        text("""
            SELECT count(*) FROM jobs
            WHERE tenant_id = :tenant_id AND open_params IS NOT NULL AND state = 'validating' AND deleted_at IS NULL
        """),
        {"tenant_id": tenant_id},
    ).scalar_one()
    if count >= MOST_OPEN:
        raise TooManyOpenJobs(MOST_OPEN)
    submission.open_job(connection, tenant_id, options, job_id)
    # What `open_job` does not know of.
    connection.execute(
        text("UPDATE jobs SET open_params = :params WHERE id = :job_id"), {"params": params, "job_id": job_id}
    )


def find(connection: Connection, tenant_id: UUID, job_id: UUID, *, expiry: float) -> OpenJob | None:
    """The tenant's job of that id while it takes lines."""
    # By primary key.
    row = connection.execute(
        text("""
            SELECT id, model, priority, metadata, name, completion_window, total, open_params AS params, created_at,
                   staged_at + make_interval(secs => :expiry) AS expires_at
            FROM jobs
            WHERE id = :job_id AND tenant_id = :tenant_id AND open_params IS NOT NULL AND state = 'validating'
              AND deleted_at IS NULL
        """),
        {"job_id": job_id, "tenant_id": tenant_id, "expiry": expiry},
    ).one_or_none()
    return None if row is None else OpenJob(**row._mapping)


def append(
    connection: Connection,
    tenant_id: UUID,
    job_id: UUID,
    numbered: Callable[[int], Sequence[StagedLine]],
    claim: Claim | None,
) -> int:
    """Store `numbered(total)`, all of it or nothing. Returns how many lines the job has then.

    Raises `JobNotFound` where the job takes none, `DuplicateCustomId` whose line counts these alone, `AlreadyMade`,
    `IdempotencyMismatch`.
    """
    creations.record(connection, claim, job_id, is_standing=_standing(connection, tenant_id))
    total = _lock(connection, tenant_id, job_id)
    lines = numbered(total)
    try:
        if not submission.stage_lines(connection, job_id, lines):
            raise JobNotFound(public_id(JOB_PREFIX, job_id))
    except DuplicateCustomId as error:
        error.line = None if error.line is None else error.line - total
        raise
    return total + len(lines)


def finalize(connection: Connection, tenant_id: UUID, job_id: UUID) -> bool:
    """Publish the job: it takes no more lines, and runs. False if it takes none (any more).

    Raises `InvalidInput` where it has no line.
    """
    try:
        total = _lock(connection, tenant_id, job_id)
    except JobNotFound:
        return False
    if total == 0:
        raise InvalidInput("The job has no lines: append at least one.")
    return submission.publish(connection, job_id)


def give_up(connection: Connection, tenant_id: UUID, job_id: UUID, *, by: Actor | None = None) -> bool:
    """Forget a job that takes lines, with those it has. False if the tenant has no such job."""
    try:
        _lock(connection, tenant_id, job_id)
    except JobNotFound:
        return False
    submission.abandon(connection, job_id)
    audit.record(connection, by, AuditAction.JOB_DELETED, public_id(JOB_PREFIX, job_id), tenant_id=tenant_id)
    return True


def _lock(connection: Connection, tenant_id: UUID, job_id: UUID) -> int:
    # Appends take turns, and a finalization comes before or after each.
    total: int | None = connection.execute(
        text("""
            SELECT total FROM jobs
            WHERE id = :job_id AND tenant_id = :tenant_id AND open_params IS NOT NULL AND state = 'validating'
              AND deleted_at IS NULL
            FOR NO KEY UPDATE
        """),
        {"job_id": job_id, "tenant_id": tenant_id},
    ).scalar()
    if total is None:
        raise JobNotFound(public_id(JOB_PREFIX, job_id))
    return total


def _standing(connection: Connection, tenant_id: UUID) -> Callable[[UUID], bool]:
    def is_standing(job_id: UUID) -> bool:
        # Open, or published since.
        found: bool = connection.execute(
            text("SELECT EXISTS (SELECT 1 FROM jobs WHERE id = :id AND tenant_id = :tenant_id AND deleted_at IS NULL)"),
            {"id": job_id, "tenant_id": tenant_id},
        ).scalar_one()
        return found

    return is_standing
