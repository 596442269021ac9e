"""What the formats that are sealed for a public key share: HPKE's suite, and keys as lines of text that tell a mistyped one."""

from __future__ import annotations

import base64
import hashlib
import re

from cryptography.hazmat.primitives.asymmetric.x25519 import X25519PrivateKey, X25519PublicKey
from cryptography.hazmat.primitives.hpke import AEAD, KDF, KEM, Suite

__all__ = ["KEY_BYTES", "SUITE", "body_of", "is_public_key", "line_of"]

SUITE = Suite(KEM.X25519, KDF.HKDF_SHA256, AEAD.AES_256_GCM)
"""RFC 9180: DHKEM(X25519, HKDF-SHA256), HKDF-SHA256, AES-256-GCM."""

KEY_BYTES = 32
_CHECKSUM_BYTES = 4
_FIELD = 2**255 - 19
"""The prime of Curve25519 (RFC 7748, section 4.1): a public key is a number below it, in one spelling."""


def line_of(prefix: str, body: bytes) -> str:
    """The prefix, and base64url of the body and its checksum."""
    return prefix + base64.urlsafe_b64encode(body + _checksum(prefix, body)).rstrip(b"=").decode("ascii")


def body_of(prefix: str, line: str, *, length: int) -> bytes | None:
    """The body in a line, at whose end a line feed may stand; None where it is not of this prefix and length, or was mistyped."""
    match = re.fullmatch(re.escape(prefix) + r"([A-Za-z0-9_-]+)\n?", line)
    if match is None or len(match[1]) != -(-(length + _CHECKSUM_BYTES) * 4 // 3):
        return None
    decoded = base64.urlsafe_b64decode(match[1] + "=" * (-len(match[1]) % 4))
    body = decoded[:length]
    # Compared as it is written: the last character of base64url may have bits to spare.
    return body if line_of(prefix, body) == line.removesuffix("\n") else None


def is_public_key(public: bytes) -> bool:
    """Whether it is a key that somebody can hold: in its one spelling, and of no small order, for which no secret is one."""
    if len(public) != KEY_BYTES or int.from_bytes(public, "little") >= _FIELD:
        return False
    try:
        X25519PrivateKey.generate().exchange(X25519PublicKey.from_public_bytes(public))
    except ValueError:  # the shared secret is all zero, as with any scalar: they are multiples of the cofactor
        return False
    return True


def _checksum(prefix: str, body: bytes) -> bytes:
    """Finds a mistyped character; 4 bytes of a hash tell nothing useful of a key of 32."""
    return hashlib.sha256(prefix.encode("ascii") + body).digest()[:_CHECKSUM_BYTES]
