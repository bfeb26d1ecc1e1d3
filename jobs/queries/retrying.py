"""A child job of some of another's settled lines: they are copied inside Postgres, a chunk a transaction.

The child is staged and published as any submission is; the lines of the parent stay as they ended.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.errors import PromptsGone
from jobs.ids import JOB_PREFIX, public_id
from jobs.queries import audit, job_events
from jobs.queries.audit import Actor, AuditAction
from jobs.queries.lines import Filter
from jobs.queries.planner import force_index_scans
from jobs.queries.settling import lock_jobs


@dataclass(frozen=True, slots=True)
class SourceLine:
    """A line as it was stored for the parent."""

    line: int
    custom_id: str
    prefix: int
    body: bytes


def pick(
    connection: Connection, job_id: UUID, which: Filter, *, after: int, last_seq: int, limit: int
) -> list[tuple[int, int]]:
    """`(seq, line)` of up to `limit` results, in the order of `seq`."""
    force_index_scans(connection)
    # A partial index that ends with seq.
    rows = connection.execute(
        text(f"""
            SELECT r.seq, r.line FROM results r
            WHERE r.job_id = :job_id AND r.seq > :after AND r.seq <= :last_seq AND {which.condition}
            ORDER BY r.seq
            LIMIT :limit
        """),
        which.parameters | {"job_id": job_id, "after": after, "last_seq": last_seq, "limit": limit},
    )
    return [(row.seq, row.line) for row in rows]


def settled_of(connection: Connection, job_id: UUID, lines: Sequence[int]) -> list[int]:
    """Those of `lines` that have a result, in their order."""
    # By the key of (job, line).
    rows = connection.execute(
        text("SELECT line FROM results WHERE job_id = :job_id AND line = ANY(CAST(:lines AS int[])) ORDER BY line"),
        {"job_id": job_id, "lines": list(lines)},
    )
    return list(rows.scalars())


def copy(connection: Connection, parent: UUID, child: UUID, lines: Sequence[int], *, first: int) -> bool:
    """Store the parent's `lines` as the child's, numbered from `first`. False if the child was collected.

    Raises `PromptsGone` where the parent was deleted in between.
    """
    force_index_scans(connection)
    # The child before its lines, as in `submission.stage_lines`.
    staged = connection.execute(
        text("""
            UPDATE jobs SET total = total + :count, staged_at = clock_timestamp()
            WHERE id = :child AND state = 'validating' AND deleted_at IS NULL
        """),
        {"child": child, "count": len(lines)},
    )
    if staged.rowcount == 0:
        return False
    # Requests and bodies by their keys; nothing leaves Postgres.
    copied = connection.execute(
        text("""
            WITH wanted AS MATERIALIZED (
                SELECT n.line, CAST(:first AS int) - 1 + n.turn::int AS number
                FROM unnest(CAST(:lines AS int[])) WITH ORDINALITY AS n (line, turn)
            ), requests_copied AS (
                INSERT INTO requests (job_id, line, prefix)
                SELECT :child, w.number, q.prefix FROM wanted w CROSS JOIN LATERAL (
                    SELECT prefix FROM requests q
                    WHERE q.job_id = :parent AND q.line BETWEEN w.line AND w.line ORDER BY q.line LIMIT 1
                ) q
                RETURNING 1
            ), bodies_copied AS (
                INSERT INTO bodies (job_id, line, custom_id, body)
                SELECT :child, w.number, b.custom_id, b.body FROM wanted w CROSS JOIN LATERAL (
                    SELECT custom_id, body FROM bodies b
                    WHERE b.job_id = :parent AND b.line BETWEEN w.line AND w.line ORDER BY b.line LIMIT 1
                ) b
                RETURNING 1
            )
            SELECT least((SELECT count(*) FROM requests_copied), (SELECT count(*) FROM bodies_copied))
        """),
        {"parent": parent, "child": child, "lines": list(lines), "first": first},
    ).scalar_one()
    if copied < len(lines):
        raise PromptsGone(public_id(JOB_PREFIX, parent))
    return True


def read(connection: Connection, parent: UUID, lines: Sequence[int]) -> list[SourceLine]:
    """The parent's `lines` as they are stored, for parameters that change. Raises `PromptsGone`."""
    force_index_scans(connection)
    # Each by its key.
    rows = connection.execute(
        text("""
            SELECT b.line, b.custom_id, q.prefix, b.body
            FROM unnest(CAST(:lines AS int[])) WITH ORDINALITY AS n (line, turn)
            CROSS JOIN LATERAL (
                SELECT line, custom_id, body FROM bodies b
                WHERE b.job_id = :parent AND b.line BETWEEN n.line AND n.line ORDER BY b.line LIMIT 1
            ) b
            CROSS JOIN LATERAL (
                SELECT prefix FROM requests q
                WHERE q.job_id = :parent AND q.line BETWEEN n.line AND n.line ORDER BY q.line LIMIT 1
            ) q
        """),
        {"parent": parent, "lines": list(lines)},
    )
    found = {row.line: SourceLine(row.line, row.custom_id, row.prefix, row.body) for row in rows}
    if len(found) < len(lines):
        raise PromptsGone(public_id(JOB_PREFIX, parent))
    return [found[line] for line in lines]


def bind(connection: Connection, tenant_id: UUID, parent: UUID, child: UUID, *, lines: int, by: Actor | None) -> None:
    """Tie a child that is about to be published to its parent; it has the parent's webhook unless it has its own."""
    lock_jobs(connection, [parent])
    connection.execute(
        text("""
            UPDATE jobs c SET retry_of = p.id,
                              webhook_events = CASE WHEN c.webhook_endpoint_id IS NULL THEN p.webhook_events
                                                    ELSE c.webhook_events END,
                              webhook_endpoint_id = coalesce(c.webhook_endpoint_id, p.webhook_endpoint_id)
            FROM jobs p
            WHERE c.id = :child AND p.id = :parent
        """),
        {"child": child, "parent": parent},
    )
    detail = {"job": public_id(JOB_PREFIX, child), "lines": lines}
    job_events.add(connection, parent, "retried", detail)
    target = public_id(JOB_PREFIX, parent)
    audit.record(connection, by, AuditAction.JOB_RETRIED, target, tenant_id=tenant_id, detail=detail)
