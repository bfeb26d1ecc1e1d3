"""Models, the workers that serve them, how long lines waited for a worker, and how they ended, by day."""

from __future__ import annotations

from uuid import UUID

from sqlalchemy import (
    REAL,
    BigInteger,
    CheckConstraint,
    Column,
    Date,
    DateTime,
    Double,
    ForeignKey,
    Index,
    Integer,
    SmallInteger,
    Table,
    Text,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from jobs.tables.schema import NOW, metadata

models = Table(
    "models",
    metadata,
    Column("name", Text, primary_key=True),
    Column("max_model_len", Integer, nullable=False),
    Column("vocab_size", Integer, nullable=False),
    Column("registered_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("updated_at", DateTime(timezone=True), nullable=False, server_default=NOW),
)

workers = Table(
    "workers",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("model", ForeignKey("models.name"), nullable=False, index=True),  # that it runs, or turns to, now
    Column("host", Text, nullable=False),
    Column("pid", Integer, nullable=False),
    Column("device", Text, nullable=False),
    Column("started_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("heartbeat_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("lease_expires_at", DateTime(timezone=True), nullable=False),
    Column("ended_at", DateTime(timezone=True)),  # set by its own stop or by the reaper; never unset
    Column("stats", JSONB, nullable=False, server_default=text("'{}'::jsonb")),
    Column("wanted", Text),  # what an operator asked of it: drain or stop; its next heartbeat brings it there
    Column("end_reason", Text),
    Column("freed", Integer, nullable=False, server_default="0"),  # lines that it held when it ended
    CheckConstraint("wanted IN ('drain', 'stop')", name="wanted"),
    CheckConstraint("end_reason IN ('stopped', 'broken', 'lost')", name="end_reason"),
    Index("ix_workers_ended_at", "ended_at", postgresql_where=text("ended_at IS NOT NULL")),
    Index("ix_workers_live", "lease_expires_at", postgresql_where=text("ended_at IS NULL")),
)

# All models that a worker serves in turn, its present one included.
worker_models = Table(
    "worker_models",
    metadata,
    Column("worker_id", ForeignKey("workers.id", ondelete="CASCADE"), primary_key=True),
    Column("model", ForeignKey("models.name"), primary_key=True, index=True),
)

# A worker's counters since its start, as its first heartbeat of each minute gave them: rates are their differences.
worker_minutes = Table(
    "worker_minutes",
    metadata,
    Column("worker_id", ForeignKey("workers.id", ondelete="CASCADE"), primary_key=True),
    Column("minute", DateTime(timezone=True), primary_key=True),
    Column("prompt_tokens", BigInteger, nullable=False),
    Column("cached_tokens", BigInteger, nullable=False),
    Column("completion_tokens", BigInteger, nullable=False),
    Column("preemptions", BigInteger, nullable=False),
    Column("busy_seconds", Double, nullable=False),  # inside steps
    Column("running", Integer, nullable=False),
    Column("kv_usage", REAL, nullable=False),
)

# How long the lines claimed in a minute had waited, counted by `jobs.queries.waits.bucket`. Each worker has rows of its
# own, so that no claim waits for another's lock.
wait_minutes = Table(
    "wait_minutes",
    metadata,
    Column("minute", DateTime(timezone=True), primary_key=True),
    Column("model", Text, primary_key=True),
    Column("tenant_id", Uuid, primary_key=True),
    Column("worker_id", Uuid, primary_key=True),
    Column("bucket", SmallInteger, primary_key=True),
    Column("lines", Integer, nullable=False),
    postgresql_with={"fillfactor": "50"},
)

# Lines settled in a day of UTC, those of live requests left out. Each worker has rows of its own, as above; lines that
# no worker held are counted under `NO_WORKER`.
tenant_days = Table(
    "tenant_days",
    metadata,
    Column("day", Date, primary_key=True),
    Column("tenant_id", Uuid, primary_key=True),
    Column("worker_id", Uuid, primary_key=True),
    Column("lines", BigInteger, nullable=False),
    Column("failed", BigInteger, nullable=False),
    postgresql_with={"fillfactor": "50"},
)
NO_WORKER = UUID(int=0)

# The kinds of failure that a tenant's lines had in a day of UTC.
tenant_failures = Table(
    "tenant_failures",
    metadata,
    Column("day", Date, primary_key=True),
    Column("tenant_id", Uuid, primary_key=True),
    Column("fingerprint", BigInteger, primary_key=True),
)
