"""Tenants and API keys."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass
from datetime import datetime
from typing import Any
from uuid import UUID

from sqlalchemy import Connection, Row, text

from jobs.ids import KEY_PREFIX, new_id, public_id
from jobs.keys import new_webhook_secret
from jobs.queries import audit
from jobs.queries.audit import COMMAND_LINE, Actor, AuditAction
from jobs.roles import Role


@dataclass(frozen=True, slots=True)
class Tenant:
    id: UUID
    name: str
    webhook_secret: str


@dataclass(frozen=True, slots=True)
class Principal(Tenant):
    """A tenant as one of its live keys, which came with a request, stands for it."""

    key_id: UUID
    key_name: str
    key_hint: str
    role: Role

    @property
    def scope(self) -> UUID | None:
        """The tenant whose rows this key sees, or None: those of all tenants."""
        return None if self.role is Role.OPERATOR else self.id

    @property
    def actor(self) -> Actor:
        """Who the audit log says it was."""
        return Actor(self.id, self.key_id)


@dataclass(frozen=True, slots=True)
class ApiKey:
    """The part of a key that may be shown again: never the key itself."""

    id: UUID
    tenant: str
    name: str
    role: Role
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
    """Set a tenant's weight, from 1 to `jobs.tables.tenants.MAX_WEIGHT`. False if there is no such tenant."""
    # Counts from the next claim on.
    tenant_id = connection.execute(
        text("UPDATE tenants SET weight = :weight WHERE name = :name RETURNING id"), {"name": name, "weight": weight}
    ).scalar()
    if tenant_id is None:
        return False
    detail = {"weight": weight}
    audit.record(connection, COMMAND_LINE, AuditAction.TENANT_WEIGHTED, name, tenant_id=tenant_id, detail=detail)
    return True


def add_key(
    connection: Connection,
    tenant_id: UUID,
    *,
    name: str,
    hint: str,
    digest: bytes,
    role: Role = Role.READ_WRITE,
    expires_at: datetime | None = None,
    by: Actor | None = None,
) -> UUID | None:
    """Store a key's digest. Returns its id, or None if that very key exists already."""
    # The digest is unique: creating the operator's own first key again, at every start, does nothing.
    key_id: UUID | None = connection.execute(
        text("""
            INSERT INTO api_keys (id, tenant_id, name, role, hint, digest, expires_at)
            VALUES (:id, :tenant_id, :name, :role, :hint, :digest, :expires_at)
            ON CONFLICT (digest) DO NOTHING
            RETURNING id
        """),
        {
            "id": new_id(),
            "tenant_id": tenant_id,
            "name": name,
            "role": role,
            "hint": hint,
            "digest": digest,
            "expires_at": expires_at,
        },
    ).scalar()
    if key_id is not None:
        detail = {"name": name, "hint": hint, "role": role}
        target = public_id(KEY_PREFIX, key_id)
        audit.record(connection, by, AuditAction.KEY_CREATED, target, tenant_id=tenant_id, detail=detail)
    return key_id


# Revoked and expired keys match nothing.
_PRINCIPAL = """
    SELECT t.id, t.name, t.webhook_secret, k.id AS key_id, k.name AS key_name, k.hint AS key_hint, k.role,
           k.last_used_at < clock_timestamp() - interval '1 minute' OR k.last_used_at IS NULL AS is_stale
    FROM api_keys k JOIN tenants t ON t.id = k.tenant_id
    WHERE k.revoked_at IS NULL AND (k.expires_at IS NULL OR k.expires_at > clock_timestamp())
"""


def find_key(connection: Connection, digest: bytes) -> Principal | None:
    """The principal whose live key has this digest."""
    # By the digest's unique index.
    found = connection.execute(text(f"{_PRINCIPAL} AND k.digest = :digest"), {"digest": digest}).one_or_none()
    return None if found is None else _used(connection, found)


def find_keys(connection: Connection, digests: Collection[bytes]) -> dict[bytes, Principal]:
    """The principals whose live keys have these digests, by digest."""
    # In one order for every process, because each may write when its key was last used.
    found = {digest: find_key(connection, digest) for digest in sorted(digests)}
    return {digest: principal for digest, principal in found.items() if principal is not None}


def find_principals(connection: Connection, key_ids: Collection[UUID]) -> dict[UUID, Principal]:
    """The principals of those of `key_ids` that are live keys."""
    # By primary key, and in one order for every process, as above.
    rows = connection.execute(
        text(f"{_PRINCIPAL} AND k.id = ANY(CAST(:ids AS uuid[])) ORDER BY k.digest"), {"ids": list(key_ids)}
    ).all()
    return {row.key_id: _used(connection, row) for row in rows}


def _used(connection: Connection, row: Row[Any]) -> Principal:
    """Note the use of a key that `_PRINCIPAL` found."""
    if row.is_stale:
        # Last use is kept to the minute: one write in a minute, not one for each request.
        connection.execute(
            text("UPDATE api_keys SET last_used_at = clock_timestamp() WHERE id = :id"), {"id": row.key_id}
        )
    return Principal(row.id, row.name, row.webhook_secret, row.key_id, row.key_name, row.key_hint, Role(row.role))


