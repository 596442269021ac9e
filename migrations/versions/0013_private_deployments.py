"""Versions whose weights are shared between two parties.

Locks: none but on the new table. Way back: `downgrade` drops it; the sealed objects stay, and nothing names them. Roles that run go
on, and get no permissions any more.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from cloister_server.store.row_security import secured

revision = "0013"
down_revision = "0009"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "private_deployments",
        sa.Column("tenant_id", sa.String(length=40), primary_key=True),
        sa.Column("model_id", sa.String(length=40), primary_key=True),
        sa.Column("version", sa.Integer(), primary_key=True),
        sa.Column("generation", sa.Integer(), primary_key=True),
        sa.Column("id", sa.String(length=40), nullable=False),
        sa.Column("statement", sa.JSON(), nullable=False),
        sa.Column("files_id", sa.String(length=40), nullable=True),
        sa.Column("created", sa.DateTime(), nullable=False),
        sa.Column("ended", sa.DateTime(), nullable=True),
        sa.ForeignKeyConstraint(
            ["tenant_id", "model_id", "version"],
            ["model_versions.tenant_id", "model_versions.model_id", "model_versions.version"],
        ),
    )
    if op.get_bind().dialect.name != "sqlite":
        for statement in secured("private_deployments"):
            op.execute(statement)


def downgrade() -> None:
    op.drop_table("private_deployments")
