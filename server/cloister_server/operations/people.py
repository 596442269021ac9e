"""Operations on accounts of people, and on who of them are operators."""

from __future__ import annotations

from typing import Any

from sqlalchemy.orm import Session

from cloister.wire._model import Body
from cloister_server import operators
from cloister_server import people as people_
from cloister_server.grants import Role
from cloister_server.operations.definition import Acting, Destroys, Given, InTenant, operation
from cloister_server.people import Invitation
from cloister_server.service import Service

__all__ = [
    "CreateUser",
    "Named",
    "OneUser",
    "add_operator",
    "create",
    "delete",
    "disable",
    "listed",
    "operators_",
    "remove_operator",
    "reset",
]


class CreateUser(InTenant):
    name: Given
    role: Role = "none"


class OneUser(InTenant):
    user: Given


class Named(Body):
    """An operator, by name."""

    name: Given


@operation("user.create", CreateUser, changes=True, fresh=("id",), secret=("invitation",))
def create(session: Session, service: Service, by: Acting, request: CreateUser) -> dict[str, Any]:
    principal = by.into(session, request.tenant)
    invited = people_.create(session, service, principal, name=request.name, role=request.role)
    return {**_told(service, invited), "role": request.role}


@operation("user.list", InTenant)
def listed(session: Session, _: Service, by: Acting, request: InTenant) -> list[dict[str, Any]]:
    users = people_.listed(session, by.within(session, request.tenant))
    return [{"name": each.name, "id": each.id, "status": each.status, "created": each.created} for each in users]


@operation("user.reset", OneUser, changes=True, secret=("invitation",))
def reset(session: Session, service: Service, by: Acting, request: OneUser) -> dict[str, Any]:
    return _told(service, people_.reset(session, service, by.within(session, request.tenant), request.user))


@operation("user.disable", OneUser, changes=True)
def disable(session: Session, service: Service, by: Acting, request: OneUser) -> dict[str, Any]:
    disabled = people_.disable(session, service, by.into(session, request.tenant), request.user)
    return {"id": disabled.id, "name": disabled.name, "status": disabled.status}


_DELETED: Destroys[OneUser] = Destroys(
    lambda _, request: request.user, "An account that is deleted does not come back."
)


@operation("user.delete", OneUser, changes=True, destroys=_DELETED)
def delete(session: Session, service: Service, by: Acting, request: OneUser) -> dict[str, Any]:
    gone = people_.remove(session, service, by.into(session, request.tenant), request.user)
    return {"deleted": gone.id, "name": gone.name}


@operation("operator.add", Named, changes=True, fresh=("id",), secret=("invitation",))
def add_operator(session: Session, service: Service, by: Acting, request: Named) -> dict[str, Any]:
    return _told(service, operators.add(session, service, by.within(session, operators.TENANT), name=request.name))


_REMOVED: Destroys[Named] = Destroys(
    lambda _, request: request.name, "The operator's account is deleted, and what it was let do ends at once."
)


@operation("operator.remove", Named, changes=True, destroys=_REMOVED)
def remove_operator(session: Session, service: Service, by: Acting, request: Named) -> dict[str, Any]:
    principal = by.within(session, operators.TENANT)
    gone = operators.remove(session, service, principal, request.name, may_be_last=by.is_local)
    return {"removed": gone.id, "name": gone.name}


@operation("operator.list", Body)
def operators_(session: Session, _: Service, __: Acting, ___: Body) -> list[dict[str, Any]]:
    return [
        {"name": each.name, "id": each.id, "status": each.status, "created": each.created}
        for each in operators.listed(session)
    ]


def _told(service: Service, invited: Invitation) -> dict[str, Any]:
    return {
        "id": invited.user_id,
        "account": invited.account,
        "invitation": invited.code.get_secret_value(),
        "page": f"{service.settings.issuer}/oauth/invitation",
    }
