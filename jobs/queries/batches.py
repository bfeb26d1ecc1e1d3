"""Batches: a file of lines, the job that it becomes, and the files of its results.

    validating ──▶ failed                           the input has errors; no job
        └────────▶ a job runs ──▶ its end ──▶ finalized, when both files of results are stored

A process that validates or finalizes a batch holds it by `held_until`, which it renews; after its death another takes
over. Every function takes a tenant, but those of that work.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

import orjson
from sqlalchemy import Connection, Row, text

from jobs.ids import BATCH_PREFIX, new_id, public_id
from jobs.queries import audit, webhook_endpoints
from jobs.queries.audit import Actor, AuditAction
from jobs.states import TERMINAL_JOB_STATES, JobState
from jobs.tracing import submitting_trace

OnError = Literal["fail", "skip"]
BatchStatus = Literal[
    "validating", "failed", "in_progress", "finalizing", "completed", "expired", "cancelling", "cancelled"
]


@dataclass(frozen=True, slots=True)
class Counts:
    """Counters of a batch's job."""

    state: JobState
    total: int
    completed: int
    failed: int
    cancelled: int
    expired: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    in_progress_at: datetime
    cancelling_at: datetime | None
    ended_at: datetime | None


@dataclass(frozen=True, slots=True)
class Batch:
    """A batch, and its job once there is one."""

    id: UUID
    tenant_id: UUID
    endpoint: str
    input_file_id: UUID
    completion_window: str
    metadata: dict[str, str] | None
    on_error: OnError
    output_seconds: int | None
    model: str | None
    errors: list[dict[str, Any]] | None
    job_id: UUID | None
    output_file_id: UUID | None
    error_file_id: UUID | None
    created_at: datetime
    expires_at: datetime
    failed_at: datetime | None
    cancelling_at: datetime | None
    finalized_at: datetime | None
    job: Counts | None

    @property
    def status(self) -> BatchStatus:
        """In OpenAI's words."""
        if self.failed_at is not None:
            return "failed"
        if self.job is None:
            return "validating" if self.cancelling_at is None else "cancelled"
        if self.job.state not in TERMINAL_JOB_STATES:
            return "cancelling" if self.job.state == JobState.CANCELLING else "in_progress"
        if self.finalized_at is None:
            return {"completed": "finalizing", "cancelled": "cancelling"}.get(self.job.state, "in_progress")  # type: ignore[return-value]
        return str(self.job.state)  # type: ignore[return-value]

    @property
    def is_terminal(self) -> bool:
        return self.status in ("failed", "completed", "expired", "cancelled")


def _batch(row: Row[Any]) -> Batch:
    columns = dict(row._mapping)
    state = columns.pop("state")
    counters = {
        name: columns.pop(name)
        for name in (
            *("total", "completed", "failed", "cancelled", "expired"),
            *("prompt_tokens", "cached_tokens", "completion_tokens", "in_progress_at", "ended_at"),
        )
    }
    cancelling_at = columns.pop("job_cancelling_at")
    job = None if state is None else Counts(state=JobState(state), cancelling_at=cancelling_at, **counters)
    return Batch(**columns, job=job)


def create(
    connection: Connection,
    tenant_id: UUID,
    *,
    endpoint: str,
    input_file_id: UUID,
    completion_window: str,
    window_seconds: int,
    metadata: dict[str, str] | None,
    on_error: OnError,
    output_seconds: int | None,
) -> Batch | None:
    """A batch whose input is to be validated. None where the file is gone by now."""
    batch_id = new_id()
    # The file is locked, so that it cannot be deleted between the look at it and the batch that keeps it.
    created = connection.execute(
        text("""
            INSERT INTO batches (id, tenant_id, endpoint, input_file_id, completion_window, metadata, on_error,
                                 output_seconds, traceparent, expires_at)
            SELECT :id, :tenant_id, :endpoint, f.id, :completion_window, CAST(:metadata AS jsonb), :on_error,
                   :output_seconds, :traceparent, clock_timestamp() + make_interval(secs => :window_seconds)
            FROM (SELECT id FROM files
                  WHERE id = :input_file_id AND tenant_id = :tenant_id AND deleted_at IS NULL
                  FOR SHARE) f
        """),
        {
            "id": batch_id,
            "tenant_id": tenant_id,
            "endpoint": endpoint,
            "input_file_id": input_file_id,
            "completion_window": completion_window,
            "window_seconds": window_seconds,
            "metadata": None if metadata is None else orjson.dumps(metadata).decode(),
            "on_error": on_error,
            "output_seconds": output_seconds,
            "traceparent": submitting_trace(),
        },
    )
    return None if created.rowcount == 0 else get_batch(connection, tenant_id, batch_id)


