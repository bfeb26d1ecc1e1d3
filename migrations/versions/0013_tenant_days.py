"""Lines settled in a day, and how they failed, counted as it happens; today so far is taken from the minutes."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0013"
down_revision = "0012"
branch_labels = None
depends_on = None

TODAY = "date_trunc('day', statement_timestamp(), 'UTC')"


def upgrade() -> None:
    op.create_table(
        "tenant_days",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        sa.Column("lines", sa.BigInteger(), nullable=False),
        sa.Column("failed", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("day", "tenant_id", "worker_id", name=op.f("pk_tenant_days")),
        postgresql_with={"fillfactor": "50"},
    )
    op.create_table(
        "tenant_failures",
        sa.Column("day", sa.Date(), nullable=False),
        sa.Column("tenant_id", sa.Uuid(), nullable=False),
        sa.Column("fingerprint", sa.BigInteger(), nullable=False),
        sa.PrimaryKeyConstraint("day", "tenant_id", "fingerprint", name=op.f("pk_tenant_failures")),
    )
    op.execute(f"""
        INSERT INTO tenant_days
        SELECT ({TODAY} AT TIME ZONE 'UTC')::date, j.tenant_id, '00000000-0000-0000-0000-000000000000',
               sum(m.lines), sum(m.failed)
        FROM job_minutes m JOIN jobs j ON j.id = m.job_id
        WHERE m.minute >= {TODAY}
        GROUP BY j.tenant_id
    """)
    op.execute(f"""
        INSERT INTO tenant_failures
        SELECT DISTINCT ({TODAY} AT TIME ZONE 'UTC')::date, j.tenant_id, g.fingerprint
        FROM failure_groups g JOIN jobs j ON j.id = g.job_id
        WHERE g.last_at >= {TODAY} AND NOT j.is_live
    """)


def downgrade() -> None:
    op.drop_table("tenant_failures")
    op.drop_table("tenant_days")
