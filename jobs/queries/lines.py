"""Lines of a job and their results, for people: a page by key, filtered by an index, and one line with all there is."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.queries import line_events
from jobs.queries.line_events import NotedEvent
from jobs.queries.planner import force_index_scans
from jobs.states import RequestState

MOST_LOOKED_AT = 20_000  # results that one page looks at for those without a failure, among which no index tells


@dataclass(frozen=True, slots=True)
class LineResult:
    """A settled line. `body` is the JSON object `{"response": …, "error": …}`."""

    seq: int
    line: int
    custom_id: str
    state: str
    body: bytes
    fingerprint: int | None
    is_truncated: bool
    settled_at: datetime | None
    claimed_at: datetime | None
    worker_id: UUID | None


@dataclass(frozen=True, slots=True)
class Filter:
    """Which results: of a state, of a kind of failure, cut by `max_tokens`. All of them where nothing is set."""

    state: str | None = None
    fingerprint: int | None = None
    is_truncated: bool = False

    @property
    def condition(self) -> str:
        """SQL over `results r`, by the index that fits; parameters are `:state` and `:fingerprint`."""
        if self.fingerprint is not None:
            return "r.fingerprint IS NOT NULL AND r.fingerprint = :fingerprint"
        if self.is_truncated:
            return "r.is_truncated"
        if self.state is None:
            return "true"
        return "r.state = :state" + ("" if self.state == "completed" else " AND r.state <> 'completed'")

    @property
    def parameters(self) -> dict[str, object]:
        return {"state": self.state, "fingerprint": self.fingerprint}


@dataclass(frozen=True, slots=True)
class Line:
    """A line: its request as it is stored, where it runs or ran, and its result where it has one."""

    line: int
    custom_id: str
    request: bytes
    state: str
    epoch: int
    deaths: int
    claimed_at: datetime | None
    worker_id: UUID | None
    host: str | None
    device: str | None
    seq: int | None
    result: bytes | None
    settled_at: datetime | None
    fingerprint: int | None
    is_truncated: bool | None
    timing: bytes | None
    events: Sequence[NotedEvent] = ()
    """What was out of order in its claims, in their order."""


def read_chunk(
    connection: Connection, job_id: UUID, which: Filter, *, at: int, last_seq: int, is_forward: bool, limit: int
) -> tuple[list[LineResult], int]:
    """Up to `limit` results after `at`, to `last_seq`, or before `at`, newest first; and where the next chunk begins.

    A chunk of completed lines, of which no index tells, looks at `MOST_LOOKED_AT` results and may be empty.
    """
    force_index_scans(connection)
    order = "ASC" if is_forward else "DESC"
    looked_at = MOST_LOOKED_AT if which.state == "completed" else last_seq + 1
    first, last = (at + 1, min(last_seq, at + looked_at)) if is_forward else (max(1, at - looked_at), at - 1)
    # The key, or a partial index that ends with seq, gives the order; bodies and requests come by their keys, each one
    # that stands alone in its range (decision 0010).
    rows = connection.execute(
        text(f"""
            SELECT p.seq, p.line, b.custom_id, p.state, p.body, p.fingerprint, p.is_truncated, p.settled_at,
                   q.claimed_at, p.worker_id
            FROM (
                SELECT r.* FROM results r
                WHERE r.job_id = :job_id AND r.seq BETWEEN :first AND :last AND {which.condition}
                ORDER BY r.seq {order}
                LIMIT :limit
            ) p
            CROSS JOIN LATERAL (
                SELECT custom_id FROM bodies b
                WHERE b.job_id = p.job_id AND b.line BETWEEN p.line AND p.line ORDER BY b.line LIMIT 1
            ) b
            CROSS JOIN LATERAL (
                SELECT claimed_at FROM requests q
                WHERE q.job_id = p.job_id AND q.line BETWEEN p.line AND p.line ORDER BY q.line LIMIT 1
            ) q
        """),
        which.parameters | {"job_id": job_id, "first": first, "last": last, "limit": limit},
    )
    found = [LineResult(**row._mapping) for row in rows]
    found.sort(key=lambda result: result.seq, reverse=not is_forward)
    if len(found) == limit:
        return found, found[-1].seq
    return found, last if is_forward else first


def read_line(connection: Connection, job_id: UUID, line: int) -> Line | None:
    """One line. None where the job has no such line."""
    force_index_scans(connection)
    # Each table by its key, as in a chunk; the worker that holds it now, or that held it at its end.
    row = connection.execute(
        text("""
            SELECT q.line, b.custom_id, b.body AS request, q.state, q.epoch, q.deaths, q.claimed_at,
                   coalesce(q.worker_id, r.worker_id) AS worker_id, w.host, w.device,
                   r.seq, r.body AS result, r.settled_at, r.fingerprint, r.is_truncated, r.timing
            FROM (
                SELECT * FROM requests WHERE job_id = :job_id AND line BETWEEN :line AND :line ORDER BY line LIMIT 1
            ) q
            CROSS JOIN LATERAL (
                SELECT custom_id, body FROM bodies
                WHERE job_id = :job_id AND line BETWEEN :line AND :line ORDER BY line LIMIT 1
            ) b
            LEFT JOIN LATERAL (
                SELECT * FROM results WHERE job_id = :job_id AND line BETWEEN :line AND :line ORDER BY line LIMIT 1
            ) r ON true
            LEFT JOIN workers w ON w.id = coalesce(q.worker_id, r.worker_id)
        """),
        {"job_id": job_id, "line": line},
    ).one_or_none()
    if row is None:
        return None
    # A first claim that runs, or brought the result, has none.
    is_first = row.epoch == 0 or (row.epoch == 1 and row.state != RequestState.PENDING)
    return Line(**row._mapping, events=() if is_first else line_events.read_events(connection, job_id, line))
