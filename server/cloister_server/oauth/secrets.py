"""Client secrets: 256 random bits with a prefix and a checksum, so that scanners find them and garbage is refused early."""

from __future__ import annotations

import hashlib
import hmac
import secrets
import zlib

__all__ = ["is_well_formed", "mac_of", "matches", "new_secret"]

_PREFIX = "cls_"


def new_secret() -> str:
    """`cls_`, 43 characters of 256 random bits, 8 of a CRC-32 that proves nothing but a typing error."""
    body = secrets.token_urlsafe(32)
    return f"{_PREFIX}{body}{_checksum(body)}"


def is_well_formed(secret: str) -> bool:
    """Whether this can be a secret of ours at all, before any database is asked."""
    body = secret[len(_PREFIX) : -8]
    return secret.startswith(_PREFIX) and len(secret) == 55 and secret.isascii() and secret[-8:] == _checksum(body)


def mac_of(secret: str, *, pepper: bytes) -> bytes:
    """What is kept of a secret: HMAC-SHA-256 under a key that is not in the database in the clear."""
    return hmac.new(pepper, secret.encode(), hashlib.sha256).digest()


def matches(secret: str, mac: bytes, *, pepper: bytes) -> bool:
    return hmac.compare_digest(mac_of(secret, pepper=pepper), mac)


def _checksum(body: str) -> str:
    return f"{zlib.crc32(body.encode()):08x}"
