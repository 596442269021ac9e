"""Which app asks, by the credentials that came with its request; everybody else gets one and the same refusal. Knows SQL and keys.

An app has a public key (private_key_jwt: RFC 7523 as updated by rfc7523bis) or a secret, and never both; a public client has neither,
and says no more than its id.
"""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Mapping
from typing import Any

from authlib.oauth2.rfc6749.errors import UnauthorizedClientError
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding, PublicFormat
from sqlalchemy.orm import Session

from cloister_server import vault
from cloister_server.oauth import client_secrets
from cloister_server.oauth.authorizations import client_of_id
from cloister_server.oauth.form import TokenRequest, invalid_client
from cloister_server.oauth.replays import Replayed, take_once
from cloister_server.oauth.signed import InvalidSigned, read_public_key, read_signed, verify
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.queries import app_of_id, is_suspended
from cloister_server.store.session import reading
from cloister_server.store.tables import App

__all__ = ["authenticate_client"]

_CLIENT_ID = re.compile(r"ap_[0-9a-f]{32}")
_TYPES = (None, "jwt", "client-authentication+jwt", "application/client-authentication+jwt")
_LONGEST_LIFE_S = 300
_CLOCKS_APART_S = 5


def authenticate_client(service: Service, request: TokenRequest) -> App:
    """The app whose credentials these are. Whatever is wrong costs and reads the same: InvalidClientError.

    Raises UnauthorizedClientError, once it has shown who it is, where its tenant is suspended.
    """
    app, is_out = _authenticated(service, request)
    if is_out:
        raise UnauthorizedClientError("this client's tenant is suspended; ask the server's operator to resume it")
    return app


def _authenticated(service: Service, request: TokenRequest) -> tuple[App, bool]:
    """The app, and whether its tenant is suspended."""
    if request.assertion is not None:
        return _by_assertion(service, request.client_id, request.assertion.get_secret_value())
    secret = request.client_secret.get_secret_value()
    return _by_secret(service, request.client_id, secret) if secret else _public(service, request.client_id)


def _public(service: Service, client_id: str) -> tuple[App, bool]:
    """The public client of this id (RFC 6749, section 2.1): anybody can say that they are it."""
    app, is_out = _looked_up(service, client_of_id, client_id)
    if app is None or not app.public:
        raise invalid_client()
    return app, is_out


def _by_secret(service: Service, client_id: str, secret: str) -> tuple[App, bool]:
    if not _CLIENT_ID.fullmatch(client_id) or not client_secrets.is_well_formed(secret):
        raise invalid_client()
    pepper = vault.pepper(service)
    app, is_out = _looked_up(service, app_of_id, client_id)
    # Without a secret, or without an app, it is compared with what nobody has.
    stored = app.secret_mac if app and app.secret_mac else None
    if not client_secrets.matches(pepper, client_id, secret, stored=stored) or app is None:
        raise invalid_client()
    return app, is_out


def _by_assertion(service: Service, named: str, assertion: str) -> tuple[App, bool]:
    """Its signature is checked whether or not there is such an app; `named` is what the form said besides, or nothing."""
    try:
        signed = read_signed(assertion)
        client_id = signed.claims.get("sub")
        if not isinstance(client_id, str) or not _CLIENT_ID.fullmatch(client_id) or named not in ("", client_id):
            raise InvalidSigned("of nobody")
        nobodys = _NOBODYS_KEYS.get(str(signed.header.get("alg")))
        if nobodys is None:
            raise InvalidSigned("another algorithm")
        app, is_out = _looked_up(service, app_of_id, client_id)
        key = app.public_key if app is not None else None
        verify(signed, key if key is not None and key["kty"] == nobodys["kty"] else nobodys)
        if app is None:
            raise InvalidSigned("of nobody")
        jti, expires = _checked(signed.header, signed.claims, client_id, service.settings.issuer)
        take_once(service.engine, "client-assertion", client_id, jti, until=expires + _CLOCKS_APART_S)
    except (InvalidSigned, Replayed):
        raise invalid_client() from None
    return app, is_out


def _looked_up(
    service: Service, client_of: Callable[[Session, str], App | None], client_id: str
) -> tuple[App | None, bool]:
    """The app of this id, and whether its tenant is suspended: the same two statements whether or not there is one."""
    with reading(service.engine, ALL_TENANTS) as session:
        app = client_of(session, client_id)
        return app, is_suspended(session, "" if app is None else app.tenant_id)


def _checked(header: Mapping[str, Any], claims: Mapping[str, Any], client_id: str, issuer: str) -> tuple[str, float]:
    """The id and the end of an assertion that is for this server, of now and not for long. Raises InvalidSigned."""
    kind = header.get("typ")
    if (kind.lower() if isinstance(kind, str) else kind) not in _TYPES or not header.keys() <= {"alg", "typ", "kid"}:
        raise InvalidSigned("something else")
    # rfc7523bis: for its issuer, as a string, and for nobody besides; a token endpoint's URL could be another server's.
    if claims.get("iss") != client_id or claims.get("aud") != issuer:
        raise InvalidSigned("of or for somebody else")
    jti, at = claims.get("jti"), time.time()
    if not isinstance(jti, str) or not 0 < len(jti) <= 256:
        raise InvalidSigned("without an id it could be shown again")
    times = {name: claims[name] for name in ("exp", "iat", "nbf") if name in claims}
    if "exp" not in times or any(type(each) not in (int, float) for each in times.values()):
        raise InvalidSigned("times of another type")
    if max(times.get("iat", at), times.get("nbf", at)) > at + _CLOCKS_APART_S:
        raise InvalidSigned("not of now")
    # Some clients sign for an hour; whatever they say, one is taken for five minutes, from its beginning where it tells that.
    end = min(times["exp"], times["iat"] + _LONGEST_LIFE_S) if "iat" in times else times["exp"]
    if not at < end <= at + _LONGEST_LIFE_S + _CLOCKS_APART_S:
        raise InvalidSigned("too old, or too long")
    return jti, end


_NOBODYS_KEYS = {
    name: read_public_key(key.public_key().public_bytes(Encoding.PEM, PublicFormat.SubjectPublicKeyInfo))
    for key, names in (
        (ec.generate_private_key(ec.SECP256R1()), ("ES256",)),
        (Ed25519PrivateKey.generate(), ("Ed25519", "EdDSA")),
    )
    for name in names
}
"""Verified against where there is no app, or none with such a key: it costs what a wrong signature does."""
