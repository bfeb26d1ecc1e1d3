"""Reads for owners. Jobs are found by tenant and id, so another tenant's id is an unknown id."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.queries.planner import force_index_scans
from jobs.states import TERMINAL_JOB_STATES, JobState


@dataclass(frozen=True, slots=True)
class Job:
    """A snapshot of a published job."""

    id: UUID
    tenant_id: UUID
    state: JobState
    model: str
    priority: int
    metadata: dict[str, str]
    completion_window: int | None
    total: int
    completed: int
    failed: int
    cancelled: int
    expired: int
    last_seq: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    created_at: datetime
    in_progress_at: datetime
    expires_at: datetime | None
    cancelling_at: datetime | None
    ended_at: datetime | None
    name: str | None
    paused_at: datetime | None
    retry_of: UUID | None

    @property
    def open(self) -> int:
        """How many requests are pending or running."""
        return self.total - self.completed - self.failed - self.cancelled - self.expired

    @property
    def is_terminal(self) -> bool:
        return self.state in TERMINAL_JOB_STATES


@dataclass(frozen=True, slots=True)
class StoredResult:
    """A settled line. `body` is the JSON object `{"response": …, "error": …}`; `request`, where it was asked for, the
    line as it was stored."""

    seq: int
    line: int
    custom_id: str
    body: bytes
    request: bytes | None = None


@dataclass(frozen=True, slots=True)
class ServedModel:
    name: str
    max_model_len: int
    vocab_size: int
    registered_at: datetime
    live_workers: int


def job_of(row: object) -> Job:
    """A row with the columns of `Job`."""
    columns = dict(row._mapping)  # type: ignore[attr-defined]
    return Job(**columns | {"state": JobState(columns["state"])})


def get_job(connection: Connection, tenant_id: UUID, job_id: UUID) -> Job | None:
    """One published job of this tenant."""
    return get_jobs(connection, [(tenant_id, job_id)]).get((tenant_id, job_id))


def get_jobs(connection: Connection, owned: Collection[tuple[UUID, UUID]]) -> dict[tuple[UUID, UUID], Job]:
    """Published jobs by (tenant, id). A pair whose job is another tenant's is left out."""
    jobs = {(job.tenant_id, job.id): job for job in find_jobs(connection, [job_id for _, job_id in owned])}
    return {pair: jobs[pair] for pair in owned if pair in jobs}


def find_jobs(connection: Connection, job_ids: Collection[UUID]) -> list[Job]:
    """Published jobs of any tenant, in no order. Who may see which is the caller's to decide."""
    # The columns of `Job`, by primary key.
    rows = connection.execute(
        text("""
            SELECT id, tenant_id, state, model, priority, metadata, completion_window,
                   total, completed, failed, cancelled, expired, last_seq,
                   prompt_tokens, cached_tokens, completion_tokens,
                   created_at, in_progress_at, expires_at, cancelling_at, ended_at, name, paused_at, retry_of
            FROM jobs
            WHERE id = ANY(CAST(:job_ids AS uuid[])) AND in_progress_at IS NOT NULL AND deleted_at IS NULL
        """),
        {"job_ids": list(job_ids)},
    )
    return [job_of(row) for row in rows]


def owner_of(connection: Connection, job_id: UUID) -> UUID | None:
    """The tenant of a published job."""
    # For callers who see all tenants' jobs.
    owner: UUID | None = connection.execute(
        text("SELECT tenant_id FROM jobs WHERE id = :id AND in_progress_at IS NOT NULL AND deleted_at IS NULL"),
        {"id": job_id},
    ).scalar()
    return owner


def no_longer_running(connection: Connection, job_ids: Collection[UUID]) -> set[UUID]:
    """Those of `job_ids` that are at their end, or gone. The caller has checked whose jobs they are."""
    # Read those that still run, so that a job without a row counts as gone.
    running = connection.execute(
        text("""
            SELECT id FROM jobs
            WHERE id = ANY(CAST(:job_ids AS uuid[])) AND ended_at IS NULL AND deleted_at IS NULL
        """),
        {"job_ids": list(job_ids)},
    ).scalars()
    return set(job_ids).difference(running)


def read_results(connection: Connection, job_id: UUID, *, after: int, limit: int) -> list[StoredResult]:
    """Results with `seq > after`, in commit order. The caller has checked whose job it is.

    A job's row is locked while a group takes its `seq`, so a smaller one never becomes visible later.
    """
    force_index_scans(connection)
    # By primary key (job_id, seq); each custom_id by the key of its body, alone in its range (decision 0010).
    rows = connection.execute(
        text("""
            SELECT r.seq, r.line, b.custom_id, r.body
            FROM (
                SELECT job_id, seq, line, body FROM results
                WHERE job_id = :job_id AND seq > :after ORDER BY seq LIMIT :limit
            ) r CROSS JOIN LATERAL (
                SELECT custom_id FROM bodies b
                WHERE b.job_id = r.job_id AND b.line BETWEEN r.line AND r.line ORDER BY b.line LIMIT 1
            ) b
            ORDER BY r.seq
        """),
        {"job_id": job_id, "after": after, "limit": limit},
    )
    return [StoredResult(row.seq, row.line, row.custom_id, row.body) for row in rows]


def read_results_and_requests(connection: Connection, job_id: UUID, *, after: int, limit: int) -> list[StoredResult]:
    """The same, with what was asked."""
    # By primary key (job_id, seq); custom_id stands with the body.
    rows = connection.execute(
        text("""
            SELECT r.seq, r.line, b.custom_id, r.body, b.body AS request
            FROM results r JOIN bodies b USING (job_id, line)
            WHERE r.job_id = :job_id AND r.seq > :after
            ORDER BY r.seq
            LIMIT :limit
        """),
        {"job_id": job_id, "after": after, "limit": limit},
    )
    return [StoredResult(row.seq, row.line, row.custom_id, row.body, row.request) for row in rows]


def list_models(connection: Connection) -> list[ServedModel]:
    """Every model that was ever served, and how many workers serve it now."""
    # A live worker has not ended and holds its lease.
    rows = connection.execute(
        text("""
            SELECT m.name, m.max_model_len, m.vocab_size, m.registered_at, count(w.id) AS live_workers
            FROM models m
            LEFT JOIN (worker_models s JOIN workers w
                       ON w.id = s.worker_id AND w.ended_at IS NULL AND w.lease_expires_at > clock_timestamp())
              ON s.model = m.name
            GROUP BY m.name
            ORDER BY m.name
        """)
    )
    return [ServedModel(**row._mapping) for row in rows]


def is_reachable(connection: Connection) -> bool:
    """Whether Postgres answers and the schema is there."""
    # Without reading the table.
    return connection.execute(text("SELECT to_regclass('jobs') IS NOT NULL")).scalar_one() is True
