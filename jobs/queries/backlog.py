"""What waits, by model, for metrics and autoscalers. Read from jobs' counters: no line is counted."""

from __future__ import annotations

from dataclasses import dataclass

from sqlalchemy import Connection, text

TOKENS_UNKNOWN = 256.0
"""Tokens that a line is taken for while no line of its model has ended."""

ENDED_JOBS = 1000
"""The jobs that ended last: a job without a settled line takes over the mean of those of its model."""


@dataclass(frozen=True, slots=True)
class ModelBacklog:
    """The open work of one model. `pending_tokens` is an estimate: open lines times the mean tokens of settled ones."""

    model: str
    jobs: int
    pending: int
    running: int
    pending_tokens: float
    oldest_seconds: float
    """Age of the oldest job with a line that waits, 0 where none does."""
    live_workers: int
    """Those that serve it among others included."""


@dataclass(frozen=True, slots=True)
class Backlog:
    models: list[ModelBacklog]
    webhooks_due: int
    """Deliveries whose time has come."""


def read_backlog(connection: Connection) -> Backlog:
    """The backlog of every model that was ever served. Its cost grows with open jobs and running lines."""
    # A job's own mean where it has one, else that of its model's jobs among the last that ended, else a constant.
    # Running lines are few: they fit into engines.
    rows = connection.execute(
        text("""
            WITH running AS MATERIALIZED (
                SELECT job_id, count(*) AS lines FROM requests WHERE state = 'running' GROUP BY job_id
            ), mean AS (
                SELECT model AS name, sum(prompt_tokens + completion_tokens) / sum(last_seq)::float AS tokens
                FROM (
                    SELECT model, prompt_tokens, completion_tokens, last_seq FROM jobs
                    WHERE ended_at IS NOT NULL
                    ORDER BY ended_at DESC
                    LIMIT :ended_jobs
                ) ended
                WHERE last_seq > 0
                GROUP BY model
            ), open AS (
                SELECT j.model, j.in_progress_at, coalesce(r.lines, 0) AS running,
                       greatest(j.total - j.last_seq - coalesce(r.lines, 0), 0) AS pending,
                       coalesce((j.prompt_tokens + j.completion_tokens) / nullif(j.last_seq, 0)::float,
                                mean.tokens, :unknown) AS tokens
                FROM jobs j LEFT JOIN running r ON r.job_id = j.id LEFT JOIN mean ON mean.name = j.model
                WHERE j.ended_at IS NULL AND j.state = 'in_progress' AND j.deleted_at IS NULL
            ), live AS (
                SELECT s.model, count(*) AS workers FROM workers w JOIN worker_models s ON s.worker_id = w.id
                WHERE w.ended_at IS NULL AND w.lease_expires_at > clock_timestamp()
                GROUP BY s.model
            )
            SELECT m.name AS model, count(o.model) AS jobs, coalesce(sum(o.pending), 0)::bigint AS pending,
                   coalesce(sum(o.running), 0)::bigint AS running,
                   coalesce(sum(o.pending * o.tokens), 0)::float AS pending_tokens,
                   coalesce(extract(epoch FROM clock_timestamp()
                       - min(o.in_progress_at) FILTER (WHERE o.pending > 0)), 0)::float AS oldest_seconds,
                   coalesce(max(live.workers), 0) AS live_workers
            FROM models m LEFT JOIN open o ON o.model = m.name LEFT JOIN live ON live.model = m.name
            GROUP BY m.name
            ORDER BY m.name
        """),
        {"ended_jobs": ENDED_JOBS, "unknown": TOKENS_UNKNOWN},
    )
    models = [ModelBacklog(**row._mapping) for row in rows]
    # By the partial index of what is due.
    due = connection.execute(text("SELECT count(*) FROM deliveries WHERE due_at <= clock_timestamp()")).scalar_one()
    return Backlog(models, due)
