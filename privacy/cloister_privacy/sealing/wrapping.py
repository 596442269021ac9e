"""A short secret under a long-lived key: each wrap derives a key of its own, so no count of wraps wears the key out."""

from __future__ import annotations

import hmac
import secrets

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister_privacy.sealing.derivation import COMMITMENT_BYTES, SALT_BYTES, derive
from cloister_privacy.sealing.errors import InvalidWrap

__all__ = ["unwrap_secret", "wrap_secret"]

_TAG_BYTES = 16
_LARGEST_SECRET = 2**16
_NONCE = bytes(12)
"""All zero: the derived key encrypts this one secret and nothing else."""


def wrap_secret(secret: bytes, *, key: bytes, line: bytes, binding: bytes) -> bytes:
    """`line | salt | commitment | AES-256-GCM(secret)`: `line` names the format, `binding` what the secret is for."""
    if not 1 <= len(secret) <= _LARGEST_SECRET:
        raise ValueError(f"a secret to wrap has 1 to {_LARGEST_SECRET} bytes, not {len(secret)}")
    salt = secrets.token_bytes(SALT_BYTES)
    enc_key, commitment = derive(key, salt=salt, info=line + binding)
    return line + salt + commitment + AESGCM(enc_key).encrypt(_NONCE, secret, line + binding)


def unwrap_secret(wrapped: bytes, *, key: bytes, line: bytes, binding: bytes) -> bytes:
    """The secret. Raises InvalidWrap where the bytes, the key, the format or the binding are not those of the wrap."""
    body = len(line) + SALT_BYTES + COMMITMENT_BYTES
    if not wrapped.startswith(line) or not body + _TAG_BYTES < len(wrapped) <= body + _LARGEST_SECRET + _TAG_BYTES:
        raise InvalidWrap()
    salt, commitment = wrapped[len(line) : len(line) + SALT_BYTES], wrapped[len(line) + SALT_BYTES : body]
    enc_key, expected = derive(key, salt=salt, info=line + binding)
    if not hmac.compare_digest(commitment, expected):
        raise InvalidWrap()
    try:
        return AESGCM(enc_key).decrypt(_NONCE, wrapped[body:], line + binding)
    except InvalidTag:
        raise InvalidWrap() from None
