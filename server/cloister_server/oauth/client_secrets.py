"""Client secrets: 256 random bits that spot a typo by themselves, kept as a peppered MAC. Knows neither SQL nor HTTP.

`cls_`, 64 hex digits of randomness, 8 of their CRC-32: scanners find it, and garbage is refused before any database read.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import zlib

from pydantic import SecretStr

__all__ = ["is_well_formed", "mac", "matches", "new_secret"]

_FORM = re.compile(r"cls_([0-9a-f]{64})([0-9a-f]{8})")
_LINE = b"cloister.client-secret/1\n"
_NOBODYS_MAC = secrets.token_bytes(32)
"""Compared where there is no client, so that an unknown client costs what a wrong secret does."""


def new_secret() -> SecretStr:
    """A fresh secret, to be shown once."""
    body = secrets.token_hex(32)
    return SecretStr(f"cls_{body}{_checksum(body)}")


def is_well_formed(secret: str) -> bool:
    """Whether this could be a secret of ours at all; says nothing of whose."""
    match = _FORM.fullmatch(secret)
    return match is not None and hmac.compare_digest(match[2], _checksum(match[1]))


def mac(pepper: bytes, client_id: str, secret: str) -> bytes:
    """What is stored: bound to the client's id, so that a row's MAC is of no use in another row."""
    return hmac.digest(pepper, _LINE + f"{client_id}\n{secret}".encode(), hashlib.sha256)


def matches(pepper: bytes, client_id: str, secret: str, *, stored: bytes | None) -> bool:
    """Whether this is the client's secret, in one time for all answers; `stored` is None where there is no such client."""
    is_same = hmac.compare_digest(mac(pepper, client_id, secret), stored or _NOBODYS_MAC)
    return is_same and stored is not None


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"