def get_batch(connection: Connection, tenant_id: UUID, batch_id: UUID) -> Batch | None:
    """A batch of this tenant."""
    # By primary key, and its job by the job's.
    row = connection.execute(
        text("""
            SELECT b.id, b.tenant_id, b.endpoint, b.input_file_id, b.completion_window, b.metadata, b.on_error,
                   b.output_seconds, b.model, b.errors, b.job_id, b.output_file_id, b.error_file_id,
                   b.created_at, b.expires_at, b.failed_at, b.cancelling_at, b.finalized_at,
                   j.state, j.total, j.completed, j.failed, j.cancelled, j.expired,
                   j.prompt_tokens, j.cached_tokens, j.completion_tokens,
                   j.in_progress_at, j.cancelling_at AS job_cancelling_at, j.ended_at
            FROM batches b LEFT JOIN jobs j ON j.id = b.job_id
            WHERE b.id = :id AND b.tenant_id = :tenant_id AND j.deleted_at IS NULL
        """),
        {"id": batch_id, "tenant_id": tenant_id},
    ).one_or_none()
    return None if row is None else _batch(row)


def list_batches(connection: Connection, tenant_id: UUID, *, after: UUID | None, limit: int) -> list[Batch]:
    """Batches of this tenant, newest first. `after` is the id of the last batch of the page before."""
    # Ids are ordered by time, so the id is the cursor.
    rows = connection.execute(
        text("""
            SELECT b.id, b.tenant_id, b.endpoint, b.input_file_id, b.completion_window, b.metadata, b.on_error,
                   b.output_seconds, b.model, b.errors, b.job_id, b.output_file_id, b.error_file_id,
                   b.created_at, b.expires_at, b.failed_at, b.cancelling_at, b.finalized_at,
                   j.state, j.total, j.completed, j.failed, j.cancelled, j.expired,
                   j.prompt_tokens, j.cached_tokens, j.completion_tokens,
                   j.in_progress_at, j.cancelling_at AS job_cancelling_at, j.ended_at
            FROM batches b LEFT JOIN jobs j ON j.id = b.job_id
            WHERE b.tenant_id = :tenant_id AND j.deleted_at IS NULL
              AND (CAST(:after AS uuid) IS NULL OR b.id < CAST(:after AS uuid))
            ORDER BY b.id DESC
            LIMIT :limit
        """),
        {"tenant_id": tenant_id, "after": after, "limit": limit},
    )
    return [_batch(row) for row in rows]


def is_reading(connection: Connection, file_id: UUID) -> bool:
    """Whether a batch still reads a file: once it has a job, its lines are in Postgres."""
    # Open batches alone are indexed.
    found: bool = connection.execute(
        text("""
            SELECT EXISTS (SELECT 1 FROM batches
                           WHERE input_file_id = :file_id
                             AND job_id IS NULL AND failed_at IS NULL AND cancelling_at IS NULL)
        """),
        {"file_id": file_id},
    ).scalar_one()
    return found


def cancel_validating(connection: Connection, tenant_id: UUID, batch_id: UUID, *, by: Actor | None = None) -> bool:
    """Cancel a batch that has no job yet. False where it has one, or is at its end."""
    # The guard is the one that `publish` has, so one of the two wins.
    cancelled = connection.execute(
        text("""
            UPDATE batches SET cancelling_at = clock_timestamp(), held_until = NULL
            WHERE id = :id AND tenant_id = :tenant_id
              AND job_id IS NULL AND failed_at IS NULL AND cancelling_at IS NULL
        """),
        {"id": batch_id, "tenant_id": tenant_id},
    )
    if cancelled.rowcount == 0:
        return False
    webhook_endpoints.announce_batch(connection, batch_id, "batch.cancelled")
    audit.record(connection, by, AuditAction.BATCH_CANCELLED, public_id(BATCH_PREFIX, batch_id), tenant_id=tenant_id)
    return True


