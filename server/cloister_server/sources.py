"""Sources: who declares them, and what anyone who may see one is told. Knows SQL and the ledger; nothing of HTTP."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister.wire import sources as wire
from cloister.wire.jobs import Page
from cloister_server import audit, budgets, grants, policy
from cloister_server.errors import Conflict
from cloister_server.principal import Principal
from cloister_server.store.paging import page_of
from cloister_server.store.tables import Source, Tenant, new_id

__all__ = ["create", "get", "listed"]


def create(
    session: Session, principal: Principal, body: wire.CreateSource, *, owner_id: str | None = None
) -> wire.Source:
    """Declare a source: an audited act of its owner. Unit, adjacency, delta and `public` are fixed from here on."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    authorized = policy.authorize(session, principal, "source.create", tenant)
    taken = select(Source.id).where(Source.tenant_id == tenant.id, Source.name == body.name)
    if session.scalar(taken) is not None:
        raise Conflict(f"a source named {body.name!r} is already there; use it, or choose another name")
    source = Source(tenant_id=tenant.id, id=new_id("src"), owner_id=owner_id or principal.id, **body.model_dump())
    session.add(source)
    session.flush()  # the grants name the row
    grants.grant_to_creator(session, principal, source)
    audit.allowed(session, authorized, "source.create", source.id)
    return view(session, source)


def get(session: Session, principal: Principal, id_or_name: str) -> wire.Source:
    """One source and its budget."""
    return view(session, policy.find(session, principal, "source.read", Source, id_or_name).resource)


def listed(session: Session, principal: Principal, *, cursor: str | None, limit: int) -> Page:
    """The sources that the principal may see."""
    return page_of(session, principal, Source, cursor=cursor, limit=limit, view=lambda row: view(session, row))


def view(session: Session, source: Source) -> wire.Source:
    return wire.Source(
        id=source.id,
        name=source.name,
        unit=source.unit,
        adjacency=source.adjacency,
        public=source.public,
        budget=budgets.balance(session, source),
        created=source.created,
    )
