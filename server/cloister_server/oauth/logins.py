"""Logins: one app that acts for one person, and its refresh tokens, each of which is good once. Knows SQL; no HTTP, no passphrases.

A refresh token is the login's handle, a generation and a MAC of both. An earlier generation, rightly MACed, was used already: then
somebody has a copy, and the whole login ends (RFC 9700, section 4.14.2). What is wrongly MACed is noise and ends nothing.
"""

from __future__ import annotations

import hmac
import re
from dataclasses import dataclass
from datetime import timedelta

from pydantic import SecretStr
from sqlalchemy import delete
from sqlalchemy.orm import Session

from cloister_server import audit, vault
from cloister_server.oauth import verifier
from cloister_server.oauth.access_tokens import ADMIN_CLIENT_ID
from cloister_server.oauth.sign_in import mac
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.identities import (
    BrowserSession,
    Login,
    User,
    forget_logins_by,
    forget_old_logins,
    login_of_handle,
    login_of_id,
)
from cloister_server.store.issuers import forget_subjects_of
from cloister_server.store.operators import is_operator
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import Tenant, new_id, now

__all__ = [
    "CLI_CLIENT_ID",
    "Begun",
    "begin",
    "end",
    "end_all",
    "end_by_refresh_token",
    "forget_client",
    "is_active",
    "may_begin",
    "of_refresh_token",
    "refresh",
]

CLI_CLIENT_ID = "cloister-cli"
"""The one client that every deployment has: `cloister login`. It acts for people of any tenant, and by the device flow alone."""

IDLE_S = 14 * 86_400
"""A login that was not refreshed for so long is over."""
LONGEST_S = 90 * 86_400
_TOKEN = re.compile(r"clr_([0-9a-f]{32})\.([0-9]{1,9})\.([0-9a-f]{64})")


@dataclass(frozen=True, slots=True)
class Begun:
    """A login, as far as its tokens need to know, and the refresh token that is good next."""

    tenant_id: str
    login_id: str
    user_id: str
    refresh_token: SecretStr
    jkt: str | None


def begin(
    session: Session,
    pepper: bytes,
    *,
    tenant_id: str,
    user_id: str,
    client_id: str,
    jkt: str | None,
    request_id: str,
) -> Begun:
    """Let an app act for a person from now on, who has just allowed it."""
    at = now()
    forget_old_logins(session)
    login = Login(
        tenant_id=tenant_id,
        id=new_id("lg"),
        handle=new_id("lh").removeprefix("lh_"),
        user_id=user_id,
        client_id=client_id,
        jkt=jkt,
        generation=1,
        until=at + timedelta(seconds=IDLE_S),
    )
    session.add(login)
    person = Principal(tenant_id=tenant_id, id=user_id, kind="user", request_id=request_id)
    audit.told(session, person, "login.begin", client_id)
    return _begun(pepper, login)


def refresh(service: Service, token: str, *, client_id: str, proven: str | None, is_public: bool) -> Begun | None:
    """The same login with the next refresh token; None where the token is no good, and its login ends where it was used before.

    `proven`: the key that the request proves to have. A login that is bound to one asks for that one of a public client, and for
    some proof of any other (RFC 9449, section 5).
    """
    pepper = vault.pepper(service)
    read = _read(pepper, token)
    if read is None:
        return None
    handle, generation = read
    with writing(service.engine, ALL_TENANTS) as session:
        login = login_of_handle(session, handle, is_locked=True)
        if login is None or login.client_id != client_id:
            return None
        if generation != login.generation:
            if generation < login.generation:
                _end(session, service, login)
            return None
        if login.jkt is not None and (proven is None or (is_public and proven != login.jkt)):
            return None
        if not is_active(session, login.tenant_id, login.user_id) or not may_begin(session, client_id, login.user_id):
            return None
        login.generation, login.used = login.generation + 1, now()
        last = login.created + timedelta(seconds=LONGEST_S)
        login.until = min(last, now() + timedelta(seconds=IDLE_S))
        return _begun(pepper, login)


def end(session: Session, service: Service, login_id: str | None) -> None:
    """End a login: its refresh token at once, its access tokens in this process from the next request, in others within a second."""
    login = login_of_id(session, login_id)
    if login is not None:
        _end(session, service, login)


def end_by_refresh_token(service: Service, token: str, *, client_id: str) -> bool:
    """End the login of this refresh token, whichever generation, where it is this client's; whether it was."""
    read = _read(vault.pepper(service), token)
    if read is None:
        return False
    with writing(service.engine, ALL_TENANTS) as session:
        login = login_of_handle(session, read[0])
        if login is None or login.client_id != client_id:
            return False
        _end(session, service, login)
    return True


def of_refresh_token(service: Service, token: str) -> Login | None:
    """The login of a refresh token that is good now."""
    read = _read(vault.pepper(service), token)
    if read is None:
        return None
    with reading(service.engine, ALL_TENANTS) as session:
        login = login_of_handle(session, read[0])
        is_good = (
            login is not None and login.generation == read[1] and is_active(session, login.tenant_id, login.user_id)
        )
    return login if is_good else None


def end_all(session: Session, service: Service, user: User) -> int:
    """End every login of a person, sign them out of every browser, and forget which subjects of other issuers they are; how many
    logins that were."""
    of_user = (Login.tenant_id == user.tenant_id, Login.user_id == user.id)
    count: int = session.execute(delete(Login).where(*of_user)).rowcount  # type: ignore[attr-defined]  # of a DELETE there is one
    session.execute(delete(BrowserSession).where(BrowserSession.user_id == user.id))
    forget_subjects_of(session, user.id)
    verifier.forget_after(session, service)
    return count


def forget_client(session: Session, service: Service, client_id: str) -> None:
    """End every login by an app that is no more, and whatever let it in; whoever has a token of it is refused as by `end`."""
    forget_logins_by(session, client_id)
    forget_subjects_of(session, client_id)
    verifier.forget_after(session, service)


def is_active(session: Session, tenant_id: str, user_id: str) -> bool:
    """Whether anybody may act for this person now."""
    user, tenant = session.get(User, (tenant_id, user_id)), session.get(Tenant, tenant_id)
    if user is None or tenant is None:
        return False
    return user.status == "active" and tenant.status == "active" and tenant.suspended is None


def may_begin(session: Session, client_id: str, user_id: str) -> bool:
    """Whether a client may act for this person at all: the operators' one for operators alone."""
    return client_id != ADMIN_CLIENT_ID or is_operator(session, user_id)


def _end(session: Session, service: Service, login: Login) -> None:
    session.delete(login)
    verifier.forget_after(session, service)


def _begun(pepper: bytes, login: Login) -> Begun:
    token = f"clr_{login.handle}.{login.generation}.{_mac(pepper, login.handle, str(login.generation))}"
    return Begun(login.tenant_id, login.id, login.user_id, SecretStr(token), login.jkt)


def _read(pepper: bytes, token: str) -> tuple[str, int] | None:
    """Handle and generation of a refresh token that this service made; None of all else."""
    match = _TOKEN.fullmatch(token)
    if match is None:
        return None
    if not hmac.compare_digest(_mac(pepper, match[1], match[2]), match[3]):
        return None
    return match[1], int(match[2])


def _mac(pepper: bytes, handle: str, generation: str) -> str:
    return mac(pepper, "refresh-token", handle, generation).hex()
