"""What an operator wants of a worker, why it ended, its counters by minute, and how long claimed lines waited."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0009"
down_revision = "0008"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("workers", sa.Column("wanted", sa.Text(), nullable=True))
    op.add_column("workers", sa.Column("end_reason", sa.Text(), nullable=True))
    op.add_column("workers", sa.Column("freed", sa.Integer(), server_default="0", nullable=False))
    op.create_check_constraint(op.f("ck_workers_wanted"), "workers", "wanted IN ('drain', 'stop')")
    op.create_check_constraint(op.f("ck_workers_end_reason"), "workers", "end_reason IN ('stopped', 'broken', 'lost')")
    op.create_index("ix_workers_ended_at", "workers", ["ended_at"], postgresql_where=sa.text("ended_at IS NOT NULL"))
    op.create_table(
        "worker_minutes",
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        sa.Column("minute", sa.DateTime(timezone=True), nullable=False),
        sa.Column("prompt_tokens", sa.BigInteger(), nullable=False),
        sa.Column("cached_tokens", sa.BigInteger(), nullable=False),
        sa.Column("completion_tokens", sa.BigInteger(), nullable=False),
        sa.Column("preemptions", sa.BigInteger(), nullable=False),
        sa.Column("busy_seconds", sa.Double(), nullable=False),
        sa.Column("running", sa.Integer(), nullable=False),
        sa.Column("kv_usage", sa.REAL(), nullable=False),
        sa.ForeignKeyConstraint(
            ["worker_id"], ["workers.id"], name=op.f("fk_worker_minutes_worker_id"), ondelete="CASCADE"
        ),
        sa.PrimaryKeyConstraint("worker_id", "minute", name=op.f("pk_worker_minutes")),
    )
    op.create_table(
        "wait_minutes",
        sa.Column("minute", sa.DateTime(timezone=True), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        sa.Column("bucket", sa.SmallInteger(), nullable=False),
        sa.Column("lines", sa.Integer(), nullable=False),
        sa.PrimaryKeyConstraint("minute", "model", "tenant_id", "worker_id", "bucket", name=op.f("pk_wait_minutes")),
        postgresql_with={"fillfactor": "50"},
    )


def downgrade() -> None:
    op.drop_table("wait_minutes")
    op.drop_table("worker_minutes")
    op.drop_index("ix_workers_ended_at", table_name="workers")
    for name in ("end_reason", "wanted"):
        op.drop_constraint(op.f(f"ck_workers_{name}"), "workers", type_="check")
    for column in ("freed", "end_reason", "wanted"):
        op.drop_column("workers", column)
