"""Why somebody may or may not, and who may: the decision itself, told with the grants behind it. Knows SQL; decides nothing."""

from __future__ import annotations

from dataclasses import replace
from ipaddress import IPv6Address
from typing import Any

from sqlalchemy.orm import Session

from cloister.wire import policy as wire
from cloister_server import grants, policy
from cloister_server.errors import Invalid, NotFound
from cloister_server.policy import Authorized
from cloister_server.principal import Principal
from cloister_server.store import decisions, queries
from cloister_server.store.conditions import address_key
from cloister_server.store.identities import User, user_of_id, users_of
from cloister_server.store.queries import VERBS
from cloister_server.store.tables import App, Grant, Tenant

__all__ = ["explain", "view", "who_can"]


def explain(
    session: Session, principal: Principal, *, who: str, verb: str, resource: str, address: str | None = None
) -> wire.Explanation:
    """Whether `who`, an app or a person by id or name, may do this to a resource of the asker's tenant now, and by which grant.

    `address` is where it would ask from. For who may read the tenant's policy. Raises NotFound where there is no such app or person of
    the tenant, nor one that anything here is granted to.
    """
    tenant = _readable(session, principal).resource
    if address is not None and address_key(address) is None:
        raise Invalid(f"{address!r} is no address; give one as 192.0.2.1 or 2001:db8::1")
    resource_id = _resource(session, tenant, verb, resource)
    names = _known(session, tenant)
    asked = _principal_of(session, tenant, names, who, asker=principal, address=address)
    about = {"tenant_id": tenant.id, "resource_id": resource_id}
    found = decisions.decisive_of(session, asked, verb, **about)
    rows = {row.id: view(row, names) for row in decisions.bearing_on(session, asked, verb, **about)}
    grant = None if found is None else rows.pop(found.grant_id)
    return wire.Explanation(
        principal=asked.id,
        verb=verb,
        resource=resource_id,
        allowed=grant is not None and grant.effect == "allow",
        reason=_reason(grant, tenant),
        grant=grant,
        others=tuple(rows.values()),
    )


def who_can(session: Session, principal: Principal, *, verb: str, resource: str) -> wire.Holders:
    """All apps and people, of whatever tenant, that may do this to a resource of the asker's tenant now, from where they may."""
    tenant = _readable(session, principal).resource
    resource_id = _resource(session, tenant, verb, resource)
    about = {"tenant_id": tenant.id, "resource_id": resource_id}
    names, holders = _known(session, tenant), []
    for holder_tenant_id, holder_id in queries.holders_on(session, verb, **about):
        asked = Principal(holder_tenant_id, holder_id, "app", principal.request_id)
        places = {None, *(row.address_first for row in decisions.bearing_on(session, asked, verb, **about))}
        for address in sorted(places, key=lambda each: each or ""):
            there = replace(asked, address=_address(address))
            found = decisions.decisive_of(session, there, verb, **about)
            if found is not None and found.effect == "allow":
                rows = {row.id: row for row in decisions.bearing_on(session, there, verb, **about)}
                grant = view(rows[found.grant_id], names)
                holders.append(wire.Holder(principal=holder_id, name=names.get(holder_id), grant=grant))
                break
    return wire.Holders(verb=verb, resource=resource_id, holders=tuple(holders))


def view(row: Grant, names: dict[str, str]) -> wire.GrantView:
    """A grant as it is shown."""
    return wire.GrantView(
        id=row.id,
        effect=row.effect,
        to=row.principal_id,
        to_name=names.get(row.principal_id),
        verb=row.verb,
        resource=row.resource_id,
        expires=row.expires,
        first_address=_address(row.address_first),
        last_address=_address(row.address_last),
        max_epsilon=row.max_epsilon,
        requests_per_minute=row.requests_per_minute,
        outputs=row.outputs,
    )


def _reason(grant: wire.GrantView | None, tenant: Tenant) -> str:
    if tenant.suspended is not None:
        return "the tenant is suspended, and what it has is nobody's to use until it is resumed"
    if grant is None:
        return "no grant matched, and what nothing allows is denied"
    holder = f"{grant.to_name or grant.to}'s grant {grant.id}"
    if grant.effect == "allow":
        return f"{holder} allows it"
    return f"{holder} denies it, and a denial goes before every grant that allows"


def _readable(session: Session, principal: Principal) -> Authorized[Tenant]:
    tenant = session.get_one(Tenant, principal.tenant_id)
    verb = "tenant.administer" if principal.kind == "operator" else "policy.read"
    return policy.authorize(session, principal, verb, tenant)


def _resource(session: Session, tenant: Tenant, verb: str, given: str) -> str:
    found = grants.find_resource(session, tenant, verb, given)
    if found is None:
        raise NotFound(VERBS[verb].__name__.lower())
    return found


def _known(session: Session, tenant: Tenant) -> dict[str, str]:
    """Id -> name of the tenant's apps, people and groups, and of those elsewhere that hold grants here."""
    own = {each.id: each.name for of in (queries.apps_of, users_of) for each in session.scalars(of(tenant.id))}
    groups = {group.id: group.name for group, _ in queries.groups_of(session, tenant.id)}
    return {**queries.names_of_holders(session, tenant.id), **groups, **own}


def _principal_of(
    session: Session, tenant: Tenant, names: dict[str, str], given: str, *, asker: Principal, address: str | None
) -> Principal:
    if asker.kind == "operator":
        found: App | User | None = grants.find_principal(session, tenant, given)
    else:  # who is elsewhere, and has nothing here, is nobody's to find out
        ids = [each for each, name in names.items() if given in (each, name)]
        found = (queries.app_of_id(session, ids[0]) or user_of_id(session, ids[0])) if ids else None
    if found is None:
        raise NotFound("client or user")
    return Principal(found.tenant_id, found.id, "user" if isinstance(found, User) else "app", asker.request_id, address)


def _address(digits: str | None) -> str | None:
    if digits is None:
        return None
    address: Any = IPv6Address(int(digits, 16))
    return str(address.ipv4_mapped or address)
