"""Workers: one row a process life. The lease stands here, so that a heartbeat is one update however much is held."""

from __future__ import annotations

from dataclasses import dataclass
from uuid import UUID

import orjson
from sqlalchemy import Connection, text

from jobs.errors import LeaseLost
from jobs.queries.settling import lock_held_jobs
from jobs.requests import ModelLimits


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """A worker as it registers. `id` is new with each process life."""

    id: UUID
    host: str
    pid: int
    device: str


def register(connection: Connection, worker: WorkerIdentity, model: ModelLimits, *, lease: float) -> None:
    """Make the model known and the worker alive for `lease` seconds."""
    # A model is what its last worker said it is; jobs that wait for it stay.
    connection.execute(
        text(
            "INSERT INTO models (name, max_model_len, vocab_size) VALUES (:name, :max_model_len, :vocab_size) "
            "ON CONFLICT (name) DO UPDATE SET max_model_len = excluded.max_model_len, "
            "  vocab_size = excluded.vocab_size, updated_at = clock_timestamp()"
        ),
        {"name": model.name, "max_model_len": model.max_model_len, "vocab_size": model.vocab_size},
    )
    connection.execute(
        text(
            "INSERT INTO workers (id, model, host, pid, device, lease_expires_at) "
            "VALUES (:id, :model, :host, :pid, :device, clock_timestamp() + make_interval(secs => :lease))"
        ),
        {
            "id": worker.id,
            "model": model.name,
            "host": worker.host,
            "pid": worker.pid,
            "device": worker.device,
            "lease": lease,
        },
    )


def heartbeat(connection: Connection, worker_id: UUID, *, lease: float, stats: dict[str, object]) -> None:
    """Renew the lease. Raises `LeaseLost` where the row was ended: everything this worker holds is somebody else's."""
    renewed = connection.execute(
        text(
            "UPDATE workers SET heartbeat_at = clock_timestamp(), stats = CAST(:stats AS jsonb), "
            "       lease_expires_at = clock_timestamp() + make_interval(secs => :lease) "
            "WHERE id = :id AND ended_at IS NULL"
        ),
        {"id": worker_id, "lease": lease, "stats": orjson.dumps(stats).decode()},
    )
    if renewed.rowcount == 0:
        raise LeaseLost("The worker's row was ended: its lease ran out and a reaper came by.")


def end(connection: Connection, worker_id: UUID) -> int:
    """A worker stops of its own accord: what it holds waits again, uncharged. Returns how many requests that were."""
    # Locked like a reaper does, so that the two never free the same requests.
    connection.execute(text("SELECT 1 FROM workers WHERE id = :id FOR UPDATE"), {"id": worker_id})
    lock_held_jobs(connection, worker_id)
    released = connection.execute(
        text("UPDATE requests SET state = 'pending', worker_id = NULL WHERE worker_id = :id AND state = 'running'"),
        {"id": worker_id},
    ).rowcount
    connection.execute(
        text("UPDATE workers SET ended_at = clock_timestamp() WHERE id = :id AND ended_at IS NULL"), {"id": worker_id}
    )
    return released


def is_live(connection: Connection, host: str, pid: int) -> bool:
    """Whether this very process has loaded its model, registered, and holds its lease."""
    # For a supervisor, which knows its children by their pids.
    return bool(
        connection.execute(
            text(
                "SELECT EXISTS (SELECT FROM workers WHERE host = :host AND pid = :pid "
                "               AND ended_at IS NULL AND lease_expires_at > clock_timestamp())"
            ),
            {"host": host, "pid": pid},
        ).scalar()
    )
