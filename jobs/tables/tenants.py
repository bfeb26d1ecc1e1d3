"""Tenants, their keys, and what tells a repeated request from a new one."""

from __future__ import annotations

from sqlalchemy import CheckConstraint, Column, DateTime, ForeignKey, LargeBinary, SmallInteger, Table, Text, Uuid

from jobs.roles import Role
from jobs.tables.schema import NOW, metadata

MAX_WEIGHT = 1000  # of a tenant

tenants = Table(
    "tenants",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("name", Text, nullable=False, unique=True),
    Column("webhook_secret", Text, nullable=False),  # whsec_…: signs, so it cannot be kept as a hash
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("weight", SmallInteger, nullable=False, server_default="1"),  # share of the workers beside other tenants
    CheckConstraint(f"weight BETWEEN 1 AND {MAX_WEIGHT}", name="weight"),
)

api_keys = Table(
    "api_keys",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("name", Text, nullable=False, server_default=""),
    Column("role", Text, nullable=False, server_default=Role.READ_WRITE),
    Column("hint", Text, nullable=False),  # the first characters, to tell keys apart in a list
    Column("digest", LargeBinary, nullable=False, unique=True),  # HMAC-SHA256 under the server's pepper
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("expires_at", DateTime(timezone=True)),
    Column("revoked_at", DateTime(timezone=True)),
    Column("last_used_at", DateTime(timezone=True)),
    CheckConstraint("role IN (" + ", ".join(f"'{role}'" for role in Role) + ")", name="role"),
)

login_codes = Table(
    "login_codes",
    metadata,
    Column("digest", LargeBinary, primary_key=True),  # HMAC-SHA256 of the code under the server's pepper
    Column("key_id", ForeignKey("api_keys.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("expires_at", DateTime(timezone=True), nullable=False),
)

idempotency_keys = Table(
    "idempotency_keys",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
    Column("key", Text, primary_key=True),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("body_sha256", LargeBinary),  # NULL while the first request is still uploading
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
)

creations = Table(
    "creations",
    metadata,
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), primary_key=True),
    Column("request", LargeBinary, primary_key=True),  # a hash of what tells the request from others
    Column("body_sha256", LargeBinary, nullable=False),
    Column("object_id", Uuid, nullable=False),  # no foreign key: a file, an upload, a part, a batch or a live job
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("expires_at", DateTime(timezone=True), nullable=False, index=True),
)
