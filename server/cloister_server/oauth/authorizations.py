"""What a person is asked to allow an app: by the app's own request in a browser, or by a code that a device shows. Knows SQL; no HTTP.

Authorization code with PKCE S256 (RFC 6749, 7636, 9700) and the device flow (RFC 8628). Every code is kept as a MAC, is good once
and not for long; a code that is shown again ends what came of it.
"""

from __future__ import annotations

import base64
import hashlib
import hmac
import re
import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from datetime import timedelta
from urllib.parse import parse_qsl, urlencode

from pydantic import SecretStr
from sqlalchemy import delete, func, select
from sqlalchemy.exc import IntegrityError
from sqlalchemy.orm import Session

from cloister_server import vault
from cloister_server.errors import BadRequest, RateLimited, ServerError
from cloister_server.oauth import logins
from cloister_server.oauth.access_tokens import ADMIN_CLIENT_ID
from cloister_server.oauth.logins import CLI_CLIENT_ID, Begun
from cloister_server.oauth.redirects import is_registered
from cloister_server.oauth.sign_in import NotSignedIn, Person, attempt, confirm, mac, network, refund
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS, for_tenants
from cloister_server.store.identities import Authorization, user_of_id
from cloister_server.store.queries import app_of_id
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import App, now

__all__ = [
    "ADMIN",
    "CLI",
    "DEVICE_S",
    "INTERVAL_S",
    "AuthorizationRequest",
    "Device",
    "NotConfirmed",
    "RedirectedError",
    "allow",
    "answer",
    "client_of_id",
    "decide_device",
    "find_device",
    "new_device",
    "read_authorization_request",
    "redeem_code",
    "redeem_device",
]

CODE_S = 60
DEVICE_S = 600
INTERVAL_S = 5
_MOST_DEVICES = 20
"""That one address may have waiting at once."""
_LETTERS = "BCDFGHJKLMNPQRSTVWXZ"  # RFC 8628, section 6.1: no vowels, so no words
_CLIENT_ID = re.compile(rf"ap_[0-9a-f]{{32}}|{CLI_CLIENT_ID}")
_CHALLENGE = re.compile(r"[A-Za-z0-9_-]{43}")
_VERIFIER = re.compile(r"[A-Za-z0-9._~-]{43,128}")  # RFC 7636, section 4.1
_STATE = re.compile(r"[\x20-\x7e]{1,1024}")
_CODE = re.compile(r"cla_[0-9a-f]{64}")
_DEVICE_CODE = re.compile(r"cld_[0-9a-f]{64}")

CLI = App(tenant_id="", id=CLI_CLIENT_ID, name="cloister, at a command line", secret_mac=b"", dpop=False, public=True)
"""The client of `cloister login`, which has no row: it is everybody's."""


ADMIN = App(tenant_id="", id=ADMIN_CLIENT_ID, name="cloister-admin", secret_mac=b"", dpop=True, public=True)
"""The client of `cloister-admin login`, which has no row either."""


@dataclass(frozen=True, slots=True)
class AuthorizationRequest:
    """What an app asks, whose redirect URI is its own."""

    client: App
    redirect_uri: str
    state: str | None
    challenge: str
    jkt: str | None
    query: str
    """As it came, for the forms on the way: it is read anew each time."""


class RedirectedError(Exception):
    """A refusal that the app is told, by way of the browser: the app and its redirect URI are known to belong together."""

    def __init__(self, error: str, description: str, *, redirect_uri: str, state: str | None) -> None:
        super().__init__(description)
        self.error, self.description, self.redirect_uri, self.state = error, description, redirect_uri, state

    def location(self, issuer: str) -> str:
        told = {"error": self.error, "error_description": self.description}
        return _location(self.redirect_uri, told, state=self.state, issuer=issuer)


class NotConfirmed(Exception):
    """The second factor was not shown once more, where that is asked for; `refusal` says why."""

    def __init__(self, refusal: ServerError) -> None:
        super().__init__(refusal.message)
        self.refusal = refusal