def take(connection: Connection, holder: UUID, *, seconds: float) -> Batch | None:
    """Hold a batch that is to be validated or finalized, the oldest first. None where there is none."""
    # Two processes take different ones.
    batch_id = connection.execute(
        text("""
            UPDATE batches SET held_until = clock_timestamp() + make_interval(secs => :seconds), holder = :holder
            WHERE id = (
                SELECT b.id FROM batches b LEFT JOIN jobs j ON j.id = b.job_id
                WHERE b.failed_at IS NULL AND b.finalized_at IS NULL
                  AND (b.held_until IS NULL OR b.held_until < clock_timestamp())
                  AND (b.job_id IS NULL AND b.cancelling_at IS NULL OR j.ended_at IS NOT NULL)
                ORDER BY b.id
                LIMIT 1
                FOR UPDATE OF b SKIP LOCKED)
            RETURNING id
        """),
        {"seconds": seconds, "holder": holder},
    ).scalar()
    return None if batch_id is None else _of_any_tenant(connection, batch_id)


def _of_any_tenant(connection: Connection, batch_id: UUID) -> Batch:
    # By primary key, and its job by the job's; also one whose job is deleted.
    row = connection.execute(
        text("""
            SELECT b.id, b.tenant_id, b.endpoint, b.input_file_id, b.completion_window, b.metadata, b.on_error,
                   b.output_seconds, b.model, b.errors, b.job_id, b.output_file_id, b.error_file_id,
                   b.created_at, b.expires_at, b.failed_at, b.cancelling_at, b.finalized_at,
                   j.state, j.total, j.completed, j.failed, j.cancelled, j.expired,
                   j.prompt_tokens, j.cached_tokens, j.completion_tokens,
                   j.in_progress_at, j.cancelling_at AS job_cancelling_at, j.ended_at
            FROM batches b LEFT JOIN jobs j ON j.id = b.job_id
            WHERE b.id = :id
        """),
        {"id": batch_id},
    ).one()
    return _batch(row)


def hold(connection: Connection, holder: UUID, batch_id: UUID, *, seconds: float) -> bool:
    """Renew a hold. False where the batch was cancelled, or another process took it over."""
    # A cancelled batch has no hold.
    return (
        connection.execute(
            text("""
                UPDATE batches SET held_until = clock_timestamp() + make_interval(secs => :seconds)
                WHERE id = :id AND holder = :holder AND held_until IS NOT NULL AND finalized_at IS NULL
            """),
            {"id": batch_id, "holder": holder, "seconds": seconds},
        ).rowcount
        == 1
    )


def release(connection: Connection, holder: UUID, batch_id: UUID, *, seconds: float) -> None:
    """Give a batch up after a failure; it can be taken again in `seconds`."""
    # A pause, because what failed may fail again at once.
    connection.execute(
        text("""
            UPDATE batches SET held_until = clock_timestamp() + make_interval(secs => :seconds)
            WHERE id = :id AND holder = :holder AND held_until IS NOT NULL
        """),
        {"id": batch_id, "holder": holder, "seconds": seconds},
    )


def fail(connection: Connection, holder: UUID, batch_id: UUID, errors: Sequence[dict[str, Any]]) -> bool:
    """End a batch whose input has errors. False where it is not held any more."""
    # Its job, if one was staged, is abandoned by the caller.
    failed = connection.execute(
        text("""
            UPDATE batches SET failed_at = clock_timestamp(), errors = CAST(:errors AS jsonb), held_until = NULL
            WHERE id = :id AND holder = :holder AND job_id IS NULL AND cancelling_at IS NULL AND failed_at IS NULL
        """),
        {"id": batch_id, "holder": holder, "errors": orjson.dumps(list(errors)).decode()},
    )
    if failed.rowcount == 0:
        return False
    webhook_endpoints.announce_batch(connection, batch_id, "batch.failed")
    return True


