"""Webhook endpoints that a tenant keeps, subscribed to types of events, beside those that jobs name by their URL.

A rotated secret may go on for a while: deliveries are signed with both until it ends.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from jobs.ids import ENDPOINT_PREFIX, new_id, public_id
from jobs.queries import audit, milestones
from jobs.queries.audit import Actor, AuditAction

EVENT_TYPES = (
    *("batch.completed", "batch.failed", "batch.expired", "batch.cancelled"),
    *("job.completed", "job.cancelled", "job.expired"),
    *milestones.TYPES,
)
OLD_SECRET_SECONDS = 86400.0


@dataclass(frozen=True, slots=True)
class Endpoint:
    """An endpoint as its owner sees it."""

    id: UUID
    name: str
    url: str
    event_types: list[str]
    secret: str
    created_at: datetime
    updated_at: datetime
    disabled_at: datetime | None


def _endpoint(row: Row[Any] | None) -> Endpoint | None:
    return None if row is None else Endpoint(**row._mapping)


def create(
    connection: Connection,
    tenant_id: UUID,
    *,
    name: str,
    url: str,
    event_types: Sequence[str],
    secret: str,
    by: Actor | None = None,
) -> Endpoint:
    """An endpoint that gets the tenant's events of these types from now on."""
    # Several may have the same URL.
    row = connection.execute(
        text("""
            INSERT INTO webhook_endpoints (id, tenant_id, name, url, event_types, secret)
            VALUES (:id, :tenant_id, :name, :url, CAST(:event_types AS text[]), :secret)
            RETURNING id, name, url, event_types, secret, created_at, updated_at, disabled_at
        """),
        {
            "id": new_id(),
            "tenant_id": tenant_id,
            "name": name,
            "url": url,
            "event_types": list(event_types),
            "secret": secret,
        },
    ).one()
    _record(connection, by, AuditAction.ENDPOINT_CREATED, tenant_id, row.id, {"name": name, "url": url})
    return Endpoint(**row._mapping)


def get(connection: Connection, tenant_id: UUID, endpoint_id: UUID) -> Endpoint | None:
    """An endpoint of this tenant. Those that jobs name are not among them."""
    # Only endpoints with types of their own are kept by a tenant.
    return _endpoint(
        connection.execute(
            text("""
                SELECT id, name, url, event_types, secret, created_at, updated_at, disabled_at
                FROM webhook_endpoints
                WHERE id = :id AND tenant_id = :tenant_id AND event_types IS NOT NULL
            """),
            {"id": endpoint_id, "tenant_id": tenant_id},
        ).one_or_none()
    )


def list_endpoints(connection: Connection, tenant_id: UUID, *, after: UUID | None, limit: int) -> list[Endpoint]:
    """Endpoints of this tenant, newest first. `after` is the id of the last one of the page before."""
    # Ids are ordered by time, so the id is the cursor.
    rows = connection.execute(
        text("""
            SELECT id, name, url, event_types, secret, created_at, updated_at, disabled_at
            FROM webhook_endpoints
            WHERE tenant_id = :tenant_id AND event_types IS NOT NULL
              AND (CAST(:after AS uuid) IS NULL OR id < CAST(:after AS uuid))
            ORDER BY id DESC
            LIMIT :limit
        """),
        {"tenant_id": tenant_id, "after": after, "limit": limit},
    )
    return [Endpoint(**row._mapping) for row in rows]


def update(
    connection: Connection,
    tenant_id: UUID,
    endpoint_id: UUID,
    *,
    name: str | None,
    url: str | None,
    event_types: Sequence[str] | None,
    by: Actor | None = None,
) -> Endpoint | None:
    """Change what is not None, and enable the endpoint again. None where there is no such endpoint."""
    # An endpoint that answered 410 is disabled until its owner says otherwise.
    row = connection.execute(
        text("""
            UPDATE webhook_endpoints
            SET name = coalesce(:name, name), url = coalesce(:url, url),
                event_types = coalesce(CAST(:event_types AS text[]), event_types),
                disabled_at = NULL, updated_at = clock_timestamp()
            WHERE id = :id AND tenant_id = :tenant_id AND event_types IS NOT NULL
            RETURNING id, name, url, event_types, secret, created_at, updated_at, disabled_at
        """),
        {
            "id": endpoint_id,
            "tenant_id": tenant_id,
            "name": name,
            "url": url,
            "event_types": None if event_types is None else list(event_types),
        },
    ).one_or_none()
    if row is not None:
        given = {"name": name, "url": url, "event_types": None if event_types is None else " ".join(event_types)}
        changes = {field: value for field, value in given.items() if value is not None}
        _record(connection, by, AuditAction.ENDPOINT_CHANGED, tenant_id, endpoint_id, changes)
    return _endpoint(row)