@dataclass(frozen=True, slots=True)
class Device:
    """What a device that waits is told (RFC 8628, section 3.2)."""

    device_code: SecretStr
    user_code: str


def client_of_id(session: Session, client_id: str) -> App | None:
    """The app of this client id, those of `cloister login` and `cloister-admin login` among them."""
    return {each.id: each for each in (CLI, ADMIN)}.get(client_id) or app_of_id(session, client_id)


def read_authorization_request(service: Service, query: str) -> AuthorizationRequest:
    """Read an app's request (RFC 6749, section 4.1.1). Raises BadRequest where it is not known who asks and where to answer: then
    nobody is taken anywhere; RedirectedError where the app itself is to be told."""
    fields = _fields(query)
    client_id, redirect_uri = fields.get("client_id", ""), fields.get("redirect_uri", "")
    with reading(service.engine, ALL_TENANTS) as session:
        client = client_of_id(session, client_id) if _CLIENT_ID.fullmatch(client_id) else None
    if client is None or not is_registered(redirect_uri, client.redirect_uris):
        raise BadRequest(
            "no such app is known here with this redirect_uri, so you are not taken there; whoever runs the app must register the "
            "address with the server's operator, character for character"
        )
    state = fields.get("state")
    if state is not None and not _STATE.fullmatch(state):
        raise BadRequest("the app's state is longer than 1,024 visible characters")

    def refused(error: str, description: str) -> RedirectedError:
        return RedirectedError(error, description, redirect_uri=redirect_uri, state=state)

    for name in ("request", "request_uri"):
        if name in fields:
            raise refused(f"{name}_not_supported", "send the parameters themselves")
    if "response_type" not in fields:
        raise refused("invalid_request", "there is no response_type, send response_type=code")
    if fields["response_type"] != "code":
        raise refused("unsupported_response_type", "only response_type=code is given here")
    if fields.get("response_mode", "query") != "query":
        raise refused("invalid_request", "only response_mode=query is given here")
    if fields.get("code_challenge_method") != "S256" or not _CHALLENGE.fullmatch(fields.get("code_challenge", "")):
        raise refused("invalid_request", "send code_challenge and code_challenge_method=S256 (RFC 7636)")
    if fields.get("scope"):
        raise refused("invalid_scope", "there are no scopes here: what a person may do is in their grants")
    if fields.get("resource", service.settings.issuer) != service.settings.issuer:
        raise refused("invalid_target", "tokens are for this server alone")
    jkt = fields.get("dpop_jkt")
    if jkt is not None and not _CHALLENGE.fullmatch(jkt):
        raise refused("invalid_request", "dpop_jkt is no thumbprint (RFC 9449, section 10)")
    return AuthorizationRequest(client, redirect_uri, state, fields["code_challenge"], jkt, query)


def allow(service: Service, request: AuthorizationRequest, person: Person) -> str:
    """Where to take the person who has allowed it: back to the app, with a code for a minute. Raises RedirectedError."""
    if request.client.tenant_id != person.tenant_id:
        raise RedirectedError(
            "access_denied",
            "this app is not for accounts of this tenant",
            redirect_uri=request.redirect_uri,
            state=request.state,
        )
    code = f"cla_{secrets.token_hex(32)}"
    key = mac(vault.pepper(service), "code", code)
    with writing(service.engine, for_tenants(person.tenant_id)) as session:
        _forget_old(session)
        session.add(
            Authorization(
                mac=key,
                kind="code",
                client_id=request.client.id,
                state="allowed",
                user_id=person.id,
                redirect_uri=request.redirect_uri,
                challenge=request.challenge,
                jkt=request.jkt,
                until=now() + timedelta(seconds=CODE_S),
            )
        )
    return _location(request.redirect_uri, {"code": code}, state=request.state, issuer=service.settings.issuer)


def answer(service: Service, request: AuthorizationRequest, error: str, description: str) -> str:
    """Where to take a person who has not allowed it."""
    return RedirectedError(error, description, redirect_uri=request.redirect_uri, state=request.state).location(
        service.settings.issuer
    )


