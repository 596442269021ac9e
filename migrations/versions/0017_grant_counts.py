"""The count of a grant's minute, over all processes.

Locks: on PostgreSQL `grants`, against writers but not readers, for milliseconds; on SQLite the database, as long. Way back:
`downgrade` drops the table, which tells nothing but of the minute.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from cloister_server.store.row_security import secured

revision = "0017"
down_revision = "0014"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.create_table(
        "grant_counts",
        sa.Column("tenant_id", sa.String(length=40), primary_key=True),
        sa.Column("grant_id", sa.String(length=40), primary_key=True),
        sa.Column("minute", sa.Integer(), nullable=False),
        sa.Column("taken", sa.Integer(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id", "grant_id"], ["grants.tenant_id", "grants.id"], ondelete="CASCADE"),
    )
    if op.get_bind().dialect.name != "sqlite":
        for statement in secured("grant_counts"):
            op.execute(statement)


def downgrade() -> None:
    op.drop_table("grant_counts")
