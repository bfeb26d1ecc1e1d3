"""Reads for one job's page. Each goes by an index, and none counts lines. The caller has checked whose job it is."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.estimates import MINUTES, Estimate, estimate
from jobs.queries.job_events import FIRST_CLAIM
from jobs.queries.reading import Job
from jobs.states import JobState

POINTS = 180  # of a chart
SPARK_MINUTES = 30
TIMELINE = 100


@dataclass(frozen=True, slots=True)
class Pace:
    """How fast a job goes: lines/s over this minute and the one before, and when it ends at its longer pace.

    `spark` has the lines/s of the last `SPARK_MINUTES` whole minutes of its life, oldest first.
    """

    lines_per_second: float
    estimate: Estimate | None
    spark: Sequence[float]


@dataclass(frozen=True, slots=True)
class Point:
    """What was settled within `seconds` from `at`. `lines` counts failed ones, too."""

    at: datetime
    seconds: int
    lines: int
    failed: int
    prompt_tokens: int
    cached_tokens: int
    completion_tokens: int


@dataclass(frozen=True, slots=True)
class FailureGroup:
    """Lines that failed alike. `example` is the stored result of the first of them."""

    fingerprint: int
    code: str
    message: str
    lines: int
    first_at: datetime
    last_at: datetime
    first_line: int
    custom_id: str | None
    example: bytes | None


@dataclass(frozen=True, slots=True)
class JobEvent:
    number: int
    at: datetime
    kind: str
    detail: Mapping[str, object]


@dataclass(frozen=True, slots=True)
class Delivery:
    """A webhook's outcome so far. `due_at` is None once it was delivered or given up."""

    id: int
    event_id: UUID
    event_type: str
    url: str
    created_at: datetime
    attempts: int
    due_at: datetime | None
    delivered_at: datetime | None
    given_up: bool
    last_status: int | None
    last_error: str | None


def read_pace(connection: Connection, job: Job, now: datetime) -> Pace:
    """A job's pace at `now`, from its newest minutes."""
    return read_paces(connection, [job], now)[job.id]


def read_paces(connection: Connection, jobs: Collection[Job], now: datetime) -> dict[UUID, Pace]:
    """The same for several jobs, by one query."""
    if not jobs:
        return {}
    # By their keys the first claim of each, and its newest minutes: this one, the job's first, and those that count. As
    # numbers, because the feed reads those of each job on a screen each second.
    rows = connection.execute(
        text("""
            SELECT j.id, e.at AS started_at, m.minutes, m.lines
            FROM unnest(CAST(:job_ids AS uuid[])) AS j (id)
            LEFT JOIN job_events e ON e.job_id = j.id AND e.number = :first
            CROSS JOIN LATERAL (
                SELECT array_agg((extract(epoch FROM n.minute) / 60)::int) AS minutes, array_agg(n.lines) AS lines
                FROM (
                    SELECT minute, lines FROM job_minutes WHERE job_id = j.id ORDER BY minute DESC LIMIT :limit
                ) n
            ) m
        """),
        {"job_ids": [job.id for job in jobs], "first": FIRST_CLAIM, "limit": max(MINUTES, SPARK_MINUTES) + 2},
    )
    found = {row.id: (row.started_at, dict(zip(row.minutes or (), row.lines or (), strict=True))) for row in rows}
    return {job.id: _pace(job, now, found[job.id][0] or job.in_progress_at, found[job.id][1]) for job in jobs}


def _pace(job: Job, now: datetime, started_at: datetime, lines: Mapping[int, int]) -> Pace:
    """`lines` are those of the newest minutes with work, newest first; minutes are counted since 1970."""
    this_minute, first_minute = _minute(now), _minute(started_at)
    since = max(now.replace(second=0, microsecond=0) - timedelta(minutes=1), started_at)
    settled = sum(lines.get(minute, 0) for minute in range(_minute(since), this_minute + 1))
    rate = settled / max(1.0, (now - since).total_seconds())
    found = None
    if job.state == JobState.IN_PROGRESS and job.paused_at is None:
        counted = [
            (datetime.fromtimestamp(60 * minute, UTC), lines[minute]) for minute in itertools.islice(lines, MINUTES + 2)
        ]
        found = estimate(now=now, started_at=started_at, settled=job.last_seq, left=job.open, minutes=counted)
    shown = range(min(SPARK_MINUTES, this_minute - first_minute), 0, -1)
    return Pace(rate, found, [round(lines.get(this_minute - ago, 0) / 60, 3) for ago in shown])


