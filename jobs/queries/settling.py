"""The end of requests and jobs. Writer, cancel, reaper and expiry all go through `settle`:

    lock job rows in id order → fence → insert results, advance seq and counters → end jobs with nothing open

The lock comes first because under READ COMMITTED two writers that settle a job's last rows would each see the other's
as open. `settle` is the last thing that its transaction does.
"""

from __future__ import annotations

import time
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple
from uuid import UUID

import orjson
from sqlalchemy import Connection, text

from jobs.database import ByteaArray
from jobs.fingerprints import Failure
from jobs.ids import JOB_PREFIX, new_id, public_id
from jobs.line_timing import LineTiming
from jobs.queries import audit, failures, job_events
from jobs.queries.audit import Actor, AuditAction
from jobs.queries.planner import force_index_scans
from jobs.states import JobState, RequestState
from jobs.tables.fleet import NO_WORKER


class ClaimToken(NamedTuple):
    """The fencing token of one claim of one request; no two claims share one. `holder` is None while it is pending."""

    job_id: UUID
    line: int
    epoch: int
    holder: UUID | None


@dataclass(frozen=True, slots=True)
class Outcome:
    """How one request ends.

    The fence: it is written only where the request is still open, and its epoch and holder are those of `token`.
    `body` is the JSON object `{"response": …, "error": …}`. `is_truncated`: `max_tokens` cut it. `failure` is what a
    failed line is grouped by. `timing`: where its time went, where that is kept.
    """

    token: ClaimToken
    state: RequestState
    body: bytes
    prompt_tokens: int = 0
    cached_tokens: int = 0
    completion_tokens: int = 0
    is_truncated: bool = False
    failure: Failure | None = None
    timing: LineTiming | None = None


@dataclass(frozen=True, slots=True)
class Settled:
    """The result of settling a group: `written` requests, and the jobs that ended with it."""

    written: int
    ended_jobs: tuple[UUID, ...]


