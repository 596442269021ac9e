"""Groups, conditions on grants, the count of a tenant's policy changes; on PostgreSQL row security, which shows a tenant's rows to
transactions that act for that tenant, and to no others.

Locks: on PostgreSQL each table, exclusively but for milliseconds; new columns are null and rewrite no row. On SQLite the database, as
long. Way back: `downgrade` drops the tables and columns: grants to groups go, and so must those with conditions, which
would allow more without them.
"""

from __future__ import annotations

import sqlalchemy as sa
from alembic import op

from cloister_server.store.row_security import SETTING, secured, unsecured

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_NEW = ("groups", "members", "policy_revisions")
_OWNED = (
    "apps", "attempts", "audit", "balances", "blocks", "datasets", "grants", "idempotency_keys", "jobs", "ledger", "links",
    "model_versions", "models", "parts", "sealed_objects", "sources", "tenant_keys", "units", "weights", *_NEW,
)  # fmt: skip
_CONDITIONS = {
    "address_first": sa.String(length=32), "address_last": sa.String(length=32), "max_epsilon": sa.Double(),
    "requests_per_minute": sa.Integer(), "outputs": sa.String(length=16),
}  # fmt: skip
_COUNTED = ("grants", "members")
_COUNT = """
    INSERT INTO policy_revisions (tenant_id, revision) VALUES ({row}.tenant_id, 1)
    ON CONFLICT (tenant_id) DO UPDATE SET revision = policy_revisions.revision + 1;
"""


def upgrade() -> None:
    op.create_table(
        "groups",
        sa.Column("tenant_id", sa.String(length=40), primary_key=True),
        sa.Column("id", sa.String(length=40), primary_key=True),
        sa.Column("name", sa.String(length=512), nullable=False),
        sa.Column("created", sa.DateTime(), nullable=False),
        sa.UniqueConstraint("tenant_id", "name"),
    )
    op.create_index("ix_groups_id", "groups", ["id"])
    op.create_table(
        "members",
        sa.Column("tenant_id", sa.String(length=40), primary_key=True),
        sa.Column("group_id", sa.String(length=40), primary_key=True),
        sa.Column("principal_id", sa.String(length=40), primary_key=True),
        sa.Column("created", sa.DateTime(), nullable=False),
        sa.ForeignKeyConstraint(["tenant_id", "group_id"], ["groups.tenant_id", "groups.id"]),
    )
    op.create_index("ix_members_principal", "members", ["tenant_id", "principal_id"])
    op.create_table(
        "policy_revisions",
        sa.Column("tenant_id", sa.String(length=40), primary_key=True),
        sa.Column("revision", sa.BigInteger(), nullable=False),
    )
    for name, kind in _CONDITIONS.items():
        op.add_column("grants", sa.Column(name, kind, nullable=True))
    if op.get_bind().dialect.name == "sqlite":
        _count_on_sqlite()
    else:
        _count_on_postgres()
        _secure_all()


def downgrade() -> None:
    is_sqlite = op.get_bind().dialect.name == "sqlite"
    op.execute("DELETE FROM grants WHERE principal_id IN (SELECT id FROM groups)")
    op.execute(f"DELETE FROM grants WHERE {' OR '.join(f'{name} IS NOT NULL' for name in _CONDITIONS)}")  # noqa: S608 (names of ours)
    if is_sqlite:
        for table in _COUNTED:
            for change in ("insert", "update", "delete"):
                op.execute(f"DROP TRIGGER policy_of_{table}_{change}")
    else:
        op.execute("SET CONSTRAINTS ALL IMMEDIATE")
        op.execute("DROP POLICY of_the_holder ON grants")
        op.execute("DROP POLICY of_the_service ON tenant_keys")
        for statement in (each for table in (*_OWNED, "tenants") for each in unsecured(table)):
            op.execute(statement)
        for table in _COUNTED:
            op.execute(f"DROP TRIGGER policy_of_{table} ON {table}")
        op.execute("DROP FUNCTION policy_changed")
    for name in _CONDITIONS:
        op.drop_column("grants", name)
    for table in ("policy_revisions", "members", "groups"):
        op.drop_table(table)


def _count_on_sqlite() -> None:
    for table in _COUNTED:
        for change, rows in (("insert", ("NEW",)), ("update", ("OLD", "NEW")), ("delete", ("OLD",))):
            counts = "".join(_COUNT.format(row=row) for row in rows)
            op.execute(f"CREATE TRIGGER policy_of_{table}_{change} AFTER {change} ON {table} BEGIN {counts} END")


def _count_on_postgres() -> None:
    """As the change commits: until then the row that counts is locked by nobody, and so it is always the last that is locked."""
    op.execute(
        f"""
        CREATE FUNCTION policy_changed() RETURNS trigger LANGUAGE plpgsql AS $$ BEGIN
            IF TG_OP <> 'INSERT' THEN {_COUNT.format(row="OLD")} END IF;
            IF TG_OP <> 'DELETE' THEN {_COUNT.format(row="NEW")} END IF;
            RETURN NULL;
        END $$
        """
    )
    for table in _COUNTED:
        op.execute(
            f"CREATE CONSTRAINT TRIGGER policy_of_{table} AFTER INSERT OR UPDATE OR DELETE ON {table} "
            "DEFERRABLE INITIALLY DEFERRED FOR EACH ROW EXECUTE FUNCTION policy_changed()"
        )


def _secure_all() -> None:
    for statement in (*(each for table in _OWNED for each in secured(table)), *secured("tenants", tenant="id")):
        op.execute(statement)
    # Whoever is asked for a key of the service opens it by the system's; and a principal finds out who shares with it.
    op.execute("CREATE POLICY of_the_service ON tenant_keys FOR SELECT USING (tenant_id = 'system')")
    principal = SETTING.format("principal")
    groups = f"SELECT m.group_id FROM members m WHERE m.principal_id = {principal}"  # noqa: S608 (as above)
    op.execute(
        f"CREATE POLICY of_the_holder ON grants FOR SELECT USING (principal_id = {principal} OR principal_id IN ({groups}))"
    )