def rotate_secret(
    connection: Connection,
    tenant_id: UUID,
    endpoint_id: UUID,
    *,
    secret: str,
    keeps_old: bool,
    by: Actor | None = None,
) -> Endpoint | None:
    """Sign with a new secret; with the old one beside it for a day if `keeps_old`. None where there is none."""
    # One old secret at a time: a second rotation ends the first's.
    row = connection.execute(
        text("""
            UPDATE webhook_endpoints
            SET old_secret = CASE WHEN :keeps_old THEN secret END,
                old_secret_until = CASE WHEN :keeps_old
                                        THEN clock_timestamp() + make_interval(secs => :seconds) END,
                secret = :secret, updated_at = clock_timestamp()
            WHERE id = :id AND tenant_id = :tenant_id AND event_types IS NOT NULL
            RETURNING id, name, url, event_types, secret, created_at, updated_at, disabled_at
        """),
        {
            "id": endpoint_id,
            "tenant_id": tenant_id,
            "secret": secret,
            "keeps_old": keeps_old,
            "seconds": OLD_SECRET_SECONDS,
        },
    ).one_or_none()
    if row is not None:
        _record(connection, by, AuditAction.ENDPOINT_ROTATED, tenant_id, endpoint_id, {"name": row.name})
    return _endpoint(row)


def delete(connection: Connection, tenant_id: UUID, endpoint_id: UUID, *, by: Actor | None = None) -> bool:
    """Forget an endpoint, with its deliveries and their log. False where there is none."""
    # Deliveries go with the row.
    row = connection.execute(
        text("""
            DELETE FROM webhook_endpoints WHERE id = :id AND tenant_id = :tenant_id AND event_types IS NOT NULL
            RETURNING name, url
        """),
        {"id": endpoint_id, "tenant_id": tenant_id},
    ).one_or_none()
    if row is None:
        return False
    _record(connection, by, AuditAction.ENDPOINT_REMOVED, tenant_id, endpoint_id, {"name": row.name, "url": row.url})
    return True


def _record(
    connection: Connection,
    by: Actor | None,
    action: AuditAction,
    tenant_id: UUID,
    endpoint_id: UUID,
    detail: Mapping[str, object],
) -> None:
    target = public_id(ENDPOINT_PREFIX, endpoint_id)
    audit.record(connection, by, action, target, tenant_id=tenant_id, detail=detail)


def announce_batch(connection: Connection, batch_id: UUID, event_type: str) -> None:
    """Tell those who subscribed that a batch has ended, in the transaction that ends it."""
    # One event a batch and type, and a delivery for each endpoint.
    connection.execute(
        text("""
            WITH inserted AS (
                INSERT INTO events (id, tenant_id, batch_id, type)
                SELECT :event_id, tenant_id, id, :type FROM batches WHERE id = :batch_id
                ON CONFLICT (batch_id, type) DO NOTHING
                RETURNING id, tenant_id, type
            )
            INSERT INTO deliveries (event_id, endpoint_id)
            SELECT i.id, w.id
            FROM inserted i JOIN webhook_endpoints w ON w.tenant_id = i.tenant_id
            WHERE w.disabled_at IS NULL AND i.type = ANY(w.event_types)
        """),
        {"event_id": new_id(), "batch_id": batch_id, "type": event_type},
    )


def announce_test(connection: Connection, tenant_id: UUID, endpoint_id: UUID, event_type: str) -> int:
    """Send an endpoint an event of nothing, once. Returns the delivery's id."""
    # An event without a job or a batch is a test.
    delivery_id: int = connection.execute(
        text("""
            WITH inserted AS (
                INSERT INTO events (id, tenant_id, type) VALUES (:event_id, :tenant_id, :type) RETURNING id
            )
            INSERT INTO deliveries (event_id, endpoint_id) SELECT id, :endpoint_id FROM inserted RETURNING id
        """),
        {"event_id": new_id(), "tenant_id": tenant_id, "endpoint_id": endpoint_id, "type": event_type},
    ).scalar_one()
    return delivery_id


def forget_tests(connection: Connection, *, retention: float) -> int:
    """Remove test events older than `retention` seconds. Returns how many."""
    # They are few, and go with their deliveries.
    return connection.execute(
        text("""
            DELETE FROM events
            WHERE job_id IS NULL AND batch_id IS NULL
              AND created_at < clock_timestamp() - make_interval(secs => :retention)
        """),
        {"retention": retention},
    ).rowcount
