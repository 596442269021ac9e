"""The life of key-encryption keys: listed, rotated, moved to another provider, destroyed. Knows SQL and providers; no data.

A key is pre-active, active, decrypt-only and destroyed, in that order. A change of key rewraps data keys, and touches nothing
that they sealed.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from cloister_server import vault
from cloister_server.store.tables import SealedObject, SigningKey, Tenant, TenantKey

__all__ = ["KeyView", "listed"]


@dataclass(frozen=True, slots=True)
class KeyView:
    """One version of a tenant's key, or of the system's, and how many keys it wraps."""

    tenant: str
    tenant_name: str
    version: int
    provider: str
    state: str
    wraps: int
    created: datetime
    destroyed: datetime | None


def listed(session: Session) -> list[KeyView]:
    """Every key of the deployment, the service's own first: for the operator's CLI alone."""
    wraps = {
        (tenant_id, version): count
        for tenant_id, version, count in session.execute(
            select(SealedObject.tenant_id, SealedObject.key_version, func.count()).group_by(
                SealedObject.tenant_id, SealedObject.key_version
            )
        )
    }
    for version, count in session.execute(
        select(SigningKey.key_version, func.count()).group_by(SigningKey.key_version)
    ):
        wraps[vault.SYSTEM, version] = count
    names = {each.id: each.name for each in session.scalars(select(Tenant))}
    rows = session.scalars(
        select(TenantKey).order_by(TenantKey.tenant_id != vault.SYSTEM, TenantKey.tenant_id, TenantKey.version)
    )
    return [
        KeyView(
            tenant=row.tenant_id,
            tenant_name=names.get(row.tenant_id, row.tenant_id),
            version=row.version,
            provider=row.provider,
            state=row.state,
            wraps=wraps.get((row.tenant_id, row.version), 0),
            created=row.created,
            destroyed=row.destroyed,
        )
        for row in rows
    ]
