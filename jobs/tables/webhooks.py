"""Webhook endpoints, events, and their deliveries."""

from __future__ import annotations

from sqlalchemy import (
    ARRAY,
    BigInteger,
    Boolean,
    Column,
    DateTime,
    ForeignKey,
    Identity,
    Index,
    Integer,
    LargeBinary,
    SmallInteger,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from jobs.tables.schema import NOW, metadata

webhook_endpoints = Table(
    "webhook_endpoints",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("url", Text, nullable=False),
    Column("name", Text),
    Column("event_types", ARRAY(Text)),  # NULL: named by jobs, which say what it gets
    Column("secret", Text),  # NULL: the tenant's
    Column("old_secret", Text),  # signs, too, until …
    Column("old_secret_until", DateTime(timezone=True)),
    Column("disabled_at", DateTime(timezone=True)),  # the receiver answered 410
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Index(
        "ix_webhook_endpoints_of_jobs", "tenant_id", "url", unique=True, postgresql_where=text("event_types IS NULL")
    ),
    Index("ix_webhook_endpoints_tenant_id_id", "tenant_id", "id"),
)

events = Table(
    "events",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE")),
    Column("batch_id", ForeignKey("batches.id", ondelete="CASCADE")),  # neither: a test
    Column("type", Text, nullable=False),  # job.completed, batch.failed …
    Column("detail", JSONB),  # of a milestone: the job's counters then, and why it stands still
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    UniqueConstraint("job_id", "type"),
    UniqueConstraint("batch_id", "type"),
)

deliveries = Table(
    "deliveries",
    metadata,
    Column("id", BigInteger, Identity(always=True), primary_key=True),
    Column("event_id", ForeignKey("events.id", ondelete="CASCADE"), nullable=False),
    Column("endpoint_id", ForeignKey("webhook_endpoints.id", ondelete="CASCADE"), nullable=False),
    Column("attempts", SmallInteger, nullable=False, server_default="0"),
    # NULL once delivered or given up. A courier that takes a delivery moves this past its own time limit first.
    Column("due_at", DateTime(timezone=True), server_default=NOW),
    Column("delivered_at", DateTime(timezone=True)),
    Column("given_up", Boolean, nullable=False, server_default=text("false")),
    Column("last_status", Integer),
    Column("last_error", Text),
    UniqueConstraint("event_id", "endpoint_id"),
    Index("ix_deliveries_due_at", "due_at", postgresql_where=text("due_at IS NOT NULL")),
    Index("ix_deliveries_endpoint_id_id", "endpoint_id", "id"),
)

delivery_attempts = Table(
    "delivery_attempts",
    metadata,
    Column("delivery_id", ForeignKey("deliveries.id", ondelete="CASCADE"), primary_key=True),
    Column("number", SmallInteger, primary_key=True),
    Column("at", DateTime(timezone=True), nullable=False),
    Column("milliseconds", Integer, nullable=False),
    Column("status", Integer),  # NULL: there was no answer
    Column("error", Text),  # NULL: delivered
    Column("answer", LargeBinary, nullable=False),  # the first bytes of its body
)
