"""A weight for each tenant's share of the workers."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tenants", sa.Column("weight", sa.SmallInteger(), server_default="1", nullable=False))
    op.create_check_constraint(op.f("ck_tenants_weight"), "tenants", "weight BETWEEN 1 AND 1000")


def downgrade() -> None:
    op.drop_constraint(op.f("ck_tenants_weight"), "tenants", type_="check")
    op.drop_column("tenants", "weight")
