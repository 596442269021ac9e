"""Which rows a principal may see, as SQL, and what each verb is decided on. Knows grants; refuses to know HTTP or features."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from functools import cache
from typing import Any, TypeVar

from sqlalchemy import ColumnElement, Select, and_, bindparam, delete, exists, false, or_, select
from sqlalchemy.orm import Session, aliased

from cloister_server.principal import Principal
from cloister_server.store.conditions import address_key, is_from, restrictions
from cloister_server.store.identities import User
from cloister_server.store.isolation import lifted
from cloister_server.store.tables import (
    App,
    Block,
    Dataset,
    Grant,
    Group,
    IdempotencyKey,
    Job,
    Member,
    Model,
    RevokedToken,
    SigningKey,
    Source,
    Table,
    Tenant,
    TenantKey,
    Weights,
    now,
)

__all__ = [
    "ANY",
    "FIRST_BLOCK",
    "OPERATOR_VERBS",
    "VERBS",
    "app_of_id",
    "app_of_name",
    "apps_of",
    "bearing",
    "blocks_of",
    "deciding",
    "forget_answers",
    "forget_grants_on",
    "forget_grants_to",
    "grants_of",
    "group_of",
    "groups_of",
    "holders_on",
    "holds_something",
    "id_of_name",
    "is_suspended",
    "jobs_not_of",
    "keys_not_destroyed",
    "name_is_taken",
    "names_of_holders",
    "names_of_principals",
    "names_of_resources",
    "public_keys",
    "sources_of",
    "standing_of",
    "tenant_of_id_or_name",
    "tenants",
    "token_keys",
    "visible_to",
]

ANY = "*"
"""The resource id of a grant on every resource of its tenant."""

FIRST_BLOCK = "first"
"""The name of the block that every source begins with."""

VERBS: Mapping[str, type[Table]] = {
    "source.create": Tenant,
    "source.read": Source,
    "source.own": Source,
    "dataset.create": Source,
    "dataset.read": Dataset,
    "dataset.upload": Dataset,
    "dataset.train": Dataset,
    "job.read": Job,
    "job.cancel": Job,
    "model.read": Model,
    "model.predict": Model,
    "model.publish": Model,
    "model.deploy_private": Model,
    "policy.read": Tenant,
    "weights.create": Tenant,
    "weights.use": Weights,
}
"""Every verb that a grant may name, and the table of the resource that it is decided on."""

OPERATOR_VERBS: Mapping[str, type[Table]] = {
    "tenant.administer": Tenant,
    "source.create": Tenant,
    "source.read": Source,
}
"""All that whoever holds the deployment itself may do, in the tenant named: nothing that reads rows, models or jobs."""

R = TypeVar("R", bound=Table)


def visible_to(principal: Principal, table: type[R]) -> Select[R]:
    """The rows on which the principal may do at least one verb, in whatever tenant, as the decision query would say."""
    row = table.__table__.c
    if principal.kind == "operator":
        may_see = row.tenant_id == principal.tenant_id if table in OPERATOR_VERBS.values() else false()
        return select(table).where(may_see)
    key = address_key(principal.address)
    return _visible(table, key is not None).params(_asked(principal, key))


def deciding(principal: Principal, verb: str, *, tenant_id: str, resource_id: str) -> Select[Any]:
    """The one grant that decides, if any does: the definition of a decision.

    It is one on this verb and resource, or on any, that the principal or a group of its tenant with it as a member holds, in force
    now and for where the request comes from; on what a suspended tenant has none is. A deny goes before every allow; of several
    allows the one that is bound least does.
    """
    key = address_key(principal.address)
    of = {"tenant": tenant_id, "verb": verb, "resource": resource_id}
    return _deciding(key is not None).params(_asked(principal, key) | of)


def bearing(principal: Principal, verb: str, *, tenant_id: str, resource_id: str) -> Select[Any]:
    """The grants on this that the principal or a group of its holds, in the order in which they decide, in force or not."""
    of = {"tenant": tenant_id, "verb": verb, "resource": resource_id}
    return _bearing().params(_asked(principal, None) | of)


# Each is built once: to build one takes longer than to ask it. What is asked goes with it as parameters.


def _asked(principal: Principal, key: str | None) -> dict[str, Any]:
    return {"home": principal.tenant_id, "principal": principal.id, "address": key, "at": now()}


@cache
def _visible(table: type[Any], is_from_somewhere: bool) -> Select[Any]:
    row, allow, deny = table.__table__.c, aliased(Grant), aliased(Grant)
    is_denied = exists().where(
        deny.tenant_id == allow.tenant_id,
        deny.verb == allow.verb,
        _covers(deny, row.id),
        _is_held(deny),
        _counts(deny, is_from_somewhere),
        deny.effect != "allow",
    )
    is_allowed = exists().where(
        allow.tenant_id == row.tenant_id,
        allow.verb.in_([verb for verb, decided_on in VERBS.items() if decided_on is table]),
        _covers(allow, row.id),
        _is_held(allow),
        _counts(allow, is_from_somewhere),
        allow.effect == "allow",
        ~is_denied.correlate(table, allow),
    )
    granting = select(Grant.tenant_id).where(_is_held(Grant))
    return select(table).where(row.tenant_id.in_(granting), is_allowed.correlate(table))


@cache
def _deciding(is_from_somewhere: bool) -> Select[Any]:
    return _bearing().where(_counts(Grant, is_from_somewhere)).limit(1)


@cache
def _bearing() -> Select[Any]:
    on_this = (
        Grant.tenant_id == bindparam("tenant"),
        Grant.verb == bindparam("verb"),
        _covers(Grant, bindparam("resource")),
    )
    return select(Grant).where(*on_this, _is_held(Grant)).order_by(*restrictions(Grant))


def _is_held(grant: Any) -> ColumnElement[bool]:
    """By the principal, or by a group of its tenant with it as a member."""
    home: Any = bindparam("home")
    principal: Any = bindparam("principal")
    groups = select(Member.group_id).where(Member.tenant_id == home, Member.principal_id == principal)
    return or_(grant.principal_id == principal, grant.principal_id.in_(groups))


def _counts(grant: Any, is_from_somewhere: bool) -> ColumnElement[bool]:
    """Now, and for where the request comes from."""
    return and_(
        is_in_force(grant, bindparam("at")), is_from(grant, bindparam("address") if is_from_somewhere else None)
    )


def is_in_force(grant: Any, at: Any) -> ColumnElement[bool]:
    """An expired grant, allow or deny, counts for nothing, and so does one on what a suspended tenant has."""
    return and_(or_(grant.expires.is_(None), grant.expires > at), ~_is_suspended(grant, grant.tenant_id))


def is_suspended(session: Session, tenant_id: str) -> bool:
    """Whether nobody may act for the tenant just now."""
    return session.scalar(select(Tenant.id).where(Tenant.id == tenant_id, Tenant.suspended.is_not(None))) is not None


def tenants() -> Select[Tenant]:
    """Every tenant, oldest first: for the operator."""
    return select(Tenant).order_by(Tenant.created, Tenant.id)


def tenant_of_id_or_name(session: Session, id_or_name: str) -> Tenant | None:
    return session.scalars(select(Tenant).where(or_(Tenant.id == id_or_name, Tenant.name == id_or_name))).first()


def jobs_not_of(statuses: Collection[str]) -> Select[str, str]:
    """Tenant and id of the jobs, in every tenant, that have none of these statuses, oldest first: for the worker."""
    return select(Job.tenant_id, Job.id).where(Job.status.not_in(statuses)).order_by(Job.created, Job.id)


def keys_not_destroyed() -> Select[str, str]:
    """Id and provider of every key that wraps other keys, the service's own among them: for `init`."""
    return select(TenantKey.key_id, TenantKey.provider).where(TenantKey.state != "destroyed")


