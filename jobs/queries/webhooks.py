"""Webhook deliveries: which are due, and how attempts ended. A courier holds a delivery only by its `due_at`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, text


@dataclass(frozen=True, slots=True)
class DueDelivery:
    """One attempt to make. `attempt` counts from 1; it is signed with each of `secrets`.

    The event is that of a job, whose counters stand here, of a batch, or of neither: a test.
    """

    id: int
    attempt: int
    taken_at: datetime
    endpoint_id: UUID
    url: str
    secrets: Sequence[str]
    event_id: UUID
    event_type: str
    event_created_at: datetime
    batch_id: UUID | None
    job_id: UUID | None
    job_state: str | None
    model: str | None
    metadata: dict[str, str] | None
    total: int | None
    completed: int | None
    failed: int | None
    cancelled: int | None
    expired: int | None
    detail: dict[str, Any] | None = None
    """Of a milestone: `request_counts` as they were, and perhaps `reason`."""

    traceparent: str | None = None
    """Of the request that made the job or the batch, where it was traced."""

    @property
    def is_test(self) -> bool:
        return self.job_id is None and self.batch_id is None


def take_due(
    connection: Connection, *, limit: int, per_endpoint: int, under_way: Sequence[UUID], hold: float
) -> list[DueDelivery]:
    """Take deliveries that are due. Their `due_at` moves by `hold` seconds, so that no other courier takes them too.

    `under_way` names the endpoint of each attempt that this courier already makes. No endpoint gets more than
    `per_endpoint` of them, and each place goes to the tenant with the fewest, so receivers that hang delay only their
    own tenant. If the courier dies, the attempt is repeated after `hold`, under the same event id.
    """
    # Rank due deliveries within their endpoint, then within their tenant; lock, count and postpone the chosen ones.
    rows = connection.execute(
        text("""
            WITH busy AS (
                SELECT w.id, w.tenant_id, count(*) AS attempts
                FROM unnest(CAST(:under_way AS uuid[])) AS u (id) JOIN webhook_endpoints w USING (id)
                GROUP BY w.id
            ), waiting AS (
                SELECT d.id, d.due_at, w.tenant_id,
                       coalesce(b.attempts, 0)
                           + row_number() OVER (PARTITION BY d.endpoint_id ORDER BY d.due_at, d.id) AS place
                FROM deliveries d JOIN webhook_endpoints w ON w.id = d.endpoint_id LEFT JOIN busy b ON b.id = w.id
                WHERE d.due_at <= clock_timestamp()
            ), chosen AS (
                SELECT id, due_at,
                       coalesce((SELECT sum(attempts) FROM busy b WHERE b.tenant_id = w.tenant_id), 0)
                           + row_number() OVER (PARTITION BY tenant_id ORDER BY due_at, id) AS turn
                FROM waiting w
                WHERE place <= :per_endpoint
                ORDER BY turn, due_at, id
                LIMIT :limit
            ), due AS (
                SELECT d.id
                FROM deliveries d JOIN chosen USING (id)
                WHERE d.due_at <= clock_timestamp()
                FOR UPDATE OF d SKIP LOCKED
            ), taken AS (
                UPDATE deliveries d SET attempts = d.attempts + 1,
                                        due_at = clock_timestamp() + make_interval(secs => :hold)
                FROM due
                WHERE d.id = due.id
                RETURNING d.id, d.attempts, d.event_id, d.endpoint_id
            )
            SELECT t.id, t.attempts AS attempt, clock_timestamp() AS taken_at, t.endpoint_id, w.url,
                   array_remove(ARRAY[coalesce(w.secret, n.webhook_secret),
                                      CASE WHEN w.old_secret_until > clock_timestamp() THEN w.old_secret END], NULL)
                       AS secrets,
                   e.id AS event_id, e.type AS event_type, e.created_at AS event_created_at,
                   e.detail, e.batch_id, j.id AS job_id, j.state AS job_state, j.model, j.metadata,
                   j.total, j.completed, j.failed, j.cancelled, j.expired,
                   coalesce(j.traceparent, (SELECT b.traceparent FROM batches b WHERE b.id = e.batch_id)) AS traceparent
            FROM taken t
            JOIN events e ON e.id = t.event_id
            JOIN webhook_endpoints w ON w.id = t.endpoint_id
            JOIN tenants n ON n.id = e.tenant_id
            LEFT JOIN jobs j ON j.id = e.job_id
            ORDER BY t.id
        """),
        {"limit": limit, "per_endpoint": per_endpoint, "under_way": list(under_way), "hold": hold},
    )
    return [DueDelivery(**row._mapping) for row in rows]


def give_up_deleted(connection: Connection) -> list[UUID]:
    """End the retries of deliveries whose job was deleted. Returns the ids of their events."""
    # Few deliveries are due at any time: they are in a partial index.
    return list(
        connection.execute(
            text("""
                UPDATE deliveries d SET given_up = true, due_at = NULL, last_error = 'the job was deleted'
                FROM events e JOIN jobs j ON j.id = e.job_id
                WHERE e.id = d.event_id AND d.due_at IS NOT NULL AND j.deleted_at IS NOT NULL
                RETURNING d.event_id
            """)
        ).scalars()
    )


def log_attempt(
    connection: Connection,
    delivery: DueDelivery,
    *,
    milliseconds: int,
    status: int | None,
    error: str | None,
    answer: bytes,
) -> None:
    """Keep what came of an attempt, for the owner's eyes."""
    # Once, because a commit can succeed and its reply be lost; not where the endpoint was deleted by now.
    connection.execute(
        text("""
            INSERT INTO delivery_attempts (delivery_id, number, at, milliseconds, status, error, answer)
            SELECT id, :number, :at, :milliseconds, :status, :error, :answer FROM deliveries WHERE id = :id
            ON CONFLICT (delivery_id, number) DO NOTHING
        """),
        {
            "id": delivery.id,
            "number": delivery.attempt,
            "at": delivery.taken_at,
            "milliseconds": milliseconds,
            "status": status,
            "error": error,
            "answer": answer,
        },
    )


