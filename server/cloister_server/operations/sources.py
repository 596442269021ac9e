"""Operations on sources and what was spent of them."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from cloister.wire.sources import CreateSource as Declared
from cloister_server import budgets, grants, policy, tenants
from cloister_server import sources as sources_
from cloister_server.operations.definition import Acting, Given, InTenant, operation
from cloister_server.service import Service
from cloister_server.store.tables import Source

__all__ = ["CreateSource", "OneSource", "create", "listed", "show_budget"]


class CreateSource(InTenant):
    source: Declared
    owner: Given
    """The app that owns it."""


class OneSource(InTenant):
    source: Given


@operation("source.create", CreateSource, changes=True, fresh=("id", "created"))
def create(session: Session, _: Service, by: Acting, request: CreateSource) -> dict[str, Any]:
    principal = by.into(session, request.tenant)
    owner = grants.find_app(session, tenants.find_tenant(session, request.tenant), request.owner)
    return sources_.create(session, principal, request.source, owner_id=owner.id).model_dump(mode="json")


@operation("source.list", InTenant)
def listed(session: Session, _: Service, by: Acting, request: InTenant) -> list[dict[str, Any]]:
    principal, found, cursor = by.within(session, request.tenant), [], None
    while True:
        page = sources_.listed(session, principal, cursor=cursor, limit=200)
        found += page.items
        cursor = page.next
        if cursor is None:
            return found


@operation("budget.show", OneSource)
def show_budget(session: Session, _: Service, by: Acting, request: OneSource) -> dict[str, Any]:
    row = policy.find(session, by.within(session, request.tenant), "source.read", Source, request.source).resource
    return {"source": row.id, "name": row.name, **budgets.balance(session, row).model_dump(mode="json")}
