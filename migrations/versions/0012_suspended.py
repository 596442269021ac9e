"""Since when a tenant is suspended; both ends of that count as changes of its policy.

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


_COUNT = """
    INSERT INTO policy_revisions (tenant_id, revision) VALUES (NEW.id, 1)
    ON CONFLICT (tenant_id) DO UPDATE SET revision = policy_revisions.revision + 1;
"""


def upgrade() -> None:
    op.add_column("tenants", sa.Column("suspended", sa.DateTime(), nullable=True))
    if op.get_bind().dialect.name == "sqlite":
        op.execute(f"CREATE TRIGGER policy_of_tenants AFTER UPDATE OF suspended ON tenants BEGIN {_COUNT} END")
        return
    op.execute(
        f"CREATE FUNCTION tenant_suspended() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN {_COUNT} RETURN NULL; END $$"
    )
    # As the change commits, like those of 0008: the row that counts is the last that is locked.
    op.execute(
        "CREATE CONSTRAINT TRIGGER policy_of_tenants AFTER UPDATE OF suspended ON tenants "
        "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION tenant_suspended()"
    )


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        op.execute("DROP TRIGGER policy_of_tenants")
    else:
        op.execute("SET CONSTRAINTS ALL IMMEDIATE")
        op.execute("DROP TRIGGER policy_of_tenants ON tenants")
        op.execute("DROP FUNCTION tenant_suspended")
    op.drop_column("tenants", "suspended")
