"""For whom a transaction runs: whose rows it may read and write at most. Knows no database and decides no verb."""

from __future__ import annotations

from dataclasses import dataclass

from cloister_server.principal import Principal

__all__ = ["ALL_TENANTS", "Acting", "for_principal", "for_tenants"]


@dataclass(frozen=True, slots=True)
class Acting:
    """For whom: some tenants, every tenant (`tenant_ids` is None), or a principal, to whose own tenant those are added that
    share something with it by a grant."""

    tenant_ids: tuple[str, ...] | None
    principal_id: str | None = None


ALL_TENANTS = Acting(None)
"""The deployment itself: its start, its worker's look-out for jobs, the lookup of who a token is of, the operator's commands."""


def for_principal(principal: Principal) -> Acting:
    """An authenticated request: the principal's tenant, and those that granted it something, as the transaction begins."""
    return Acting((principal.tenant_id,), principal.id)


def for_tenants(*tenant_ids: str) -> Acting:
    """Work that is about these tenants and no other, such as a job's."""
    return Acting(tenant_ids)
