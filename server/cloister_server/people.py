"""People's accounts: made and ended by the operator, taken up by whoever holds the invitation. Knows SQL and keys; no HTTP.

A passphrase and the second factor's secret are the person's alone: the operator gives an invitation that is good once, and can take
an account back to that, never read or set what is behind it.
"""

from __future__ import annotations

import hmac
import re
import secrets
from dataclasses import dataclass
from datetime import timedelta

from pydantic import SecretStr
from sqlalchemy import delete
from sqlalchemy.orm import Session

from cloister.wire.identities import Identity
from cloister_server import audit, grants, policy, vault
from cloister_server.errors import Conflict, Invalid
from cloister_server.grants import NoSuch, Role
from cloister_server.oauth import logins, passphrases, totp
from cloister_server.oauth.sign_in import NotSignedIn, mac
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS, for_tenants
from cloister_server.store.identities import (
    Authorization,
    User,
    user_of_account,
    user_of_id,
    user_of_name,
    users_of,
)
from cloister_server.store.queries import app_of_id, name_is_taken
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import Tenant, new_id, now

__all__ = ["Invitation", "create", "disable", "identity", "listed", "offer", "remove", "reset", "take_up"]

INVITED_S = 86_400
_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_-]{0,62}")
_CODE = re.compile(r"inv_[0-9a-f]{32}")


@dataclass(frozen=True, slots=True)
class Invitation:
    """What the operator hands to a person, by another way than the account's name."""

    user_id: str
    account: str
    code: SecretStr


def identity(session: Session, principal: Principal) -> Identity:
    """What a principal may know of itself: it has shown that it is it, and there is no grant to ask for."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    found = user_of_id(session, principal.id) if principal.kind == "user" else app_of_id(session, principal.id)
    name = found.name if found is not None else ""
    return Identity(id=principal.id, kind=principal.kind, name=name, tenant=tenant.name)


def create(session: Session, service: Service, principal: Principal, *, name: str, role: Role) -> Invitation:
    """An account with a role's grants, and an invitation that is nowhere but in this answer. Raises Conflict or Invalid."""
    authorized = policy.authorize_change(session, principal, "tenant.administer")
    tenant = authorized.resource
    if not _NAME.fullmatch(name):
        raise Invalid(
            f"{name[:64]!r} is no name here: a letter first, then letters, digits, '_' and '-', 63 characters at most"
        )
    if name_is_taken(session, tenant.id, name):
        raise Conflict(f"the tenant has an account, client or group named {name!r} already; choose another name")
    user = User(tenant_id=tenant.id, id=new_id("us"), name=name, status="invited", totp_step=0)
    session.add(user)
    grants.grant_role(session, user, role)
    audit.allowed(session, authorized, "user.create", user.id)
    return _invite(session, service, tenant, user)


def listed(session: Session, principal: Principal) -> list[User]:
    """The accounts of the operator's tenant, oldest first."""
    tenant = session.get_one(Tenant, principal.tenant_id)
    policy.authorize(session, principal, "tenant.administer", tenant)
    return list(session.scalars(users_of(tenant.id)))


def reset(session: Session, service: Service, principal: Principal, name: str) -> Invitation:
    """Take an account back to a new invitation: passphrase and second factor are gone, and every login is ended."""
    authorized = policy.authorize_change(session, principal, "tenant.administer")
    user = _own(session, authorized.resource, name)
    _shut(session, service, user, "invited")
    audit.allowed(session, authorized, "user.reset", user.id)
    return _invite(session, service, authorized.resource, user)


def disable(session: Session, service: Service, principal: Principal, name: str) -> User:
    """Nobody acts for this person any more: here from the next request on, elsewhere within a second. `reset` is the way back."""
    authorized = policy.authorize(session, principal, "tenant.administer", session.get_one(Tenant, principal.tenant_id))
    user = _own(session, authorized.resource, name)
    _shut(session, service, user, "disabled")
    audit.allowed(session, authorized, "user.disable", user.id)
    return user


