"""The one verifier of access tokens, ours and those of other issuers, for every route and protocol. Says who asks, and nothing of
what they may.

A token that verified is remembered for a minute at most. Whether whoever it is of is still there, and neither the token, the key
that signed it nor its issuer revoked, is looked up every second, and at once where this very process revoked something. The tenant
is the one in a row of ours and never one that a token claims.
"""

from __future__ import annotations

import hashlib
import re
import threading
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from time import monotonic, time
from typing import Any, Literal
from weakref import WeakKeyDictionary

from joserfc.errors import JoseError
from joserfc.jwk import ECKey
from sqlalchemy import Engine, event
from sqlalchemy.orm import Session

from cloister_server import vault
from cloister_server.errors import Unauthenticated
from cloister_server.oauth.access_tokens import (
    ADMIN_SCOPE,
    ALGORITHM,
    USER_ID,
    AccessToken,
    key_id_of,
    read_token,
)
from cloister_server.oauth.dpop import InvalidProof, proven_key
from cloister_server.oauth.foreign import ForeignToken, Rules, issuer_named_in, read_foreign
from cloister_server.oauth.issuer_keys import IssuerKeys, Key
from cloister_server.oauth.signed import ALGORITHMS, InvalidSigned
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS, for_tenants
from cloister_server.store.identities import standing_of_login
from cloister_server.store.issuers import issuers, standing_of_subject
from cloister_server.store.queries import standing_of, token_keys
from cloister_server.store.session import reading

__all__ = [
    "authenticate",
    "forget_after",
    "inspect",
    "recall",
    "request_id_of",
]

Headers = Sequence[tuple[bytes, bytes]]

_TOKEN = re.compile(rb"[A-Za-z0-9_-]{1,2048}\.[A-Za-z0-9_-]{1,8192}\.[A-Za-z0-9_-]{1,1024}")
_TOKEN_KEPT_S = 60.0
_STANDING_KEPT_S = 1.0
_KEYS_KEPT_S = 60.0
_KEY_LOADS_APART_S = 1.0
"""Tokens of keys that we do not know cannot make us look for new ones more often."""
_ASKING_AT_ONCE = 16
"""Tokens whose standing is looked up at a time. However many requests come with one, it is looked up once."""
_MOST_KEPT = 4096


def authenticate(
    service: Service, headers: Headers, *, method: str, path: str, address: str | None = None
) -> Principal:
    """Who sends this request, by its token, and by its proof where the token is bound to a key.

    Raises Unauthenticated, in one sentence whatever is wrong with the token and in another whatever is with the proof.
    """
    token, is_bound = _given(service, headers)
    read, standing = _memory(service).authenticate(service, token)
    if is_bound != (read.jkt is not None):
        raise _refusal(service)  # a bound token as if it were a bearer's, or the other way round
    if is_bound:
        try:
            if proven_key(service, headers, method=method, path=path, token=token) != read.jkt:
                raise InvalidProof("another key than the token's")
        except InvalidProof:
            raise _no_proof(service) from None
    return _principal(read, standing, request_id_of(headers), address)


def recall(service: Service, headers: Headers, *, address: str | None = None) -> Principal | None:
    """The same from memory alone, where that is fresh enough; None where something must be verified, as a proof always must.

    None, too, to one who asks in good time before it is not fresh any more: `authenticate` looks it up for all who ask meanwhile.
    """
    token, is_bound = _given(service, headers)
    read, standing = (None, None) if is_bound else _memory(service).recall(token)
    if read is None or standing is None:
        _require_form(service, token)
        return None
    if read.jkt is not None:
        return None
    return _principal(read, standing, request_id_of(headers), address)


def inspect(service: Service, token: str, *, within: Session | None = None) -> tuple[AccessToken, str]:
    """What a token of ours says and the tenant of its client, both looked up anew, `within` this transaction where one is open.

    Raises Unauthenticated unless it is valid now.
    """
    encoded = token.encode("ascii", "replace")
    _require_form(service, encoded)
    read = _memory(service).verify(service, encoded, within=within)
    with reading(service.engine, ALL_TENANTS) if within is None else nullcontext(within) as session:
        standing = _standing(session, read)
    if standing is None:
        raise _refusal(service)
    return read, standing[0]


def forget_after(session: Session, service: Service) -> None:
    """Once this transaction is committed, look up all keys and the standing of every token anew in this process."""
    event.listen(session, "after_commit", lambda _: _memory(service).forget(), once=True)


@dataclass(frozen=True, slots=True)
class _Seen:
    """A token that verified, and until when, by the monotonic clock, that need not be done again."""

    token: AccessToken | ForeignToken
    until: float


_Standing = tuple[str, str]
"""Of which tenant and who whoever acts is."""


@dataclass(slots=True)
class _LookedUp:
    """Whose a token was, and when that was asked; and whether somebody asks again already, as in `store.shares`."""

    standing: _Standing
    at: float
    is_renewing: bool = False