def attach_job(connection: Connection, holder: UUID, batch_id: UUID, job_id: UUID, model: str) -> bool:
    """Tie a published job to its batch, with two files that its results can be read from while it runs.

    False where the batch is not held any more; the caller rolls the job's publication back then.
    """
    output_id, error_id = new_id(), new_id()
    batch = connection.execute(
        text("""
            UPDATE batches SET job_id = :job_id, model = :model, held_until = NULL,
                               output_file_id = :output_id, error_file_id = :error_id
            WHERE id = :id AND holder = :holder AND job_id IS NULL AND cancelling_at IS NULL AND failed_at IS NULL
            RETURNING tenant_id, expires_at
        """),
        {
            "id": batch_id,
            "holder": holder,
            "job_id": job_id,
            "model": model,
            "output_id": output_id,
            "error_id": error_id,
        },
    ).one_or_none()
    if batch is None:
        return False
    # The deadline is counted from the batch's creation, not from the end of its validation.
    connection.execute(
        text("UPDATE jobs SET expires_at = :expires_at WHERE id = :job_id"),
        {"expires_at": batch.expires_at, "job_id": job_id},
    )
    for file_id, part in ((output_id, "output"), (error_id, "error")):
        # Without `stored_at`: the content is assembled from results until it is stored.
        connection.execute(
            text("""
                INSERT INTO files (id, tenant_id, purpose, filename, batch_id)
                VALUES (:id, :tenant_id, 'batch_output', :filename, :batch_id)
            """),
            {
                "id": file_id,
                "tenant_id": batch.tenant_id,
                "filename": f"batch_{batch_id.hex}_{part}.jsonl",
                "batch_id": batch_id,
            },
        )
    return True


def finalize(
    connection: Connection, holder: UUID, batch: Batch, *, output_bytes: int | None, error_bytes: int | None
) -> bool:
    """End a batch whose files are stored; a file without lines goes. False where it is not held any more."""
    ended = connection.execute(
        text("""
            UPDATE batches SET finalized_at = clock_timestamp(), held_until = NULL,
                               output_file_id = CASE WHEN :has_output THEN output_file_id END,
                               error_file_id = CASE WHEN :has_error THEN error_file_id END
            WHERE id = :id AND holder = :holder AND finalized_at IS NULL AND held_until IS NOT NULL
        """),
        {
            "id": batch.id,
            "holder": holder,
            "has_output": output_bytes is not None,
            "has_error": error_bytes is not None,
        },
    )
    if ended.rowcount == 0:
        return False
    for file_id, size in ((batch.output_file_id, output_bytes), (batch.error_file_id, error_bytes)):
        # `output_expires_after` counts from the file's creation, which owners see as this moment.
        connection.execute(
            text("""
                UPDATE files SET bytes = coalesce(:size, 0), created_at = clock_timestamp(),
                                 stored_at = clock_timestamp(),
                                 expires_at = clock_timestamp() + make_interval(secs => :seconds),
                                 deleted_at = CASE WHEN CAST(:size AS bigint) IS NULL THEN clock_timestamp() END
                WHERE id = :id AND deleted_at IS NULL
            """),
            {"id": file_id, "size": size, "seconds": batch.output_seconds},
        )
    assert batch.job is not None
    webhook_endpoints.announce_batch(connection, batch.id, f"batch.{batch.job.state}")
    return True


def of_file(connection: Connection, file_id: UUID) -> Batch | None:
    """The batch whose results a file holds."""
    # By the file's row; files of results alone have a batch.
    batch_id = connection.execute(text("SELECT batch_id FROM files WHERE id = :id"), {"id": file_id}).scalar()
    return None if batch_id is None else _of_any_tenant(connection, batch_id)


def retire(connection: Connection, *, retention: float) -> int:
    """Remove batches without a job that ended longer than `retention` seconds ago; others go with their job."""
    # A job's row takes its batch along when it is removed.
    return connection.execute(
        text("""
            DELETE FROM batches
            WHERE job_id IS NULL
              AND coalesce(failed_at, cancelling_at) < clock_timestamp() - make_interval(secs => :retention)
        """),
        {"retention": retention},
    ).rowcount
