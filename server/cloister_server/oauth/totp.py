"""Codes of the second factor (RFC 6238: SHA-1, six digits, thirty seconds) and their secrets, sealed. Knows neither SQL nor HTTP."""

from __future__ import annotations

import base64
import hmac
import re
import secrets
import time
from urllib.parse import quote

from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

from cloister_privacy.sealing import Context, open_sealed, seal

__all__ = ["STEP_S", "base32", "code_at", "offered", "open_secret", "seal_secret", "step_of", "uri"]

STEP_S = 30
_DIGITS = 6
_STEPS_APART = 1
"""A clock may be wrong by as many steps (RFC 6238, section 5.2)."""
_SALT = 16
_CODE = re.compile(r"[0-9]{6}")


def code_at(secret: bytes, step: int) -> str:
    """RFC 4226, section 5.3."""
    digest = hmac.digest(secret, step.to_bytes(8), "sha1")
    at = digest[-1] & 15
    return f"{(int.from_bytes(digest[at : at + 4]) & 0x7FFFFFFF) % 10**_DIGITS:0{_DIGITS}d}"


def step_of(secret: bytes, code: str, *, after: int) -> int | None:
    """The time step, later than `after`, whose code this is; None where there is none. The same work for every code."""
    given = code if _CODE.fullmatch(code) else "------"
    this = int(time.time()) // STEP_S
    found = None
    for step in range(this - _STEPS_APART, this + _STEPS_APART + 1):
        is_same = hmac.compare_digest(code_at(secret, step), given)
        if is_same and step > after:
            found = step
    return found


def offered(pepper: bytes, user_id: str, invitation: bytes) -> bytes:
    """The secret that whoever holds this invitation is shown: the same each time, so that nothing of it is kept before it is used."""
    info = b"cloister.totp-offered/1\n" + user_id.encode()
    return HKDF(SHA256(), length=20, salt=invitation, info=info).derive(pepper)


def uri(secret: bytes, *, account: str, issuer: str) -> str:
    """What authenticator apps read (Google Authenticator's key URI format)."""
    return f"otpauth://totp/{quote(issuer, safe='')}:{quote(account, safe='')}?secret={base32(secret)}&issuer={quote(issuer, safe='')}"


def seal_secret(pepper: bytes, secret: bytes, *, tenant_id: str, user_id: str) -> bytes:
    """For the database: under a key that this secret alone is sealed by."""
    salt = secrets.token_bytes(_SALT)
    context = Context(tenant=tenant_id, kind="totp", object=user_id)
    return salt + bytes(seal(secret, key=_key(pepper, salt), context=context))


def open_secret(pepper: bytes, sealed: bytes, *, tenant_id: str, user_id: str) -> bytes:
    """Raises InvalidSeal where a bit of it was touched, or it is another's."""
    context = Context(tenant=tenant_id, kind="totp", object=user_id)
    return bytes(open_sealed(sealed[_SALT:], key=_key(pepper, sealed[:_SALT]), context=context))


def _key(pepper: bytes, salt: bytes) -> bytes:
    return HKDF(SHA256(), length=32, salt=salt, info=b"cloister.totp/1\n").derive(pepper)


def base32(secret: bytes) -> str:
    """As people type it into an authenticator."""
    return base64.b32encode(secret).decode().rstrip("=")
