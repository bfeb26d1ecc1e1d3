"""Where a line's time went, and how claims of it ended that brought no result."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0017"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("results", sa.Column("timing", sa.LargeBinary()))
    op.create_table(
        "line_events",
        sa.Column("job_id", sa.Uuid(), nullable=False),
        sa.Column("line", sa.Integer(), nullable=False),
        sa.Column("epoch", sa.Integer(), nullable=False),
        sa.Column("kind", sa.Text(), nullable=False),
        sa.Column("at", sa.DateTime(timezone=True), server_default=sa.text("clock_timestamp()"), nullable=False),
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        sa.CheckConstraint("kind IN ('lost', 'given_back', 'alone')", name=op.f("ck_line_events_kind")),
        sa.PrimaryKeyConstraint("job_id", "line", "epoch", "kind", name=op.f("pk_line_events")),
    )


def downgrade() -> None:
    op.drop_table("line_events")
    op.drop_column("results", "timing")
