"""Events of jobs that run, with what was so when they were announced."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op
from sqlalchemy.dialects import postgresql

revision = "0012"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("events", sa.Column("detail", postgresql.JSONB()))


def downgrade() -> None:
    # Couriers of before would send a milestone with counters of another moment.
    op.execute("DELETE FROM events WHERE detail IS NOT NULL")
    op.drop_column("events", "detail")
