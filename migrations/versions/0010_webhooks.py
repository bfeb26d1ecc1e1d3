"""Endpoints that subscribe to types of events, events of batches, and what came of each attempt."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0010"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("webhook_endpoints", sa.Column("name", sa.Text(), nullable=True))
    op.add_column("webhook_endpoints", sa.Column("event_types", postgresql.ARRAY(sa.Text()), nullable=True))
    op.add_column("webhook_endpoints", sa.Column("secret", sa.Text(), nullable=True))
    op.add_column("webhook_endpoints", sa.Column("old_secret", sa.Text(), nullable=True))
    op.add_column("webhook_endpoints", sa.Column("old_secret_until", sa.DateTime(timezone=True), nullable=True))
    op.add_column(
        "webhook_endpoints",
        sa.Column(
            "updated_at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False
        ),
    )
    op.drop_constraint("uq_webhook_endpoints_tenant_id_url", "webhook_endpoints")
    op.create_index(
        "ix_webhook_endpoints_of_jobs",
        "webhook_endpoints",
        ["tenant_id", "url"],
        unique=True,
        postgresql_where=sa.text("event_types IS NULL"),
    )
    op.create_index("ix_webhook_endpoints_tenant_id_id", "webhook_endpoints", ["tenant_id", "id"])
    op.alter_column("events", "job_id", nullable=True)
    op.add_column("events", sa.Column("batch_id", sa.Uuid(), nullable=True))
    op.create_foreign_key(op.f("fk_events_batch_id"), "events", "batches", ["batch_id"], ["id"], ondelete="CASCADE")
    op.create_unique_constraint(op.f("uq_events_batch_id_type"), "events", ["batch_id", "type"])
    op.create_index("ix_deliveries_endpoint_id_id", "deliveries", ["endpoint_id", "id"])
    op.create_table(
        "delivery_attempts",
        sa.Column("delivery_id", sa.BigInteger(), nullable=False),
        sa.Column("number", sa.SmallInteger(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), nullable=False),
        sa.Column("milliseconds", sa.Integer(), nullable=False),
        sa.Column("status", sa.Integer(), nullable=True),
        sa.Column("error", sa.Text(), nullable=True),
        sa.Column("answer", sa.LargeBinary(), nullable=False),
        sa.ForeignKeyConstraint(
            ["delivery_id"], ["deliveries.id"], name=op.f("fk_delivery_attempts_delivery_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("delivery_id", "number", name=op.f("pk_delivery_attempts")),
    )


def downgrade() -> None:
    op.drop_table("delivery_attempts")
    op.drop_index("ix_deliveries_endpoint_id_id")
    op.execute("DELETE FROM events WHERE job_id IS NULL")
    op.drop_column("events", "batch_id")
    op.alter_column("events", "job_id", nullable=False)
    op.drop_index("ix_webhook_endpoints_tenant_id_id")
    op.drop_index("ix_webhook_endpoints_of_jobs")
    op.execute("DELETE FROM webhook_endpoints WHERE event_types IS NOT NULL")
    op.create_unique_constraint(op.f("uq_webhook_endpoints_tenant_id_url"), "webhook_endpoints", ["tenant_id", "url"])
    for column in ("updated_at", "old_secret_until", "old_secret", "secret", "event_types", "name"):
        op.drop_column("webhook_endpoints", column)
