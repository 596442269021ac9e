"""The one verifier of access tokens, for every route and protocol. Says who asks, and nothing of what they may.

A token that verified is remembered for a minute at most; that its app still exists is looked up every second, so a
removed app is out within one. The tenant is the one in the app's row and never one that a token claims.
"""

from __future__ import annotations

import hashlib
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey
from sqlalchemy import Engine

from cloister_server import vault
from cloister_server.errors import Unauthenticated
from cloister_server.oauth.server import ALGORITHM, TYPE
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.queries import app_of_id
from cloister_server.store.session import reading

__all__ = ["authenticate", "recall"]

Headers = Sequence[tuple[bytes, bytes]]

_TOKEN = re.compile(rb"[A-Za-z0-9_-]{1,512}\.[A-Za-z0-9_-]{1,2048}\.[A-Za-z0-9_-]{1,256}")
_TOKEN_KEPT_S = 60.0
_APP_KEPT_S = 1.0
_KEY_KEPT_S = 60.0
_KEY_LOADS_APART_S = 1.0
"""Tokens of keys that we do not know cannot make us look for new ones more often."""
_MOST_KEPT = 4096
_CLOCKS_APART_S = 5
_LONGEST_LIFE_S = 600


def authenticate(service: Service, headers: Headers) -> Principal:
    """Who sends this request, by its bearer token. Raises Unauthenticated, in one sentence whatever is wrong with it."""
    return _verifier(service).authenticate(service, _bearer(headers), _request_id(headers))


def recall(service: Service, headers: Headers) -> Principal | None:
    """The same from memory alone, where it is fresh enough; None where the token must be verified or the app looked up."""
    return _verifier(service).recall(_bearer(headers), _request_id(headers))


@dataclass(frozen=True, slots=True)
class _Seen:
    """A token that verified: whose it is, and until when that need not be done again (wall clock, monotonic clock)."""

    client_id: str
    expires: float
    until: float


class _Verifier:
    """What one process remembers for one deployment. Holds no secret: tokens by their hash, keys by their public half."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens: OrderedDict[bytes, _Seen] = OrderedDict()
        self._apps: OrderedDict[str, tuple[str, float]] = OrderedDict()
        self._key: ECKey | None = None
        self._key_loaded = -_KEY_KEPT_S

    def authenticate(self, service: Service, token: bytes, request_id: str) -> Principal:
        known = self.recall(token, request_id)
        if known is not None:
            return known
        client_id = self._remembered(token)
        if client_id is None:
            client_id, expires = self._verify(service, token)
            seen = _Seen(client_id, expires, time.monotonic() + _TOKEN_KEPT_S)
            self._keep(self._tokens, hashlib.sha256(token).digest(), seen)
        asked_at = time.monotonic()
        with reading(service.engine) as session:
            app = app_of_id(session, client_id)
        if app is None:
            raise _refusal()
        self._keep(self._apps, client_id, (app.tenant_id, asked_at + _APP_KEPT_S))
        return Principal(tenant_id=app.tenant_id, id=client_id, kind="app", request_id=request_id)

    def recall(self, token: bytes, request_id: str) -> Principal | None:
        client_id = self._remembered(token)
        with self._lock:
            tenant_id, until = self._apps.get(client_id or "", ("", 0.0))
        if client_id is None or until <= time.monotonic():
            return None
        return Principal(tenant_id=tenant_id, id=client_id, kind="app", request_id=request_id)

    def _remembered(self, token: bytes) -> str | None:
        with self._lock:
            seen = self._tokens.get(hashlib.sha256(token).digest())
        if seen is None or seen.until <= time.monotonic() or seen.expires <= time.time():
            return None
        return seen.client_id

    def _keep(self, kept: OrderedDict[Any, Any], key: object, value: object) -> None:
        with self._lock:
            kept[key] = value
            kept.move_to_end(key)
            while len(kept) > _MOST_KEPT:
                kept.popitem(last=False)

    def _verify(self, service: Service, token: bytes) -> tuple[str, float]:
        """Client id and expiry of a token that is ours, of now, and signed. Raises Unauthenticated."""
        key = self._current_key(service, kept_s=_KEY_KEPT_S)
        try:
            return _claims(service.settings.issuer, token, key)
        except (JoseError, ValueError):
            newer = self._current_key(service, kept_s=_KEY_LOADS_APART_S)
        try:
            if newer is key:
                raise ValueError("the same key says the same")
            return _claims(service.settings.issuer, token, newer)
        except (JoseError, ValueError):
            raise _refusal() from None

    def _current_key(self, service: Service, *, kept_s: float) -> ECKey:
        with self._lock:
            if self._key is not None and time.monotonic() < self._key_loaded + kept_s:
                return self._key
        with reading(service.engine) as session:
            secret = vault.signing_key(session, service.keys, "token")
        # The public half comes from the wrapped private one: a key that someone wrote into the table opens nothing.
        public = ECKey.import_key(secret.secret).as_dict(private=False)
        key = ECKey.import_key({**public, "kid": secret.id, "alg": ALGORITHM, "use": "sig"})
        with self._lock:
            self._key, self._key_loaded = key, time.monotonic()
        return key


def _claims(issuer: str, token: bytes, key: ECKey) -> tuple[str, float]:
    """Raises JoseError or ValueError unless this is exactly such a token as `server` issues."""
    read = jwt.decode(token, key, algorithms=[ALGORITHM])
    if read.header != {"alg": ALGORITHM, "typ": TYPE, "kid": key.kid}:
        raise ValueError("another header than ours")
    claims, at = read.claims, time.time()
    client_id, issued, expires = claims.get("client_id"), claims.get("iat"), claims.get("exp")
    if claims.get("iss") != issuer or claims.get("aud") != issuer or claims.get("sub") != client_id:
        raise ValueError("of or for somebody else")
    if type(issued) is not int or type(expires) is not int or not isinstance(client_id, str):
        raise ValueError("claims of another type")
    if expires <= at or issued > at + _CLOCKS_APART_S or expires - issued > _LONGEST_LIFE_S:
        raise ValueError("not of now")
    return client_id, expires


def _bearer(headers: Headers) -> bytes:
    given = [value for name, value in headers if name.lower() == b"authorization"]
    scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    if scheme.lower() != b"bearer" or not _TOKEN.fullmatch(token):
        raise _refusal()
    return token


def _request_id(headers: Headers) -> str:
    """The edge has put exactly one valid id there."""
    return next((value.decode("ascii") for name, value in headers if name.lower() == b"x-request-id"), "")


def _refusal() -> Unauthenticated:
    return Unauthenticated(
        "there is no valid access token; get one at /oauth/token and send it as Authorization: Bearer"
    )


_verifiers: WeakKeyDictionary[Engine, _Verifier] = WeakKeyDictionary()
"""One memory for each deployment that this process serves; it goes when the engine goes."""
_verifiers_lock = threading.Lock()


def _verifier(service: Service) -> _Verifier:
    with _verifiers_lock:
        return _verifiers.setdefault(service.engine, _Verifier())
