"""The audit log as it is read: of every tenant, in time. Knows SQL; for the operator, from whom no tenant is hidden."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Select, and_, func, or_, select
from sqlalchemy.orm import Session

from cloister_server.store.tables import AuditRow, Link, Tenant

__all__ = ["Entry", "heads", "later", "newest", "page"]


@dataclass(frozen=True, slots=True)
class Entry:
    """A row of the audit log, with its tenant's name and its link's number in the tenant's chain; None where it is in no link."""

    time: datetime
    tenant: str
    tenant_name: str
    principal: str
    verb: str
    resource: str
    outcome: str
    """As in `tables.AuditRow`."""
    grant: str | None
    request_id: str
    id: str
    link: int | None


def newest(session: Session, tenant_id: str | None, *, count: int) -> list[Entry]:
    """The newest rows of one tenant or of all, oldest first."""
    statement = _entries(tenant_id).order_by(AuditRow.time.desc(), AuditRow.id.desc()).limit(count)
    return [Entry(*row) for row in session.execute(statement)][::-1]


def page(
    session: Session,
    tenant_id: str | None,
    *,
    since: datetime | None,
    until: datetime,
    after: tuple[datetime, str] | None,
    count: int,
) -> list[Entry]:
    """So many rows of one tenant or of all, oldest first: of a time, and after the row of this moment and id."""
    statement = _entries(tenant_id).where(AuditRow.time <= until)
    if since is not None:
        statement = statement.where(AuditRow.time >= since)
    if after is not None:
        moment, row = after
        statement = statement.where(or_(AuditRow.time > moment, and_(AuditRow.time == moment, AuditRow.id > row)))
    found = session.execute(statement.order_by(AuditRow.time, AuditRow.id).limit(count))
    return [Entry(*row) for row in found]


def heads(session: Session, tenant_id: str | None) -> dict[str, int]:
    """How many links the chain of each tenant has: where `later` goes on from."""
    of_tenant = select(func.max(Link.number)).where(Link.tenant_id == Tenant.id).scalar_subquery()
    statement = select(Tenant.id, of_tenant)
    if tenant_id is not None:
        statement = statement.where(Tenant.id == tenant_id)
    return {each: number or 0 for each, number in session.execute(statement)}


def later(session: Session, seen: Mapping[str, int], now: Mapping[str, int]) -> list[Entry]:
    """The rows that were linked after `seen` and up to `now`, as `heads` gave them, oldest first. A link is never passed over:
    a chain has no gaps."""
    found = []
    for tenant_id, number in now.items():
        if number > seen.get(tenant_id, 0):
            fresh = _entries(tenant_id).where(Link.number > seen.get(tenant_id, 0), Link.number <= number)
            found += [Entry(*row) for row in session.execute(fresh)]
    return sorted(found, key=lambda each: (each.time, each.id))


def _entries(tenant_id: str | None) -> Select[
    datetime, str, str, str, str, str, str, str | None, str, str, int | None
]:  # fmt: skip
    statement = (
        select(
            AuditRow.time,
            AuditRow.tenant_id,
            Tenant.name,
            AuditRow.principal_id,
            AuditRow.verb,
            AuditRow.resource_id,
            AuditRow.outcome,
            AuditRow.grant_id,
            AuditRow.request_id,
            AuditRow.id,
            Link.number,
        )
        .join(Tenant, Tenant.id == AuditRow.tenant_id)
        .outerjoin(Link, and_(Link.tenant_id == AuditRow.tenant_id, Link.kind == "audit", Link.row_id == AuditRow.id))
    )
    return statement if tenant_id is None else statement.where(AuditRow.tenant_id == tenant_id)
