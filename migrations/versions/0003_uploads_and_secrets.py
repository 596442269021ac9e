"""A part says who uploaded it, and what it holds as a keyed digest; an app says since when its secret is the present one.

Locks: on PostgreSQL `parts` and `apps`, exclusively but for milliseconds: columns without a default rewrite no row. On
SQLite the database, as long. What is there keeps nulls: of parts uploaded before, nobody is told whether they hold the same.
Way back: `downgrade` drops the columns; interrupted uploads then cannot be told from others that hold other rows.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0003"
down_revision = "0002"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("parts", sa.Column("uploader_id", sa.String(length=40), nullable=True))
    op.add_column("parts", sa.Column("content_mac", sa.LargeBinary(), nullable=True))
    op.add_column("apps", sa.Column("secret_since", sa.DateTime(), nullable=True))


def downgrade() -> None:
    op.drop_column("apps", "secret_since")
    op.drop_column("parts", "content_mac")
    op.drop_column("parts", "uploader_id")
