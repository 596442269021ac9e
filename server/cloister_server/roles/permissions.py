"""Permissions of private inference as a party reads them: signed by the platform for this party, for a minute at most.

The platform's keys are asked of it, and believed for a minute: where it cannot be asked, nobody is permitted. Knows HTTP as a
client; no SQL.
"""

from __future__ import annotations

import contextlib
import ipaddress
import threading
import time
from collections.abc import Callable, Mapping
from typing import Any

import httpx2

from cloister.wire.private_requests import LONGEST_PERMISSION_S, PERMISSION_TYPE
from cloister_server.errors import StartRefused
from cloister_server.oauth.signed import InvalidSigned, read_signed, verify

__all__ = ["NotPermitted", "Permissions", "fetched_keys"]

_KEYS_KEPT_S = 60.0
_ASKED_APART_S = 1.0
"""Neither keys that nobody knows nor a platform that does not answer can make us ask more often."""
_CLOCKS_APART_S = 5
_TIMEOUT_S = 5.0

Keys = Mapping[str, Mapping[str, Any]]


class NotPermitted(Exception):
    """A permission that is none, or that nobody could verify; the message is for whoever showed it."""


class Permissions:
    """Those of one issuer for one audience. Threads may share it."""

    def __init__(self, issuer: str, audience: str, fetch: Callable[[], Keys]) -> None:
        self._issuer, self._audience, self._fetch = issuer, audience, fetch
        self._lock = threading.Lock()
        self._keys: Keys = {}
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
        with self._lock:
            at = time.monotonic()
            is_stale = at - self._loaded >= _KEYS_KEPT_S
            if (is_stale or kid not in self._keys) and at - self._asked >= _ASKED_APART_S:
                # Where it does not answer, those that are known hold for their minute.
                with contextlib.suppress(httpx2.HTTPError, ValueError, KeyError, TypeError):
                    self._keys, self._loaded, is_stale = self._fetch(), at, False
                self._asked = time.monotonic()
            found = None if is_stale else self._keys.get(kid)
        if is_stale:
            raise NotPermitted("the platform's keys cannot be had, so nobody is permitted; try again in a moment")
        if found is None:
            raise InvalidSigned("a key of nobody's")
        return found


def fetched_keys(issuer: str) -> Callable[[], Keys]:
    """How to ask the platform for its keys. Raises StartRefused where it would be asked in the clear over a network."""
    url = httpx2.URL(issuer)
    if url.scheme != "https" and not (url.scheme == "http" and _is_loopback(url.host)):
        raise StartRefused(
            f"the platform's URL {issuer!r} is not https, and its keys could be changed on the way; serve it by https"
        )

    def fetch() -> Keys:
        with httpx2.Client(timeout=_TIMEOUT_S, follow_redirects=False, trust_env=url.scheme == "https") as http:
            answer = http.get(f"{issuer}/.well-known/jwks.json")
            answer.raise_for_status()
            return {str(key["kid"]): key for key in answer.json()["keys"]}

    return fetch


def _is_loopback(host: str) -> bool:
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