class _Memory:
    """What one process remembers for one deployment. Holds no secret: tokens by their hash, keys by their public half."""

    def __init__(self) -> None:
        self._lock = threading.RLock()
        self._asking = tuple(threading.Lock() for _ in range(_ASKING_AT_ONCE))
        self._tokens: OrderedDict[bytes, _Seen] = OrderedDict()
        self._standing: OrderedDict[bytes, _LookedUp] = OrderedDict()
        self._forgotten = 0
        self._keys: Mapping[str, ECKey] = {}
        self._keys_loaded = -_KEYS_KEPT_S
        self._issuers: Mapping[str, Rules] = {}
        self._issuers_loaded = -_STANDING_KEPT_S
        self._issuer_keys = IssuerKeys()

    def authenticate(self, service: Service, token: bytes) -> tuple[AccessToken | ForeignToken, _Standing]:
        digest = hashlib.sha256(token).digest()
        read = self._remembered(digest)
        if read is None:
            _require_form(service, token)
            read = self._verify_any(service, token)
            self._keep(self._tokens, digest, _Seen(read, monotonic() + _TOKEN_KEPT_S))
        with self._asking[digest[0] % _ASKING_AT_ONCE]:
            standing = self._known_standing(digest)  # of many that came with one token one has asked by now
            return read, standing or self._look_up(service, digest, read)

    def recall(self, token: bytes) -> tuple[AccessToken | ForeignToken | None, _Standing | None]:
        digest = hashlib.sha256(token).digest()
        return self._remembered(digest), self._known_standing(digest, may_renew=True)

    def _known_standing(self, digest: bytes, *, may_renew: bool = False) -> _Standing | None:
        """What was looked up within a second; where somebody renews it, to `authenticate` within half of one."""
        with self._lock:
            found = self._standing.get(digest)
            age_s = 0.0 if found is None else monotonic() - found.at
            if found is None or age_s >= _STANDING_KEPT_S:
                return None
            # The first of those who would renew it goes to `authenticate`, which then does not take it for fresh.
            if age_s >= _STANDING_KEPT_S / 2 and found.is_renewing is not may_renew:
                found.is_renewing = True
                return None
            return found.standing

    def _look_up(self, service: Service, digest: bytes, read: AccessToken | ForeignToken) -> _Standing:
        asked_at, forgotten = monotonic(), self._forgotten
        with reading(service.engine, ALL_TENANTS) as session:
            standing = _standing(session, read)
        with self._lock:
            self._standing.pop(digest, None)
            if standing is not None and forgotten == self._forgotten:  # else this was read before something was revoked
                self._keep(self._standing, digest, _LookedUp(standing, asked_at))
        if standing is None:
            raise _refusal(service)
        return standing

    def forget(self) -> None:
        with self._lock:
            self._forgotten += 1
            self._standing.clear()
            self._keys_loaded = -_KEYS_KEPT_S
            self._issuers_loaded = -_STANDING_KEPT_S

    def _verify_any(self, service: Service, token: bytes) -> AccessToken | ForeignToken:
        """A token of ours, or of an issuer that is on the list, as that one's must be. Raises Unauthenticated, always the same.

        No transaction is open here: the issuer may have to be asked for its keys.
        """
        try:
            issuer = issuer_named_in(token)
            if issuer == service.settings.issuer:
                return self.verify(service, token)
            rules = self._known_issuers(service).get(issuer) if issuer is not None else None
            if rules is None:
                raise InvalidSigned("an issuer that is not on the list")
            return read_foreign(rules, token, key_of=lambda key_id: self._key_of(rules, key_id))
        except (InvalidSigned, ValueError):
            raise _refusal(service) from None

    def verify(self, service: Service, token: bytes, *, within: Session | None = None) -> AccessToken:
        """What a token says that is ours, of now, and signed. Raises Unauthenticated."""
        try:
            key_id = key_id_of(token)
            key = self._known_keys(service, kept_s=_KEYS_KEPT_S, within=within).get(key_id)
            if key is None:
                key = self._known_keys(service, kept_s=_KEY_LOADS_APART_S, within=within).get(key_id)
            if key is None:
                raise ValueError("a key of nobody's")
            return read_token(service.settings.issuer, token, key)
        except (JoseError, ValueError):
            raise _refusal(service) from None

    def _key_of(self, rules: Rules, key_id: str) -> Key | None:
        return self._issuer_keys.find(
            rules.id, key_id, jwks_uri=rules.jwks_uri, network=rules.network, algorithms=rules.algorithms
        )

    def _remembered(self, digest: bytes) -> AccessToken | ForeignToken | None:
        with self._lock:
            seen = self._tokens.get(digest)
        if seen is None or seen.until <= monotonic() or seen.token.expires <= time():
            return None
        return seen.token

    def _keep(self, kept: OrderedDict[Any, Any], key: object, value: object) -> None:
        with self._lock:
            kept[key] = value
            kept.move_to_end(key)
            while len(kept) > _MOST_KEPT:
                kept.popitem(last=False)

    def _known_keys(self, service: Service, *, kept_s: float, within: Session | None) -> Mapping[str, ECKey]:
        with self._lock:
            if monotonic() < self._keys_loaded + kept_s:
                return self._keys
        loaded_at = monotonic()

        def load(session: Session) -> list[vault.SigningSecret]:
            return vault.open_signing_keys(session, service.keys, token_keys(session))

        secrets = service.read(for_tenants(vault.SYSTEM), load) if within is None else load(within)
        # The public half comes from the wrapped private one: a key that someone wrote into the table opens nothing.
        keys = {each.id: _public(each) for each in secrets}
        with self._lock:
            self._keys, self._keys_loaded = keys, loaded_at
        return keys

    def _known_issuers(self, service: Service) -> Mapping[str, Rules]:
        with self._lock:
            if monotonic() < self._issuers_loaded + _STANDING_KEPT_S:
                return self._issuers
            forgotten = self._forgotten
        loaded_at = monotonic()
        with reading(service.engine, ALL_TENANTS) as session:
            listed = {row.url: Rules.of(row) for row in session.scalars(issuers())}
        self._issuer_keys.forget_all_but({each.id for each in listed.values()})
        with self._lock:
            if forgotten == self._forgotten:
                self._issuers, self._issuers_loaded = listed, loaded_at
        return listed


