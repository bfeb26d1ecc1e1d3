"""What happened to a job beside its lines' ends: its first claim, lost workers, pauses, priorities, retries.

Number 1 is the first claim. All others are numbered under the job's lock, so a reader that has seen number n, and
number 1, misses nothing before n. A job keeps the first `MOST` of them.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from uuid import UUID

import orjson
from sqlalchemy import Connection, text

FIRST_CLAIM = 1
MOST = 1000


def add(connection: Connection, job_id: UUID, kind: str, detail: Mapping[str, object] | None = None) -> None:
    """Note an event. The transaction holds the job's lock."""
    # The next number; nothing where the job has `MOST`.
    connection.execute(
        text("""
            INSERT INTO job_events (job_id, number, kind, detail)
            SELECT :job_id, n.last + 1, :kind, CAST(:detail AS jsonb)
            FROM (SELECT coalesce(max(number), 1) AS last FROM job_events WHERE job_id = :job_id) n
            WHERE n.last < :most
        """),
        {"job_id": job_id, "kind": kind, "detail": orjson.dumps(detail or {}).decode(), "most": MOST},
    )


def add_first_claims(connection: Connection, job_ids: Collection[UUID], worker_id: UUID) -> None:
    """Note that a worker took lines of jobs of which none was taken before. Takes no lock on the jobs.

    In the order of ids, because two workers that come first at once wait for each other's rows.
    """
    connection.execute(
        text("""
            INSERT INTO job_events (job_id, number, kind, detail)
            SELECT n.job_id, :number, 'claimed', jsonb_build_object('worker', w.id, 'host', w.host, 'device', w.device)
            FROM unnest(CAST(:job_ids AS uuid[])) AS n (job_id) CROSS JOIN workers w
            WHERE w.id = :worker_id
            ON CONFLICT (job_id, number) DO NOTHING
        """),
        {"job_ids": sorted(job_ids), "number": FIRST_CLAIM, "worker_id": worker_id},
    )


def add_lost_worker(connection: Connection, worker_id: UUID) -> None:
    """Note, for each job of which the worker holds lines, how many. The transaction holds these jobs' locks."""
    # Live jobs end with their worker: their caller gets an error.
    connection.execute(
        text("""
            INSERT INTO job_events (job_id, number, kind, detail)
            SELECT h.job_id, n.last + 1, 'worker_lost',
                   jsonb_build_object('worker', w.id, 'host', w.host, 'device', w.device, 'lines', h.lines)
            FROM (SELECT job_id, count(*) AS lines FROM requests
                  WHERE worker_id = :worker_id AND state = 'running' GROUP BY job_id) h
            JOIN jobs j ON j.id = h.job_id AND NOT j.is_live
            CROSS JOIN LATERAL (
                SELECT coalesce(max(number), 1) AS last FROM job_events e WHERE e.job_id = h.job_id
            ) n
            JOIN workers w ON w.id = :worker_id
            WHERE n.last < :most
        """),
        {"worker_id": worker_id, "most": MOST},
    )
