"""Proofs of possession (RFC 9449): whoever shows a bound token shows, with each request, that its key is theirs. Knows no framework.

A proof is for one method, one URL and one token, a minute old at most, and is taken once, by whichever process: there is no nonce to
be fetched first.
"""

from __future__ import annotations

import base64
import hashlib
import time
from collections.abc import Sequence
from typing import Any
from urllib.parse import unquote, urlsplit

from cloister_server.oauth.replays import Replayed, take_once
from cloister_server.oauth.signed import InvalidSigned, read_signed, thumbprint, verify
from cloister_server.service import Service

__all__ = ["InvalidProof", "proven_key"]

_OLDEST_S = 60
_CLOCKS_APART_S = 10
_DEFAULT_PORTS = {"http": 80, "https": 443}


class InvalidProof(Exception):
    """There is no proof, or one of something else; the message is for tests."""


def proven_key(
    service: Service, headers: Sequence[tuple[bytes, bytes]], *, method: str, path: str, token: bytes | None = None
) -> str:
    """The thumbprint (RFC 7638) of the key that this request, with this token if any, proves possession of. Raises InvalidProof."""
    given = [value for name, value in headers if name.lower() == b"dpop"]
    if len(given) != 1:
        raise InvalidProof("exactly one proof")
    try:
        signed = read_signed(given[0].decode("ascii"))
        header, claims = signed.header, signed.claims
        jwk = header.get("jwk")
        if header.keys() != {"typ", "alg", "jwk"} or header["typ"] != "dpop+jwt" or not isinstance(jwk, dict):
            raise InvalidProof("another header")
        verify(signed, jwk)
    except (InvalidSigned, UnicodeDecodeError):
        raise InvalidProof("not signed with the key that it shows") from None
    jti, issued, at = claims.get("jti"), claims.get("iat"), time.time()
    if not isinstance(jti, str) or not 0 < len(jti) <= 256:
        raise InvalidProof("without an id it could be shown again")
    if isinstance(issued, bool) or not isinstance(issued, (int, float)):
        raise InvalidProof("without a time")
    if not at - _OLDEST_S <= issued <= at + _CLOCKS_APART_S:
        raise InvalidProof("not of now")
    if claims.get("htm") != method or _normal(claims.get("htu")) != _expected(service, path):
        raise InvalidProof("for another request")
    if token is not None and claims.get("ath") != _text(hashlib.sha256(token).digest()):
        raise InvalidProof("for another token")
    key = thumbprint(jwk)
    try:
        take_once(service.engine, "dpop", key, jti, until=issued + _OLDEST_S + _CLOCKS_APART_S)
    except Replayed:
        raise InvalidProof("shown before") from None
    return key


def _expected(service: Service, path: str) -> tuple[str, str, int | None, str]:
    """Of a request to this path, which the server has decoded: the URL that the outside knows begins with the issuer's."""
    scheme, host, port, base = _normal(service.settings.issuer)
    return scheme, host, port, base.rstrip("/") + path


def _normal(url: Any) -> tuple[str, str, int | None, str]:
    """RFC 9449, section 4.3: without query and fragment, after the normalization of RFC 3986."""
    try:
        parts = urlsplit(url) if isinstance(url, str) else None
        if parts is None or not parts.hostname or "@" in parts.netloc:
            raise InvalidProof("no URL")
        port = parts.port or _DEFAULT_PORTS.get(parts.scheme)
        return parts.scheme, parts.hostname, port, unquote(parts.path, errors="strict") or "/"
    except ValueError:  # UnicodeDecodeError too
        raise InvalidProof("no URL") from None


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode()
