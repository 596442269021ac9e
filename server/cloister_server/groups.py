"""Groups: principals of a tenant that grants are given to together. Knows SQL and policy; decides nothing."""

from __future__ import annotations

import re
from dataclasses import dataclass

from sqlalchemy.orm import Session

from cloister_server import audit, grants, policy
from cloister_server.errors import Conflict, Invalid
from cloister_server.grants import NoSuch
from cloister_server.principal import Principal
from cloister_server.store import queries
from cloister_server.store.identities import User
from cloister_server.store.tables import App, Group, Member, Tenant, new_id

__all__ = ["GroupView", "add", "create", "delete", "listed", "remove"]

_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")


@dataclass(frozen=True, slots=True)
class GroupView:
    """A group and who is in it, by id and name."""

    id: str
    name: str
    members: dict[str, str]


def create(session: Session, principal: Principal, *, name: str) -> Group:
    """A group of the operator's tenant, with nobody in it. No client, no account and no other group has its name."""
    authorized = policy.authorize_change(session, principal, "tenant.administer")
    if not _NAME.fullmatch(name):
        raise Invalid(f"{name!r} is no name: begin with a letter; letters, digits, - and _ follow, 63 in all")
    tenant_id = authorized.resource.id
    if queries.name_is_taken(session, tenant_id, name):
        raise Conflict(f"the tenant has a client, account or group named {name!r} already; choose another name")
    group = Group(tenant_id=tenant_id, id=new_id("grp"), name=name)
    session.add(group)
    audit.allowed(session, authorized, "group.create", group.id)
    return group


def add(session: Session, principal: Principal, group: str, member: str) -> GroupView:
    """Put an app or a person of the tenant into a group of it: what the group is granted, they may from the next decision on."""
    authorized = policy.authorize_change(session, principal, "tenant.administer")
    found, whom = _found(session, authorized.resource, group, member)
    if session.get(Member, (found.tenant_id, found.id, whom.id)) is None:
        session.add(Member(tenant_id=found.tenant_id, group_id=found.id, principal_id=whom.id))
        audit.allowed(session, authorized, "group.add", f"{found.id}/{whom.id}")
        session.flush()  # the view is of what is there now
    return _view(session, principal, found)


def remove(session: Session, principal: Principal, group: str, member: str) -> GroupView:
    """Take somebody out of a group: they may no more what the group is granted, from the next decision on. Raises NoSuch."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    authorized = policy.authorize(session, principal, "tenant.administer", tenant)
    found, whom = _found(session, tenant, group, member)
    row = session.get(Member, (found.tenant_id, found.id, whom.id))
    if row is None:
        raise NoSuch("client", f"{member} in group {group}", "user")
    session.delete(row)
    audit.allowed(session, authorized, "group.remove", f"{found.id}/{whom.id}")
    session.flush()  # as above
    return _view(session, principal, found)


def delete(session: Session, principal: Principal, group: str) -> Group:
    """Delete a group with its grants, in whatever tenant they are, and its memberships. Raises NoSuch."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    authorized = policy.authorize(session, principal, "tenant.administer", tenant)
    found = _group(session, tenant, group)
    queries.forget_grants_to(session, found.id)
    session.delete(found)
    audit.allowed(session, authorized, "group.delete", found.id)
    return found


def listed(session: Session, principal: Principal) -> list[GroupView]:
    """The tenant's groups, oldest first."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    policy.authorize(session, principal, "tenant.administer", tenant)
    groups = queries.groups_of(session, tenant.id)
    names = queries.names_of_principals(
        session, {each for _, members in groups for each in members}, seen_from=tenant.id
    )
    return [
        GroupView(group.id, group.name, {each: names.get(each, each) for each in members}) for group, members in groups
    ]


def _found(session: Session, tenant: Tenant, group: str, member: str) -> tuple[Group, App | User]:
    whom = grants.find_principal(session, tenant, member)
    if whom.tenant_id != tenant.id:
        raise Invalid(
            "a group is of its own tenant's; grant to the other tenant's client or person, or to a group there"
        )
    return _group(session, tenant, group), whom


def _group(session: Session, tenant: Tenant, given: str) -> Group:
    group = queries.group_of(session, tenant.id, given)
    if group is None or group.tenant_id != tenant.id:
        raise NoSuch("group", given)
    return group


def _view(session: Session, principal: Principal, group: Group) -> GroupView:
    return next(each for each in listed(session, principal) if each.id == group.id)
