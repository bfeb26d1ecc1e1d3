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
from jobs.queries.progress import Pace
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
class Figures:
    """What can be counted, at one moment; and the jobs that the other answers are about."""

    now: datetime
    jobs: OpenJobs
    lines_per_s: float
    machine: Machine
    failed_today: FailedToday
    nearest: Sequence[UUID]
    """Jobs of which few seconds of work seem left."""

    longest_waiting: UUID | None
    """The oldest job that has no running line and is not paused; of models without a live worker first."""


@dataclass(frozen=True, slots=True)
class Overview:
    figures: Figures
    next_done: NextDone | None
    worst_wait: WorstWait | None


_OPEN = """
    j.ended_at IS NULL AND j.state IN ('in_progress', 'cancelling') AND j.deleted_at IS NULL AND NOT j.is_live
    AND (CAST(:tenant_id AS uuid) IS NULL OR j.tenant_id = :tenant_id)
"""
_TODAY = """
    day = (statement_timestamp() AT TIME ZONE 'UTC')::date
    AND (CAST(:tenant_id AS uuid) IS NULL OR tenant_id = :tenant_id)
"""


def read_overview(connection: Connection, tenant_id: UUID | None, *, limit: int, solo_after_deaths: int) -> Overview:
    """The five answers for a tenant, or for all of them. `limit` is a claim's, as `explaining` needs it."""
    figures = read_figures(connection, tenant_id)
    jobs = {job.id: job for job in reading.find_jobs(connection, candidates(figures))}
    longest = None if figures.longest_waiting is None else jobs.get(figures.longest_waiting)
    models = [] if longest is None else [longest.model]
    queues = explaining.read_model_queues(connection, models, limit=limit, solo_after_deaths=solo_after_deaths)
    nearest = [jobs[job_id] for job_id in figures.nearest if job_id in jobs]
    return overview_of(figures, jobs, queues, progress.read_paces(connection, nearest, figures.now))


def candidates(figures: Figures) -> set[UUID]:
    """The jobs that `overview_of` wants."""
    return {*figures.nearest, *filter(None, [figures.longest_waiting])}


def overview_of(
    figures: Figures, jobs: Mapping[UUID, Job], queues: Mapping[str, ModelQueue], paces: Mapping[UUID, Pace]
) -> Overview:
    """The answers from what was read of the candidates, as far as they are still there."""
    estimates = [(jobs[job_id], paces[job_id].estimate) for job_id in figures.nearest if job_id in paces]
    ends = [NextDone(job, estimate.at) for job, estimate in estimates if estimate is not None]
    longest = None if figures.longest_waiting is None else jobs.get(figures.longest_waiting)
    reason = None if longest is None or longest.is_terminal else explaining.explain(longest, queues[longest.model])
    return Overview(
        figures,
        min(ends, key=lambda end: end.at, default=None),
        None if longest is None or reason is None else WorstWait(longest, reason),
    )


def read_figures(connection: Connection, tenant_id: UUID | None) -> Figures:
    """In one statement, because the feed asks each second.

    Lines a second are of this minute and the one before, failures since midnight of UTC, and the nearest end is by the
    lines of the last ten minutes.
    """
    avoid_scans(connection)
    # Running lines in the order of their partial index, which no other index gives (decision 0010). Open jobs by
    # theirs; of each the newest result, by primary key. Lines by the index of minutes. The day is the first part of
    # both primary keys; `settle` counts. Few workers live: lines wait beside a free one where a job's open lines are
    # more than its running ones.
    row = connection.execute(
        text(f"""
            WITH held AS MATERIALIZED (
                SELECT job_id, count(*) AS lines
                FROM (SELECT job_id FROM requests WHERE state = 'running' ORDER BY worker_id OFFSET 0) r GROUP BY job_id
            ), live AS MATERIALIZED (
                SELECT id, model, coalesce((stats ->> 'seats')::int, 0) AS seats,
                       coalesce((stats ->> 'running')::int, 0) AS running,
                       coalesce((stats ->> 'waiting')::int, 0) AS waiting,
                       coalesce((stats ->> 'busy')::double precision, 0) AS busy,
                       coalesce((stats ->> 'tokens_per_second')::double precision, 0) AS tokens
                FROM workers
                WHERE ended_at IS NULL AND lease_expires_at > clock_timestamp()
            )
            SELECT clock_timestamp() AS now, o.*, l.lines_per_s, d.lines, d.failed, k.kinds, m.*,
                   ARRAY(
                       SELECT j.id
                       FROM jobs j JOIN (
                           SELECT job_id, sum(lines) AS lines FROM job_minutes
                           WHERE minute >= date_trunc('minute', statement_timestamp()) - interval '10 minutes'
                           GROUP BY job_id
                       ) m ON m.job_id = j.id
                       WHERE {_OPEN} AND j.paused_at IS NULL AND j.state = 'in_progress'
                       ORDER BY (j.total - j.last_seq)::double precision / greatest(m.lines, 1), j.id
                       LIMIT :candidates
                   ) AS nearest,
                   (
                       SELECT j.id
                       FROM jobs j
                       LEFT JOIN held ON held.job_id = j.id
                       LEFT JOIN (SELECT DISTINCT s.model FROM live l JOIN worker_models s ON s.worker_id = l.id) w
                         ON w.model = j.model
                       WHERE {_OPEN} AND held.job_id IS NULL AND j.paused_at IS NULL
                       ORDER BY w.model IS NOT NULL, j.id
                       LIMIT 1
                   ) AS longest_waiting
            FROM (
                SELECT count(*) AS open, count(*) FILTER (WHERE r.settled_at IS NOT NULL) AS moving,
                       count(*) FILTER (WHERE held.job_id IS NULL AND j.paused_at IS NULL) AS waiting,
                       count(j.paused_at) AS paused
                FROM jobs j
                LEFT JOIN LATERAL (
                    SELECT settled_at FROM results
                    WHERE job_id = j.id AND seq BETWEEN j.last_seq AND j.last_seq ORDER BY seq LIMIT 1
                ) r ON r.settled_at > clock_timestamp() - make_interval(secs => :moving)
                LEFT JOIN held ON held.job_id = j.id
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
            ) k CROSS JOIN (
                SELECT count(*) AS live, coalesce(sum(seats), 0) AS seats, coalesce(sum(running), 0) AS running,
                       coalesce(avg(busy), 0) AS busy, coalesce(sum(tokens), 0) AS tokens,
                       coalesce(bool_or(running + waiting = 0 AND seats > 0 AND EXISTS (
                           SELECT FROM jobs j LEFT JOIN held ON held.job_id = j.id
                           WHERE j.model = live.model AND j.state = 'in_progress' AND j.ended_at IS NULL
                             AND j.paused_at IS NULL AND j.total - j.last_seq > coalesce(held.lines, 0)
                             AND j.in_progress_at < clock_timestamp() - make_interval(secs => :idle)
                       )), false) AS is_idle_with_work
                FROM live
            ) m
        """),
        {"tenant_id": tenant_id, "moving": MOVING, "candidates": NEXT_CANDIDATES, "idle": IDLE_WITH_WORK},
    ).one()
    lines, failed = int(row.lines), int(row.failed)
    return Figures(
        row.now,
        OpenJobs(row.open, row.moving, row.waiting, row.paused),
        float(row.lines_per_s),
        Machine(row.live, row.seats, row.running, row.busy, row.tokens, row.is_idle_with_work),
        FailedToday(failed, row.kinds, failed / lines if lines else 0.0),
        row.nearest,
        row.longest_waiting,
    )
