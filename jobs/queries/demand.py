"""What waits for each of the models that a worker serves in turn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.queries.planner import force_index_scans


@dataclass(frozen=True, slots=True)
class Demand:
    """A model's lines that a claim could take now. Waits are seconds since the oldest such job was published."""

    waiting: float
    live_waiting: float | None
    """Of requests whose callers wait; None where there are none."""

    is_served: bool
    """Whether another live worker runs the model, or turns to it, now."""


def read_demand(connection: Connection, worker_id: UUID, models: Sequence[str]) -> dict[str, Demand]:
    """The demand of those of `models` for which a line waits, as the worker `worker_id` sees it."""
    force_index_scans(connection)
    # Jobs as `claiming.read_queue` and `claiming.suspect_job` choose them, whatever the deaths of their lines. OFFSET 0
    # keeps EXISTS a look at one row (decision 0010).
    rows = connection.execute(
        text("""
            SELECT j.model,
                   extract(epoch FROM clock_timestamp() - min(j.in_progress_at))::float AS waiting,
                   extract(epoch FROM clock_timestamp() - min(j.in_progress_at) FILTER (WHERE j.is_live))::float
                       AS live_waiting,
                   EXISTS (
                       SELECT FROM workers w
                       WHERE w.model = j.model AND w.id <> :worker_id
                         AND w.ended_at IS NULL AND w.lease_expires_at > clock_timestamp()
                   ) AS is_served
            FROM jobs j
            WHERE j.model = ANY(CAST(:models AS text[])) AND j.state = 'in_progress' AND j.ended_at IS NULL
              AND j.paused_at IS NULL AND (j.expires_at IS NULL OR j.expires_at > clock_timestamp())
              AND EXISTS (SELECT 1 FROM requests r WHERE r.job_id = j.id AND r.state = 'pending' OFFSET 0)
            GROUP BY j.model
        """),
        {"worker_id": worker_id, "models": list(models)},
    )
    return {row.model: Demand(row.waiting, row.live_waiting, row.is_served) for row in rows}
