"""The one verifier of access tokens, for every route and protocol. Says who asks, and nothing of what they may.

A token that verified is remembered for a minute at most. Whether its app is still there, and neither the token nor the key that
signed it revoked, is looked up every second, and at once where this very process revoked something. The tenant is the one in
the app's row and never one that a token claims.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
import time
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

from joserfc import jwt
from joserfc.errors import JoseError
from joserfc.jwk import ECKey
from sqlalchemy import Engine, event
from sqlalchemy.orm import Session

from cloister_server import vault
from cloister_server.errors import Unauthenticated
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.queries import standing_of, token_keys
from cloister_server.store.session import reading

__all__ = ["ALGORITHM", "TYPE", "AccessToken", "authenticate", "forget_after", "inspect", "recall"]

Headers = Sequence[tuple[bytes, bytes]]

ALGORITHM = "ES256"
TYPE = "at+jwt"  # RFC 9068
LONGEST_LIFE_S = 600

_TOKEN = re.compile(rb"[A-Za-z0-9_-]{1,512}\.[A-Za-z0-9_-]{1,2048}\.[A-Za-z0-9_-]{1,256}")
_TOKEN_KEPT_S = 60.0
_STANDING_KEPT_S = 1.0
_KEYS_KEPT_S = 60.0
_KEY_LOADS_APART_S = 1.0
"""Tokens of keys that we do not know cannot make us look for new ones more often."""
_MOST_KEPT = 4096
_CLOCKS_APART_S = 5


@dataclass(frozen=True, slots=True)
class AccessToken:
    """What a token of ours says, and who signed it."""

    client_id: str
    key_id: str
    jti: str
    issued: int
    expires: int


def authenticate(service: Service, headers: Headers) -> Principal:
    """Who sends this request, by its bearer token. Raises Unauthenticated, in one sentence whatever is wrong with it."""
    return _memory(service).authenticate(service, _bearer(service, headers), _request_id(headers))


def recall(service: Service, headers: Headers) -> Principal | None:
    """The same from memory alone, where it is fresh enough; None where the token must be verified or its standing looked up."""
    return _memory(service).recall(_bearer(service, headers), _request_id(headers))


def inspect(service: Service, token: str) -> tuple[AccessToken, str]:
    """What a token says and the tenant of its client, both looked up anew. Raises Unauthenticated unless it is valid now."""
    encoded = token.encode("ascii", "replace")
    if not _TOKEN.fullmatch(encoded):
        raise _refusal(service)
    read = _memory(service).verify(service, encoded)
    with reading(service.engine) as session:
        tenant_id = standing_of(session, read.client_id, key_id=read.key_id, jti=read.jti)
    if tenant_id is None:
        raise _refusal(service)
    return read, tenant_id


def forget_after(session: Session, service: Service) -> None:
    """Once this transaction is committed, look up the standing of every token anew in this process."""
    event.listen(session, "after_commit", lambda _: _memory(service).forget(), once=True)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A token that verified, and until when, by the monotonic clock, that need not be done again."""

    token: AccessToken
    until: float