def _minute(moment: datetime) -> int:
    return int(moment.timestamp()) // 60


def read_points(connection: Connection, job_id: UUID) -> list[Point]:
    """A job's minutes, as many of them in a point as bring the points to at most `POINTS`."""
    # Both ends by the key; a point has so many minutes that all of the job is in POINTS of them.
    rows = connection.execute(
        text("""
            WITH span AS (
                SELECT min(minute) AS first, max(minute) AS last FROM job_minutes WHERE job_id = :job_id
            ), width AS (
                SELECT first, 60 * ceil((extract(epoch FROM last - first) / 60 + 1) / :points)::int AS seconds FROM span
            )
            SELECT date_bin(make_interval(secs => w.seconds), m.minute, w.first) AS at, w.seconds,
                   sum(m.lines) AS lines, sum(m.failed) AS failed, sum(m.prompt_tokens) AS prompt_tokens,
                   sum(m.cached_tokens) AS cached_tokens, sum(m.completion_tokens) AS completion_tokens
            FROM width w JOIN job_minutes m ON m.job_id = :job_id
            GROUP BY 1, 2
            ORDER BY 1
        """),
        {"job_id": job_id, "points": POINTS},
    )
    return [
        Point(
            row.at,
            row.seconds,
            int(row.lines),
            int(row.failed),
            int(row.prompt_tokens),
            int(row.cached_tokens),
            int(row.completion_tokens),
        )
        for row in rows
    ]


def read_failures(connection: Connection, job_id: UUID) -> list[FailureGroup]:
    """A job's kinds of failure, those of most lines first, each with one of its lines."""
    # At most 201 groups; the example by the key of (job, line).
    rows = connection.execute(
        text("""
            SELECT g.fingerprint, g.code, g.message, g.lines, g.first_at, g.last_at, g.first_line,
                   b.custom_id, r.body AS example
            FROM failure_groups g
            LEFT JOIN results r ON r.job_id = g.job_id AND r.line = g.first_line
            LEFT JOIN bodies b ON b.job_id = g.job_id AND b.line = g.first_line
            WHERE g.job_id = :job_id
            ORDER BY g.lines DESC, g.fingerprint
        """),
        {"job_id": job_id},
    )
    return [FailureGroup(**row._mapping) for row in rows]


def read_events(connection: Connection, job_id: UUID, *, after: int = 0, limit: int = TIMELINE) -> list[JobEvent]:
    """The newest events with a number above `after`, in their order."""
    # By the key.
    rows = connection.execute(
        text("""
            SELECT number, at, kind, detail FROM job_events WHERE job_id = :job_id AND number > :after
            ORDER BY number DESC LIMIT :limit
        """),
        {"job_id": job_id, "after": after, "limit": limit},
    ).all()
    return [JobEvent(**row._mapping) for row in reversed(rows)]


def read_deliveries(connection: Connection, job_id: UUID) -> Sequence[Delivery]:
    """The webhooks of a job's events, newest first."""
    # A job has few events, and each a delivery at most.
    rows = connection.execute(
        text("""
            SELECT d.id, e.id AS event_id, e.type AS event_type, w.url, e.created_at, d.attempts, d.due_at,
                   d.delivered_at, d.given_up, d.last_status, d.last_error
            FROM events e JOIN deliveries d ON d.event_id = e.id JOIN webhook_endpoints w ON w.id = d.endpoint_id
            WHERE e.job_id = :job_id
            ORDER BY e.created_at DESC, d.id DESC
            LIMIT 100
        """),
        {"job_id": job_id},
    )
    return [Delivery(**row._mapping) for row in rows]
