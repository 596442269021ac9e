"""How many requests a tenant's principals send in a minute, all processes together. Decides nothing else of a request."""

from __future__ import annotations

from sqlalchemy import Select, func, select

from cloister_server.errors import RateLimited
from cloister_server.service import Service
from cloister_server.store import shares
from cloister_server.store.acting import for_tenants
from cloister_server.store.session import reading, writing
from cloister_server.store.shares import Share, shares_of
from cloister_server.store.tables import RequestCount, Tenant

__all__ = ["admit", "admit_from_memory", "taken"]


def admit_from_memory(service: Service, tenant_id: str) -> bool:
    """Whether a request of the tenant passes by what this process has taken already; False where the database is to be asked.

    Raises RateLimited.
    """
    wait_s = shares_of(service.engine).spend(tenant_id)
    if wait_s is None:
        return False
    _require_none(wait_s)
    return True


def admit(service: Service, tenant_id: str) -> None:
    """Count a request of the tenant. Raises RateLimited `request_quota_exceeded` where its minute is used up."""
    _require_none(shares_of(service.engine).use(tenant_id, lambda at: _taken(service, tenant_id, at)))


def taken(tenant_id: str) -> Select[int]:
    """How many of the requests that a tenant may send in this minute are taken, by whatever process, used or not."""
    this_minute = RequestCount.minute == shares.this_minute()
    return select(func.coalesce(func.sum(RequestCount.taken), 0)).where(
        RequestCount.tenant_id == tenant_id, this_minute
    )


def _taken(service: Service, tenant_id: str, at: float) -> Share:
    """A share of the tenant's minute, counted. Of a tenant without a quota nothing is written."""
    with reading(service.engine, for_tenants(tenant_id)) as session:
        if session.scalars(_quota(tenant_id)).one() is None:
            return shares.unbounded(at)
    with writing(service.engine, for_tenants(tenant_id)) as session:
        count = session.get_one(RequestCount, tenant_id, with_for_update=True)
        allowed = session.scalars(_quota(tenant_id)).one()
        return shares.unbounded(at) if allowed is None else shares.take(count, allowed, at=at)


def _quota(tenant_id: str) -> Select[int | None]:
    return select(Tenant.quota_requests).where(Tenant.id == tenant_id)


def _require_none(wait_s: int) -> None:
    """Raises RateLimited where there is a wait."""
    if wait_s:
        raise RateLimited(
            f"your tenant has sent as many requests in this minute as its quota allows; try again in {wait_s} s, or ask the server's "
            "operator for a larger quota",
            code="request_quota_exceeded",
            details={"retry_after_s": wait_s},
        )
