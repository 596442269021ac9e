"""Operators: people who may administer the whole deployment. How the first is made, by a token of `init`, and others by operators.

Their accounts lie in a tenant of their own, made for that alone. That somebody is one is a row, and never a grant: no grant, group
or role of any tenant leads there, and no app and no other issuer's subject can be one.
"""

from __future__ import annotations

import re
import secrets
from datetime import timedelta

from pydantic import SecretStr
from sqlalchemy.orm import Session

from cloister_server import audit, people, policy, tenants, vault
from cloister_server.errors import Conflict, Forbidden
from cloister_server.grants import NoSuch
from cloister_server.oauth.sign_in import mac
from cloister_server.people import Invitation
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store import operators as store
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.identities import User
from cloister_server.store.operators import FirstAdminToken, Operator, is_operator
from cloister_server.store.queries import tenant_of_id_or_name
from cloister_server.store.tables import Tenant, now

__all__ = [
    "TENANT",
    "FirstAdminRefused",
    "accounts",
    "add",
    "first_admin_token",
    "is_operator",
    "listed",
    "redeem",
    "remove",
    "require_other",
    "tenant",
]

TENANT = "operators"
"""The name of the tenant in which operators have their accounts."""

FIRST_ADMIN_S = 3600
_TOKEN = re.compile(r"fat_[0-9a-f]{64}")


class FirstAdminRefused(Forbidden):
    """The one answer to whatever is wrong with a first-admin token."""

    default_code = "first_admin_refused"

    def __init__(self) -> None:
        super().__init__(
            "the first-admin token is wrong, older than an hour, or was used, or there is an operator already; "
            "`cloister-admin init` prints a new one while there is none"
        )


def tenant(session: Session) -> Tenant | None:
    """The operators' own tenant, once there was an operator."""
    return tenant_of_id_or_name(session, TENANT)


def require_other(name: str) -> None:
    """Raise Conflict where this names the operators' own tenant, which is nobody else's and stays."""
    if name == TENANT:
        raise Conflict(
            f"the tenant {TENANT!r} is where operators have their accounts: it is made with the first of them, is given nothing "
            "else, and neither suspended nor shredded; use `cloister-admin operator`",
            code="operators_tenant",
        )


def first_admin_token(service: Service) -> SecretStr | None:
    """A new token that makes the first operator, once, within an hour; earlier ones are void. None where there is an operator."""

    def made(session: Session) -> SecretStr | None:
        store.forget_first_tokens(session)
        if store.operators(session):
            return None
        token = f"fat_{secrets.token_hex(32)}"
        until = now() + timedelta(seconds=FIRST_ADMIN_S)
        session.add(FirstAdminToken(mac=_mac(session, service, token), until=until))
        return SecretStr(token)

    return service.write(ALL_TENANTS, made)


def redeem(service: Service, token: str, *, name: str, request_id: str) -> Invitation:
    """The first operator's account, to be taken up by the invitation as any other. Raises FirstAdminRefused, Conflict or Invalid."""

    def require_good(session: Session, *, is_locked: bool = False) -> None:
        row = session.get(FirstAdminToken, _mac(session, service, token), with_for_update=is_locked)
        if not _TOKEN.fullmatch(token) or row is None or row.until <= now() or store.operators(session):
            raise FirstAdminRefused

    def made(session: Session) -> Invitation:
        require_good(session, is_locked=True)
        store.forget_first_tokens(session)
        own = tenant(session) or tenants.create_tenant(
            session, service.keys, name=TENANT, request_id=request_id, by="first-admin"
        )
        session.flush()  # the account is decided on its row
        return add(session, service, tenants.operator_of(own, request_id=request_id, by="first-admin"), name=name)

    service.read(ALL_TENANTS, require_good)  # anybody can ask: whoever is wrong keeps no writer waiting
    return service.write(ALL_TENANTS, made)


def add(session: Session, service: Service, principal: Principal, *, name: str) -> Invitation:
    """Make a person an operator, with an account for that alone. Raises Conflict or Invalid."""
    invited = people.create(session, service, principal, name=name, role="none")
    session.flush()  # the mark is of its row
    session.add(Operator(tenant_id=principal.tenant_id, id=invited.user_id))
    audit.told(session, principal, "operator.add", invited.user_id)
    return invited


def remove(session: Session, service: Service, principal: Principal, name: str, *, may_be_last: bool) -> User:
    """Delete an operator's account; their logins end. Raises NoSuch, or Conflict where nobody would be left who can sign in."""
    policy.authorize_change(
        session, principal, "tenant.administer"
    )  # of two who remove each other at once, the other waits
    known = store.operators(session)
    gone = next((each for each in known if name in (each.id, each.name)), None)
    if gone is None:
        raise NoSuch("operator", name)
    if not may_be_last and not any(each.status == "active" for each in known if each is not gone):
        raise Conflict(
            "no other operator can sign in yet, and nobody could administer from elsewhere; let another take up an invitation first, "
            "or remove this one at the deployment itself",
            code="last_operator",
        )
    audit.told(session, principal, "operator.remove", gone.id)
    return people.remove(session, service, principal, name)


def listed(session: Session) -> list[User]:
    """Every operator, oldest first."""
    return store.operators(session)


def accounts(session: Session) -> dict[str, str]:
    """Id -> account of every operator, as they sign in."""
    return {each.id: f"{TENANT}/{each.name}" for each in store.operators(session)}


def _mac(session: Session, service: Service, token: str) -> bytes:
    return mac(vault.signing_key(session, service.keys, "pepper").secret, "first-admin", token)
