"""The five answers: what moves, what is done next, what waits, whether the machine is busy, what failed today."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.queries import explaining, progress, reading
from jobs.queries.explaining import ModelQueue, Wait
from jobs.queries.planner import avoid_scans
from jobs.queries.reading import Job

MOVING = 30.0  # seconds in which a job that moves has settled a line
IDLE_WITH_WORK = 10.0  # seconds that lines have waited beside a free worker
NEXT_CANDIDATES = 5  # jobs whose estimates are compared


@dataclass(frozen=True, slots=True)
class OpenJobs:
    """How many jobs are open, and in what way. One that moves and has no running line counts as moving and waiting."""

    open: int
    moving: int
    waiting: int
    paused: int


@dataclass(frozen=True, slots=True)
class Machine:
    """The live workers together. `busy` is the mean of their shares of time inside steps, 0 to 1."""

    live: int
    seats: int
    running: int
    busy: float
    tokens_per_s: float
    is_idle_with_work: bool


@dataclass(frozen=True, slots=True)
class FailedToday:
    lines: int
    kinds: int
    share: float


@dataclass(frozen=True, slots=True)
class NextDone:
    job: Job
    at: datetime


@dataclass(frozen=True, slots=True)
class WorstWait:
    job: Job
    reason: Wait


@dataclass(frozen=True, slots=True)
class Overview:
    jobs: OpenJobs
    lines_per_s: float
    next_done: NextDone | None
    worst_wait: WorstWait | None
    machine: Machine
    failed_today: FailedToday


_OPEN = """
    j.ended_at IS NULL AND j.state IN ('in_progress', 'cancelling') AND j.deleted_at IS NULL AND NOT j.is_live
    AND (CAST(:tenant_id AS uuid) IS NULL OR j.tenant_id = :tenant_id)
"""
# In the order of their partial index, which no other index gives (decision 0010).
_RUNNING = "SELECT job_id FROM requests WHERE state = 'running' ORDER BY worker_id OFFSET 0"
_TODAY = """
    day = (statement_timestamp() AT TIME ZONE 'UTC')::date
    AND (CAST(:tenant_id AS uuid) IS NULL OR tenant_id = :tenant_id)
"""


def read_overview(
    connection: Connection,
    tenant_id: UUID | None,
    *,
    limit: int,
    solo_after_deaths: int,
    queues: Mapping[str, ModelQueue] | None = None,
) -> Overview:
    """The five answers for a tenant, or for all of them.

    `limit` is a claim's, as `explaining` needs it; `queues` those of models that were read a moment ago.
    """
    avoid_scans(connection)
    now, jobs, lines_per_s, failed = _figures(connection, tenant_id)
    nearest = _nearest_to_its_end(connection, tenant_id)
    longest = _longest_without_a_line(connection, tenant_id)
    found = reading.get_jobs(connection, [*nearest, *longest])
    return Overview(
        jobs,
        lines_per_s,
        _next_done(connection, [found[owned] for owned in nearest if owned in found], now),
        _worst_wait(
            connection, [found[owned] for owned in longest if owned in found], limit, solo_after_deaths, queues
        ),
        _machine(connection),
        failed,
    )


def _figures(connection: Connection, tenant_id: UUID | None) -> tuple[datetime, OpenJobs, float, FailedToday]:
    """Now, open jobs, lines a second over this minute and the one before, and what failed since midnight of UTC."""
    # Open jobs by their partial index; of each the newest result, by primary key, and whether a line runs, by the
    # partial index of running requests. Lines by the index of minutes. The day is the first part of both primary keys;
    # `settle` counts. All in one statement, because the feed asks each second.
    row = connection.execute(
        text(f"""
            SELECT clock_timestamp() AS now, o.*, l.lines_per_s, d.lines, d.failed, k.kinds
            FROM (
                SELECT count(*) AS open, count(*) FILTER (WHERE r.settled_at IS NOT NULL) AS moving,
                       count(*) FILTER (WHERE n.job_id IS NULL AND j.paused_at IS NULL) AS waiting,
                       count(j.paused_at) AS paused
                FROM jobs j
                LEFT JOIN LATERAL (
                    SELECT settled_at FROM results
                    WHERE job_id = j.id AND seq BETWEEN j.last_seq AND j.last_seq ORDER BY seq LIMIT 1
                ) r ON r.settled_at > clock_timestamp() - make_interval(secs => :moving)
                LEFT JOIN (SELECT DISTINCT job_id FROM ({_RUNNING}) held) n ON n.job_id = j.id
                WHERE {_OPEN}
            ) o CROSS JOIN (
                SELECT coalesce(sum(m.lines), 0) / (60 + extract(second FROM statement_timestamp())) AS lines_per_s
                FROM job_minutes m JOIN jobs j ON j.id = m.job_id
                WHERE m.minute >= date_trunc('minute', statement_timestamp()) - interval '1 minute'
                  AND (CAST(:tenant_id AS uuid) IS NULL OR j.tenant_id = :tenant_id)
            ) l CROSS JOIN (
                SELECT coalesce(sum(lines), 0) AS lines, coalesce(sum(failed), 0) AS failed
                FROM tenant_days WHERE {_TODAY}
            ) d CROSS JOIN (
                SELECT count(DISTINCT fingerprint) AS kinds FROM tenant_failures WHERE {_TODAY}
            ) k
        """),
        {"tenant_id": tenant_id, "moving": MOVING},
    ).one()
    lines, failed = int(row.lines), int(row.failed)
    return (
        row.now,
        OpenJobs(row.open, row.moving, row.waiting, row.paused),
        float(row.lines_per_s),
        FailedToday(failed, row.kinds, failed / lines if lines else 0.0),
    )


def _nearest_to_its_end(connection: Connection, tenant_id: UUID | None) -> list[tuple[UUID, UUID]]:
    """Jobs of which few seconds of work seem left, with their tenants first in each pair."""
    # Jobs that settled lines in the last ten minutes, by the index of minutes; the fewest seconds of work left first.
    rows = connection.execute(
        text(f"""
            SELECT j.id, j.tenant_id
            FROM jobs j JOIN (
                SELECT job_id, sum(lines) AS lines FROM job_minutes
                WHERE minute >= date_trunc('minute', statement_timestamp()) - interval '10 minutes' GROUP BY job_id
            ) m ON m.job_id = j.id
            WHERE {_OPEN} AND j.paused_at IS NULL AND j.state = 'in_progress'
            ORDER BY (j.total - j.last_seq)::double precision / greatest(m.lines, 1), j.id
            LIMIT :limit
        """),
        {"tenant_id": tenant_id, "limit": NEXT_CANDIDATES},
    ).all()
    return [(row.tenant_id, row.id) for row in rows]


def _next_done(connection: Connection, jobs: Sequence[Job], now: datetime) -> NextDone | None:
    """The job that ends first by its own page's estimate, among those that seem nearest to it."""
    paces = progress.read_paces(connection, jobs, now)
    estimates = [(job, paces[job.id].estimate) for job in jobs]
    ends = [NextDone(job, estimate.at) for job, estimate in estimates if estimate is not None]
    return min(ends, key=lambda end: end.at, default=None)


