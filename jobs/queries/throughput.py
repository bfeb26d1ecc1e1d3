"""What the workers of a model got done of late, from the minutes of its jobs."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import fmean, quantiles

from sqlalchemy import Connection, text

from jobs.queries.planner import avoid_scans

HOURS = 6  # that are looked at
MINUTES = 60  # with work, the newest


@dataclass(frozen=True, slots=True)
class Throughput:
    """Tokens, of prompts and answers together, in whole minutes with work; `slow` and `fast` are their quartiles."""

    tokens_per_second: float
    slow: float
    fast: float
    completion_tokens_per_line: float
    minutes: int


def read_throughput(connection: Connection, model: str) -> Throughput | None:
    """None where no line of the model ended within the last `HOURS`. Live requests are among them."""
    avoid_scans(connection)
    # By the index over minutes; the minute that is not over yet would look slow.
    rows = connection.execute(
        text("""
            SELECT sum(m.prompt_tokens + m.completion_tokens)::float / 60 AS tokens_per_second,
                   sum(m.completion_tokens)::float AS completion_tokens, sum(m.lines)::float AS lines
            FROM job_minutes m JOIN jobs j ON j.id = m.job_id
            WHERE m.minute >= statement_timestamp() - make_interval(hours => :hours)
              AND m.minute < date_trunc('minute', statement_timestamp()) AND j.model = :model
            GROUP BY m.minute
            HAVING sum(m.prompt_tokens + m.completion_tokens) > 0
            ORDER BY m.minute DESC
            LIMIT :minutes
        """),
        {"model": model, "hours": HOURS, "minutes": MINUTES},
    ).all()
    if not rows:
        return None
    rates = [row.tokens_per_second for row in rows]
    mean = fmean(rates)
    slow, _, fast = quantiles(rates, n=4, method="inclusive") if len(rates) > 1 else (mean, mean, mean)
    lines = sum(row.lines for row in rows)
    return Throughput(
        mean, min(slow, mean), max(fast, mean), sum(row.completion_tokens for row in rows) / lines, len(rows)
    )
