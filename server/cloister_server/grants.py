"""Grants: what a creator, a role and the operator give. Knows SQL and policy; decides nothing."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from datetime import datetime
from typing import Any, Literal, get_args

from sqlalchemy.orm import Session

from cloister_server import audit, policy
from cloister_server.errors import Invalid, NotFound, ServerError
from cloister_server.principal import Principal
from cloister_server.store import identities, queries
from cloister_server.store.conditions import UNBOUND, Conditions, Outputs, address_range
from cloister_server.store.identities import User
from cloister_server.store.queries import ANY, VERBS
from cloister_server.store.tables import (
    App,
    Dataset,
    Grant,
    Group,
    Job,
    Model,
    Source,
    Table,
    Tenant,
    Weights,
    new_id,
    now,
)

__all__ = [
    "ROLES",
    "NoSuch",
    "Role",
    "add",
    "find_app",
    "find_holder",
    "find_principal",
    "find_resource",
    "forget_holder",
    "forget_resource",
    "grant_role",
    "grant_to_creator",
    "listed",
    "names",
    "remove",
    "remove_all",
]

Role = Literal["steward", "trainer", "predictor", "none"]

ROLES: Mapping[str, tuple[str, ...]] = {
    "steward": tuple(VERBS),
    "trainer": ("source.read", "dataset.read", "dataset.train", "weights.create"),
    "predictor": ("model.read", "model.predict"),
    "none": (),
}
"""What `client create --role` grants, each on every resource of the tenant, those to come included."""

_CREATOR: Mapping[type[Table], tuple[str, ...]] = {
    Source: ("source.read", "source.own", "dataset.create"),
    Dataset: ("dataset.read", "dataset.upload", "dataset.train"),
    Job: ("job.read", "job.cancel"),
    Model: ("model.read", "model.predict", "model.publish"),
    Weights: ("weights.use",),
}


_ID = re.compile(r"[a-z]{2,4}_[0-9a-f]{32}")
"""What looks like an id is one, and never a name."""


class NoSuch(NotFound):
    """What the operator named is not there, of the kind, or any of the kinds, that was meant; in the operator's words, from whom
    nothing is hidden."""

    def __init__(self, kind: str, given: str, *others: str) -> None:
        kinds = (kind, *others)
        lists = _either(f"`cloister-admin {each} list`" for each in kinds)
        ServerError.__init__(self, f"there is no {_either(kinds)} {given!r} here; {lists} shows what there is")


def grant_to_creator(session: Session, principal: Principal, row: Source | Dataset | Job | Model | Weights) -> None:
    """What whoever makes a resource may do to it, as grants like all others; a source's go to its owner."""
    holder_id = row.owner_id if isinstance(row, Source) else principal.id
    for verb in _CREATOR[type(row)]:
        session.add(_grant(row.tenant_id, holder_id, verb, row.id))


def grant_role(session: Session, holder: App | User, role: Role) -> None:
    """A role's verbs on everything of the holder's own tenant."""
    for verb in ROLES[role]:
        session.add(_grant(holder.tenant_id, holder.id, verb, ANY))


def forget_resource(session: Session, row: Dataset) -> None:
    """Delete all grants on a resource that is being deleted: its id names nothing from here on."""
    queries.forget_grants_on(session, tenant_id=row.tenant_id, resource_id=row.id)


def forget_holder(session: Session, holder: App | User) -> None:
    """Delete all grants, in whatever tenant, of an app or a person that is being removed."""
    queries.forget_grants_to(session, holder.id)


def add(
    session: Session,
    principal: Principal,
    *,
    to: str,
    verb: str,
    resource_id: str,
    effect: Literal["allow", "deny"] = "allow",
    expires: datetime | None = None,
    network: str | None = None,
    conditions: Conditions = UNBOUND,
) -> Grant:
    """Let an app, a person or a group, of any tenant, do one verb to one resource of this tenant (or to any, '*'); or deny it.

    `to` and `resource_id` may be names as well; `network` is where requests must come from ('10.0.0.0/8'). Raises NoSuch or Invalid
    where the holder, the verb or the resource is not there, a condition could not be kept to, or it would have expired already: a
    grant that never matches, or that allows more than it says, would be a false comfort.
    """
    if expires is not None and expires <= now():
        raise Invalid(
            f"a grant until {expires:%Y-%m-%d %H:%M} would count for nothing: that is past; give a later moment, in UTC, or none",
            code="expiry_past",
        )
    authorized = policy.authorize_change(session, principal, "tenant.administer")
    tenant = authorized.resource
    _require_kept(verb, effect, conditions)
    holder, covered = find_holder(session, tenant, to), find_resource(session, tenant, verb, resource_id)
    if covered is None:
        kind = VERBS[verb].__name__.lower()
        raise Invalid(
            f"{verb!r} is decided on a {kind}, and the tenant has no {kind} {resource_id!r}; give one by its id"
            f"{'' if VERBS[verb] is Job else ' or name'}, or '{ANY}' for any"
        )
    bound = {**asdict(conditions), **_addresses(network)}
    grant = _grant(tenant.id, holder.id, verb, covered, effect=effect, expires=expires, **bound)
    session.add(grant)
    audit.allowed(session, authorized, "grant.add", grant.id)
    return grant


def listed(session: Session, principal: Principal, *, to: str | None = None) -> list[Grant]:
    """The grants on a tenant's resources, oldest first: all, or one app's."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    policy.authorize(session, principal, "tenant.administer", tenant)
    holder_id = None if to is None else find_holder(session, tenant, to).id
    return list(session.scalars(queries.grants_of(tenant.id, holder_id)))


def names(session: Session, principal: Principal) -> dict[str, str]:
    """Id -> name of the holders and the resources of the tenant's grants; `TENANT/NAME` for holders of another tenant."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    policy.authorize(session, principal, "tenant.administer", tenant)
    return {
        tenant.id: tenant.name,
        **queries.names_of_resources(session, tenant.id),
        **queries.names_of_holders(session, tenant.id),
    }


