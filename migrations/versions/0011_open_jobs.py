"""Jobs that take lines in several requests."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0011"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("jobs", sa.Column("open_params", sa.LargeBinary()))
    op.create_index("ix_jobs_taking_lines", "jobs", ["tenant_id"], postgresql_where=sa.text("open_params IS NOT NULL"))


def downgrade() -> None:
    op.drop_index("ix_jobs_taking_lines", "jobs")
    op.drop_column("jobs", "open_params")
