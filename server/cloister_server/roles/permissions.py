"""Permissions of private inference as a party reads them: signed by the platform for this party, for a minute at most.

The platform's keys are asked of it, and believed for a minute: where it cannot be asked, nobody is permitted. Whose key is known
waits for no answer of it. Knows HTTP as a client; no SQL.
"""

from __future__ import annotations

import contextlib
import ipaddress
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any
from urllib.parse import urlsplit

from cloister.wire.private_requests import LONGEST_PERMISSION_S, PERMISSION_TYPE
from cloister_server.errors import StartRefused
from cloister_server.oauth.fetching import WITHIN_S, Network, NotFetched
from cloister_server.oauth.issuer_keys import fetch_keys
from cloister_server.oauth.signed import InvalidSigned, read_signed, verify

__all__ = ["NotPermitted", "Permissions", "fetched_keys"]

_KEYS_KEPT_S = 60.0
_ASKED_APART_S = 1.0
"""Neither keys that nobody knows nor a platform that does not answer can make us ask more often."""
_CLOCKS_APART_S = 5
_WAIT_S = WITHIN_S + 1
_MOST_WAITING = 4
"""For a key that nobody knows, while those that are known are fresh: others are refused at once, and hold no thread."""

Keys = Mapping[str, Mapping[str, Any]]


class NotPermitted(Exception):
    """A permission that is none, or that nobody could verify; the message is for whoever showed it."""


class Permissions:
    """Those of one issuer for one audience. Threads may share it."""

    def __init__(self, issuer: str, audience: str, fetch: Callable[[], Keys]) -> None:
        self._issuer, self._audience, self._fetch = issuer, audience, fetch
        self._changed = threading.Condition()
        self._keys: Keys = {}
        self._is_asking, self._waiting = False, 0
        self._loaded, self._asked = -_KEYS_KEPT_S, -_ASKED_APART_S

    def subject(self, permission: str) -> str:
        """Whom it permits. Raises NotPermitted."""
        try:
            signed = read_signed(permission)
            kid = signed.header.get("kid")
            if signed.header != {"alg": "ES256", "typ": PERMISSION_TYPE, "kid": kid} or not isinstance(kid, str):
                raise InvalidSigned("another header than a permission's")
            key = self._key(kid)
            verify(signed, key)
            return self._claimed(signed.claims)
        except InvalidSigned:
            raise NotPermitted("this is no permission for this party now; get one from the platform") from None

    def _claimed(self, claims: Mapping[str, Any]) -> str:
        at = time.time()
        issued, expires, subject = claims.get("iat"), claims.get("exp"), claims.get("sub")
        if claims.get("iss") != self._issuer or claims.get("aud") != self._audience:
            raise InvalidSigned("of or for somebody else")
        if type(issued) is not int or type(expires) is not int or not isinstance(subject, str):
            raise InvalidSigned("claims of another type")
        if expires <= at or issued > at + _CLOCKS_APART_S or expires - issued > LONGEST_PERMISSION_S:
            raise InvalidSigned("not of now")
        return subject

    def _key(self, kid: str) -> Mapping[str, Any]:
        with self._changed:
            is_known = kid in self._keys and not self._is_stale()
            asks = not is_known and not self._is_asking and time.monotonic() - self._asked >= _ASKED_APART_S
            if asks:
                self._is_asking = True
            elif not is_known and self._is_asking and (self._is_stale() or self._waiting < _MOST_WAITING):
                self._waiting += 1
                self._changed.wait_for(lambda: not self._is_asking, _WAIT_S)
                self._waiting -= 1
        if asks:
            self._ask()
        with self._changed:
            if self._is_stale():
                raise NotPermitted("the platform's keys cannot be had, so nobody is permitted; try again in a moment")
            found = self._keys.get(kid)
        if found is None:
            raise InvalidSigned("a key of nobody's")
        return found

    def _is_stale(self) -> bool:
        return time.monotonic() - self._loaded >= _KEYS_KEPT_S

    def _ask(self) -> None:
        """Where it does not answer, the keys that are known hold for their minute."""
        at, keys = time.monotonic(), None
        try:
            with contextlib.suppress(NotFetched):
                keys = self._fetch()
        finally:
            with self._changed:
                if keys is not None:
                    self._keys, self._loaded = keys, at
                self._is_asking, self._asked = False, time.monotonic()
                self._changed.notify_all()


def fetched_keys(issuer: str) -> Callable[[], Keys]:
    """How to ask the platform for its keys, which raises NotFetched. Raises StartRefused where they could be changed on the way."""
    parts = urlsplit(issuer)
    is_plain = parts.scheme == "http" and _is_loopback(parts.hostname or "")
    if parts.scheme != "https" and not is_plain:
        raise StartRefused(
            f"the platform's URL {issuer!r} is not https, and its keys could be changed on the way; serve it by https"
        )

    def fetch() -> Keys:
        network: Network | None = "loopback" if is_plain else None
        found = fetch_keys(f"{issuer}/.well-known/jwks.json", network=network, algorithms=["ES256"])
        return {kid: key for kid, key in found.items() if isinstance(key, dict)}

    return fetch


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
