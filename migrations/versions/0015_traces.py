"""The trace context of the request that made a job or a batch."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0015"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    for table in ("jobs", "batches"):
        op.add_column(table, sa.Column("traceparent", sa.Text()))


def downgrade() -> None:
    for table in ("jobs", "batches"):
        op.drop_column(table, "traceparent")
