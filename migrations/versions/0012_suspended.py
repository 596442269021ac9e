"""Since when a tenant is suspended.

Locks: on PostgreSQL `tenants`, exclusively but for milliseconds; a column without a default rewrites no row. On SQLite the database,
as long. Way back: `downgrade` drops the column: whoever was suspended acts again.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0012"
down_revision = "0010"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tenants", sa.Column("suspended", sa.DateTime(), nullable=True))


def downgrade() -> None:
    op.drop_column("tenants", "suspended")
