"""Worker rows, one for each process life, with its lease. `rescue.release_dead_worker` frees what a dead one held."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import orjson
from sqlalchemy import Connection, text

from jobs.errors import LeaseLost
from jobs.queries import line_events
from jobs.queries.line_events import LineEvent
from jobs.queries.rescue import lock_held_jobs
from jobs.requests import ModelLimits
from jobs.states import EndReason, Wanted


@dataclass(frozen=True, slots=True)
class WorkerIdentity:
    """A worker as it registers. `id` is new with each process life."""

    id: UUID
    host: str
    pid: int
    device: str


def register(
    connection: Connection,
    worker: WorkerIdentity,
    model: ModelLimits,
    *,
    others: Sequence[ModelLimits] = (),
    lease: float,
    wanted: Wanted | None = None,
) -> None:
    """Insert the worker with a lease of `lease` seconds, its present model, and the `others` that it serves in turn.

    `wanted`: a drain or stop that an operator asked of this process before, when its row had another id.
    """
    # A model's limits are those of the worker that registered last; jobs that wait for it stay. In the order of names,
    # because two workers that register at once wait for each other's rows.
    served = sorted((model, *others), key=lambda one: one.name)
    connection.execute(
        text("""
            INSERT INTO models (name, max_model_len, vocab_size)
            SELECT * FROM unnest(CAST(:names AS text[]), CAST(:lengths AS int[]), CAST(:sizes AS int[]))
            ON CONFLICT (name) DO UPDATE SET max_model_len = excluded.max_model_len,
                                             vocab_size = excluded.vocab_size,
                                             updated_at = clock_timestamp()
        """),
        {
            "names": [one.name for one in served],
            "lengths": [one.max_model_len for one in served],
            "sizes": [one.vocab_size for one in served],
        },
    )
    # The lease is Postgres' time.
    connection.execute(
        text("""
            INSERT INTO workers (id, model, host, pid, device, wanted, lease_expires_at)
            VALUES (:id, :model, :host, :pid, :device, :wanted, clock_timestamp() + make_interval(secs => :lease))
        """),
        {
            "id": worker.id,
            "model": model.name,
            "host": worker.host,
            "pid": worker.pid,
            "device": worker.device,
            "wanted": wanted,
            "lease": lease,
        },
    )
    connection.execute(
        text("INSERT INTO worker_models (worker_id, model) SELECT :id, unnest(CAST(:names AS text[]))"),
        {"id": worker.id, "names": [one.name for one in served]},
    )


def turn_to(connection: Connection, worker_id: UUID, model: str, *, beside_others: bool) -> bool:
    """Note which of its models a worker runs from now on. Others then leave that model's lines to it.

    Without `beside_others` it changes nothing, and returns False, where another live worker runs that model by now: of
    several idle workers that turn to one model at once, one does.
    """
    # Who turns to the same model waits here, and then sees what the other one did.
    connection.execute(text("SELECT 1 FROM models WHERE name = :model FOR NO KEY UPDATE"), {"model": model})
    # The guard is `is_served` of `demand.read_demand`.
    turned = connection.execute(
        text("""
            UPDATE workers SET model = :model
            WHERE id = :id AND (:beside_others OR NOT EXISTS (
                SELECT FROM workers w
                WHERE w.model = :model AND w.id <> :id AND w.ended_at IS NULL AND w.lease_expires_at > clock_timestamp()
            ))
        """),
        {"id": worker_id, "model": model, "beside_others": beside_others},
    )
    return turned.rowcount == 1


def heartbeat(connection: Connection, worker_id: UUID, *, lease: float, stats: Mapping[str, object]) -> Wanted | None:
    """Renew the lease. Returns what an operator wants of the worker.

    Raises `LeaseLost` if the row was ended: all that this worker held was released.
    """
    # A lease that ran out unnoticed is renewed; a row that a reaper ended is not.
    renewed = connection.execute(
        text("""
            UPDATE workers SET heartbeat_at = clock_timestamp(),
                               stats = CAST(:stats AS jsonb),
                               lease_expires_at = clock_timestamp() + make_interval(secs => :lease)
            WHERE id = :id AND ended_at IS NULL
            RETURNING wanted
        """),
        {"id": worker_id, "lease": lease, "stats": orjson.dumps(stats).decode()},
    ).one_or_none()
    if renewed is None:
        raise LeaseLost("The worker's row was ended: its lease ran out and a reaper came by.")
    return None if renewed.wanted is None else Wanted(renewed.wanted)


def keep_minute(connection: Connection, worker_id: UUID) -> None:
    """Keep the counters of the worker's last heartbeat as those of this minute."""
    # A worker that has not loaded its model has no counters. The first heartbeat of a minute writes its row.
    connection.execute(
        text("""
            INSERT INTO worker_minutes (worker_id, minute, prompt_tokens, cached_tokens, completion_tokens,
                                        preemptions, busy_seconds, running, kv_usage)
            SELECT w.id, date_trunc('minute', w.heartbeat_at), s.prompt_tokens, s.cached_prompt_tokens,
                   s.output_tokens, s.preemptions, s.busy_seconds, s.running,
                   s.kv_blocks_used::real / greatest(s.kv_blocks, 1)
            FROM workers w CROSS JOIN LATERAL jsonb_to_record(w.stats) AS s (
                prompt_tokens bigint, cached_prompt_tokens bigint, output_tokens bigint, preemptions bigint,
                busy_seconds double precision, running int, kv_blocks_used int, kv_blocks int
            )
            WHERE w.id = :id AND s.output_tokens IS NOT NULL
            ON CONFLICT (worker_id, minute) DO NOTHING
        """),
        {"id": worker_id},
    )


def end(connection: Connection, worker_id: UUID) -> int:
    """End a worker that stops in order: its requests are pending again, without a death. Returns how many."""
    # Lock the worker as a reaper does, so that the two never release the same requests.
    connection.execute(text("SELECT 1 FROM workers WHERE id = :id FOR UPDATE"), {"id": worker_id})
    lock_held_jobs(connection, worker_id)
    # Release what it holds, and note that of each line.
    released: int = connection.execute(
        text(f"""
            WITH freed AS (
                UPDATE requests SET state = 'pending', worker_id = NULL WHERE worker_id = :id AND state = 'running'
                RETURNING job_id, line, epoch, CAST(:id AS uuid) AS worker_id
            ), noted AS ({line_events.NOTE_FREED})
            SELECT count(*) FROM freed
        """),
        {"id": worker_id, "event": LineEvent.GIVEN_BACK},
    ).scalar_one()
    # A row that a reaper ended before keeps its time.
    connection.execute(
        text("""
            UPDATE workers SET ended_at = clock_timestamp(), end_reason = :reason, freed = :freed
            WHERE id = :id AND ended_at IS NULL
        """),
        {"id": worker_id, "reason": EndReason.STOPPED, "freed": released},
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
