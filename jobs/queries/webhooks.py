"""Webhook deliveries: which are due, and what came of them. A courier holds a delivery only by its `due_at`."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, text


@dataclass(frozen=True, slots=True)
class DueDelivery:
    """One attempt to make. `attempt` counts from 1."""

    id: int
    attempt: int
    url: str
    webhook_secret: str
    event_id: UUID
    event_type: str
    event_created_at: datetime
    job_id: UUID
    job_state: str
    model: str
    metadata: dict[str, str]
    total: int
    completed: int
    failed: int
    cancelled: int
    expired: int


def take_due(connection: Connection, *, limit: int, hold: float) -> list[DueDelivery]:
    """Deliveries that are due, put off by `hold` seconds so that no other courier makes the same attempt meanwhile.

    A courier that dies with one in hand costs that delay; the receiver sees at most one repeat, under the same id.
    """
    rows = connection.execute(
        text(
            "WITH due AS ( "
            "  SELECT id FROM deliveries WHERE due_at <= clock_timestamp() ORDER BY due_at LIMIT :limit "
            "  FOR UPDATE SKIP LOCKED "
            "), taken AS ( "
            "  UPDATE deliveries d SET attempts = d.attempts + 1, "
            "    due_at = clock_timestamp() + make_interval(secs => :hold) "
            "  FROM due WHERE d.id = due.id RETURNING d.id, d.attempts, d.event_id, d.endpoint_id "
            ") SELECT t.id, t.attempts AS attempt, w.url, n.webhook_secret, e.id AS event_id, e.type AS event_type, "
            "    e.created_at AS event_created_at, j.id AS job_id, j.state AS job_state, j.model, j.metadata, "
            "    j.total, j.completed, j.failed, j.cancelled, j.expired "
            "FROM taken t JOIN events e ON e.id = t.event_id JOIN webhook_endpoints w ON w.id = t.endpoint_id "
            "     JOIN tenants n ON n.id = e.tenant_id JOIN jobs j ON j.id = e.job_id ORDER BY t.id"
        ),
        {"limit": limit, "hold": hold},
    )
    return [DueDelivery(**row._mapping) for row in rows]


def mark_delivered(connection: Connection, delivery_id: int, *, status: int) -> None:
    """The receiver answered 2xx."""
    connection.execute(
        text(
            "UPDATE deliveries SET delivered_at = clock_timestamp(), due_at = NULL, last_status = :status, "
            "last_error = NULL WHERE id = :id"
        ),
        {"id": delivery_id, "status": status},
    )


def put_off(connection: Connection, delivery_id: int, *, delay: float, status: int | None, error: str) -> None:
    """The attempt failed: the next is due in `delay` seconds."""
    connection.execute(
        text(
            "UPDATE deliveries SET due_at = clock_timestamp() + make_interval(secs => :delay), last_status = :status, "
            "last_error = :error WHERE id = :id AND delivered_at IS NULL"
        ),
        {"id": delivery_id, "delay": delay, "status": status, "error": error},
    )


def give_up(connection: Connection, delivery_id: int, *, status: int | None, error: str, disable: bool) -> None:
    """No attempt follows. `disable`: the receiver is gone for good, and its other deliveries end with this one."""
    connection.execute(
        text(
            "UPDATE deliveries SET given_up = true, due_at = NULL, last_status = :status, last_error = :error "
            "WHERE id = :id AND delivered_at IS NULL"
        ),
        {"id": delivery_id, "status": status, "error": error},
    )
    if disable:
        # Jobs that name this URL later enable it again; what is under way now ends.
        connection.execute(
            text(
                "WITH gone AS ( "
                "  UPDATE webhook_endpoints SET disabled_at = clock_timestamp() "
                "  WHERE id = (SELECT endpoint_id FROM deliveries WHERE id = :id) RETURNING id) "
                "UPDATE deliveries d SET given_up = true, due_at = NULL, last_error = :error FROM gone "
                "WHERE d.endpoint_id = gone.id AND d.due_at IS NOT NULL AND d.id <> :id"
            ),
            {"id": delivery_id, "error": error},
        )
