"""Workers as people look at them: what each does, why one ended, and what an operator wants of it."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.ids import WORKER_PREFIX, public_id
from jobs.queries import audit
from jobs.queries.audit import Actor, AuditAction
from jobs.states import EndReason, Wanted

ENDED_SHOWN = 3600.0  # seconds that a worker is listed after its end
SPARK_MINUTES = 60


_WANTED = {
    Wanted.DRAIN: AuditAction.WORKER_DRAINED,
    Wanted.STOP: AuditAction.WORKER_STOPPED,
    None: AuditAction.WORKER_UNDRAINED,
}


@dataclass(frozen=True, slots=True)
class FleetWorker:
    """A worker's row. `stats` is what its last heartbeat said: `engine.outputs.EngineStats` and the rates."""

    id: UUID
    model: str
    """That it runs, or turns to, now."""

    models: Sequence[str]
    """All that it serves in turn, by name."""

    host: str
    pid: int
    device: str
    started_at: datetime
    heartbeat_at: datetime
    is_live: bool
    ended_at: datetime | None
    wanted: Wanted | None
    end_reason: EndReason | None
    freed: int
    stats: Mapping[str, Any]


@dataclass(frozen=True, slots=True)
class WorkerMinute:
    """What a worker did between two of its minutes."""

    at: datetime
    seconds: float
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int
    preemptions: int
    busy: float
    running: int
    kv_usage: float


@dataclass(frozen=True, slots=True)
class RunningLine:
    job_id: UUID
    line: int
    claimed_at: datetime | None


_WORKERS = """
    SELECT id, model, host, pid, device, started_at, heartbeat_at, wanted, end_reason, freed, stats,
           ARRAY(SELECT s.model FROM worker_models s WHERE s.worker_id = workers.id ORDER BY s.model) AS models,
           workers.ended_at IS NULL AND lease_expires_at > clock_timestamp() AS is_live,
           -- A worker whose lease is over is lost, although no reaper has come by yet.
           coalesce(
               workers.ended_at, CASE WHEN lease_expires_at <= clock_timestamp() THEN lease_expires_at END
           ) AS ended_at
    FROM workers
"""


def list_workers(connection: Connection) -> list[FleetWorker]:
    """The live workers, and those that ended within the last hour; in the order in which they started."""
    # By the partial indexes of live and of ended workers.
    rows = connection.execute(
        text(
            _WORKERS + " WHERE ended_at IS NULL OR ended_at > statement_timestamp() - make_interval(secs => :seconds)"
            " ORDER BY started_at, id"
        ),
        {"seconds": ENDED_SHOWN},
    )
    return [_worker(row) for row in rows]


def get_worker(connection: Connection, worker_id: UUID) -> FleetWorker | None:
    """One worker, also one that ended long ago."""
    # By primary key.
    row = connection.execute(text(_WORKERS + " WHERE id = :id"), {"id": worker_id}).one_or_none()
    return None if row is None else _worker(row)


def set_wanted(connection: Connection, worker_id: UUID, wanted: Wanted | None, *, by: Actor | None = None) -> bool:
    """Ask something of a worker, or take back what was asked. False if it has ended."""
    # Its next heartbeat brings it there.
    asked = connection.execute(
        text("UPDATE workers SET wanted = :wanted WHERE id = :id AND ended_at IS NULL"),
        {"id": worker_id, "wanted": wanted},
    )
    if asked.rowcount == 0:
        return False
    audit.record(connection, by, _WANTED[wanted], public_id(WORKER_PREFIX, worker_id), tenant_id=None)
    return True


def minutes(connection: Connection, worker_ids: Collection[UUID], *, most: int) -> dict[UUID, list[WorkerMinute]]:
    """The newest minutes of each worker, oldest first: the differences between its counters."""
    # By primary key, backwards; one row more than asked for, because a difference needs two.
    rows = connection.execute(
        text("""
            SELECT m.*
            FROM unnest(CAST(:ids AS uuid[])) AS w (id) CROSS JOIN LATERAL (
                SELECT * FROM worker_minutes m WHERE m.worker_id = w.id ORDER BY m.minute DESC LIMIT :rows
            ) m
            ORDER BY m.worker_id, m.minute
        """),
        {"ids": list(worker_ids), "rows": most + 1},
    ).all()
    found: dict[UUID, list[WorkerMinute]] = {worker_id: [] for worker_id in worker_ids}
    for before, row in itertools.pairwise(rows):
        if before.worker_id == row.worker_id:
            seconds = (row.minute - before.minute).total_seconds()
            found[row.worker_id].append(
                WorkerMinute(
                    row.minute,
                    seconds,
                    row.prompt_tokens - before.prompt_tokens,
                    row.cached_tokens - before.cached_tokens,
                    row.completion_tokens - before.completion_tokens,
                    row.preemptions - before.preemptions,
                    min(1.0, (row.busy_seconds - before.busy_seconds) / seconds),
                    row.running,
                    row.kv_usage,
                )
            )
    return found


def running_lines(connection: Connection, worker_id: UUID, tenant_id: UUID | None, *, limit: int) -> list[RunningLine]:
    """Lines that a worker holds, those of one tenant or all, the longest first."""
    # The partial index of running requests answers this.
    rows = connection.execute(
        text("""
            SELECT r.job_id, r.line, r.claimed_at
            FROM requests r JOIN jobs j ON j.id = r.job_id
            WHERE r.worker_id = :worker_id AND r.state = 'running'
              AND (CAST(:tenant_id AS uuid) IS NULL OR j.tenant_id = :tenant_id)
            ORDER BY r.claimed_at, r.job_id, r.line
            LIMIT :limit
        """),
        {"worker_id": worker_id, "tenant_id": tenant_id, "limit": limit},
    )
    return [RunningLine(row.job_id, row.line, row.claimed_at) for row in rows]


def _worker(row: Any) -> FleetWorker:
    columns = dict(row._mapping)
    reason = columns["end_reason"]
    if reason is None and columns["ended_at"] is not None:
        reason = EndReason.LOST
    return FleetWorker(
        **columns
        | {
            "wanted": None if columns["wanted"] is None else Wanted(columns["wanted"]),
            "end_reason": None if reason is None else EndReason(reason),
        }
    )
