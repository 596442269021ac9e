"""Sources: who declares them, changes their budget and opens blocks, and what whoever sees one is told. Knows SQL and the ledger."""

from __future__ import annotations

from sqlalchemy import select
from sqlalchemy.orm import Session

from cloister.wire import sources as wire
from cloister.wire.jobs import Page
from cloister_server import audit, budgets, grants, ledger, policy
from cloister_server.errors import Conflict, NotFound
from cloister_server.policy import Allow
from cloister_server.principal import Principal
from cloister_server.store.paging import page_of
from cloister_server.store.queries import blocks_of, holds_something
from cloister_server.store.tables import Block, Source, Tenant, new_id

__all__ = ["allow", "create", "get", "is_owned", "listed", "open_block", "set_budget"]


def create(
    session: Session, principal: Principal, body: wire.CreateSource, *, owner_id: str | None = None
) -> wire.Source:
    """Declare a source: an audited act of its owner. Unit, adjacency, delta and `public` are fixed from here on."""
    authorized = policy.authorize_change(session, principal, "source.create")
    tenant = authorized.resource
    taken = select(Source.id).where(Source.tenant_id == tenant.id, Source.name == body.name)
    if session.scalar(taken) is not None:
        raise Conflict(f"a source named {body.name!r} is already there; use it, or choose another name")
    source = Source(tenant_id=tenant.id, id=new_id("src"), owner_id=owner_id or principal.id, **body.model_dump())
    session.add(source)
    session.flush()  # the grants name the row
    grants.grant_to_creator(session, principal, source)
    audit.allowed(session, authorized, "source.create", source.id)
    return view(session, principal, source)


def get(session: Session, principal: Principal, id_or_name: str) -> wire.Source:
    """One source and its budget."""
    return view(session, principal, policy.find(session, principal, "source.read", Source, id_or_name).resource)


def listed(session: Session, principal: Principal, *, cursor: str | None, limit: int) -> Page:
    """The sources that the principal may see."""
    return page_of(
        session, principal, Source, cursor=cursor, limit=limit, view=lambda row: view(session, principal, row)
    )


def set_budget(session: Session, principal: Principal, id_or_name: str, body: wire.SetBudget) -> wire.Source:
    """Change what the source allows, with a reason that the ledger keeps. Raises Invalid below what is used."""
    authorized = policy.find(session, principal, "source.own", Source, id_or_name)
    source = authorized.resource
    budgets.set_epsilon(session, source, principal_id=principal.id, epsilon=body.epsilon, reason=body.reason)
    audit.allowed(session, authorized, "source.set_budget", source.id)
    return view(session, principal, source)


def allow(
    session: Session, principal: Principal, id_or_name: str, client: str, body: wire.SetAllowance
) -> wire.Allowance:
    """Bound what an app or a person may use of the source: of its own tenant by id or name, and of another by its id, once something
    of this tenant is granted to it. The newest holds."""
    authorized = policy.find(session, principal, "source.own", Source, id_or_name)
    source = authorized.resource
    try:
        holder = grants.find_principal(session, session.get_one(Tenant, source.tenant_id), client)
    except grants.NoSuch:
        raise NotFound("client or user") from None
    # Who is elsewhere, and has nothing here, is nobody's to find out.
    if holder.tenant_id != source.tenant_id and not holds_something(session, holder, source.tenant_id):
        raise NotFound("client or user")
    budgets.allow(
        session,
        source,
        principal_id=principal.id,
        to=holder.id,
        epsilon=body.epsilon,
        expires=body.expires,
        reason=body.reason,
    )
    audit.allowed(session, authorized, "source.allow", source.id)
    return wire.Allowance(source=source.id, client=holder.id, epsilon=body.epsilon, expires=body.expires)


def open_block(session: Session, principal: Principal, id_or_name: str, body: wire.OpenBlock) -> wire.Block:
    """Open a block: the owner's word that its people are in no earlier one. Users with ids are checked at upload."""
    authorized = policy.find(session, principal, "source.own", Source, id_or_name)
    source = budgets.lock(session, authorized.resource)
    if ledger.acts(session, source).is_written_off:
        raise Conflict(f"the budget of source {source.name!r} was written off, for good; declare another source")
    blocks = blocks_of(session, source)
    if body.name in (name for _, name in blocks):
        raise Conflict(f"a block named {body.name!r} is already there; choose another name")
    block = Block(tenant_id=source.tenant_id, source_id=source.id, number=blocks[-1][0] + 1, name=body.name)
    session.add(block)
    ledger.append(
        session, source, "block", principal.id, block=block.number, event={"name": block.name, "reason": body.reason}
    )
    audit.allowed(session, authorized, "source.open_block", f"{source.id}/{block.number}")
    return wire.Block(source=source.id, number=block.number, name=block.name)


def is_owned(session: Session, principal: Principal, source: Source) -> bool:
    """Whether the principal may see who used what: owners, and the operator."""
    if principal.kind == "operator":
        return True
    decision = policy.decide(session, principal, "source.own", tenant_id=source.tenant_id, resource_id=source.id)
    return isinstance(decision, Allow)


def view(session: Session, principal: Principal, source: Source) -> wire.Source:
    viewer_id = None if is_owned(session, principal, source) else principal.id
    return wire.Source(
        id=source.id,
        name=source.name,
        unit=source.unit,
        adjacency=source.adjacency,
        public=source.public,
        budget=budgets.balance(session, source, viewer_id=viewer_id),
        created=source.created,
    )
