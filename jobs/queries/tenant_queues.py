"""The queue by model and tenant: what waits, for how long, and which deadlines the live workers will miss."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.queries import waits
from jobs.queries.planner import avoid_scans

HORIZONS = {"1h": 3600.0, "6h": 6 * 3600.0, "24h": 24 * 3600.0}  # seconds, by Postgres' word for the interval


@dataclass(frozen=True, slots=True)
class TenantQueue:
    """A tenant's part of a model's queue. Waits are seconds, `p50` and `p95` those of the last hour's claims.

    `pressure` is, by horizon, the tokens due within it by what the model's live workers make in that time; None where
    no rate is known.
    """

    tenant: str
    jobs: int
    lines: int
    tokens: int
    oldest_wait: float | None
    p50: float | None
    p95: float | None
    pressure: Mapping[str, float | None]


@dataclass(frozen=True, slots=True)
class QueuedModel:
    model: str
    workers: int
    last_seen: datetime | None
    tokens_per_s: float
    seconds_to_empty: float | None
    tenants: Sequence[TenantQueue]


def read_queues(connection: Connection, tenant_id: UUID | None) -> list[QueuedModel]:
    """Every model with open lines. A tenant sees its own rows; rate and time to empty are those of the whole model."""
    avoid_scans(connection)
    rates = _rates(connection)
    due = ", ".join(
        f"sum(open * tokens) FILTER (WHERE expires_at <= statement_timestamp() + interval '{name}') AS due_{name}"
        for name in HORIZONS
    )
    # Open jobs by their partial index. Running lines are counted by theirs. A job without a settled line takes as many
    # tokens a line as the model's lines of the last hour, which are in the index of minutes.
    rows = connection.execute(
        text(f"""
            WITH held AS (
                SELECT job_id, count(*) AS lines
                FROM (SELECT job_id FROM requests WHERE state = 'running' ORDER BY worker_id OFFSET 0) r GROUP BY job_id
            ), usual AS (
                SELECT j.model, sum(m.prompt_tokens + m.completion_tokens)::double precision / greatest(sum(m.lines), 1)
                       AS tokens
                FROM job_minutes m JOIN jobs j ON j.id = m.job_id
                WHERE m.minute >= statement_timestamp() - interval '1 hour'
                GROUP BY j.model
            ), waiting AS (
                SELECT j.model, j.tenant_id, j.in_progress_at, j.expires_at,
                       greatest(j.total - j.last_seq - coalesce(held.lines, 0), 0) AS lines,
                       j.total - j.last_seq AS open,
                       CASE WHEN j.last_seq > 0
                            THEN (j.prompt_tokens + j.completion_tokens)::double precision / j.last_seq
                            ELSE coalesce(usual.tokens, 0) END AS tokens
                FROM jobs j
                LEFT JOIN held ON held.job_id = j.id
                LEFT JOIN usual ON usual.model = j.model
                WHERE j.state = 'in_progress' AND j.ended_at IS NULL AND j.deleted_at IS NULL AND j.paused_at IS NULL
            )
            SELECT w.*, t.name AS tenant
            FROM (
                SELECT model, tenant_id, count(*) AS jobs, sum(lines)::bigint AS lines, sum(open * tokens) AS tokens,
                       extract(epoch FROM statement_timestamp() - min(in_progress_at) FILTER (WHERE lines > 0))
                           ::double precision AS oldest_wait,
                       {due}
                FROM waiting GROUP BY model, tenant_id
            ) w JOIN tenants t ON t.id = w.tenant_id
            ORDER BY w.model, t.name
        """)
    ).all()
    claims = _claims(connection)
    workers = _workers(connection)
    queues = []
    for model, of_model in itertools.groupby(rows, key=lambda row: row.model):
        tenants = list(of_model)
        own = [row for row in tenants if tenant_id is None or row.tenant_id == tenant_id]
        if not own:
            continue
        live, last_seen = workers.get(model, (0, None))
        rate = rates.get(model, 0.0)
        left = sum(row.tokens for row in tenants)  # those of lines that run included
        queued = [_tenant(row, rate, claims.get((model, row.tenant_id), {})) for row in own]
        queues.append(QueuedModel(model, live, last_seen, rate, left / rate if rate else None, queued))
    return queues


def _tenant(row: Any, rate: float, claims: Mapping[int, int]) -> TenantQueue:
    return TenantQueue(
        row.tenant,
        row.jobs,
        row.lines,
        round(row.tokens),
        row.oldest_wait,
        waits.percentile(claims, 0.5),
        waits.percentile(claims, 0.95),
        {name: _pressure(getattr(row, f"due_{name}"), rate, seconds) for name, seconds in HORIZONS.items()},
    )


def _pressure(due: float | None, rate: float, seconds: float) -> float | None:
    if not due:
        return 0.0
    return due / (rate * seconds) if rate else None


def _rates(connection: Connection) -> dict[str, float]:
    """Tokens a second of each model, prompts included, over the last ten whole minutes in which it settled lines."""
    # By the index of minutes.
    rows = connection.execute(
        text("""
            SELECT j.model, sum(m.prompt_tokens + m.completion_tokens)::double precision
                   / (60 * count(DISTINCT m.minute)) AS tokens
            FROM job_minutes m JOIN jobs j ON j.id = m.job_id
            WHERE m.minute >= date_trunc('minute', statement_timestamp()) - interval '10 minutes'
              AND m.minute < date_trunc('minute', statement_timestamp())
            GROUP BY j.model
        """)
    )
    return {row.model: row.tokens for row in rows}


def _workers(connection: Connection) -> dict[str, tuple[int, datetime | None]]:
    """Of each model its live workers, and when any of its workers was last heard of."""
    # Rows of ended workers are kept for a week.
    rows = connection.execute(
        text("""
            SELECT s.model, max(w.heartbeat_at) AS last_seen,
                   count(*) FILTER (WHERE w.ended_at IS NULL AND w.lease_expires_at > clock_timestamp()) AS live
            FROM workers w JOIN worker_models s ON s.worker_id = w.id
            GROUP BY s.model
        """)
    )
    return {row.model: (row.live, row.last_seen) for row in rows}


def _claims(connection: Connection) -> dict[tuple[str, UUID], dict[int, int]]:
    """Lines claimed within the last hour, by model and tenant and by how long they had waited."""
    # The minute is the first part of the primary key.
    rows = connection.execute(
        text("""
            SELECT model, tenant_id, bucket, sum(lines) AS lines FROM wait_minutes
            WHERE minute > statement_timestamp() - interval '1 hour'
            GROUP BY model, tenant_id, bucket
        """)
    )
    claims: dict[tuple[str, UUID], dict[int, int]] = defaultdict(dict)
    for row in rows:
        claims[row.model, row.tenant_id][row.bucket] = int(row.lines)
    return claims
