"""Progress of a job: lines by minute, failures by kind, what happened to it, and when and where each line ran."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("name", sa.Text(), nullable=True))
    op.add_column("jobs", sa.Column("retry_of", sa.Uuid(), nullable=True))
    op.add_column("jobs", sa.Column("paused_at", sa.DateTime(timezone=True), nullable=True))
    op.execute("UPDATE jobs SET name = left(metadata ->> 'name', 128) WHERE metadata ? 'name'")
    op.add_column("requests", sa.Column("claimed_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("results", sa.Column("settled_at", sa.DateTime(timezone=True), nullable=True))
    op.add_column("results", sa.Column("worker_id", sa.Uuid(), nullable=True))
    op.add_column("results", sa.Column("fingerprint", sa.BigInteger(), nullable=True))
    op.add_column("results", sa.Column("is_truncated", sa.Boolean(), server_default=sa.text("false"), nullable=False))
    op.create_index(
        "ix_results_fingerprint",
        "results",
        ["job_id", "fingerprint", "seq"],
        postgresql_where=sa.text("fingerprint IS NOT NULL"),
    )
    op.create_index(
        "ix_results_without_answer",
        "results",
        ["job_id", "state", "seq"],
        postgresql_where=sa.text("state <> 'completed'"),
    )
    op.create_index("ix_results_truncated", "results", ["job_id", "seq"], postgresql_where=sa.text("is_truncated"))
    op.create_table(
        "job_minutes",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("minute", sa.DateTime(timezone=True), nullable=False),
        sa.Column("lines", sa.Integer(), nullable=False),
        sa.Column("failed", sa.Integer(), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_minutes_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "minute", name=op.f("pk_job_minutes")),
        postgresql_with={"fillfactor": "50"},
    )
    op.create_index("ix_job_minutes_minute", "job_minutes", ["minute"])
    op.create_table(
        "failure_groups",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("fingerprint", sa.BigInteger(), nullable=False),
        sa.Column("code", sa.Text(), nullable=False),
        sa.Column("message", sa.Text(), nullable=False),
        sa.Column("lines", sa.Integer(), nullable=False),
        sa.Column("first_line", sa.Integer(), nullable=False),
        sa.Column("first_at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("last_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_failure_groups_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "fingerprint", name=op.f("pk_failure_groups")),
    )
    op.create_table(
        "job_events",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("number", sa.SmallInteger(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("detail", postgresql.JSONB(), server_default=sa.text("'{}'::jsonb"), nullable=False),
        sa.ForeignKeyConstraint(["job_id"], ["jobs.id"], name=op.f("fk_job_events_job_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("job_id", "number", name=op.f("pk_job_events")),
    )


def downgrade() -> None:
    for table in ("job_events", "failure_groups", "job_minutes"):
        op.drop_table(table)
    for index in ("ix_results_truncated", "ix_results_without_answer", "ix_results_fingerprint"):
        op.drop_index(index, "results")
    for column in ("is_truncated", "fingerprint", "worker_id", "settled_at"):
        op.drop_column("results", column)
    op.drop_column("requests", "claimed_at")
    for column in ("paused_at", "retry_of", "name"):
        op.drop_column("jobs", column)