def apps_of(tenant_id: str) -> Select[App]:
    return select(App).where(App.tenant_id == tenant_id).order_by(App.created, App.id)


def grants_of(tenant_id: str, holder_id: str | None) -> Select[Grant]:
    """The grants on a tenant's resources, in the order in which they were given."""
    grants = select(Grant).where(Grant.tenant_id == tenant_id).order_by(Grant.created, Grant.id)
    return grants if holder_id is None else grants.where(Grant.principal_id == holder_id)


def app_of_id(session: Session, client_id: str) -> App | None:
    """The app of this client id, in whatever tenant: who it is, not what it may."""
    with lifted(session):
        return session.scalars(select(App).where(App.id == client_id)).one_or_none()


def blocks_of(session: Session, source: Source) -> list[tuple[int, str]]:
    """Number and name of a source's blocks, in the order in which they were opened. The first has no row."""
    of_source = (Block.tenant_id == source.tenant_id, Block.source_id == source.id)
    opened = session.execute(select(Block.number, Block.name).where(*of_source).order_by(Block.number))
    return [(0, FIRST_BLOCK), *((row.number, row.name) for row in opened)]


def sources_of(session: Session, owner_id: str) -> list[str]:
    """The names of the sources that an app owns, in its own tenant or another."""
    return list(session.scalars(select(Source.name).where(Source.owner_id == owner_id).order_by(Source.name)))


