"""Where each key-encryption key lies and whether it is still used, who seals what for which job, quotas, ends of tenants.

Locks: on PostgreSQL `tenants`, `tenant_keys`, `signing_keys` and `sealed_objects`, exclusively but for milliseconds: constant
defaults rewrite no row; one index of `sealed_objects` is built, seconds for a million rows. On SQLite the database, as long.
Way back: `downgrade` drops the new tables and columns. Keys that are not in the local keystore are lost to an older release.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

revision = "0006"
down_revision = "0005"
branch_labels = None
depends_on = None


def upgrade() -> None:
    op.add_column(
        "tenants", sa.Column("status", sa.String(length=512), nullable=False, server_default=sa.text("'active'"))
    )
    op.add_column("tenants", sa.Column("quota_bytes", sa.BigInteger(), nullable=True))
    op.add_column("tenants", sa.Column("receipt", sa.JSON(), nullable=True))
    op.add_column(
        "tenant_keys", sa.Column("provider", sa.String(length=64), nullable=False, server_default=sa.text("'local'"))
    )
    op.add_column(
        "tenant_keys", sa.Column("state", sa.String(length=16), nullable=False, server_default=sa.text("'active'"))
    )
    op.add_column("tenant_keys", sa.Column("destroyed", sa.DateTime(), nullable=True))
    op.add_column("signing_keys", sa.Column("key_version", sa.Integer(), nullable=False, server_default=sa.text("1")))
    # The service's own keys are wrapped by a key with a life like any tenant's.
    op.execute(
        "INSERT INTO tenant_keys (tenant_id, version, key_id, created) "
        "SELECT 'system', 1, 'system', (SELECT min(created) FROM signing_keys) WHERE EXISTS (SELECT 1 FROM signing_keys)"
    )
    op.add_column("sealed_objects", sa.Column("job_id", sa.String(length=40), nullable=True))
    op.add_column("sealed_objects", sa.Column("attempt", sa.Integer(), nullable=True))
    op.add_column("sealed_objects", sa.Column("size", sa.BigInteger(), nullable=True))
    op.create_index("ix_sealed_objects_key", "sealed_objects", ["tenant_id", "key_version"])
    op.create_table(
        "keystore_backups",
        sa.Column("id", sa.String(length=40), primary_key=True),
        sa.Column("place", sa.String(length=4096), nullable=False),
        sa.Column("created", sa.DateTime(), nullable=False),
    )


def downgrade() -> None:
    op.drop_table("keystore_backups")
    op.drop_index("ix_sealed_objects_key", "sealed_objects")
    op.execute("DELETE FROM tenant_keys WHERE tenant_id = 'system'")
    for table, columns in {
        "sealed_objects": ("size", "attempt", "job_id"),
        "signing_keys": ("key_version",),
        "tenant_keys": ("destroyed", "state", "provider"),
        "tenants": ("receipt", "quota_bytes", "status"),
    }.items():
        for column in columns:
            op.drop_column(table, column)
