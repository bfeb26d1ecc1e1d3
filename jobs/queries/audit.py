"""The audit log: who changed what, written in the transaction that changes it, so that neither is there alone."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from uuid import UUID

import orjson
from sqlalchemy import Connection, text

from jobs.ids import new_id

MOST_CHARACTERS = 200  # of a target, and of each text in a detail: what callers choose cannot make rows large


class AuditAction(StrEnum):
    """What can be done. The part before the dot says what the target is."""

    JOB_PAUSED = "job.paused"
    JOB_RESUMED = "job.resumed"
    JOB_CHANGED = "job.changed"
    JOB_CANCELLED = "job.cancelled"
    JOB_RETRIED = "job.retried"
    JOB_DELETED = "job.deleted"
    BATCH_CANCELLED = "batch.cancelled"
    WORKER_DRAINED = "worker.drained"
    WORKER_UNDRAINED = "worker.undrained"
    WORKER_STOPPED = "worker.stopped"
    KEY_CREATED = "key.created"
    KEY_REVOKED = "key.revoked"
    ENDPOINT_CREATED = "webhook_endpoint.created"
    ENDPOINT_CHANGED = "webhook_endpoint.changed"
    ENDPOINT_ROTATED = "webhook_endpoint.rotated"
    ENDPOINT_REMOVED = "webhook_endpoint.removed"
    DELIVERY_REPLAYED = "webhook_delivery.replayed"
    TENANT_WEIGHTED = "tenant.weighted"
    SESSION_BLOCKED = "session.blocked"


@dataclass(frozen=True, slots=True)
class Actor:
    """Who asks for a change: a tenant's key. The command line has neither tenant nor key."""

    tenant_id: UUID | None
    key_id: UUID | None
    is_bulk: bool = False  # one job of many that a single request named

    def is_foreign_to(self, tenant_id: UUID) -> bool:
        """Whether another tenant's key asks, which only an operator's can."""
        return self.tenant_id != tenant_id


COMMAND_LINE = Actor(None, None)


@dataclass(frozen=True, slots=True)
class AuditEntry:
    """`tenant`: whose it is, None where it is the service's own. `key_*`: of the key that asked, None without one."""

    id: UUID
    at: datetime
    tenant_id: UUID | None
    tenant: str | None
    action: AuditAction
    target: str
    detail: Mapping[str, object]
    key_id: UUID | None
    key_tenant_id: UUID | None
    key_name: str | None
    key_hint: str | None


def record(
    connection: Connection,
    by: Actor | None,
    action: AuditAction,
    target: str,
    *,
    tenant_id: UUID | None,
    detail: Mapping[str, object] | None = None,
) -> None:
    """Write down a change of this transaction. Nothing where `by` is None, because then the service itself acts."""
    if by is None:
        return
    shown = {name: _cut(value) for name, value in (detail or {}).items()}
    if by.is_bulk:
        shown["bulk"] = True
    # Ids are ordered by time, so the id is the cursor of a list.
    connection.execute(
        text("""
            INSERT INTO audit (id, tenant_id, key_id, action, target, detail)
            VALUES (:id, :tenant_id, :key_id, :action, :target, CAST(:detail AS jsonb))
        """),
        {
            "id": new_id(),
            "tenant_id": tenant_id,
            "key_id": by.key_id,
            "action": action,
            "target": _cut(target),
            "detail": orjson.dumps(shown).decode(),
        },
    )


def _cut(value: object) -> object:
    return value[:MOST_CHARACTERS] if isinstance(value, str) else value


def list_entries(connection: Connection, tenant_id: UUID | None, *, after: UUID | None, limit: int) -> list[AuditEntry]:
    """What was done to a tenant's own, or to everything; newest first. `after`: the last id of the page before."""
    of_tenant = "" if tenant_id is None else "AND a.tenant_id = :tenant_id"
    # By (tenant_id, id), or by the primary key; names by theirs.
    rows = connection.execute(
        text(f"""
            SELECT a.id, a.at, a.tenant_id, t.name AS tenant, a.action, a.target, a.detail, a.key_id,
                   k.tenant_id AS key_tenant_id, k.name AS key_name, k.hint AS key_hint
            FROM (SELECT * FROM audit a
                  WHERE (CAST(:after AS uuid) IS NULL OR a.id < :after) {of_tenant}
                  ORDER BY a.id DESC LIMIT :limit) a
            LEFT JOIN tenants t ON t.id = a.tenant_id
            LEFT JOIN api_keys k ON k.id = a.key_id
            ORDER BY a.id DESC
        """),
        {"tenant_id": tenant_id, "after": after, "limit": limit},
    )
    return [AuditEntry(**dict(row._mapping) | {"action": AuditAction(row.action)}) for row in rows]


def forget_old(connection: Connection, *, retention: float) -> int:
    """Remove entries older than `retention` seconds. Returns how many."""
    # By the index of `at`.
    return connection.execute(
        text("DELETE FROM audit WHERE at < statement_timestamp() - make_interval(secs => :retention)"),
        {"retention": retention},
    ).rowcount
