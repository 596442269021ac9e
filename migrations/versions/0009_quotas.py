"""Quotas of jobs and of requests a minute, the minute's count, and what a job may come to store.

Locks: on PostgreSQL `tenants` and `jobs`, exclusively but for milliseconds; a constant default rewrites no row. On SQLite the
database, as long. Way back: `downgrade` drops table and columns: these quotas are lifted, and jobs under way reserve no storage.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from cloister_server.store.row_security import secured

revision = "0009"
down_revision = "0012"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column("tenants", sa.Column("quota_jobs", sa.Integer(), nullable=True))
    op.add_column("tenants", sa.Column("quota_requests", sa.Integer(), nullable=True))
    op.add_column("jobs", sa.Column("reserved_bytes", sa.BigInteger(), nullable=False, server_default=sa.text("0")))
    op.create_table(
        "request_counts",
        sa.Column("tenant_id", sa.String(length=40), primary_key=True),
        sa.Column("minute", sa.Integer(), nullable=False),
        sa.Column("taken", sa.Integer(), nullable=False),
    )
    if op.get_bind().dialect.name != "sqlite":
        for statement in secured("request_counts"):
            op.execute(statement)


def downgrade() -> None:
    op.drop_table("request_counts")
    op.drop_column("jobs", "reserved_bytes")
    for column in ("quota_requests", "quota_jobs"):
        op.drop_column("tenants", column)
