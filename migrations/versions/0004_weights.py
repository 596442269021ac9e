"""Weights that are uploaded to start training from.

Locks: none but on the new table. Way back: `downgrade` drops it; the sealed objects stay, and nothing names them.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0004"
down_revision = "0003"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "weights",
        sa.Column("tenant_id", sa.String(length=40), primary_key=True),
        sa.Column("id", sa.String(length=40), primary_key=True),
        sa.Column("object_id", sa.String(length=40), nullable=False),
        sa.Column("digest", sa.String(length=64), nullable=False),
        sa.Column("created", sa.DateTime(), nullable=False),
    )
    op.create_index("ix_weights_id", "weights", ["id"])


def downgrade() -> None:
    op.drop_index("ix_weights_id", "weights")
    op.drop_table("weights")