def id_of_name(session: Session, table: type[Table], *, tenant_id: str, name: str) -> str | None:
    """The id of the tenant's resource of this name; None where there is none, and where such resources have no names."""
    row = table.__table__.c
    if "name" not in row:
        return None
    return session.scalar(select(row.id).where(row.tenant_id == tenant_id, row.name == name))


def names_of_resources(session: Session, tenant_id: str) -> dict[str, str]:
    """Id -> name of all that a grant in this tenant can name and that has a name."""
    tables = {table.__table__ for table in VERBS.values() if table is not Tenant and "name" in table.__table__.c}
    rows = [row for t in tables for row in session.execute(select(t.c.id, t.c.name).where(t.c.tenant_id == tenant_id))]
    return {row.id: row.name for row in rows}


def names_of_holders(session: Session, tenant_id: str) -> dict[str, str]:
    """Id -> name of the apps, people and groups that hold grants in this tenant; `TENANT/NAME` for those of another."""
    holders = select(Grant.principal_id).where(Grant.tenant_id == tenant_id)
    return names_of_principals(session, holders, seen_from=tenant_id)


def names_of_principals(session: Session, ids: Any, *, seen_from: str) -> dict[str, str]:
    """Id -> name of apps, people and groups; `TENANT/NAME` for those of another tenant than the one that they are seen from."""
    with lifted(session):
        rows = [row for table in _HOLDERS for row in session.execute(_named(table).where(table.id.in_(ids)))]
    return {row.id: row.name if row.tenant_id == seen_from else f"{row.tenant}/{row.name}" for row in rows}


def name_is_taken(session: Session, tenant_id: str, name: str) -> bool:
    """Whether an app, a person or a group of the tenant has this name: no two of them may, since grants are given by it."""
    of_name = [select(table.id).where(table.tenant_id == tenant_id, table.name == name) for table in _HOLDERS]
    return any(session.scalar(each) is not None for each in of_name)


def app_of_name(session: Session, tenant_id: str, name: str) -> App | None:
    return session.scalars(select(App).where(and_(App.tenant_id == tenant_id, App.name == name))).one_or_none()


def group_of(session: Session, tenant_id: str | None, id_or_name: str) -> Group | None:
    """The group of this id in any tenant, or of this name in one: who it is, not what its members may."""
    named = Group.id == id_or_name
    if tenant_id is not None:
        named = or_(named, and_(Group.tenant_id == tenant_id, Group.name == id_or_name))
    with lifted(session):
        return session.scalars(select(Group).where(named)).first()


def groups_of(session: Session, tenant_id: str) -> list[tuple[Group, list[str]]]:
    """A tenant's groups, oldest first, each with the ids of its members."""
    members: dict[str, list[str]] = {}
    for group_id, principal_id in session.execute(
        select(Member.group_id, Member.principal_id)
        .where(Member.tenant_id == tenant_id)
        .order_by(Member.created, Member.principal_id)
    ):
        members.setdefault(group_id, []).append(principal_id)
    groups = session.scalars(select(Group).where(Group.tenant_id == tenant_id).order_by(Group.created, Group.id))
    return [(group, members.get(group.id, [])) for group in groups]


