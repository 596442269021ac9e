"""Grants: what a creator, a role and the operator give. Knows SQL and policy; decides nothing."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Literal

from sqlalchemy.orm import Session

from cloister_server import audit, policy
from cloister_server.errors import Invalid, NotFound
from cloister_server.principal import Principal
from cloister_server.store.queries import ANY, VERBS, app_of_id, grants_of
from cloister_server.store.tables import App, Dataset, Grant, Job, Model, Source, Table, Tenant, new_id

__all__ = ["ROLES", "Role", "add", "grant_role", "grant_to_creator", "listed", "remove"]

Role = Literal["steward", "trainer", "predictor"]

ROLES: Mapping[str, tuple[str, ...]] = {
    "steward": tuple(VERBS),
    "trainer": ("dataset.read", "dataset.train"),
    "predictor": ("model.read", "model.predict"),
}
"""What `client create --role` grants, each on every resource of the tenant, those to come included."""

_CREATOR: Mapping[type[Table], tuple[str, ...]] = {
    Source: ("source.read", "source.own", "dataset.create"),
    Dataset: ("dataset.read", "dataset.upload", "dataset.train"),
    Job: ("job.read", "job.cancel"),
    Model: ("model.read", "model.predict", "model.publish"),
}


def grant_to_creator(session: Session, principal: Principal, row: Source | Dataset | Job | Model) -> None:
    """What whoever makes a resource may do to it, as grants like all others; a source's go to its owner."""
    holder_id = row.owner_id if isinstance(row, Source) else principal.id
    for verb in _CREATOR[type(row)]:
        session.add(_grant(row.tenant_id, holder_id, verb, row.id))


def grant_role(session: Session, app: App, role: Role) -> None:
    """A role's verbs on everything of the app's own tenant."""
    for verb in ROLES[role]:
        session.add(_grant(app.tenant_id, app.id, verb, ANY))


def add(
    session: Session,
    principal: Principal,
    *,
    to: str,
    verb: str,
    resource_id: str,
    effect: Literal["allow", "deny"] = "allow",
    expires: datetime | None = None,
) -> Grant:
    """Let an app, of any tenant, do one verb to one resource of this tenant (or to any, '*'); or deny it.

    Raises Invalid where the verb or the resource is not there, NotFound where the app is not: a grant that never
    matches would be a false comfort.
    """
    tenant = session.get_one(Tenant, principal.tenant_id)
    authorized = policy.authorize(session, principal, "tenant.administer", tenant)
    holder = app_of_id(session, to)
    if holder is None:
        raise NotFound("client")
    if verb not in VERBS:
        raise Invalid(f"there is no verb {verb!r}; grant one of {', '.join(VERBS)}")
    if resource_id != ANY and not _exists(session, tenant, verb, resource_id):
        raise Invalid(
            f"{verb!r} is decided on a {VERBS[verb].__name__.lower()}, and the tenant has none of this id; "
            f"give its id, or '{ANY}' for any"
        )
    grant = _grant(tenant.id, holder.id, verb, resource_id, effect=effect, expires=expires)
    session.add(grant)
    audit.allowed(session, authorized, "grant.add", grant.id)
    return grant


def listed(session: Session, principal: Principal, *, to: str | None = None) -> list[Grant]:
    """The grants on a tenant's resources, oldest first: all, or one app's."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    policy.authorize(session, principal, "tenant.administer", tenant)
    return list(session.scalars(grants_of(tenant.id, to)))


def remove(session: Session, principal: Principal, grant_id: str) -> None:
    """Take a grant away; it counts for no decision from the next one on."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    authorized = policy.authorize(session, principal, "tenant.administer", tenant)
    grant = session.get(Grant, (tenant.id, grant_id))
    if grant is None:
        raise NotFound("grant")
    session.delete(grant)
    audit.allowed(session, authorized, "grant.remove", grant_id)


def _exists(session: Session, tenant: Tenant, verb: str, resource_id: str) -> bool:
    table = VERBS[verb]
    if table is Tenant:
        return resource_id == tenant.id
    return session.get(table, (tenant.id, resource_id)) is not None


def _grant(tenant_id: str, holder_id: str, verb: str, resource_id: str, **more: Any) -> Grant:
    values = {"effect": "allow", "expires": None, **more}
    return Grant(
        tenant_id=tenant_id, id=new_id("gr"), principal_id=holder_id, verb=verb, resource_id=resource_id, **values
    )
