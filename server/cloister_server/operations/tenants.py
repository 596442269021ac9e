"""Operations on tenants: made, listed, suspended, resumed, bounded."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any, Self

from pydantic import Field, model_validator
from sqlalchemy.orm import Session

from cloister.wire._model import Body
from cloister_server import approvals, operators, policy, quotas, suspension
from cloister_server import tenants as tenants_
from cloister_server.operations.definition import Acting, Given, InTenant, operation
from cloister_server.service import Service
from cloister_server.store.tables import Tenant

__all__ = ["Approve", "CreateTenant", "SetQuota", "approve", "create", "listed", "quota", "resume", "suspend"]

_Bound = Annotated[int, Field(ge=0, lt=2**63)] | None


class CreateTenant(Body):
    name: Given
    key_provider: Given | None = None
    """Where its key is made, by name; the default one otherwise."""
    two_person: bool = False
    """Whether its end takes two operators."""


class Approve(InTenant):
    """One of these at a time; without any, what is asked for now is shown."""

    two_person: bool | None = None
    """Whether the tenant's end takes two operators; that it takes one again takes two, too."""
    shred: bool = False
    """Ask for the tenant's end, which another operator brings about."""
    withdraw: bool = False
    """Take back all that is asked for, whoever asked."""

    @model_validator(mode="after")
    def _one_at_a_time(self) -> Self:
        if (self.two_person is not None) + self.shred + self.withdraw > 1:
            raise ValueError("set who is needed, ask for the end, or take back what is asked for: one at a time")
        return self


class SetQuota(InTenant):
    """What is left out stays as it is; null lifts a bound."""

    storage: _Bound = None
    jobs: _Bound = None
    requests_per_minute: _Bound = None


def _plan(session: Session, service: Service, _: Acting, request: CreateTenant) -> dict[str, Any]:
    operators.require_other(request.name)
    chosen = tenants_.plan_tenant(session, service.keys, name=request.name, provider=request.key_provider)
    return {"name": request.name, "key_provider": chosen, "two_person": request.two_person}


@operation("tenant.create", CreateTenant, changes=True, plan=_plan)
def create(session: Session, service: Service, by: Acting, request: CreateTenant) -> dict[str, Any]:
    operators.require_other(request.name)
    made = tenants_.create_tenant(
        session,
        service.keys,
        name=request.name,
        request_id=by.request_id,
        by=by.id,
        provider=request.key_provider,
        two_person=request.two_person,
    )
    return {"id": made.id, "name": made.name}


@operation("tenant.list", Body)
def listed(session: Session, _: Service, __: Acting, ___: Body) -> list[dict[str, Any]]:
    return [
        {
            "id": each.id,
            "name": each.name,
            "created": each.created,
            "status": "suspended" if each.suspended and each.status == "active" else each.status,
            "two_person": each.two_person,
            "requests": [asdict(asked) for asked in approvals.told(each).requests],
        }
        for each in tenants_.tenants(session)
    ]


@operation("tenant.suspend", InTenant, changes=True)
def suspend(session: Session, service: Service, by: Acting, request: InTenant) -> dict[str, Any]:
    principal = by.within(session, request.tenant)
    return asdict(suspension.suspend(session, service, principal))


@operation("tenant.resume", InTenant, changes=True)
def resume(session: Session, service: Service, by: Acting, request: InTenant) -> dict[str, Any]:
    return asdict(suspension.resume(session, service, by.within(session, request.tenant)))


@operation("tenant.approvals", Approve, changes=True)
def approve(session: Session, _: Service, by: Acting, request: Approve) -> dict[str, Any]:
    operator = by.within(session, request.tenant)
    if request.withdraw:
        return asdict(approvals.withdraw(session, operator))
    if request.shred:
        return asdict(approvals.ask_end(session, operator))
    if request.two_person is not None:
        return asdict(approvals.set_two_persons(session, operator, required=request.two_person))
    tenant = session.get_one(Tenant, operator.tenant_id)
    return asdict(approvals.told(policy.authorize(session, operator, "tenant.administer", tenant).resource))


@operation("tenant.quota", SetQuota, changes=True)
def quota(session: Session, _: Service, by: Acting, request: SetQuota) -> dict[str, Any]:
    principal = by.within(session, request.tenant)
    kinds: tuple[quotas.Kind, ...] = ("storage", "jobs", "requests_per_minute")
    asked: dict[quotas.Kind, int | None] = {
        kind: getattr(request, kind) for kind in kinds if kind in request.model_fields_set
    }
    if asked:
        principal = by.into(session, request.tenant)
        told = quotas.set_quotas(session, principal, asked)
    else:
        policy.authorize(session, principal, "tenant.administer", session.get_one(Tenant, principal.tenant_id))
        told = quotas.usage(session, principal.tenant_id)
    return {"tenant": request.tenant, **asdict(told)}
