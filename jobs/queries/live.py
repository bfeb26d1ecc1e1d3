"""Live requests: jobs of one caller who waits for the answer. They are claimed before all others of their model."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.queries import creations, submission
from jobs.queries.creations import Claim
from jobs.requests import JobOptions, ModelLimits, StagedLine


@dataclass(frozen=True, slots=True)
class LiveModel:
    """A known model, and whether some worker holds a lease and serves it."""

    limits: ModelLimits
    is_served: bool


@dataclass(frozen=True, slots=True)
class LiveState:
    """What Postgres knows of a live job. `has_lost_worker`: a worker died, or gave a line back, while it ran one."""

    has_ended: bool
    has_lost_worker: bool


def submit(
    connection: Connection,
    tenant_id: UUID,
    model: str,
    lines: Sequence[StagedLine],
    job_id: UUID,
    claim: Claim | None,
    *,
    is_live: bool = True,
) -> None:
    """Store and publish a caller's request in this transaction: a live job, or one that waits its turn.

    Raises `AlreadyMade`, `IdempotencyMismatch`.
    """
    creations.record(
        connection, claim, job_id, is_standing=lambda made: _is_running_or_answered(connection, tenant_id, made)
    )
    submission.open_job(connection, tenant_id, JobOptions(model=model), job_id, is_live=is_live)
    submission.stage_lines(connection, job_id, lines)
    submission.publish(connection, job_id)


def _is_running_or_answered(connection: Connection, tenant_id: UUID, job_id: UUID) -> bool:
    # A live job is cancelled when its caller hangs up, and a failed answer may come out better: both are run again.
    found: bool = connection.execute(
        text("""
            SELECT EXISTS (SELECT 1 FROM jobs
                           WHERE id = :id AND tenant_id = :tenant_id AND deleted_at IS NULL
                             AND state IN ('in_progress', 'completed') AND failed = 0)
        """),
        {"id": job_id, "tenant_id": tenant_id},
    ).scalar_one()
    return found


def find_models(connection: Connection, names: Collection[str]) -> dict[str, LiveModel]:
    """Those of the models that some worker has registered, alive or not."""
    # Models by primary key; workers by the index of those that have not ended.
    rows = connection.execute(
        text("""
            SELECT m.name, m.max_model_len, m.vocab_size,
                   EXISTS (SELECT 1 FROM workers w JOIN worker_models s ON s.worker_id = w.id AND s.model = m.name
                           WHERE w.ended_at IS NULL AND w.lease_expires_at > clock_timestamp())
                       AS is_served
            FROM models m WHERE m.name = ANY(CAST(:names AS text[]))
        """),
        {"names": list(names)},
    )
    return {
        row.name: LiveModel(ModelLimits(row.name, row.max_model_len, row.vocab_size), row.is_served) for row in rows
    }


def only_live_model(connection: Connection) -> str | None:
    """The model of all workers that hold a lease; None where they serve several, or there are none."""
    # By the index of workers that have not ended.
    found = connection.execute(
        text("""
            SELECT DISTINCT s.model FROM workers w JOIN worker_models s ON s.worker_id = w.id
            WHERE w.ended_at IS NULL AND w.lease_expires_at > clock_timestamp()
            LIMIT 2
        """)
    ).scalars()
    models: list[str] = list(found)
    return models[0] if len(models) == 1 else None


def states(connection: Connection, job_ids: Collection[UUID]) -> dict[UUID, LiveState]:
    """The states of live jobs; one that is gone is not among them."""
    # A line that is claimed for the second time was held by a worker that is lost.
    rows = connection.execute(
        text("""
            SELECT j.id, j.ended_at IS NOT NULL AS has_ended,
                   EXISTS (SELECT 1 FROM requests r WHERE r.job_id = j.id AND (r.deaths > 0 OR r.epoch > 1)
                                                       OR r.job_id = j.id AND r.epoch > 0 AND r.state = 'pending')
                       AS has_lost_worker
            FROM jobs j WHERE j.id = ANY(CAST(:job_ids AS uuid[])) AND j.deleted_at IS NULL
        """),
        {"job_ids": list(job_ids)},
    )
    return {row.id: LiveState(row.has_ended, row.has_lost_worker) for row in rows}
