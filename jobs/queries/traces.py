"""Trace contexts of jobs and batches, which their rows keep. Only read where a process has a tracer."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, text


@dataclass(frozen=True, slots=True)
class JobTrace:
    """A job's trace, when its lines began to wait, and the time of this transaction's statement."""

    traceparent: str
    published_at: datetime
    now: datetime


def job_traces(connection: Connection, job_ids: Collection[UUID]) -> dict[UUID, JobTrace]:
    """The traces of those of the jobs that have one."""
    # By primary key.
    rows = connection.execute(
        text("""
            SELECT id, traceparent, in_progress_at AS published_at, clock_timestamp() AS now FROM jobs
            WHERE id = ANY(CAST(:job_ids AS uuid[])) AND traceparent IS NOT NULL
        """),
        {"job_ids": list(job_ids)},
    )
    return {row.id: JobTrace(row.traceparent, row.published_at, row.now) for row in rows}


def batch_trace(connection: Connection, batch_id: UUID) -> str | None:
    """The trace of the request that made a batch."""
    # By primary key.
    found: str | None = connection.execute(
        text("SELECT traceparent FROM batches WHERE id = :id"), {"id": batch_id}
    ).scalar()
    return found
