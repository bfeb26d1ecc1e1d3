"""What became of a tenant's webhooks: deliveries, each with its attempts, and another try of one."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Any, Literal
from uuid import UUID

from sqlalchemy import Connection, Row, text

from jobs.ids import DELIVERY_PREFIX, public_id
from jobs.queries import audit
from jobs.queries.audit import Actor, AuditAction

DeliveryStatus = Literal["pending", "delivered", "given_up"]


@dataclass(frozen=True, slots=True)
class Attempt:
    """One POST. `answer`: the first bytes of the receiver's body. `error` is None where it was delivered."""

    number: int
    at: datetime
    milliseconds: int
    status: int | None
    error: str | None
    answer: bytes


@dataclass(frozen=True, slots=True)
class LoggedDelivery:
    """A delivery, with its newest attempts."""

    id: int
    event_id: UUID
    event_type: str
    event_created_at: datetime
    job_id: UUID | None
    batch_id: UUID | None
    endpoint_id: UUID
    url: str
    status: DeliveryStatus
    due_at: datetime | None
    delivered_at: datetime | None
    last_status: int | None
    last_error: str | None
    num_attempts: int
    attempts: list[Attempt]


def list_deliveries(
    connection: Connection,
    tenant_id: UUID,
    *,
    after: int | None,
    limit: int,
    status: DeliveryStatus | None = None,
    job_id: UUID | None = None,
    delivery_id: int | None = None,
) -> list[LoggedDelivery]:
    """Deliveries of this tenant, newest first. A batch's are its job's, too."""
    # Through the tenant's endpoints, whose deliveries are indexed.
    rows = connection.execute(
        text("""
            SELECT d.id, d.event_id, e.type AS event_type, e.created_at AS event_created_at, e.job_id, e.batch_id,
                   d.endpoint_id, w.url,
                   CASE WHEN d.given_up THEN 'given_up' WHEN d.due_at IS NULL THEN 'delivered' ELSE 'pending' END
                       AS status,
                   d.due_at, d.delivered_at, d.last_status, d.last_error, d.attempts AS num_attempts
            FROM webhook_endpoints w
            JOIN deliveries d ON d.endpoint_id = w.id
            JOIN events e ON e.id = d.event_id
            LEFT JOIN batches b ON b.id = e.batch_id
            WHERE w.tenant_id = :tenant_id
              AND (CAST(:after AS bigint) IS NULL OR d.id < :after)
              AND (CAST(:delivery_id AS bigint) IS NULL OR d.id = :delivery_id)
              AND (CAST(:job_id AS uuid) IS NULL OR coalesce(e.job_id, b.job_id) = :job_id)
              AND (CAST(:status AS text) IS NULL
                   OR :status = CASE WHEN d.given_up THEN 'given_up' WHEN d.due_at IS NULL THEN 'delivered'
                                     ELSE 'pending' END)
            ORDER BY d.id DESC
            LIMIT :limit
        """),
        {
            "tenant_id": tenant_id,
            "after": after,
            "limit": limit,
            "status": status,
            "job_id": job_id,
            "delivery_id": delivery_id,
        },
    ).all()
    attempts = _attempts(connection, [row.id for row in rows])
    return [LoggedDelivery(**row._mapping, attempts=attempts.get(row.id, [])) for row in rows]


def _attempts(connection: Connection, delivery_ids: list[int]) -> dict[int, list[Attempt]]:
    found: dict[int, list[Attempt]] = {}
    rows: list[Row[Any]] = list(
        # By primary key, in the order of attempts.
        connection.execute(
            text("""
                SELECT delivery_id, number, at, milliseconds, status, error, answer FROM delivery_attempts
                WHERE delivery_id = ANY(CAST(:ids AS bigint[])) ORDER BY delivery_id, number
            """),
            {"ids": delivery_ids},
        )
    )
    for row in rows:
        found.setdefault(row.delivery_id, []).append(
            Attempt(row.number, row.at, row.milliseconds, row.status, row.error, row.answer)
        )
    return found


def replay(connection: Connection, tenant_id: UUID, delivery_id: int, *, by: Actor | None = None) -> bool:
    """Make a delivery due at once, also one that was delivered or given up. False where this tenant has none such.

    After the last attempt of the schedule it gets one more.
    """
    # An endpoint that is disabled stays so: its owner enables it first.
    replayed = connection.execute(
        text("""
            UPDATE deliveries d SET due_at = clock_timestamp(), delivered_at = NULL, given_up = false
            FROM webhook_endpoints w
            WHERE d.id = :id AND w.id = d.endpoint_id AND w.tenant_id = :tenant_id AND w.disabled_at IS NULL
        """),
        {"id": delivery_id, "tenant_id": tenant_id},
    )
    if replayed.rowcount == 0:
        return False
    target = public_id(DELIVERY_PREFIX, UUID(int=delivery_id))
    audit.record(connection, by, AuditAction.DELIVERY_REPLAYED, target, tenant_id=tenant_id)
    return True