class _Memory:
    """What one process remembers for one deployment. Holds no secret: tokens by their hash, keys by their public half."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._tokens: OrderedDict[bytes, _Seen] = OrderedDict()
        self._standing: OrderedDict[bytes, tuple[str, float]] = OrderedDict()
        self._forgotten = 0
        self._keys: Mapping[str, ECKey] = {}
        self._keys_loaded = -_KEYS_KEPT_S

    def authenticate(self, service: Service, token: bytes, request_id: str) -> Principal:
        known = self.recall(token, request_id)
        if known is not None:
            return known
        digest = hashlib.sha256(token).digest()
        read = self._remembered(digest)
        if read is None:
            read = self.verify(service, token)
            self._keep(self._tokens, digest, _Seen(read, time.monotonic() + _TOKEN_KEPT_S))
        asked_at, forgotten = time.monotonic(), self._forgotten
        with reading(service.engine) as session:
            tenant_id = standing_of(session, read.client_id, key_id=read.key_id, jti=read.jti)
        if tenant_id is None:
            raise _refusal(service)
        if forgotten == self._forgotten:  # else this was read before something was revoked
            self._keep(self._standing, digest, (tenant_id, asked_at + _STANDING_KEPT_S))
        return Principal(tenant_id=tenant_id, id=read.client_id, kind="app", request_id=request_id)

    def recall(self, token: bytes, request_id: str) -> Principal | None:
        digest = hashlib.sha256(token).digest()
        read = self._remembered(digest)
        with self._lock:
            tenant_id, until = self._standing.get(digest, ("", 0.0))
        if read is None or until <= time.monotonic():
            return None
        return Principal(tenant_id=tenant_id, id=read.client_id, kind="app", request_id=request_id)

    def forget(self) -> None:
        with self._lock:
            self._forgotten += 1
            self._standing.clear()

    def verify(self, service: Service, token: bytes) -> AccessToken:
        """What a token says that is ours, of now, and signed. Raises Unauthenticated."""
        try:
            key_id = _key_id(token)
            key = self._known_keys(service, kept_s=_KEYS_KEPT_S).get(key_id)
            if key is None:
                key = self._known_keys(service, kept_s=_KEY_LOADS_APART_S).get(key_id)
            if key is None:
                raise ValueError("a key of nobody's")
            return _claims(service.settings.issuer, token, key)
        except (JoseError, ValueError):
            raise _refusal(service) from None

    def _remembered(self, digest: bytes) -> AccessToken | None:
        with self._lock:
            seen = self._tokens.get(digest)
        if seen is None or seen.until <= time.monotonic() or seen.token.expires <= time.time():
            return None
        return seen.token

    def _keep(self, kept: OrderedDict[Any, Any], key: object, value: object) -> None:
        with self._lock:
            kept[key] = value
            kept.move_to_end(key)
            while len(kept) > _MOST_KEPT:
                kept.popitem(last=False)

    def _known_keys(self, service: Service, *, kept_s: float) -> Mapping[str, ECKey]:
        with self._lock:
            if time.monotonic() < self._keys_loaded + kept_s:
                return self._keys
        loaded_at = time.monotonic()
        with reading(service.engine) as session:
            secrets = [vault.open_signing_key(session, service.keys, row) for row in token_keys(session)]
        # The public half comes from the wrapped private one: a key that someone wrote into the table opens nothing.
        keys = {each.id: _public(each) for each in secrets}
        with self._lock:
            self._keys, self._keys_loaded = keys, loaded_at
        return keys


def _public(secret: vault.SigningSecret) -> ECKey:
    public = ECKey.import_key(secret.secret).as_dict(private=False)
    return ECKey.import_key({**public, "kid": secret.id, "alg": ALGORITHM, "use": "sig"})


def _key_id(token: bytes) -> str:
    """The key that a token names, before anything of it is believed. Raises ValueError."""
    head = token.partition(b".")[0]
    header = json.loads(base64.urlsafe_b64decode(head + b"=" * (-len(head) % 4)))
    kid = header.get("kid") if isinstance(header, dict) else None
    if not isinstance(kid, str):
        raise ValueError("no key is named")
    return kid


def _claims(issuer: str, token: bytes, key: ECKey) -> AccessToken:
    """Raises JoseError or ValueError unless this is exactly such a token as `server` issues."""
    read = jwt.decode(token, key, algorithms=[ALGORITHM])
    if read.header != {"alg": ALGORITHM, "typ": TYPE, "kid": key.kid}:
        raise ValueError("another header than ours")
    claims, at = read.claims, time.time()
    client_id, jti, issued, expires = (claims.get(name) for name in ("client_id", "jti", "iat", "exp"))
    if claims.get("iss") != issuer or claims.get("aud") != issuer or claims.get("sub") != client_id:
        raise ValueError("of or for somebody else")
    if type(issued) is not int or type(expires) is not int or not isinstance(client_id, str):
        raise ValueError("claims of another type")
    if not isinstance(jti, str) or not 0 < len(jti) <= 64:
        raise ValueError("a token without an id could not be revoked")
    if expires <= at or issued > at + _CLOCKS_APART_S or expires - issued > LONGEST_LIFE_S:
        raise ValueError("not of now")
    return AccessToken(client_id, str(key.kid), jti, issued, expires)


def _bearer(service: Service, headers: Headers) -> bytes:
    given = [value for name, value in headers if name.lower() == b"authorization"]
    scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    if scheme.lower() != b"bearer" or not _TOKEN.fullmatch(token):
        raise _refusal(service, was_given=bool(given))
    return token


def _request_id(headers: Headers) -> str:
    """The edge has put exactly one valid id there."""
    return next((value.decode("ascii") for name, value in headers if name.lower() == b"x-request-id"), "")


def _refusal(service: Service, *, was_given: bool = True) -> Unauthenticated:
    """RFC 6750, section 3.1: whoever sent nothing learns where to begin, and not that something was wrong with it."""
    error = ', error="invalid_token"' if was_given else ""
    metadata = f"{service.settings.issuer}/.well-known/oauth-protected-resource"  # RFC 9728, section 5.1
    return Unauthenticated(
        "there is no valid access token; get one at /oauth/token and send it as Authorization: Bearer",
        challenge=f'Bearer realm="cloister"{error}, resource_metadata="{metadata}"',
    )


_memories: WeakKeyDictionary[Engine, _Memory] = WeakKeyDictionary()
"""One memory for each deployment that this process serves; it goes when the engine goes."""
_memories_lock = threading.Lock()


def _memory(service: Service) -> _Memory:
    with _memories_lock:
        return _memories.setdefault(service.engine, _Memory())
