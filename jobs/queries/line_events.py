"""What was out of order in the claims of a line: lost with a worker, given back, ran alone. A good line has none."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.queries.settling import ClaimToken

MOST_CLAIMS = 20  # of a line whose events are kept: the first ones


class LineEvent(StrEnum):
    """`LOST`: its worker died, and it was counted. `GIVEN_BACK`: it was released, and not counted as a death."""

    LOST = "lost"
    GIVEN_BACK = "given_back"
    ALONE = "alone"


@dataclass(frozen=True, slots=True)
class NotedEvent:
    """An event of the claim `epoch`, and its worker where that is still known."""

    epoch: int
    kind: LineEvent
    at: datetime
    worker_id: UUID
    host: str | None
    device: str | None


# A part of a statement whose part `freed` has the claims that it released: `job_id, line, epoch, worker_id`.
NOTE_FREED = f"""
    INSERT INTO line_events (job_id, line, epoch, kind, worker_id)
    SELECT job_id, line, epoch, :event, worker_id FROM freed WHERE epoch <= {MOST_CLAIMS}
"""


def note_alone(connection: Connection, token: ClaimToken) -> None:
    """Note that this claim runs alone, because of workers that died before."""
    if token.epoch > MOST_CLAIMS:
        return
    # By an epoch that no other claim of the line has.
    connection.execute(
        text("""
            INSERT INTO line_events (job_id, line, epoch, kind, worker_id)
            VALUES (:job_id, :line, :epoch, :kind, :worker_id)
        """),
        {
            "job_id": token.job_id,
            "line": token.line,
            "epoch": token.epoch,
            "kind": LineEvent.ALONE,
            "worker_id": token.holder,
        },
    )


def read_events(connection: Connection, job_id: UUID, line: int) -> list[NotedEvent]:
    """What is noted of a line, in the order of its claims."""
    # By the beginning of the primary key.
    rows = connection.execute(
        text("""
            SELECT e.epoch, e.kind, e.at, e.worker_id, w.host, w.device
            FROM line_events e LEFT JOIN workers w ON w.id = e.worker_id
            WHERE e.job_id = :job_id AND e.line = :line
            ORDER BY e.epoch, e.at
        """),
        {"job_id": job_id, "line": line},
    )
    return [NotedEvent(**dict(row._mapping) | {"kind": LineEvent(row.kind)}) for row in rows]