def holders_on(session: Session, verb: str, *, tenant_id: str, resource_id: str) -> list[tuple[str, str]]:
    """Tenant and id of every app and person that a grant on this may be about, itself or by a group, in whatever tenant."""
    of = select(Grant.principal_id).where(Grant.tenant_id == tenant_id, Grant.verb == verb, _covers(Grant, resource_id))
    in_groups = select(Member.principal_id).where(Member.group_id.in_(of))
    found: list[tuple[str, str]] = []
    with lifted(session):
        for table in (App, User):
            held = select(table.tenant_id, table.id).where(or_(table.id.in_(of), table.id.in_(in_groups)))
            found += [(row.tenant_id, row.id) for row in session.execute(held.order_by(table.created, table.id))]
    return found


def holds_something(session: Session, holder: App | User, tenant_id: str) -> bool:
    """Whether an app or a person holds a grant of this tenant, itself or by a group, in force or not."""
    groups = select(Member.group_id).where(Member.tenant_id == holder.tenant_id, Member.principal_id == holder.id)
    held = or_(Grant.principal_id == holder.id, Grant.principal_id.in_(groups))
    with lifted(session):
        return session.scalar(select(Grant.id).where(Grant.tenant_id == tenant_id, held).limit(1)) is not None


def forget_grants_to(session: Session, holder_id: str) -> None:
    """Delete every grant that a principal or group holds, in whatever tenant, and its memberships: for one that is no more."""
    session.execute(delete(Grant).where(Grant.principal_id == holder_id))
    session.execute(delete(Member).where(or_(Member.principal_id == holder_id, Member.group_id == holder_id)))


def forget_grants_on(session: Session, *, tenant_id: str, resource_id: str) -> None:
    """Delete every grant on one resource: for one that is no more."""
    session.execute(delete(Grant).where(Grant.tenant_id == tenant_id, Grant.resource_id == resource_id))


def forget_answers(session: Session, *, routes: str) -> None:
    """Delete the kept answers to every write whose route starts so, in every tenant that the transaction acts for."""
    session.execute(delete(IdempotencyKey).where(IdempotencyKey.route.startswith(routes, autoescape=True)))


def public_keys(session: Session, purpose: str) -> list[dict[str, Any]]:
    """The public halves of the service's own keys of a purpose, oldest first."""
    return list(
        session.scalars(
            select(SigningKey.public).where(SigningKey.purpose == purpose).order_by(SigningKey.created, SigningKey.id)
        )
    )


def token_keys(session: Session) -> list[SigningKey]:
    """The keys whose tokens may be believed, those to come included: next, active, and retiring ones until their time is up."""
    return list(
        session.scalars(
            select(SigningKey)
            .where(
                SigningKey.purpose == "token",
                SigningKey.state.in_(("next", "active", "retiring")),
                or_(SigningKey.until.is_(None), SigningKey.until > now()),
            )
            .order_by(SigningKey.created, SigningKey.id)
        )
    )


def standing_of(session: Session, client_id: str, *, key_id: str, jti: str) -> str | None:
    """The tenant of a token's client; None where there is no such client, its tenant is suspended, or the token or the key that
    signed it is revoked."""
    is_revoked = exists().where(RevokedToken.jti == jti)
    is_believed = exists().where(
        SigningKey.id == key_id,
        SigningKey.purpose == "token",
        SigningKey.state.in_(("active", "retiring")),
        or_(SigningKey.until.is_(None), SigningKey.until > now()),
    )
    stands = (is_believed, ~is_revoked, ~_is_suspended(App, App.tenant_id))
    return session.scalar(select(App.tenant_id).where(App.id == client_id, *stands))


def _is_suspended(row: Any, tenant_id: Any) -> ColumnElement[bool]:
    """Whether the tenant that a row of the statement is of is suspended."""
    tenant = aliased(Tenant)
    return exists().where(tenant.id == tenant_id, tenant.suspended.is_not(None)).correlate(row)


_HOLDERS: tuple[type[App | User | Group], ...] = (App, User, Group)
"""Who holds grants."""


def _named(table: type[App | User | Group]) -> Select[str, str, str, str]:
    tenant = Tenant.name.label("tenant")
    return select(table.id, table.name, table.tenant_id, tenant).join(Tenant, Tenant.id == table.tenant_id)


def _covers(grant: Any, resource_id: Any) -> ColumnElement[bool]:
    return or_(grant.resource_id == resource_id, grant.resource_id == ANY)
