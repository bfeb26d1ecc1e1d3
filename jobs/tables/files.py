"""Files, uploads and batches, as OpenAI's clients see them; a batch has a job once its input is valid."""

from __future__ import annotations

from sqlalchemy import (
    BigInteger,
    CheckConstraint,
    Column,
    DateTime,
    ForeignKey,
    Index,
    Integer,
    Table,
    Text,
    UniqueConstraint,
    Uuid,
    text,
)
from sqlalchemy.dialects.postgresql import JSONB

from jobs.tables.schema import NOW, metadata

batches = Table(
    "batches",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("endpoint", Text, nullable=False),
    Column("input_file_id", Uuid, nullable=False),  # no foreign key: the file may go once the lines are in `bodies`
    Column("completion_window", Text, nullable=False),  # as it was asked for
    Column("metadata", JSONB),
    Column("on_error", Text, nullable=False, server_default="fail"),
    Column("output_seconds", Integer),  # that the files of results live; NULL: for good
    Column("model", Text),
    Column("errors", JSONB),  # of a failed validation
    Column("job_id", ForeignKey("jobs.id", ondelete="CASCADE")),  # NULL until the input is valid
    Column("output_file_id", Uuid),
    Column("error_file_id", Uuid),
    Column("traceparent", Text),  # of the request that made it, where it was traced
    Column("holder", Uuid),  # the process that validates or finalizes it, until `held_until`
    Column("held_until", DateTime(timezone=True)),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    Column("failed_at", DateTime(timezone=True)),
    Column("cancelling_at", DateTime(timezone=True)),  # set where it was cancelled before it had a job
    Column("finalized_at", DateTime(timezone=True)),  # the files of results are stored
    CheckConstraint("on_error IN ('fail', 'skip')", name="on_error"),
    UniqueConstraint("job_id"),
    Index("ix_batches_tenant_id_id", "tenant_id", "id"),
    Index("ix_batches_open", "id", postgresql_where=text("failed_at IS NULL AND finalized_at IS NULL")),
    Index("ix_batches_input_file_id", "input_file_id", postgresql_where=text("job_id IS NULL AND failed_at IS NULL")),
)

files = Table(
    "files",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False, server_default="0"),
    # Of a file of results: readable while the batch runs, stored when it has ended.
    Column("batch_id", ForeignKey("batches.id", ondelete="SET NULL"), index=True),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("stored_at", DateTime(timezone=True)),  # NULL while the content still comes in: invisible
    Column("expires_at", DateTime(timezone=True)),
    Column("deleted_at", DateTime(timezone=True)),  # invisible from now on; the courier removes content and row
    Index("ix_files_tenant_id_id", "tenant_id", "id"),
    # What the courier looks for.
    Index("ix_files_expires_at", "expires_at", postgresql_where=text("expires_at IS NOT NULL")),
    Index("ix_files_leaving", "created_at", postgresql_where=text("stored_at IS NULL OR deleted_at IS NOT NULL")),
)

uploads = Table(
    "uploads",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("tenant_id", ForeignKey("tenants.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("state", Text, nullable=False, server_default="pending"),
    Column("purpose", Text, nullable=False),
    Column("filename", Text, nullable=False),
    Column("mime_type", Text, nullable=False),
    Column("bytes", BigInteger, nullable=False),  # as announced; the parts must come to just that
    Column("file_seconds", Integer),  # that the file lives, from its creation; NULL: for good
    Column("file_id", ForeignKey("files.id", ondelete="SET NULL")),
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
    Column("expires_at", DateTime(timezone=True), nullable=False),
    CheckConstraint("state IN ('pending', 'completed', 'cancelled', 'expired')", name="state"),
    Index("ix_uploads_expires_at", "expires_at", postgresql_where=text("state = 'pending'")),
)

upload_parts = Table(
    "upload_parts",
    metadata,
    Column("id", Uuid, primary_key=True),
    Column("upload_id", ForeignKey("uploads.id", ondelete="CASCADE"), nullable=False, index=True),
    Column("bytes", BigInteger, nullable=False, server_default="0"),
    Column("stored_at", DateTime(timezone=True)),  # NULL while the content still comes in
    Column("created_at", DateTime(timezone=True), nullable=False, server_default=NOW),
)
