"""Operations on who may do what: groups, grants, and why a decision is what it is."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any, Literal

from sqlalchemy.orm import Session

from cloister_server import explanations, grants, groups
from cloister_server.errors import Invalid
from cloister_server.groups import GroupView
from cloister_server.operations.definition import Acting, Destroys, Given, InTenant, Moment, of_fields, operation
from cloister_server.service import Service
from cloister_server.store.conditions import Conditions
from cloister_server.store.tables import Grant

__all__ = [
    "AddGrant",
    "CreateGroup",
    "Explain",
    "ListGrants",
    "Membership",
    "OneGroup",
    "RemoveGrant",
    "WhoCan",
    "add_grant",
    "add_to_group",
    "create_group",
    "delete_group",
    "explain",
    "list_grants",
    "list_groups",
    "remove_from_group",
    "remove_grant",
    "who_can",
]

Effect = Literal["allow", "deny"]

_BOUND = ("first_address", "last_address", "max_epsilon", "requests_per_minute", "outputs")
_SHOWN = ("id", "to", "to_name", "effect", "verb", "resource", "resource_name", "expires")


class CreateGroup(InTenant):
    name: Given


class OneGroup(InTenant):
    group: Given


class Membership(OneGroup):
    member: Given


class AddGrant(InTenant):
    to: Given
    """An app, a person or a group: by name, as TENANT/NAME where it is another tenant's, or by id."""
    verb: Given
    resource: Given = "*"
    effect: Effect = "allow"
    until: Moment | None = None
    network: Given | None = None
    max_epsilon: float | None = None
    per_minute: int | None = None
    outputs: Given | None = None


class ListGrants(InTenant):
    to: Given | None = None


class RemoveGrant(InTenant):
    """By the grant's id, or in the words that it was added with."""

    grant: Given | None = None
    to: Given | None = None
    verb: Given | None = None
    resource: Given | None = None
    effect: Effect | None = None


class Explain(InTenant):
    principal: Given
    verb: Given
    resource: Given
    address: Given | None = None


class WhoCan(InTenant):
    verb: Given
    resource: Given


@operation("group.create", CreateGroup, changes=True, fresh=("group_id",))
def create_group(session: Session, _: Service, by: Acting, request: CreateGroup) -> dict[str, Any]:
    made = groups.create(session, by.into(session, request.tenant), name=request.name)
    return {"group_id": made.id, "name": made.name}


@operation("group.add", Membership, changes=True)
def add_to_group(session: Session, _: Service, by: Acting, request: Membership) -> dict[str, Any]:
    return _group(groups.add(session, by.into(session, request.tenant), request.group, request.member))


@operation("group.remove", Membership, changes=True)
def remove_from_group(session: Session, _: Service, by: Acting, request: Membership) -> dict[str, Any]:
    return _group(groups.remove(session, by.within(session, request.tenant), request.group, request.member))


@operation("group.list", InTenant)
def list_groups(session: Session, _: Service, by: Acting, request: InTenant) -> list[dict[str, Any]]:
    return [_group(each) for each in groups.listed(session, by.within(session, request.tenant))]


_DELETED: Destroys[OneGroup] = Destroys(
    lambda _, request: request.group, "Its grants go with it, in whatever tenant they are."
)


@operation("group.delete", OneGroup, changes=True, destroys=_DELETED)
def delete_group(session: Session, _: Service, by: Acting, request: OneGroup) -> dict[str, Any]:
    gone = groups.delete(session, by.within(session, request.tenant), request.group)
    return {"deleted": gone.id, "name": gone.name}


@operation("grant.add", AddGrant, changes=True, fresh=("id",))
def add_grant(session: Session, _: Service, by: Acting, request: AddGrant) -> dict[str, Any]:
    principal = by.into(session, request.tenant)
    added = grants.add(
        session,
        principal,
        to=request.to,
        verb=request.verb,
        resource_id=request.resource,
        effect=request.effect,
        expires=request.until,
        network=request.network,
        conditions=Conditions(request.max_epsilon, request.per_minute, request.outputs),
    )
    session.flush()  # its holder's name is asked for next
    return _grant(added, grants.names(session, principal))


@operation("grant.list", ListGrants)
def list_grants(session: Session, _: Service, by: Acting, request: ListGrants) -> list[dict[str, Any]]:
    principal = by.within(session, request.tenant)
    names = grants.names(session, principal)
    return [_grant(each, names) for each in grants.listed(session, principal, to=request.to)]


@operation("grant.remove", RemoveGrant, changes=True)
def remove_grant(session: Session, _: Service, by: Acting, request: RemoveGrant) -> dict[str, Any]:
    principal = by.within(session, request.tenant)
    words = of_fields(request, "to", "verb", "resource", "effect")
    if request.grant is not None and not any(words.values()):
        grants.remove(session, principal, request.grant)
        return {"removed": request.grant}
    if request.grant is not None or request.to is None or request.verb is None:
        raise Invalid("give either a grant's id, or --to and --verb (and --resource) as they were given to `grant add`")
    removed = grants.remove_all(
        session,
        principal,
        to=request.to,
        verb=request.verb,
        resource_id=request.resource or "*",
        effect=request.effect or "allow",
    )
    return {"removed": removed}


@operation("policy.explain", Explain)
def explain(session: Session, _: Service, by: Acting, request: Explain) -> dict[str, Any]:
    asked = of_fields(request, "verb", "resource", "address")
    told = explanations.explain(session, by.within(session, request.tenant), who=request.principal, **asked)
    return told.model_dump()


@operation("policy.who-can", WhoCan)
def who_can(session: Session, _: Service, by: Acting, request: WhoCan) -> list[dict[str, Any]]:
    asked = of_fields(request, "verb", "resource")
    told = explanations.who_can(session, by.within(session, request.tenant), **asked)
    return [
        {
            "principal": each.principal, "principal_name": each.name, "grant": each.grant.id, "by": each.grant.to,
            "by_name": each.grant.to_name, "resource": each.grant.resource, "expires": each.grant.expires,
        }
        for each in told.holders
    ]  # fmt: skip


def _group(group: GroupView) -> dict[str, Any]:
    row = asdict(group)
    return {"group_id": row["id"], "name": row["name"], "members": sorted(row["members"].values())}


def _grant(grant: Grant, names: dict[str, str]) -> dict[str, Any]:
    told = explanations.view(grant, dict(names)).model_dump()
    bound = {name: value for name in _BOUND if (value := told.pop(name)) is not None}
    row = {**told, "resource_name": names.get(grant.resource_id), "conditions": bound or None}
    return {name: row[name] for name in (*_SHOWN, "conditions")}