def mark_delivered(connection: Connection, delivery_id: int, *, status: int) -> None:
    """Record that the receiver answered 2xx."""
    # An answer that comes late counts, too.
    connection.execute(
        text("""
            UPDATE deliveries SET delivered_at = clock_timestamp(), due_at = NULL, given_up = false,
                                  last_status = :status, last_error = NULL
            WHERE id = :id
        """),
        {"id": delivery_id, "status": status},
    )


def put_off(
    connection: Connection, delivery_id: int, *, attempt: int, delay: float, status: int | None, error: str
) -> None:
    """Record that attempt number `attempt` failed: the next is due in `delay` seconds."""
    # A later attempt's record is kept.
    connection.execute(
        text("""
            UPDATE deliveries SET due_at = clock_timestamp() + make_interval(secs => :delay),
                                  last_status = :status, last_error = :error
            WHERE id = :id AND attempts = :attempt AND due_at IS NOT NULL
        """),
        {"id": delivery_id, "attempt": attempt, "delay": delay, "status": status, "error": error},
    )


def give_up(
    connection: Connection, delivery_id: int, *, attempt: int, status: int | None, error: str, disable: bool
) -> None:
    """End a delivery after attempt number `attempt`, unless a later one is under way.

    `disable`: the receiver is gone for good, and its other deliveries end with this one.
    """
    if disable:
        # Disable the endpoint and end its other deliveries. Its row is locked first, so that two attempts that learn of
        # it at once take turns. A later job that names this URL enables it again.
        connection.execute(
            text("""
                WITH gone AS (
                    UPDATE webhook_endpoints SET disabled_at = clock_timestamp()
                    WHERE id = (SELECT endpoint_id FROM deliveries WHERE id = :id)
                    RETURNING id
                )
                UPDATE deliveries d SET given_up = true, due_at = NULL, last_error = :error
                FROM gone
                WHERE d.endpoint_id = gone.id AND d.due_at IS NOT NULL AND d.id <> :id
            """),
            {"id": delivery_id, "error": error},
        )
    # End this one.
    connection.execute(
        text("""
            UPDATE deliveries SET given_up = true, due_at = NULL, last_status = :status, last_error = :error
            WHERE id = :id AND attempts = :attempt AND due_at IS NOT NULL
        """),
        {"id": delivery_id, "attempt": attempt, "status": status, "error": error},
    )
