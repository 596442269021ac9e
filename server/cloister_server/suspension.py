"""A tenant suspended and resumed: for a while nobody acts for it or on what it has, and all of it is kept. Knows SQL; no HTTP.

Its clients get no token, and those that they have are refused: in this process on the next request, in others within a second.
A grant on what it has counts for nothing meanwhile, whoever holds it. A job of it that runs stops at its next chunk boundary and
stays charged for what it opened; it goes on from its checkpoint when the tenant is resumed, and no other begins before.
"""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import func, select
from sqlalchemy.orm import Session

from cloister.wire.jobs import FINAL
from cloister_server import audit, operators, policy
from cloister_server.oauth import verifier
from cloister_server.policy import Authorized
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.tables import Job, Tenant, now

__all__ = ["Suspension", "resume", "suspend"]


@dataclass(frozen=True, slots=True)
class Suspension:
    """Since when a tenant is suspended, or None, and how many of its jobs are not over: they wait as long as it is."""

    tenant: str
    name: str
    suspended: datetime | None
    jobs_not_over: int


def suspend(session: Session, service: Service, principal: Principal) -> Suspension:
    """Suspend the operator's tenant; one that is already stays so, since when it was. Raises Conflict where it is shredded."""
    authorized = policy.authorize_change(session, principal, "tenant.administer")
    operators.require_other(authorized.resource.name)
    if authorized.resource.suspended is None:
        authorized.resource.suspended = now()
        _done(session, service, authorized, "tenant.suspend")
    return _told(session, authorized.resource)


def resume(session: Session, service: Service, principal: Principal) -> Suspension:
    """Let the operator's tenant act again, with all that it had; one that may already stays so."""
    authorized = policy.authorize_change(session, principal, "tenant.administer")
    if authorized.resource.suspended is not None:
        authorized.resource.suspended = None
        _done(session, service, authorized, "tenant.resume")
    return _told(session, authorized.resource)


def _done(session: Session, service: Service, authorized: Authorized[Tenant], verb: str) -> None:
    verifier.forget_after(session, service)
    audit.allowed(session, authorized, verb, authorized.resource.id)


def _told(session: Session, tenant: Tenant) -> Suspension:
    under_way = select(func.count()).select_from(Job).where(Job.tenant_id == tenant.id, Job.status.not_in(FINAL))
    return Suspension(tenant.id, tenant.name, tenant.suspended, session.scalar(under_way) or 0)
