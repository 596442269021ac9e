"""Tenants and their apps: made, listed, removed by the operator. Knows SQL and keys; a secret is shown once and kept as a MAC."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from pydantic import TypeAdapter, ValidationError
from sqlalchemy.orm import Session

from cloister.wire._model import Name
from cloister_server import audit, grants, policy, vault
from cloister_server.errors import Conflict, Invalid
from cloister_server.grants import NoSuch, Role
from cloister_server.keyring import KeyRing
from cloister_server.oauth import client_secrets, logins, redirects
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store import queries
from cloister_server.store.tables import App, Tenant, new_id, now

__all__ = [
    "Removed",
    "apps",
    "create_client",
    "create_tenant",
    "find_tenant",
    "operator_of",
    "plan_tenant",
    "remove_client",
    "rotate_client",
    "tenants",
]

_NAME: TypeAdapter[str] = TypeAdapter(Name)


@dataclass(frozen=True, slots=True)
class Removed:
    """A client that is no more, and the names of the sources whose owner it was: they need another."""

    client_id: str
    name: str
    sources: list[str]


def create_tenant(
    session: Session,
    keys: KeyRing,
    *,
    name: str,
    request_id: str,
    by: str = "operator",
    provider: str | None = None,
    two_person: bool = False,
) -> Tenant:
    """A tenant, and its first key in the default provider or the named one: nothing of it is ever sealed under another's.

    With `two_person` its end takes two operators (`approvals`).
    """
    if queries.tenant_of_id_or_name(session, _checked(name)) is not None:
        raise Conflict(f"a tenant named {name!r} is already there; choose another name")
    chosen = provider or keys.default
    keys.require_known(chosen)
    key = vault.new_tenant_key(session, provider=chosen)
    tenant = Tenant(id=key.tenant_id, name=name, two_person=two_person)
    principal = operator_of(tenant, request_id=request_id, by=by)
    authorized = policy.authorize(session, principal, "tenant.administer", tenant)
    session.add(tenant)
    audit.allowed(session, authorized, "tenant.create", tenant.id)
    return tenant


def plan_tenant(session: Session, keys: KeyRing, *, name: str, provider: str | None = None) -> str:
    """The provider that the key of a new tenant of this name would be made in; refuses what `create_tenant` does. Makes nothing."""
    if queries.tenant_of_id_or_name(session, _checked(name)) is not None:
        raise Conflict(f"a tenant named {name!r} is already there; choose another name")
    chosen = provider or keys.default
    keys.require_known(chosen)
    keys.of(chosen)
    return chosen


def create_client(
    session: Session,
    keys: KeyRing,
    principal: Principal,
    *,
    name: str,
    role: Role,
    public_key: dict[str, str] | None = None,
    dpop: bool = False,
    public: bool = False,
    redirect_uris: Sequence[str] = (),
) -> tuple[App, str | None]:
    """An app of the operator's tenant with a role's grants, and its secret, which is nowhere but in this answer.

    With a public key, as `oauth.signed.read_public_key` reads it, there is no secret at all. With `dpop`
    it gets none but tokens that are bound to a key of its own. A `public` one has neither secret nor key, and so must be given no
    role: it acts for people, who are taken back to one of its `redirect_uris`.
    """
    authorized = policy.authorize_change(session, principal, "tenant.administer")
    tenant = authorized.resource
    if queries.name_is_taken(session, tenant.id, _checked(name)):
        raise Conflict(f"the tenant has a client, account or group named {name!r} already; choose another name")
    if public and (public_key is not None or role != "none"):
        raise Invalid("a public client has no key and no role: it can keep nothing secret, and does what people may do")
    app = App(tenant_id=tenant.id, id=new_id("ap"), name=name, dpop=dpop, public=public, secret_mac=b"")
    app.redirect_uris = redirects.checked(redirect_uris) or None
    secret = None if public else _set_credentials(session, keys, app, public_key)
    session.add(app)
    grants.grant_role(session, app, role)
    audit.allowed(session, authorized, "client.create", app.id)
    return app, secret


def rotate_client(
    session: Session,
    keys: KeyRing,
    principal: Principal,
    id_or_name: str,
    *,
    public_key: dict[str, str] | None = None,
) -> tuple[App, str | None]:
    """A new secret for an app of the operator's tenant, which is nowhere but in this answer, or a public key instead of any.

    The old secret or key is of no use any more. Access tokens that it got live on until they expire, ten minutes at most;
    `remove_client` ends those too.
    """
    authorized = policy.authorize_change(session, principal, "tenant.administer")
    app = _own_app(session, authorized.resource, id_or_name)
    if app.public:
        raise Invalid("a public client has no secret to rotate; remove it, and every login by it ends")
    secret = _set_credentials(session, keys, app, public_key)
    app.secret_since = now()
    audit.allowed(session, authorized, "client.rotate", app.id)
    return app, secret


def remove_client(session: Session, service: Service, principal: Principal, id_or_name: str) -> Removed:
    """Remove an app of the operator's tenant and all its grants: its tokens are refused from the next request on, elsewhere within a
    second.

    What it made stays: its jobs go on, and sources that it owned answer to whoever is granted `source.own` next.
    """
    tenant = session.get_one(Tenant, principal.tenant_id)
    authorized = policy.authorize(session, principal, "tenant.administer", tenant)
    app = _own_app(session, tenant, id_or_name)
    removed = Removed(app.id, app.name, queries.sources_of(session, app.id))
    grants.forget_holder(session, app)
    logins.forget_client(session, service, app.id)
    session.delete(app)
    audit.allowed(session, authorized, "client.remove", app.id)
    return removed


def tenants(session: Session) -> list[Tenant]:
    """Every tenant of the deployment, oldest first: for operators alone."""
    return list(session.scalars(queries.tenants()))


def apps(session: Session, principal: Principal) -> list[App]:
    """The apps of the operator's tenant, oldest first."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    policy.authorize(session, principal, "tenant.administer", tenant)
    return list(session.scalars(queries.apps_of(tenant.id)))


def find_tenant(session: Session, id_or_name: str) -> Tenant:
    """The tenant of this id or name, for operators alone. Raises NotFound."""
    tenant = queries.tenant_of_id_or_name(session, id_or_name)
    if tenant is None:
        raise NoSuch("tenant", id_or_name)
    return tenant


def operator_of(tenant: Tenant, *, request_id: str, by: str = "operator") -> Principal:
    """An operator at work in this tenant: for the operators' operations and commands alone."""
    return Principal.operator(tenant.id, request_id=request_id, by=by)


def _set_credentials(session: Session, keys: KeyRing, app: App, public_key: dict[str, str] | None) -> str | None:
    """Give an app a public key and no secret, or a new secret, which is returned, and no public key."""
    app.public_key = public_key
    if public_key is not None:
        app.secret_mac = b""
        return None
    secret = client_secrets.new_secret().get_secret_value()
    app.secret_mac = client_secrets.mac(vault.signing_key(session, keys, "pepper").secret, app.id, secret)
    return secret


def _own_app(session: Session, tenant: Tenant, id_or_name: str) -> App:
    app = grants.find_app(session, tenant, id_or_name)
    if app.tenant_id != tenant.id:
        raise NoSuch("client", id_or_name)
    return app


def _checked(name: str) -> str:
    try:
        return _NAME.validate_python(name)
    except ValidationError:
        raise Invalid(
            f"{name!r} is no name here: a letter first, then letters, digits, '_' and '-', 63 characters at most"
        ) from None
