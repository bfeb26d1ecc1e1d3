"""Milestones of running jobs, for webhooks that subscribe to them: the first result, quarters, and standstill.

The courier looks for them, so settling pays nothing. A job's end overtakes what was not announced by then.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from uuid import UUID

import orjson
from sqlalchemy import Connection, text

from jobs.ids import new_id

FIRST_RESULT = "job.first_result"
QUARTERS = {"job.progress_25": 25, "job.progress_50": 50, "job.progress_75": 75}
STALLED = "job.stalled"
TYPES = (FIRST_RESULT, *QUARTERS, STALLED)

# `m.type` of the job `j` has a subscriber, and was not announced yet.
_WANTED = """
    (m.type = ANY(j.webhook_events)
     OR EXISTS (SELECT 1 FROM webhook_endpoints w
                WHERE w.tenant_id = j.tenant_id AND w.disabled_at IS NULL AND m.type = ANY(w.event_types)))
    AND NOT EXISTS (SELECT 1 FROM events e WHERE e.job_id = j.id AND e.type = m.type)
"""
_RUNS = "j.ended_at IS NULL AND j.state = 'in_progress' AND j.deleted_at IS NULL AND NOT j.is_live"


@dataclass(frozen=True, slots=True)
class Milestone:
    """An event to announce. `reason` says why a job stands still: `jobs.queries.explaining.Wait` as an object."""

    job_id: UUID
    type: str
    reason: Mapping[str, object] | None = None


def reached(connection: Connection, *, limit: int) -> list[Milestone]:
    """What jobs have reached and subscribers have not been told, up to `limit`."""
    # Open jobs are in a partial index, and few; each look at their subscribers and events goes by a key.
    rows = connection.execute(
        text(f"""
            SELECT j.id, m.type
            FROM jobs j CROSS JOIN unnest(CAST(:types AS text[]), CAST(:percents AS int[])) AS m (type, percent)
            WHERE {_RUNS} AND j.last_seq > 0 AND j.last_seq::bigint * 100 >= j.total::bigint * m.percent AND {_WANTED}
            ORDER BY j.id, m.percent
            LIMIT :limit
        """),
        {"types": [FIRST_RESULT, *QUARTERS], "percents": [0, *QUARTERS.values()], "limit": limit},
    )
    return [Milestone(row.id, row.type) for row in rows]


def standing(connection: Connection, *, seconds: float, limit: int) -> list[tuple[UUID, UUID]]:
    """`(tenant, job)` of jobs of which no line runs and none has ended for so long, and whose subscribers do not know.

    A paused job waits for its owner, who knows.
    """
    # Running lines are few, and minutes are found by their key. The newest one may have had a line until its end.
    rows = connection.execute(
        text(f"""
            WITH running AS MATERIALIZED (SELECT DISTINCT job_id FROM requests WHERE state = 'running')
            SELECT j.tenant_id, j.id
            FROM jobs j CROSS JOIN (SELECT CAST(:type AS text) AS type) m
            WHERE {_RUNS} AND j.paused_at IS NULL AND j.id NOT IN (SELECT job_id FROM running)
              AND greatest(j.in_progress_at,
                           (SELECT max(minute) + interval '1 minute' FROM job_minutes n WHERE n.job_id = j.id))
                  < clock_timestamp() - make_interval(secs => :seconds)
              AND {_WANTED}
            ORDER BY j.id
            LIMIT :limit
        """),
        {"type": STALLED, "seconds": seconds, "limit": limit},
    )
    return [(row.tenant_id, row.id) for row in rows]


def announce(connection: Connection, milestones: Sequence[Milestone]) -> int:
    """Insert each event once, with the job's counters of now, and its deliveries. Returns how many were new.

    A job that ended in between is left out: its end is the later news.
    """
    # The job's lock keeps its end out until this commits. Endpoints that jobs name get what the job says, those of the
    # tenant what they subscribed to.
    return int(
        connection.execute(
            text("""
                WITH due AS (
                    SELECT * FROM unnest(CAST(:event_ids AS uuid[]), CAST(:job_ids AS uuid[]), CAST(:types AS text[]),
                                         CAST(:reasons AS jsonb[])) AS d (event_id, job_id, type, reason)
                ), running AS (
                    SELECT id, tenant_id, webhook_endpoint_id, webhook_events, total, completed, failed, cancelled,
                           expired
                    FROM jobs
                    WHERE id = ANY(CAST(:job_ids AS uuid[])) AND state = 'in_progress' AND deleted_at IS NULL
                    ORDER BY id
                    FOR NO KEY UPDATE
                ), inserted AS (
                    INSERT INTO events (id, tenant_id, job_id, type, detail)
                    SELECT d.event_id, r.tenant_id, r.id, d.type,
                           jsonb_build_object(
                               'request_counts',
                               jsonb_build_object('total', r.total, 'completed', r.completed, 'failed', r.failed,
                                                  'cancelled', r.cancelled, 'expired', r.expired)
                           ) || CASE WHEN d.reason IS NULL THEN '{}' ELSE jsonb_build_object('reason', d.reason) END
                    FROM due d JOIN running r ON r.id = d.job_id
                    ON CONFLICT (job_id, type) DO NOTHING
                    RETURNING id, tenant_id, job_id, type
                ), queued AS (
                    INSERT INTO deliveries (event_id, endpoint_id)
                    SELECT i.id, w.id
                    FROM inserted i JOIN running r ON r.id = i.job_id
                    JOIN webhook_endpoints w ON w.id = r.webhook_endpoint_id AND w.disabled_at IS NULL
                    WHERE i.type = ANY(r.webhook_events)
                    UNION ALL
                    SELECT i.id, w.id
                    FROM inserted i JOIN webhook_endpoints w ON w.tenant_id = i.tenant_id AND w.disabled_at IS NULL
                    WHERE i.type = ANY(w.event_types)
                )
                SELECT count(*) FROM inserted
            """),
            {
                "event_ids": [new_id() for _ in milestones],
                "job_ids": [one.job_id for one in milestones],
                "types": [one.type for one in milestones],
                "reasons": [None if one.reason is None else orjson.dumps(one.reason).decode() for one in milestones],
            },
        ).scalar_one()
    )
