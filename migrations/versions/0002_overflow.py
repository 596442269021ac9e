"""Overflow: each reservation in the ledger says what its overflowing steps may add to delta.

Locks: on PostgreSQL the ledger's table alone, exclusively but for milliseconds: a column with a constant default rewrites
no row. On SQLite the database, as long; rows are not rewritten either, and the append-only triggers stay.
Reservations made before keep 0, which is true of them: their steps had no fixed slots to overflow. Let jobs end before
migrating: a spec that was sealed without a capacity is refused, and its job fails.
Way back: `downgrade` drops the column, and with it the record of what overflows may have cost; restore a backup instead.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0002"
down_revision = "0001"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("ledger", sa.Column("overflow", sa.Double(), nullable=False, server_default=sa.text("0")))


def downgrade() -> None:
    op.drop_column("ledger", "overflow")