def settle(connection: Connection, outcomes: Sequence[Outcome]) -> Settled:
    """Write a group of outcomes. Those that the fence stops are left out silently: another outcome stands."""
    if not outcomes:
        return Settled(0, ())
    force_index_scans(connection)
    job_ids = lock_jobs(connection, {outcome.token.job_id for outcome in outcomes})
    now = time.monotonic()
    # Fence the requests by their rows' places (decision 0010), insert the results of those that passed, and advance
    # seq, counters, and the minute and day of each job that has more than one caller's line, in one statement so that
    # nothing comes between.
    settled = connection.execute(
        text("""
            WITH outcome AS (
                SELECT * FROM unnest(
                    CAST(:job_ids AS uuid[]), CAST(:lines AS int[]), CAST(:epochs AS int[]), CAST(:holders AS uuid[]),
                    CAST(:states AS text[]), CAST(:bodies AS bytea[]), CAST(:prompt_tokens AS bigint[]),
                    CAST(:cached_tokens AS bigint[]), CAST(:completion_tokens AS bigint[]),
                    CAST(:fingerprints AS bigint[]), CAST(:truncated AS boolean[]), CAST(:timings AS bytea[])
                ) AS o (job_id, line, epoch, holder, state, body, prompt_tokens, cached_tokens, completion_tokens,
                        fingerprint, is_truncated, timing)
            ), fenced AS (
                UPDATE requests r SET state = o.state, worker_id = NULL
                FROM outcome o CROSS JOIN LATERAL (
                    SELECT q.ctid AS row FROM requests q WHERE q.job_id = o.job_id AND q.line = o.line OFFSET 0
                ) found
                WHERE r.ctid = found.row AND r.state IN ('pending', 'running')
                  AND r.epoch = o.epoch AND r.worker_id IS NOT DISTINCT FROM o.holder
                RETURNING o.*
            ), numbered AS (
                SELECT f.*, j.tenant_id, j.is_live,
                       j.last_seq + row_number() OVER (PARTITION BY f.job_id ORDER BY f.line) AS seq
                FROM fenced f JOIN jobs j ON j.id = f.job_id
            ), inserted AS (
                INSERT INTO results (job_id, seq, line, state, body, settled_at, worker_id, fingerprint, is_truncated,
                                     timing)
                SELECT job_id, seq, line, state, body, statement_timestamp(), holder, fingerprint, is_truncated, timing
                FROM numbered
            ), counted AS (
                SELECT job_id, is_live, count(*) AS written,
                       count(*) FILTER (WHERE state = 'completed') AS completed,
                       count(*) FILTER (WHERE state = 'failed') AS failed,
                       count(*) FILTER (WHERE state = 'cancelled') AS cancelled,
                       count(*) FILTER (WHERE state = 'expired') AS expired,
                       sum(prompt_tokens) AS prompt_tokens,
                       sum(cached_tokens) AS cached_tokens,
                       sum(completion_tokens) AS completion_tokens
                FROM numbered
                GROUP BY job_id, is_live
            ), in_this_minute AS (
                INSERT INTO job_minutes AS m
                    (job_id, minute, lines, failed, prompt_tokens, cached_tokens, completion_tokens)
                SELECT job_id, date_trunc('minute', statement_timestamp()), written, failed,
                       prompt_tokens, cached_tokens, completion_tokens
                FROM counted
                WHERE NOT is_live
                ON CONFLICT (job_id, minute) DO UPDATE
                SET lines = m.lines + excluded.lines,
                    failed = m.failed + excluded.failed,
                    prompt_tokens = m.prompt_tokens + excluded.prompt_tokens,
                    cached_tokens = m.cached_tokens + excluded.cached_tokens,
                    completion_tokens = m.completion_tokens + excluded.completion_tokens
            ), in_this_day AS (
                INSERT INTO tenant_days AS d (day, tenant_id, worker_id, lines, failed)
                SELECT (statement_timestamp() AT TIME ZONE 'UTC')::date, tenant_id, coalesce(holder, :no_worker),
                       count(*), count(*) FILTER (WHERE state = 'failed')
                FROM numbered
                WHERE NOT is_live
                GROUP BY tenant_id, holder
                ORDER BY tenant_id, holder -- so that no two groups wait for each other
                ON CONFLICT (day, tenant_id, worker_id) DO UPDATE
                SET lines = d.lines + excluded.lines, failed = d.failed + excluded.failed
            ), advanced AS (
                UPDATE jobs j SET last_seq = j.last_seq + c.written,
                                  completed = j.completed + c.completed,
                                  failed = j.failed + c.failed,
                                  cancelled = j.cancelled + c.cancelled,
                                  expired = j.expired + c.expired,
                                  prompt_tokens = j.prompt_tokens + c.prompt_tokens,
                                  cached_tokens = j.cached_tokens + c.cached_tokens,
                                  completion_tokens = j.completion_tokens + c.completion_tokens
                FROM counted c
                WHERE j.id = c.job_id
            )
            SELECT (SELECT coalesce(sum(written), 0)::int FROM counted) AS written,
                   (SELECT array_agg(job_id) FROM numbered WHERE fingerprint IS NOT NULL) AS failed_jobs,
                   (SELECT array_agg(line) FROM numbered WHERE fingerprint IS NOT NULL) AS failed_lines
        """),
        {
            "job_ids": [outcome.token.job_id for outcome in outcomes],
            "lines": [outcome.token.line for outcome in outcomes],
            "epochs": [outcome.token.epoch for outcome in outcomes],
            "holders": [outcome.token.holder for outcome in outcomes],
            "states": [str(outcome.state) for outcome in outcomes],
            "bodies": ByteaArray(outcome.body for outcome in outcomes),
            "prompt_tokens": [outcome.prompt_tokens for outcome in outcomes],
            "cached_tokens": [outcome.cached_tokens for outcome in outcomes],
            "completion_tokens": [outcome.completion_tokens for outcome in outcomes],
            "fingerprints": [outcome.failure and outcome.failure.fingerprint for outcome in outcomes],
            "truncated": [outcome.is_truncated for outcome in outcomes],
            "timings": ByteaArray(
                None if outcome.timing is None else outcome.timing.stored(now) for outcome in outcomes
            ),
            "no_worker": NO_WORKER,
        },
    ).one()
    if settled.failed_jobs is not None:
        written = set(zip(settled.failed_jobs, settled.failed_lines, strict=True))
        failures.group(
            connection,
            [
                (outcome.token.job_id, outcome.token.line, outcome.failure)
                for outcome in outcomes
                if outcome.failure is not None and (outcome.token.job_id, outcome.token.line) in written
            ],
        )
    return Settled(settled.written, _end_jobs(connection, job_ids))


def lock_jobs(connection: Connection, job_ids: Collection[UUID]) -> list[UUID]:
    """Lock job rows in id order, so that two groups over the same jobs cannot deadlock."""
    # NO KEY UPDATE, so that inserting a row that refers to the job does not wait.
    return list(
        connection.execute(
            text("SELECT id FROM jobs WHERE id = ANY(CAST(:ids AS uuid[])) ORDER BY id FOR NO KEY UPDATE"),
            {"ids": list(job_ids)},
        ).scalars()
    )


