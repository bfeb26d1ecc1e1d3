"""Who changed what: one row for each change that a key, or the command line, made."""

from __future__ import annotations

from sqlalchemy import Column, DateTime, ForeignKey, Index, Table, Text, Uuid, text
from sqlalchemy.dialects.postgresql import JSONB

from jobs.tables.schema import NOW, metadata

audit = Table(
    "audit",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("at", DateTime(timezone=True), nullable=False, server_default=NOW, index=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE")),  # whose it is; NULL: the service's own
    Column("key_id", Uuid),  # that asked; NULL: the command line, or a stranger. No foreign key: it may outlive the key
    Column("action", Text, nullable=False),
    Column("target", Text, nullable=False),  # a public id, a tenant's name or an address
    Column("detail", JSONB, nullable=False, server_default=text("'{}'::jsonb")),  # cut by `jobs.queries.audit`
    Index("ix_audit_tenant_id_id", "tenant_id", "id"),
)