# The columns of `ApiKey`.
_KEYS = """
    SELECT k.id, t.name AS tenant, k.name, k.role, k.hint, k.created_at, k.expires_at, k.revoked_at, k.last_used_at
    FROM api_keys k JOIN tenants t ON t.id = k.tenant_id
"""


def _api_key(row: Row[Any]) -> ApiKey:
    return ApiKey(**dict(row._mapping) | {"role": Role(row.role)})


def names(connection: Connection, tenant_ids: Collection[UUID]) -> dict[UUID, str]:
    """The names of tenants."""
    # By primary key.
    rows = connection.execute(
        text("SELECT id, name FROM tenants WHERE id = ANY(CAST(:ids AS uuid[]))"), {"ids": list(set(tenant_ids))}
    )
    return {row.id: row.name for row in rows}


def list_keys(connection: Connection, tenant_id: UUID | None = None) -> list[ApiKey]:
    """Every key of a tenant, or of all tenants, newest last."""
    # A service has tens of keys.
    rows = connection.execute(
        text(f"""
            {_KEYS}
            WHERE CAST(:tenant_id AS uuid) IS NULL OR k.tenant_id = :tenant_id
            ORDER BY k.created_at, k.id
        """),
        {"tenant_id": tenant_id},
    )
    return [_api_key(row) for row in rows]


def get_key(connection: Connection, tenant_id: UUID | None, key_id: UUID) -> ApiKey | None:
    """One key of a tenant, or of any."""
    # By primary key.
    row = connection.execute(
        text(f"""
            {_KEYS}
            WHERE k.id = :id AND (CAST(:tenant_id AS uuid) IS NULL OR k.tenant_id = :tenant_id)
        """),
        {"id": key_id, "tenant_id": tenant_id},
    ).one_or_none()
    return None if row is None else _api_key(row)


def create_key(
    connection: Connection, tenant: str, *, name: str, role: Role, hint: str, digest: bytes, by: Actor
) -> ApiKey:
    """Store a new key of a tenant, which is made, too."""
    owner = ensure_tenant(connection, tenant, new_webhook_secret())
    key_id = add_key(connection, owner.id, name=name, role=role, hint=hint, digest=digest, by=by)
    created = None if key_id is None else get_key(connection, owner.id, key_id)
    assert created is not None, "192 random bits came twice"
    return created


# What the audit log says of a key that was revoked.
_REVOKED = "RETURNING id, tenant_id, name, hint"


def revoke_key_by_id(connection: Connection, key_id: UUID, *, by: Actor) -> ApiKey:
    """Revoke one key. One that was revoked before keeps its time."""
    # The first revocation counts.
    rows = connection.execute(
        text(f"UPDATE api_keys SET revoked_at = clock_timestamp() WHERE id = :id AND revoked_at IS NULL {_REVOKED}"),
        {"id": key_id},
    )
    _record_revoked(connection, rows, by)
    revoked = get_key(connection, None, key_id)
    assert revoked is not None, "keys are never deleted"
    return revoked


def revoke_key(connection: Connection, beginning: str) -> int:
    """Revoke the keys whose hint `beginning` starts with: the hint, or more of the key. Returns how many were live."""
    # A key that was revoked before keeps its time.
    rows = connection.execute(
        text(f"""
            UPDATE api_keys SET revoked_at = clock_timestamp()
            WHERE starts_with(:beginning, hint) AND revoked_at IS NULL {_REVOKED}
        """),
        {"beginning": beginning},
    )
    return _record_revoked(connection, rows, COMMAND_LINE)


def _record_revoked(connection: Connection, rows: Iterable[Row[Any]], by: Actor) -> int:
    revoked = list(rows)
    for key in revoked:
        detail = {"name": key.name, "hint": key.hint}
        target = public_id(KEY_PREFIX, key.id)
        audit.record(connection, by, AuditAction.KEY_REVOKED, target, tenant_id=key.tenant_id, detail=detail)
    return len(revoked)


def add_login_code(connection: Connection, key_digest: bytes, code_digest: bytes, *, seconds: float) -> bool:
    """Store a code that logs in once, within `seconds`, with the live key of `key_digest`. False without such a key."""
    # Codes that were never used go now.
    connection.execute(text("DELETE FROM login_codes WHERE expires_at < clock_timestamp()"))
    # The code lives as long as Postgres' clock says.
    added = connection.execute(
        text("""
            INSERT INTO login_codes (digest, key_id, expires_at)
            SELECT :code, id, clock_timestamp() + make_interval(secs => :seconds)
            FROM api_keys WHERE digest = :key AND revoked_at IS NULL
        """),
        {"code": code_digest, "key": key_digest, "seconds": seconds},
    )
    return added.rowcount == 1


def redeem_login_code(connection: Connection, code_digest: bytes) -> Principal | None:
    """The principal that a code logs in. The code is used up, also where its key has been revoked since."""
    # Of two that come at once with one code, one deletes the row.
    key_id = connection.execute(
        text("DELETE FROM login_codes WHERE digest = :digest AND expires_at > clock_timestamp() RETURNING key_id"),
        {"digest": code_digest},
    ).scalar()
    return None if key_id is None else find_principals(connection, [key_id]).get(key_id)