def remove(session: Session, service: Service, principal: Principal, name: str) -> User:
    """Delete an account with all its grants, its passphrase and its second factor; what it made stays."""
    user = disable(session, service, principal, name)
    authorized = policy.authorize(session, principal, "tenant.administer", session.get_one(Tenant, principal.tenant_id))
    grants.forget_holder(session, user)
    session.execute(delete(Authorization).where(Authorization.user_id == user.id))
    session.delete(user)
    audit.allowed(session, authorized, "user.delete", user.id)
    return user


def offer(service: Service, *, account: str, code: str) -> tuple[str, str]:
    """The second factor's secret that whoever holds this invitation is to set up, in base32 and as a URI. Raises NotSignedIn."""
    pepper = vault.pepper(service)
    with reading(service.engine, ALL_TENANTS) as session:
        user = _invited(session, pepper, account, code)
    secret = totp.offered(pepper, user.id, user.invitation_mac or b"")
    return totp.base32(secret), totp.uri(secret, account=account, issuer="Cloister")


def take_up(service: Service, *, account: str, invitation: str, passphrase: str, code: str, request_id: str) -> None:
    """Set the passphrase and the second factor, once. Raises NotSignedIn, or Invalid for a code or passphrase."""
    with passphrases.at_work():
        pepper = vault.pepper(service)
        with reading(service.engine, ALL_TENANTS) as session:
            invited = _invited(session, pepper, account, invitation)
        secret = totp.offered(pepper, invited.id, invited.invitation_mac or b"")
        step = totp.step_of(secret, code, after=0)
        if step is None:
            raise Invalid(
                "the code is not the one that the app shows now; see that its clock is right, and try the next one"
            )
        chosen = passphrases.hashed(passphrase, pepper=pepper, account=account)
    with writing(service.engine, for_tenants(invited.tenant_id)) as session:
        user = session.get(User, (invited.tenant_id, invited.id), with_for_update=True)
        if user is None or user.invitation_mac != invited.invitation_mac or user.status != "invited":
            raise NotSignedIn  # of two who took it up at once the other was first
        user.status, user.passphrase, user.totp_step = "active", chosen, step
        user.totp_sealed = totp.seal_secret(pepper, secret, tenant_id=user.tenant_id, user_id=user.id)
        user.invitation_mac, user.invitation_until = None, None
        person = Principal(tenant_id=user.tenant_id, id=user.id, kind="user", request_id=request_id)
        audit.told(session, person, "user.enrol", user.id)


def _invite(session: Session, service: Service, tenant: Tenant, user: User) -> Invitation:
    code = f"inv_{secrets.token_hex(16)}"
    pepper = vault.signing_key(session, service.keys, "pepper").secret
    user.invitation_mac = mac(pepper, "invitation", user.id, code)
    user.invitation_until = now() + timedelta(seconds=INVITED_S)
    return Invitation(user.id, f"{tenant.name}/{user.name}", SecretStr(code))


def _invited(session: Session, pepper: bytes, account: str, code: str) -> User:
    """The account whose invitation this is. Raises NotSignedIn, whatever is wrong."""
    user = user_of_account(session, account)
    given = mac(pepper, "invitation", user.id if user is not None else "", code)
    expected = user.invitation_mac if user is not None and user.invitation_mac else secrets.token_bytes(32)
    is_right = hmac.compare_digest(given, expected) and _CODE.fullmatch(code) is not None
    if user is None or not is_right or user.invitation_until is None or user.invitation_until <= now():
        raise NotSignedIn
    return user


def _shut(session: Session, service: Service, user: User, status: str) -> None:
    user.status, user.passphrase, user.totp_sealed = status, None, None
    user.invitation_mac, user.invitation_until = None, None
    logins.end_all(session, service, user)


def _own(session: Session, tenant: Tenant, given: str) -> User:
    user = user_of_id(session, given) if given.startswith("us_") else user_of_name(session, tenant.id, given)
    if user is None or user.tenant_id != tenant.id:
        raise NoSuch("user", given)
    return user