def redeem_code(
    service: Service, client: App, parameters: Mapping[str, str], *, proven: str | None, request_id: str
) -> Begun | None:
    """The login that a code is good for; None where it is not. A code that is shown a second time ends what it had begun."""
    code, verifier = parameters.get("code", ""), parameters.get("code_verifier", "")
    if not _CODE.fullmatch(code) or not _VERIFIER.fullmatch(verifier):
        return None
    pepper = vault.pepper(service)
    with writing(service.engine, ALL_TENANTS) as session:
        row = session.get(Authorization, mac(pepper, "code", code), with_for_update=True)
        if row is None or row.kind != "code" or row.client_id != client.id:
            return None
        if row.state == "used":
            logins.end(session, service, row.login_id)
            return None
        challenge = base64.urlsafe_b64encode(hashlib.sha256(verifier.encode()).digest()).rstrip(b"=").decode()
        if row.until <= now() or not hmac.compare_digest(challenge, row.challenge or ""):
            return None
        if parameters.get("redirect_uri") != row.redirect_uri or (row.jkt is not None and row.jkt != proven):
            return None
        return _begin(session, pepper, row, client, proven, request_id)


def new_device(service: Service, client: App, *, address: str) -> Device:
    """Let a device wait for a person. Raises RateLimited where too many of this address wait already."""
    for _ in range(3):
        try:
            return _new_device(service, client, address)
        except IntegrityError:  # another has the same code of eight letters at this moment
            continue
    raise RateLimited("no code is free at this moment; try again in a minute")


def find_device(service: Service, person: Person, user_code: str, *, address: str) -> tuple[str, App] | None:
    """The code as it is kept, and the app whose device shows it; None where none does. Raises RateLimited: none is to be guessed."""
    attempt(service, "user-code", person.id, address)
    code = _normal(user_code)
    key = mac(vault.pepper(service), "user-code", code)
    with reading(service.engine, ALL_TENANTS) as session:
        row = _device(session, key)
        client = client_of_id(session, row.client_id) if row is not None else None
        if client is ADMIN and not logins.may_begin(session, client.id, person.id):
            return None
    if row is None or client is None or client.tenant_id not in ("", person.tenant_id):
        return None
    refund(service, "user-code", person.id, address)
    return code, client


def decide_device(
    service: Service, person: Person, user_code: str, *, is_allowed: bool, address: str, code: str
) -> bool:
    """Let the device act for this person, or not; whether there was still something to decide.

    Raises NotConfirmed where it is to administer the deployment and `code` is not the next one of the second factor.
    """
    found = find_device(service, person, user_code, address=address)
    if found is None:
        return False
    if is_allowed and found[1] is ADMIN:
        try:
            confirm(service, person, code, address=address)
        except (NotSignedIn, RateLimited) as refusal:
            raise NotConfirmed(refusal) from None
    key = mac(vault.pepper(service), "user-code", found[0])
    with writing(service.engine, for_tenants(person.tenant_id)) as session:
        row = _device(session, key, is_locked=True)
        if row is None:
            return False
        row.state = "allowed" if is_allowed else "denied"
        row.user_id = person.id
    return True


def redeem_device(
    service: Service, client: App, parameters: Mapping[str, str], *, proven: str | None, request_id: str
) -> Begun | str:
    """The login that a person has allowed a device, or the error that it is to be told (RFC 8628, section 3.5)."""
    code = parameters.get("device_code", "")
    if not _DEVICE_CODE.fullmatch(code):
        return "invalid_grant"
    pepper = vault.pepper(service)
    with writing(service.engine, ALL_TENANTS) as session:
        row = session.get(Authorization, mac(pepper, "device", code), with_for_update=True)
        if row is None or row.kind != "device" or row.client_id != client.id:
            return "invalid_grant"
        if row.state == "used":
            logins.end(session, service, row.login_id)
            return "invalid_grant"
        at = now()
        if row.until <= at:
            return "expired_token"
        if row.jkt is not None and row.jkt != proven:
            return "invalid_grant"
        is_early = row.polled is not None and at < row.polled + timedelta(seconds=row.interval_s - 1)
        row.polled = at
        if row.state == "denied":
            return "access_denied"
        if is_early:
            row.interval_s += 5
            return "slow_down"
        if row.state == "pending":
            return "authorization_pending"
        return _begin(session, pepper, row, client, proven, request_id) or "access_denied"