def _longest_without_a_line(connection: Connection, tenant_id: UUID | None) -> list[tuple[UUID, UUID]]:
    """The oldest job that has no running line and is not paused, behind its tenant; none where there is no such job."""
    # Jobs of models without a live worker first: nothing happens to them by itself.
    rows = connection.execute(
        text(f"""
            SELECT j.id, j.tenant_id
            FROM jobs j
            LEFT JOIN (SELECT DISTINCT job_id FROM ({_RUNNING}) held) n ON n.job_id = j.id
            LEFT JOIN (SELECT DISTINCT s.model FROM workers l JOIN worker_models s ON s.worker_id = l.id
                       WHERE l.ended_at IS NULL AND l.lease_expires_at > clock_timestamp()) w ON w.model = j.model
            WHERE {_OPEN} AND n.job_id IS NULL AND j.paused_at IS NULL
            ORDER BY w.model IS NOT NULL, j.id
            LIMIT 1
        """),
        {"tenant_id": tenant_id},
    ).all()
    return [(row.tenant_id, row.id) for row in rows]


def _worst_wait(
    connection: Connection,
    jobs: Sequence[Job],
    limit: int,
    solo_after_deaths: int,
    queues: Mapping[str, ModelQueue] | None,
) -> WorstWait | None:
    """Why the job waits, if there is one."""
    if not jobs:
        return None
    (job,) = jobs
    queue = None if queues is None else queues.get(job.model)
    if queue is None:
        queue = explaining.read_model_queue(connection, job.model, limit=limit, solo_after_deaths=solo_after_deaths)
    reason = explaining.explain(job, queue)
    return None if reason is None else WorstWait(job, reason)


def _machine(connection: Connection) -> Machine:
    # Few workers live. Lines wait beside a free worker where a job's open lines are more than its running ones.
    row = connection.execute(
        text(f"""
            WITH live AS (
                SELECT model, coalesce((stats ->> 'seats')::int, 0) AS seats,
                       coalesce((stats ->> 'running')::int, 0) AS running,
                       coalesce((stats ->> 'waiting')::int, 0) AS waiting,
                       coalesce((stats ->> 'busy')::double precision, 0) AS busy,
                       coalesce((stats ->> 'tokens_per_second')::double precision, 0) AS tokens
                FROM workers
                WHERE ended_at IS NULL AND lease_expires_at > clock_timestamp()
            ), held AS (
                SELECT job_id, count(*) AS lines
                FROM ({_RUNNING}) r GROUP BY job_id
            )
            SELECT count(*) AS live, coalesce(sum(seats), 0) AS seats, coalesce(sum(running), 0) AS running,
                   coalesce(avg(busy), 0) AS busy, coalesce(sum(tokens), 0) AS tokens,
                   coalesce(bool_or(running + waiting = 0 AND seats > 0 AND EXISTS (
                       SELECT FROM jobs j LEFT JOIN held ON held.job_id = j.id
                       WHERE j.model = live.model AND j.state = 'in_progress' AND j.ended_at IS NULL
                         AND j.paused_at IS NULL AND j.total - j.last_seq > coalesce(held.lines, 0)
                         AND j.in_progress_at < clock_timestamp() - make_interval(secs => :seconds)
                   )), false) AS is_idle_with_work
            FROM live
        """),
        {"seconds": IDLE_WITH_WORK},
    ).one()
    return Machine(row.live, row.seats, row.running, row.busy, row.tokens, row.is_idle_with_work)