def _standing(session: Session, read: AccessToken | ForeignToken) -> _Standing | None:
    """Whoever acts, if they still may act at all."""
    if isinstance(read, ForeignToken):
        return standing_of_subject(session, read.issuer_id, read.subject)
    by = {"client_id": read.client_id, "key_id": read.key_id, "jti": read.jti}
    if read.login_id is None:
        tenant_id = standing_of(session, **by)
    else:
        tenant_id = standing_of_login(session, read.login_id, user_id=read.subject, **by)
    return None if tenant_id is None else (tenant_id, read.subject)


def _principal(
    read: AccessToken | ForeignToken, standing: _Standing, request_id: str, address: str | None = None
) -> Principal:
    tenant_id, principal_id = standing
    kind: Literal["app", "user"] = "user" if USER_ID.fullmatch(principal_id) else "app"
    may_administer = isinstance(read, AccessToken) and read.scope == ADMIN_SCOPE
    return Principal(tenant_id, principal_id, kind, request_id, address, may_administer)


def _public(secret: vault.SigningSecret) -> ECKey:
    public = ECKey.import_key(secret.secret).as_dict(private=False)
    return ECKey.import_key({**public, "kid": secret.id, "alg": ALGORITHM, "use": "sig"})


def _given(service: Service, headers: Headers) -> tuple[bytes, bool]:
    """The token, and whether it is sent as one that is bound to a key."""
    given = [value for name, value in headers if name.lower() == b"authorization"]
    scheme, _, token = given[0].partition(b" ") if len(given) == 1 else (b"", b"", b"")
    scheme = scheme.lower()
    if scheme not in (b"bearer", b"dpop"):
        raise _refusal(service, was_given=bool(given))
    return token, scheme == b"dpop"


def _require_form(service: Service, token: bytes) -> None:
    if not _TOKEN.fullmatch(token):
        raise _refusal(service)


def request_id_of(headers: Headers) -> str:
    """The edge has put exactly one valid id there."""
    return next((value.decode("ascii") for name, value in headers if name.lower() == b"x-request-id"), "")


def _refusal(service: Service, *, was_given: bool = True) -> Unauthenticated:
    """RFC 6750, section 3.1: whoever sent nothing learns where to begin, and not that something was wrong with it."""
    error = ', error="invalid_token"' if was_given else ""
    return Unauthenticated(
        "there is no valid access token; get one at /oauth/token and send it as Authorization: Bearer, or as "
        "Authorization: DPoP with a proof where its token_type says so",
        challenge=f'Bearer realm="cloister"{error}, {_whose(service)}, DPoP algs="{" ".join(ALGORITHMS)}"{error}',
    )


def _no_proof(service: Service) -> Unauthenticated:
    return Unauthenticated(
        "the token is bound to a key, and the DPoP header does not prove that this is yours; send a fresh proof (RFC 9449) with "
        f"htm, htu (under {service.settings.issuer}), iat of this minute, ath and a jti never used before",
        challenge=f'DPoP error="invalid_dpop_proof", algs="{" ".join(ALGORITHMS)}", {_whose(service)}',
    )


def _whose(service: Service) -> str:
    return (
        f'resource_metadata="{service.settings.issuer}/.well-known/oauth-protected-resource"'  # RFC 9728, section 5.1
    )


_memories: WeakKeyDictionary[Engine, _Memory] = WeakKeyDictionary()
"""One memory for each deployment that this process serves; it goes when the engine goes."""
_memories_lock = threading.Lock()


def _memory(service: Service) -> _Memory:
    with _memories_lock:
        found = _memories.get(service.engine)
        if found is None:
            found = _memories[service.engine] = _Memory()
        return found
