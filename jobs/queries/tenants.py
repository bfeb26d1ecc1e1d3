"""Tenants and API keys."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from datetime import datetime
from uuid import UUID

from sqlalchemy import Connection, text

from jobs.ids import new_id


@dataclass(frozen=True, slots=True)
class Tenant:
    id: UUID
    name: str
    webhook_secret: str


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The part of a key that may be shown again: never the key itself."""

    id: UUID
    tenant: str
    name: str
    hint: str
    created_at: datetime
    expires_at: datetime | None
    revoked_at: datetime | None
    last_used_at: datetime | None


def ensure_tenant(connection: Connection, name: str, webhook_secret: str) -> Tenant:
    """The tenant of that name, created with this secret if there is none."""
    # A tenant that exists keeps its secret.
    connection.execute(
        text("""
            INSERT INTO tenants (id, name, webhook_secret) VALUES (:id, :name, :secret)
            ON CONFLICT (name) DO NOTHING
        """),
        {"id": new_id(), "name": name, "secret": webhook_secret},
    )
    # The row that was there, or is there now.
    row = connection.execute(
        text("SELECT id, name, webhook_secret FROM tenants WHERE name = :name"), {"name": name}
    ).one()
    return Tenant(row.id, row.name, row.webhook_secret)


@dataclass(frozen=True, slots=True)
class TenantWeight:
    """A tenant and its share of the workers: twice the weight, twice the running requests."""

    name: str
    weight: int


def list_weights(connection: Connection) -> list[TenantWeight]:
    """Every tenant, by name."""
    # For the operator's command line.
    rows = connection.execute(text("SELECT name, weight FROM tenants ORDER BY name"))
    return [TenantWeight(**row._mapping) for row in rows]


def set_weight(connection: Connection, name: str, weight: int) -> bool:
    """Set a tenant's weight, from 1 to `jobs.tables.MAX_WEIGHT`. False if there is no such tenant."""
    # Counts from the next claim on.
    changed = connection.execute(
        text("UPDATE tenants SET weight = :weight WHERE name = :name"), {"name": name, "weight": weight}
    )
    return changed.rowcount == 1


def add_key(
    connection: Connection, tenant_id: UUID, *, name: str, hint: str, digest: bytes, expires_at: datetime | None = None
) -> UUID | None:
    """Store a key's digest. Returns its id, or None if that very key exists already."""
    # The digest is unique: creating the operator's own first key again, at every start, does nothing.
    return connection.execute(
        text("""
            INSERT INTO api_keys (id, tenant_id, name, hint, digest, expires_at)
            VALUES (:id, :tenant_id, :name, :hint, :digest, :expires_at)
            ON CONFLICT (digest) DO NOTHING
            RETURNING id
        """),
        {
            "id": new_id(),
            "tenant_id": tenant_id,
            "name": name,
            "hint": hint,
            "digest": digest,
            "expires_at": expires_at,
        },
    ).scalar()


def find_key(connection: Connection, digest: bytes) -> Tenant | None:
    """The tenant whose live key has this digest."""
    # Revoked and expired keys match nothing.
    row = connection.execute(
        text("""
            SELECT t.id, t.name, t.webhook_secret, k.id AS key_id,
                   k.last_used_at < clock_timestamp() - interval '1 minute' OR k.last_used_at IS NULL AS stale
            FROM api_keys k JOIN tenants t ON t.id = k.tenant_id
            WHERE k.digest = :digest AND k.revoked_at IS NULL
              AND (k.expires_at IS NULL OR k.expires_at > clock_timestamp())
        """),
        {"digest": digest},
    ).one_or_none()
    if row is None:
        return None
    if row.stale:
        # Last use is kept to the minute: one write in a minute, not one for each request.
        connection.execute(
            text("UPDATE api_keys SET last_used_at = clock_timestamp() WHERE id = :id"), {"id": row.key_id}
        )
    return Tenant(row.id, row.name, row.webhook_secret)


def find_keys(connection: Connection, digests: Collection[bytes]) -> dict[bytes, Tenant]:
    """The tenants whose live keys have these digests, by digest."""
    # In one order for every process, because each may write when its key was last used.
    found = {digest: find_key(connection, digest) for digest in sorted(digests)}
    return {digest: tenant for digest, tenant in found.items() if tenant is not None}


def list_keys(connection: Connection) -> list[ApiKey]:
    """Every key of every tenant, newest last: for the operator's command line."""
    # The columns of `ApiKey`.
    rows = connection.execute(
        text("""
            SELECT k.id, t.name AS tenant, k.name, k.hint, k.created_at, k.expires_at, k.revoked_at, k.last_used_at
            FROM api_keys k JOIN tenants t ON t.id = k.tenant_id
            ORDER BY k.created_at, k.id
        """)
    )
    return [ApiKey(**row._mapping) for row in rows]


def revoke_key(connection: Connection, beginning: str) -> int:
    """Revoke the keys whose hint `beginning` starts with: the hint, or more of the key. Returns how many were live."""
    # A key that was revoked before keeps its time.
    return connection.execute(
        text("""
            UPDATE api_keys SET revoked_at = clock_timestamp()
            WHERE starts_with(:beginning, hint) AND revoked_at IS NULL
        """),
        {"beginning": beginning},
    ).rowcount