def remove(session: Session, principal: Principal, grant_id: str) -> None:
    """Take a grant away; it counts for no decision from the next one on."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    authorized = policy.authorize(session, principal, "tenant.administer", tenant)
    grant = session.get(Grant, (tenant.id, grant_id))
    if grant is None:
        raise NoSuch("grant", grant_id)
    session.delete(grant)
    audit.allowed(session, authorized, "grant.remove", grant_id)


def remove_all(
    session: Session,
    principal: Principal,
    *,
    to: str,
    verb: str,
    resource_id: str,
    effect: Literal["allow", "deny"] = "allow",
) -> list[str]:
    """Take away what `add` of the same words gave, however often; the ids of those grants. Raises NoSuch where there are none."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    covered = find_resource(session, tenant, verb, resource_id) or resource_id
    found = [
        grant.id
        for grant in listed(session, principal, to=to)
        if (grant.verb, grant.resource_id, grant.effect) == (verb, covered, effect)
    ]
    if not found:
        raise NoSuch("grant", f"{effect} {to} {verb} {resource_id}")
    for grant_id in found:
        remove(session, principal, grant_id)
    return found


def find_app(session: Session, tenant: Tenant, given: str) -> App:
    """The app of this client id in any tenant, of this name in the tenant, or of `TENANT/NAME`. Raises NoSuch."""
    app = _app_of(session, tenant, given)
    if app is None:
        raise NoSuch("client", given)
    return app


def find_principal(session: Session, tenant: Tenant, given: str) -> App | User:
    """The app or person of this id in any tenant, of this name in the tenant, or of `TENANT/NAME`. Raises NoSuch."""
    principal = _user_of(session, tenant, given) or _app_of(session, tenant, given)
    if principal is None:
        raise NoSuch("client", given, "user")
    return principal


def find_holder(session: Session, tenant: Tenant, given: str) -> App | User | Group:
    """The same, or a group. Raises NoSuch."""
    holder = _user_of(session, tenant, given) or _app_of(session, tenant, given) or _group_of(session, tenant, given)
    if holder is None:
        raise NoSuch("client", given, "user", "group")
    return holder


def _app_of(session: Session, tenant: Tenant, given: str) -> App | None:
    if _ID.fullmatch(given):
        return queries.app_of_id(session, given)
    there, name = _place(session, tenant, given)
    return None if there is None else queries.app_of_name(session, there.id, name)


def _user_of(session: Session, tenant: Tenant, given: str) -> User | None:
    if _ID.fullmatch(given):
        return identities.user_of_id(session, given)
    there, name = _place(session, tenant, given)
    return None if there is None else identities.user_of_name(session, there.id, name)


def _group_of(session: Session, tenant: Tenant, given: str) -> Group | None:
    there, name = _place(session, tenant, given)
    return queries.group_of(session, None if there is None else there.id, name)


def _place(session: Session, tenant: Tenant, given: str) -> tuple[Tenant | None, str]:
    """Of `TENANT/NAME`, or of a name in the tenant."""
    of, _, name = given.rpartition("/")
    return (queries.tenant_of_id_or_name(session, of) if of else tenant), name


def _either(kinds: Iterable[str]) -> str:
    *first, last = kinds
    return f"{', '.join(first)} or {last}" if first else last


def _require_kept(verb: str, effect: str, conditions: Conditions) -> None:
    if effect == "deny" and conditions != UNBOUND:
        raise Invalid("a denial denies all: give no epsilon, rate or outputs with it")
    if conditions.max_epsilon is not None and (verb != "dataset.train" or not 0 < conditions.max_epsilon < math.inf):
        raise Invalid("the most epsilon of a job is a positive number, and is kept to by 'dataset.train' alone")
    if conditions.outputs is not None and (verb != "model.predict" or conditions.outputs not in get_args(Outputs)):
        raise Invalid(f"outputs are {' or '.join(get_args(Outputs))}, and are kept to by 'model.predict' alone")
    if conditions.requests_per_minute is not None and not 0 < conditions.requests_per_minute < 1_000_000:
        raise Invalid("requests a minute are a whole number from 1 to 999999")


def _addresses(network: str | None) -> dict[str, str]:
    if network is None:
        return {}
    try:
        first, last = address_range(network)
    except ValueError:
        raise Invalid(
            f"{network!r} is no network: give one as '10.0.0.0/8', '2001:db8::/32', or a single address"
        ) from None
    return {"address_first": first, "address_last": last}


def find_resource(session: Session, tenant: Tenant, verb: str, given: str) -> str | None:
    """The id of the resource of this id or name that the verb is decided on; None where the tenant has none."""
    if verb not in VERBS:
        raise Invalid(f"there is no verb {verb!r}; it is one of {', '.join(VERBS)}")
    table = VERBS[verb]
    if given == ANY:
        return ANY
    if table is Tenant:
        return tenant.id if given in (tenant.id, tenant.name) else None
    if not _ID.fullmatch(given):
        return queries.id_of_name(session, table, tenant_id=tenant.id, name=given)
    return None if session.get(table, (tenant.id, given)) is None else given


def _grant(tenant_id: str, holder_id: str, verb: str, resource_id: str, **more: Any) -> Grant:
    values = {"effect": "allow", "expires": None, **more}
    return Grant(
        tenant_id=tenant_id, id=new_id("gr"), principal_id=holder_id, verb=verb, resource_id=resource_id, **values
    )
