"""Whether somebody is who they say: an account, its passphrase and a code, right together or refused alike. Knows SQL; no HTTP.

What is wrong is never told: an unknown account, a wrong passphrase, a wrong code and one that was used cost and read the same.
Failures make the next try wait, for this account from this address alone: nobody can shut anybody else out.
"""

from __future__ import annotations

import hmac
import ipaddress
import logging
import secrets
from dataclasses import dataclass
from datetime import timedelta

from sqlalchemy import delete, update
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from cloister_privacy.sealing import InvalidSeal
from cloister_server import vault
from cloister_server.errors import RateLimited, ServerError
from cloister_server.oauth import passphrases, totp
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS, for_tenants
from cloister_server.store.identities import BrowserSession, SignInTry, User, user_of_account, user_of_id
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import Tenant, now

__all__ = [
    "BROWSER_S",
    "NotSignedIn",
    "Person",
    "attempt",
    "confirm",
    "forget_browser",
    "mac",
    "network",
    "of_browser",
    "refund",
    "remember_browser",
    "sign_in",
]

log = logging.getLogger(__name__)

BROWSER_S = 3600
"""How long a browser is signed in."""
_FREE_TRIES = 3
_FIRST_DELAY_S = 1.0
_LONGEST_DELAY_S = 900
_REMEMBERED_S = 86_400
_NOBODYS_SECRET = secrets.token_bytes(20)


class NotSignedIn(ServerError):
    """The one answer to every failure to say who one is."""

    status = 403
    default_code = "not_signed_in"

    def __init__(self) -> None:
        super().__init__(
            "the account, the passphrase or the code is wrong, or the code was used before; wait for the next code and try again"
        )


@dataclass(frozen=True, slots=True)
class Person:
    """Somebody who has shown who they are."""

    tenant_id: str
    id: str
    account: str
    """As they type it: `TENANT/NAME`."""


def mac(pepper: bytes, kind: str, *parts: str) -> bytes:
    """HMAC-SHA256 of what is never stored itself: codes, cookies, addresses. No two kinds have one in common."""
    line = f"cloister.{kind}/1\n" + "".join(f"{len(part)}:{part}\n" for part in parts)
    return hmac.digest(pepper, line.encode("utf-8", "replace"), "sha256")


def sign_in(service: Service, *, account: str, passphrase: str, code: str, address: str) -> Person:
    """Who this is. Raises NotSignedIn, RateLimited where this account was tried too often from this address, or Unavailable."""
    with passphrases.at_work():
        attempt(service, "sign-in", account, address)
        pepper = vault.pepper(service)
        with reading(service.engine, ALL_TENANTS) as session:
            user = user_of_account(session, account)
        is_active = user is not None and user.status == "active"
        stored = user.passphrase if user is not None and is_active else None
        is_right = passphrases.matches(passphrase, stored, pepper=pepper)
        step = totp.step_of(_secret_of(pepper, user), code, after=user.totp_step if user is not None else 0)
        if user is not None and is_right and step is None:
            log.warning("person.second_factor_wrong", extra={"user_id": user.id, "tenant_id": user.tenant_id})
        if user is None or not is_right or step is None:
            raise NotSignedIn
        if not _take_step(service, user, step, pepper, ("sign-in", account, address)):
            raise NotSignedIn
    log.info("person.signed_in", extra={"user_id": user.id, "tenant_id": user.tenant_id})
    return Person(user.tenant_id, user.id, account)


def confirm(service: Service, person: Person, code: str, *, address: str) -> None:
    """See that whoever sits at a signed-in browser has the second factor at hand. Raises NotSignedIn or RateLimited."""
    attempt(service, "confirm", person.id, address)
    pepper = vault.pepper(service)
    with reading(service.engine, ALL_TENANTS) as session:
        user = user_of_id(session, person.id)
    step = totp.step_of(_secret_of(pepper, user), code, after=user.totp_step if user is not None else 0)
    if user is None or step is None or not _take_step(service, user, step, pepper, ("confirm", person.id, address)):
        raise NotSignedIn


def attempt(service: Service, kind: str, what: str, address: str) -> None:
    """Count a try before it is made, so that tries at the same moment are counted too. Raises RateLimited where it is too early.

    The first few are free; after each further one the next must wait twice as long, a quarter of an hour at most.
    """
    try:
        _count(service, kind, what, address)
    except IntegrityError:  # two first tries at once: one of them waited, and finds the other's row now
        _count(service, kind, what, address)


