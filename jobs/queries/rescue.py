"""Rescue: what a worker held whose lease ran out, or that is about to end, waits again or is given up."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.fingerprints import Failure
from jobs.queries import job_events, line_events
from jobs.queries.line_events import LineEvent
from jobs.queries.settling import ClaimToken, Outcome, error_body, lock_jobs, settle
from jobs.states import EndReason, RequestState


@dataclass(frozen=True, slots=True)
class ReapResult:
    """A dead worker: `freed` of its requests are pending again, `given_up` failed."""

    worker_id: UUID
    freed: int
    given_up: int


def reap_worker(connection: Connection, *, max_deaths: int) -> ReapResult | None:
    """Release the requests of one worker whose lease is over. None if there is no such worker."""
    # Two reapers take different workers; SKIP LOCKED also passes a worker whose claim is under way.
    worker_id = connection.execute(
        text("""
            SELECT id FROM workers
            WHERE ended_at IS NULL AND lease_expires_at < clock_timestamp()
            ORDER BY lease_expires_at
            LIMIT 1
            FOR UPDATE SKIP LOCKED
        """)
    ).scalar()
    return None if worker_id is None else release_dead_worker(connection, worker_id, max_deaths=max_deaths)


def release_dead_worker(
    connection: Connection,
    worker_id: UUID,
    *,
    max_deaths: int,
    reason: EndReason = EndReason.LOST,
    suspects: Collection[ClaimToken] | None = None,
) -> ReapResult:
    """End a worker that died or is about to: release its requests, counting one death for each suspect.

    `suspects` are the requests that may be to blame; None: all that it held. A request with `max_deaths` is given up
    with an error. The worker's row ends in the same transaction, so a zombie's heartbeats, claims and results match
    nothing from then on.
    """
    # Wait for a claim under way: an UPDATE alone would not see the rows that it is taking.
    connection.execute(text("SELECT 1 FROM workers WHERE id = :id FOR UPDATE"), {"id": worker_id})
    # End the worker; a row that was ended before keeps its time.
    connection.execute(
        text("""
            UPDATE workers
            SET ended_at = clock_timestamp(), end_reason = :reason,
                freed = (SELECT count(*) FROM requests WHERE worker_id = :id AND state = 'running')
            WHERE id = :id AND ended_at IS NULL
        """),
        {"id": worker_id, "reason": reason},
    )
    lock_held_jobs(connection, worker_id)
    job_events.add_lost_worker(connection, worker_id)
    freed = 0
    if suspects is not None:
        # Release the requests that are above suspicion, without counting a death, and note that of each line.
        freed = connection.execute(
            text(f"""
                WITH freed AS (
                    UPDATE requests r SET state = 'pending', worker_id = NULL
                    WHERE worker_id = :worker_id AND state = 'running' AND NOT EXISTS (
                        SELECT FROM unnest(CAST(:job_ids AS uuid[]), CAST(:lines AS int[])) AS s (job_id, line)
                        WHERE s.job_id = r.job_id AND s.line = r.line
                    )
                    RETURNING job_id, line, epoch, CAST(:worker_id AS uuid) AS worker_id
                ), noted AS ({line_events.NOTE_FREED})
                SELECT count(*) FROM freed
            """),
            {
                "event": LineEvent.GIVEN_BACK,
                "worker_id": worker_id,
                "job_ids": [suspect.job_id for suspect in suspects],
                "lines": [suspect.line for suspect in suspects],
            },
        ).scalar_one()
    # Release the suspects that may try again.
    freed += connection.execute(
        text(f"""
            WITH freed AS (
                UPDATE requests SET state = 'pending', worker_id = NULL, deaths = deaths + 1
                WHERE worker_id = :worker_id AND state = 'running' AND deaths + 1 < :max_deaths
                RETURNING job_id, line, epoch, CAST(:worker_id AS uuid) AS worker_id
            ), noted AS ({line_events.NOTE_FREED})
            SELECT count(*) FROM freed
        """),
        {"event": LineEvent.LOST, "worker_id": worker_id, "max_deaths": max_deaths},
    ).scalar_one()
    # The rest reached `max_deaths`.
    rows = connection.execute(
        text("SELECT job_id, line, epoch FROM requests WHERE worker_id = :worker_id AND state = 'running'"),
        {"worker_id": worker_id},
    ).all()
    code, message = "worker_died", f"The worker died {max_deaths} times while this request was running."
    body, failure = error_body(code, message), Failure.of(code, message)
    tokens = [ClaimToken(row.job_id, row.line, row.epoch, worker_id) for row in rows]
    settled = settle(connection, [Outcome(token, RequestState.FAILED, body, failure=failure) for token in tokens])
    return ReapResult(worker_id, freed, settled.written)


def lock_held_jobs(connection: Connection, worker_id: UUID) -> None:
    """Lock the jobs of a worker's running requests.

    Releasing takes the same locks, in the same order, as settling, so the two cannot deadlock.
    """
    # The partial index of running requests answers this.
    held = connection.execute(
        text("SELECT DISTINCT job_id FROM requests WHERE worker_id = :worker_id AND state = 'running'"),
        {"worker_id": worker_id},
    ).scalars()
    lock_jobs(connection, set(held))
