"""Row-level security on PostgreSQL, as statements for migrations: a table's rows are its tenant's, for the table's owner too."""

from __future__ import annotations

__all__ = ["SETTING", "secured", "unsecured"]

SETTING = "nullif(current_setting('cloister.{}', true), '')"
"""What a transaction has said: for whose 'tenants' it is, and for which 'principal'."""


def secured(table: str, *, tenant: str = "tenant_id") -> tuple[str, ...]:
    """Show and take no rows of a tenant but in transactions that act for it. Each migration that makes such a table does these."""
    tenants = SETTING.format("tenants")
    acts_for = f"{tenants} = '*' OR {tenant} = ANY (string_to_array({tenants}, ','))"
    return (
        f"ALTER TABLE {table} ENABLE ROW LEVEL SECURITY",
        f"ALTER TABLE {table} FORCE ROW LEVEL SECURITY",
        f"CREATE POLICY of_the_tenant ON {table} USING ({acts_for}) WITH CHECK ({acts_for})",
    )


def unsecured(table: str) -> tuple[str, ...]:
    """The way back."""
    return (
        f"DROP POLICY of_the_tenant ON {table}",
        f"ALTER TABLE {table} NO FORCE ROW LEVEL SECURITY",
        f"ALTER TABLE {table} DISABLE ROW LEVEL SECURITY",
    )
