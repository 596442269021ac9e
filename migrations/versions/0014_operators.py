"""Operators: people who may administer the whole deployment, and the token that makes the first of them.

Locks: none but on the new tables. Way back: `downgrade` drops both: accounts stay, and nobody administers by the API any more.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from cloister_server.store.row_security import secured

revision = "0014"
down_revision = "0016"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "operators",
        sa.Column("tenant_id", sa.String(length=40), primary_key=True),
        sa.Column("id", sa.String(length=40), primary_key=True),
        sa.Column("created", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id", "id"], ["users.tenant_id", "users.id"], ondelete="CASCADE"),
    )
    op.create_table(
        "first_admin_tokens",
        sa.Column("mac", sa.LargeBinary(length=32), primary_key=True),
        sa.Column("until", sa.DateTime(), nullable=False),
    )
    if op.get_bind().dialect.name != "sqlite":
        for statement in secured("operators"):
            op.execute(statement)


def downgrade() -> None:
    op.drop_table("first_admin_tokens")
    op.drop_table("operators")
