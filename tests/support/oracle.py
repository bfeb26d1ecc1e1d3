"""What must be true of the rows at any moment. Called after every test that does damage."""

from __future__ import annotations

from sqlalchemy import Connection, create_engine, text
from sqlalchemy.pool import NullPool

from jobs.database import sqlalchemy_url

# Each query lists violations.
_RULES = {
    "every line of a published job has one request and one body, numbered 1..total": """
        SELECT j.id, j.total, count(r.line), count(b.line), min(r.line), max(r.line)
        FROM jobs j LEFT JOIN requests r ON r.job_id = j.id LEFT JOIN bodies b ON b.job_id = j.id AND b.line = r.line
        WHERE j.in_progress_at IS NOT NULL AND j.deleted_at IS NULL GROUP BY j.id
        HAVING count(r.line) <> j.total OR count(b.line) <> j.total OR min(r.line) <> 1 OR max(r.line) <> j.total
    """,
    "a request has a result exactly when it is settled, and both say the same": """
        SELECT job_id, line, r.state, s.state FROM requests r FULL JOIN results s USING (job_id, line)
        LEFT JOIN jobs j ON j.id = job_id
        WHERE j.deleted_at IS NULL
          AND CASE WHEN r.state IN ('pending', 'running') THEN s.state IS NOT NULL
                   ELSE s.state IS DISTINCT FROM r.state END
    """,
    "the counters equal the rows": """
        SELECT j.id FROM jobs j LEFT JOIN requests r ON r.job_id = j.id WHERE j.deleted_at IS NULL GROUP BY j.id
        HAVING j.completed <> count(*) FILTER (WHERE r.state = 'completed')
            OR j.failed <> count(*) FILTER (WHERE r.state = 'failed')
            OR j.cancelled <> count(*) FILTER (WHERE r.state = 'cancelled')
            OR j.expired <> count(*) FILTER (WHERE r.state = 'expired')
    """,
    "seq is 1..last_seq without gap or repeat": """
        SELECT j.id, j.last_seq, count(s.seq), min(s.seq), max(s.seq)
        FROM jobs j LEFT JOIN results s ON s.job_id = j.id WHERE j.deleted_at IS NULL GROUP BY j.id
        HAVING count(s.seq) <> j.last_seq OR (j.last_seq > 0 AND (min(s.seq) <> 1 OR max(s.seq) <> j.last_seq))
    """,
    "no request is running without a worker that is not ended": """
        SELECT r.job_id, r.line, r.worker_id FROM requests r LEFT JOIN workers w ON w.id = r.worker_id
        WHERE r.state = 'running' AND (w.id IS NULL OR w.ended_at IS NOT NULL)
    """,
    "a job is at its end exactly when nothing of it is open": """
        SELECT j.id, j.state, j.ended_at FROM jobs j WHERE j.in_progress_at IS NOT NULL
          AND ((j.ended_at IS NOT NULL) <> (j.state IN ('completed', 'failed', 'expired', 'cancelled'))
            OR (j.ended_at IS NOT NULL) <> (j.completed + j.failed + j.cancelled + j.expired = j.total))
    """,
    "a job at its end has one event, of its state; one that runs has none": """
        SELECT j.id, j.state, count(e.id)
        FROM jobs j LEFT JOIN events e ON e.job_id = j.id AND e.detail IS NULL -- no milestone
        WHERE j.in_progress_at IS NOT NULL GROUP BY j.id
        HAVING count(e.id) <> (j.ended_at IS NOT NULL)::int OR bool_or(e.type <> 'job.' || j.state)
    """,
    "an event of a job with a webhook has at most one delivery to it": """
        SELECT e.id
        FROM events e JOIN deliveries d ON d.event_id = e.id JOIN webhook_endpoints w ON w.id = d.endpoint_id
        WHERE w.event_types IS NULL
        GROUP BY e.id HAVING count(*) > 1
    """,
    "a tenant's days count every line that the minutes of its jobs count": """
        SELECT m.tenant_id, m.lines, m.failed, d.lines, d.failed
        FROM (SELECT j.tenant_id, sum(m.lines) AS lines, sum(m.failed) AS failed
              FROM job_minutes m JOIN jobs j ON j.id = m.job_id GROUP BY j.tenant_id) m
        LEFT JOIN (SELECT tenant_id, sum(lines) AS lines, sum(failed) AS failed
                   FROM tenant_days GROUP BY tenant_id) d ON d.tenant_id = m.tenant_id
        WHERE coalesce(d.lines, 0) < m.lines OR coalesce(d.failed, 0) < m.failed -- jobs may be gone by now
    """,
    "a delivery is due, delivered or given up, and only one of them": """
        SELECT id FROM deliveries
        WHERE (due_at IS NOT NULL)::int + (delivered_at IS NOT NULL)::int + given_up::int <> 1
    """,
}


def check(database_url: str) -> None:
    """Assert every rule on all of a database, in one snapshot."""
    engine = create_engine(sqlalchemy_url(database_url), poolclass=NullPool, isolation_level="REPEATABLE READ")
    with engine.begin() as connection:
        assert_rules(connection)


def assert_rules(connection: Connection) -> None:
    """The same over a connection of the caller's."""
    for rule, violations in _RULES.items():
        found = connection.execute(text(violations)).all()
        assert not found, f"{rule}; but: {found[:5]}"
