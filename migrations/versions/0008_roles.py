"""A role for each API key, and codes that log a page in once."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("api_keys", sa.Column("role", sa.Text(), server_default="read-write", nullable=False))
    op.create_check_constraint(op.f("ck_api_keys_role"), "api_keys", "role IN ('read-only', 'read-write', 'operator')")
    op.create_table(
        "login_codes",
        sa.Column("digest", sa.LargeBinary(), nullable=False),
        sa.Column("key_id", sa.Uuid(), nullable=False),
        sa.Column("expires_at", sa.DateTime(timezone=True), nullable=False),
        sa.ForeignKeyConstraint(["key_id"], ["api_keys.id"], name=op.f("fk_login_codes_key_id"), ondelete="CASCADE"),
        sa.PrimaryKeyConstraint("digest", name=op.f("pk_login_codes")),
    )
    op.create_index(op.f("ix_login_codes_key_id"), "login_codes", ["key_id"])


def downgrade() -> None:
    op.drop_table("login_codes")
    op.drop_constraint(op.f("ck_api_keys_role"), "api_keys", type_="check")
    op.drop_column("api_keys", "role")
