"""What a kept answer's write was allowed by: whoever repeats it is asked for that again.

Locks: on PostgreSQL `idempotency_keys`, exclusively but for milliseconds; a column without a default rewrites no row. On SQLite the
database, as long. Answers from before have no such record, and are refused by name. Way back: `downgrade` drops the column: answers
are repeated to whoever has their key.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0016"
down_revision = "0011"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("idempotency_keys", sa.Column("proofs", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("idempotency_keys", "proofs")
