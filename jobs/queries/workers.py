"""Worker rows, one for each process life, with its lease. `settling.release_dead_worker` frees what a dead one held."""

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
    """Insert the worker with a lease of `lease` seconds, and its model."""
    # A model's limits are those of the worker that registered last; jobs that wait for it stay.
    connection.execute(
        text("""
            INSERT INTO models (name, max_model_len, vocab_size) VALUES (:name, :max_model_len, :vocab_size)
            ON CONFLICT (name) DO UPDATE SET max_model_len = excluded.max_model_len,
                                             vocab_size = excluded.vocab_size,
                                             updated_at = clock_timestamp()
        """),
        {"name": model.name, "max_model_len": model.max_model_len, "vocab_size": model.vocab_size},
    )
    # The lease is Postgres' time.
    connection.execute(
        text("""
            INSERT INTO workers (id, model, host, pid, device, lease_expires_at)
            VALUES (:id, :model, :host, :pid, :device, clock_timestamp() + make_interval(secs => :lease))
        """),
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
    """Renew the lease. Raises `LeaseLost` if the row was ended: all that this worker held was released."""
    # A lease that ran out unnoticed is renewed; a row that a reaper ended is not.
    renewed = connection.execute(
        text("""
            UPDATE workers SET heartbeat_at = clock_timestamp(),
                               stats = CAST(:stats AS jsonb),
                               lease_expires_at = clock_timestamp() + make_interval(secs => :lease)
            WHERE id = :id AND ended_at IS NULL
        """),
        {"id": worker_id, "lease": lease, "stats": orjson.dumps(stats).decode()},
    )
    if renewed.rowcount == 0:
        raise LeaseLost("The worker's row was ended: its lease ran out and a reaper came by.")


def end(connection: Connection, worker_id: UUID) -> int:
    """End a worker that stops in order: its requests are pending again, without a death. Returns how many."""
    # Lock the worker as a reaper does, so that the two never release the same requests.
    connection.execute(text("SELECT 1 FROM workers WHERE id = :id FOR UPDATE"), {"id": worker_id})
    lock_held_jobs(connection, worker_id)
    # Release what it holds.
    released = connection.execute(
        text("UPDATE requests SET state = 'pending', worker_id = NULL WHERE worker_id = :id AND state = 'running'"),
        {"id": worker_id},
    ).rowcount
    # A row that a reaper ended before keeps its time.
    connection.execute(
        text("UPDATE workers SET ended_at = clock_timestamp() WHERE id = :id AND ended_at IS NULL"), {"id": worker_id}
    )
    return released


def is_live(connection: Connection, host: str, pid: int) -> bool:
    """Whether this very process has loaded its model, registered, and holds its lease."""
    # By pid, because that is how a supervisor knows its children.
    return bool(
        connection.execute(
            text("""
                SELECT EXISTS (
                    SELECT FROM workers
                    WHERE host = :host AND pid = :pid AND ended_at IS NULL AND lease_expires_at > clock_timestamp()
                )
            """),
            {"host": host, "pid": pid},
        ).scalar()
    )