def _end_jobs(connection: Connection, job_ids: Sequence[UUID]) -> tuple[UUID, ...]:
    """End those of the jobs that have nothing open. Returns them."""
    # Move them to their final state, insert one event for each, and a delivery where the job's webhook wants it and for
    # each endpoint that subscribed; a live request has a caller who is told.
    return tuple(
        connection.execute(
            text("""
                WITH ended AS (
                    UPDATE jobs SET ended_at = clock_timestamp(),
                                    state = CASE WHEN state = 'cancelling' THEN 'cancelled'
                                                 WHEN expired > 0 THEN 'expired'
                                                 ELSE 'completed' END
                    WHERE id = ANY(CAST(:job_ids AS uuid[])) AND state IN ('in_progress', 'cancelling')
                      AND completed + failed + cancelled + expired = total
                    RETURNING id, tenant_id, 'job.' || state AS event, webhook_endpoint_id, webhook_events, is_live
                ), inserted AS (
                    INSERT INTO events (id, tenant_id, job_id, type)
                    SELECT n.event_id, e.tenant_id, e.id, e.event
                    FROM ended e
                    JOIN unnest(CAST(:job_ids AS uuid[]), CAST(:event_ids AS uuid[])) AS n (job_id, event_id)
                      ON n.job_id = e.id
                    RETURNING id, job_id
                ), queued AS (
                    INSERT INTO deliveries (event_id, endpoint_id)
                    SELECT i.id, w.id
                    FROM ended e
                    JOIN inserted i ON i.job_id = e.id
                    JOIN webhook_endpoints w ON w.id = e.webhook_endpoint_id AND w.disabled_at IS NULL
                    WHERE e.webhook_events IS NULL OR e.event = ANY(e.webhook_events)
                    UNION ALL
                    SELECT i.id, w.id
                    FROM ended e
                    JOIN inserted i ON i.job_id = e.id
                    JOIN webhook_endpoints w ON w.tenant_id = e.tenant_id AND w.disabled_at IS NULL
                    WHERE NOT e.is_live AND e.event = ANY(w.event_types)
                )
                SELECT id FROM ended
            """),
            {"job_ids": list(job_ids), "event_ids": [new_id() for _ in job_ids]},
        ).scalars()
    )


def cancel_job(connection: Connection, tenant_id: UUID, job_id: UUID, *, by: Actor | None = None) -> JobState | None:
    """Ask a job to stop. Returns its state after that, None if this tenant has no such job.

    Where another tenant's operator asks, the job's timeline tells its owner.

    A job at its end stays as it is. Open requests are settled by `settle_open`, one chunk in each transaction.
    """
    # Lock the job if it is this tenant's.
    state = connection.execute(
        text("""
            SELECT state FROM jobs
            WHERE id = :job_id AND tenant_id = :tenant_id AND in_progress_at IS NOT NULL AND deleted_at IS NULL
            FOR NO KEY UPDATE
        """),
        {"job_id": job_id, "tenant_id": tenant_id},
    ).scalar()
    if state != JobState.IN_PROGRESS:
        return None if state is None else JobState(state)
    # From now on no claim chooses this job.
    connection.execute(
        text("UPDATE jobs SET state = 'cancelling', cancelling_at = clock_timestamp() WHERE id = :job_id"),
        {"job_id": job_id},
    )
    audit.record(connection, by, AuditAction.JOB_CANCELLED, public_id(JOB_PREFIX, job_id), tenant_id=tenant_id)
    if by is not None and by.is_foreign_to(tenant_id):
        job_events.add(connection, job_id, "cancelled_by_operator")
    return JobState.CANCELLING


def settle_open(connection: Connection, job_id: UUID, *, limit: int) -> Settled:
    """Settle up to `limit` open requests of a job that is being cancelled or has run out of time.

    Running ones too: their worker learns of it at its next poll, and its later results stop at the fence.
    """
    if not lock_jobs(connection, [job_id]):
        return Settled(0, ())
    # Why this job's requests may end now; NULL if the job is neither being cancelled nor out of time.
    reason = connection.execute(
        text("""
            SELECT CASE WHEN state = 'cancelling' THEN 'cancelled'
                        WHEN state = 'in_progress' AND expires_at < clock_timestamp() THEN 'expired' END
            FROM jobs WHERE id = :job_id
        """),
        {"job_id": job_id},
    ).scalar_one()
    if reason is None:
        return Settled(0, ())
    # Up to twice `limit` open requests, each half from a partial index: settled lines are not read.
    rows = connection.execute(
        text("""
            (SELECT line, epoch, worker_id FROM requests WHERE job_id = :job_id AND state = 'pending' LIMIT :limit)
            UNION ALL
            (SELECT line, epoch, worker_id FROM requests WHERE job_id = :job_id AND state = 'running' LIMIT :limit)
        """),
        {"job_id": job_id, "limit": limit},
    ).all()
    state = RequestState(reason)
    body = error_body(f"job_{reason}", _REASONS[state])
    tokens = [ClaimToken(job_id, row.line, row.epoch, row.worker_id) for row in rows]
    return settle(connection, [Outcome(token, state, body) for token in tokens])


def jobs_to_settle(connection: Connection, *, limit: int) -> list[UUID]:
    """Jobs with requests that `settle_open` may end: being cancelled, or past their window."""
    # Open jobs are in a partial index.
    return list(
        connection.execute(
            text("""
                SELECT id FROM jobs
                WHERE ended_at IS NULL AND deleted_at IS NULL
                  AND (state = 'cancelling' OR (state = 'in_progress' AND expires_at < clock_timestamp()))
                ORDER BY id
                LIMIT :limit
            """),
            {"limit": limit},
        ).scalars()
    )


def error_body(code: str, message: str) -> bytes:
    """The stored body of a request that ended without an answer."""
    return orjson.dumps({"response": None, "error": {"code": code, "message": message}})


_REASONS = {
    RequestState.CANCELLED: "The job was cancelled before this request finished.",
    RequestState.EXPIRED: "The job's completion window closed before this request finished.",
}