def _count(service: Service, kind: str, what: str, address: str) -> None:
    key = mac(vault.pepper(service), f"try-{kind}", what, network(address))
    with writing(service.engine, for_tenants()) as session:
        at = now()
        session.execute(delete(SignInTry).where(SignInTry.until < at))
        row = session.get(SignInTry, key, with_for_update=True)
        if row is None:
            row = SignInTry(mac=key, failures=0, next_try=at, until=at)
            session.add(row)
        if row.next_try > at:
            raise _too_early((row.next_try - at).total_seconds())
        row.failures += 1
        delay_s = (
            0
            if row.failures < _FREE_TRIES
            else min(_FIRST_DELAY_S * 2.0 ** (row.failures - _FREE_TRIES), _LONGEST_DELAY_S)
        )
        row.next_try, row.until = at + timedelta(seconds=delay_s), at + timedelta(seconds=_REMEMBERED_S)


def refund(service: Service, kind: str, what: str, address: str) -> None:
    """A try that was none: it succeeded, and says nothing of those before it."""
    key = mac(vault.pepper(service), f"try-{kind}", what, network(address))
    with writing(service.engine, for_tenants()) as session:
        row = session.get(SignInTry, key, with_for_update=True)
        if row is not None:
            row.failures, row.next_try = row.failures - 1, now()


def forget_tries(session: Session, pepper: bytes, kind: str, what: str, address: str) -> None:
    """After a success: the next failure is the first again."""
    session.execute(delete(SignInTry).where(SignInTry.mac == mac(pepper, f"try-{kind}", what, network(address))))


def remember_browser(service: Service, cookie: str, person: Person) -> None:
    """Whoever shows this cookie is this person, for an hour."""
    key = mac(vault.pepper(service), "browser", cookie)
    with writing(service.engine, for_tenants(person.tenant_id)) as session:
        session.execute(delete(BrowserSession).where(BrowserSession.until < now()))
        session.add(
            BrowserSession(
                mac=key,
                user_id=person.id,
                until=now() + timedelta(seconds=BROWSER_S),
            )
        )


def forget_browser(service: Service, cookie: str) -> None:
    key = mac(vault.pepper(service), "browser", cookie)
    with writing(service.engine, for_tenants()) as session:
        session.execute(delete(BrowserSession).where(BrowserSession.mac == key))


def of_browser(service: Service, cookie: str) -> Person | None:
    """Who is signed in where this cookie is: asked of the database each time, so that a disabled person is nobody at once."""
    key = mac(vault.pepper(service), "browser", cookie)
    with reading(service.engine, ALL_TENANTS) as session:
        row = session.get(BrowserSession, key)
        user = user_of_id(session, row.user_id) if row is not None and row.until > now() else None
        tenant = session.get(Tenant, user.tenant_id) if user is not None else None
    if user is None or tenant is None or user.status != "active":
        return None
    if tenant.status != "active" or tenant.suspended is not None:
        return None
    return Person(user.tenant_id, user.id, f"{tenant.name}/{user.name}")


def network(address: str) -> str:
    """The address, or of IPv6 the network of 64 bits that one subscriber has at least."""
    try:
        parsed = ipaddress.ip_address(address)
    except ValueError:
        return "unknown"
    if isinstance(parsed, ipaddress.IPv6Address):
        mapped = parsed.ipv4_mapped
        return str(mapped) if mapped is not None else str(ipaddress.ip_network((parsed, 64), strict=False))
    return str(parsed)


def _secret_of(pepper: bytes, user: User | None) -> bytes:
    if user is None or user.totp_sealed is None:
        return _NOBODYS_SECRET
    try:
        return totp.open_secret(pepper, user.totp_sealed, tenant_id=user.tenant_id, user_id=user.id)
    except InvalidSeal:
        log.error("person.second_factor_unreadable", extra={"user_id": user.id})
        return _NOBODYS_SECRET


def _take_step(service: Service, user: User, step: int, pepper: bytes, tried: tuple[str, str, str]) -> bool:
    """Take a code, once: of two who show it at the same moment, one. Failures of what was tried are forgotten."""
    with writing(service.engine, for_tenants(user.tenant_id)) as session:
        taken = session.execute(
            update(User)
            .where(User.tenant_id == user.tenant_id, User.id == user.id, User.totp_step < step, User.status == "active")
            .values(totp_step=step)
        )
        if taken.rowcount != 1:  # type: ignore[attr-defined]  # of an UPDATE there is one
            return False
        forget_tries(session, pepper, *tried)
    return True


def _too_early(wait_s: float) -> RateLimited:
    wait = max(1, round(wait_s + 0.5))
    return RateLimited(f"this was tried too often from here; try again in {wait} s", details={"retry_after_s": wait})
