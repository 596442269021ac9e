"""Row security: on PostgreSQL every row of a tenant shows itself to transactions that act for that tenant, and to no others.

Locks: on PostgreSQL each table, exclusively but for milliseconds; no row is rewritten. SQLite has no row security. Way back:
`downgrade` takes the policies away.
"""

from __future__ import annotations

from alembic import op

revision = "0008"
down_revision = "0007"
branch_labels = None
depends_on = None

_OWNED = (
    "apps", "attempts", "audit", "balances", "blocks", "datasets", "grants", "idempotency_keys", "jobs", "ledger", "links",
    "model_versions", "models", "parts", "sealed_objects", "sources", "tenant_keys", "units", "weights",
)  # fmt: skip
_SETTING = "nullif(current_setting('cloister.{}', true), '')"


def upgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        return
    for table in _OWNED:
        _secure(table)
    _secure("tenants", tenant="id")
    # Whoever is asked for a key of the service opens it by the system's; and a principal finds out who shares with it.
    op.execute("CREATE POLICY of_the_service ON tenant_keys FOR SELECT USING (tenant_id = 'system')")
    op.execute(
        f"CREATE POLICY of_the_holder ON grants FOR SELECT USING (principal_id = {_SETTING.format('principal')})"
    )


def downgrade() -> None:
    if op.get_bind().dialect.name == "sqlite":
        return
    op.execute("DROP POLICY of_the_holder ON grants")
    op.execute("DROP POLICY of_the_service ON tenant_keys")
    for table in (*_OWNED, "tenants"):
        _unsecure(table)


def _secure(table: str, *, tenant: str = "tenant_id") -> None:
    """Row security on a table of tenants' rows, for its owner too. Every later table of this kind needs the same."""
    tenants = _SETTING.format("tenants")
    acts_for = f"{tenants} = '*' OR {tenant} = ANY (string_to_array({tenants}, ','))"
    op.execute(f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY")
    op.execute(f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY")
    op.execute(f"CREATE POLICY of_the_tenant ON {table} USING ({acts_for}) WITH CHECK ({acts_for})")


def _unsecure(table: str) -> None:
    op.execute(f"DROP POLICY of_the_tenant ON {table}")
    op.execute(f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY")
    op.execute(f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY")