def _new_device(service: Service, client: App, address: str) -> Device:
    device_code = f"cld_{secrets.token_hex(32)}"
    user_code = "".join(secrets.choice(_LETTERS) for _ in range(8))
    pepper = vault.pepper(service)
    asked_from = mac(pepper, "asked-from", network(address))
    with writing(service.engine, ALL_TENANTS) as session:
        _forget_old(session)
        waiting = session.scalar(select(func.count()).where(Authorization.asked_from == asked_from)) or 0
        if waiting >= _MOST_DEVICES:
            raise RateLimited("too many devices wait at this address already; try again in some minutes")
        session.add(
            Authorization(
                mac=mac(pepper, "device", device_code),
                kind="device",
                client_id=client.id,
                state="pending",
                user_code_mac=mac(pepper, "user-code", user_code),
                asked_from=asked_from,
                interval_s=INTERVAL_S,
                until=now() + timedelta(seconds=DEVICE_S),
            )
        )
    return Device(SecretStr(device_code), f"{user_code[:4]}-{user_code[4:]}")


def _device(session: Session, user_code_mac: bytes, *, is_locked: bool = False) -> Authorization | None:
    waiting = select(Authorization).where(
        Authorization.user_code_mac == user_code_mac,
        Authorization.kind == "device",
        Authorization.state == "pending",
        Authorization.until > now(),
    )
    return session.scalars(waiting.with_for_update() if is_locked else waiting).one_or_none()


def _begin(
    session: Session, pepper: bytes, row: Authorization, client: App, proven: str | None, request_id: str
) -> Begun | None:
    """Begin what was allowed, once, where the person is still there to have allowed it."""
    user = user_of_id(session, row.user_id) if row.state == "allowed" and row.user_id is not None else None
    if user is None or not logins.is_active(session, user.tenant_id, user.id):
        return None
    if not logins.may_begin(session, client.id, user.id) or (client is ADMIN and proven is None):
        return None
    begun = logins.begin(
        session,
        pepper,
        tenant_id=user.tenant_id,
        user_id=user.id,
        client_id=client.id,
        jkt=proven,
        request_id=request_id,
    )
    row.state, row.login_id = "used", begun.login_id
    return begun


def _forget_old(session: Session) -> None:
    """What is over for as long as it lasted: until then a second use is known for one."""
    session.execute(delete(Authorization).where(Authorization.until < now() - timedelta(seconds=DEVICE_S)))


def _normal(user_code: str) -> str:
    """RFC 8628, section 6.1: whatever people type between the letters, in whatever case."""
    return re.sub(r"[^A-Z]", "", user_code[:64].upper())


def _fields(query: str) -> dict[str, str]:
    """The parameters of a query, each once. Raises BadRequest."""
    try:
        pairs = (
            parse_qsl(query, keep_blank_values=True, strict_parsing=True, errors="strict", max_num_fields=32)
            if query
            else []
        )
    except ValueError:
        raise BadRequest("the app's request is no query in UTF-8") from None
    if len({name for name, _ in pairs}) != len(pairs):
        raise BadRequest("the app's request has a parameter twice")
    return {name: value for name, value in pairs if value}


def _location(redirect_uri: str, told: Mapping[str, str], *, state: str | None, issuer: str) -> str:
    more = {**told, **({} if state is None else {"state": state}), "iss": issuer}  # RFC 9207
    return f"{redirect_uri}{'&' if '?' in redirect_uri else '?'}{urlencode(more)}"
