"""The one key derivation of the sealed format and of wrapped keys: a fresh key per salt, committed to."""

from __future__ import annotations

from cryptography.hazmat.primitives.hashes import SHA512
from cryptography.hazmat.primitives.kdf.hkdf import HKDF

__all__ = ["COMMITMENT_BYTES", "KEY_BYTES", "SALT_BYTES", "derive"]

KEY_BYTES = 32
SALT_BYTES = 32
COMMITMENT_BYTES = 32


def derive(key: bytes, *, salt: bytes, info: bytes) -> tuple[bytes, bytes]:
    """`enc_key || commitment = HKDF-SHA512(key, salt, info)`, 32 bytes each.

    AES-GCM alone does not commit to its key: one ciphertext can be made to open under two. Whoever compares the
    commitment first accepts a single (key, salt, info), up to a collision of SHA-512 cut to 256 bits.
    """
    if len(key) != KEY_BYTES:
        raise ValueError(f"a key has {KEY_BYTES} bytes, not {len(key)}")
    material = HKDF(algorithm=SHA512(), length=KEY_BYTES + COMMITMENT_BYTES, salt=salt, info=info).derive(key)
    return material[:KEY_BYTES], material[KEY_BYTES:]
