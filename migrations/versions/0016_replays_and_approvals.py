"""What a kept answer's write was allowed by: whoever repeats it is asked for that again. And tenants whose end takes two operators.

Locks: on PostgreSQL `idempotency_keys` and `tenants`, exclusively but for milliseconds; no row is rewritten. On SQLite the database,
as long. Answers from before have no such record, and are refused by name. Way back: `downgrade` drops the columns: answers are
repeated to whoever has their key, and one operator ends any tenant.
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
    op.add_column("tenants", sa.Column("two_person", sa.Boolean(), nullable=False, server_default=sa.text("false")))
    op.add_column("tenants", sa.Column("approvals", sa.JSON(), nullable=True))


def downgrade() -> None:
    op.drop_column("tenants", "approvals")
    op.drop_column("tenants", "two_person")
    op.drop_column("idempotency_keys", "proofs")
