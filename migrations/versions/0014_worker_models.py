"""The models that a worker serves: several in turn, of which `workers.model` is the present one."""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0014"
down_revision = "0013"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "worker_models",
        sa.Column("worker_id", sa.Uuid(), nullable=False),
        sa.Column("model", sa.Text(), nullable=False),
        sa.ForeignKeyConstraint(
            ["worker_id"], ["workers.id"], name=op.f("fk_worker_models_worker_id"), ondelete="CASCADE"
        ),
        sa.ForeignKeyConstraint(["model"], ["models.name"], name=op.f("fk_worker_models_model")),
        sa.PrimaryKeyConstraint("worker_id", "model", name=op.f("pk_worker_models")),
    )
    op.create_index(op.f("ix_worker_models_model"), "worker_models", ["model"])
    op.execute("INSERT INTO worker_models (worker_id, model) SELECT id, model FROM workers")


def downgrade() -> None:
    op.drop_table("worker_models")
