"""The sealed format, and the keys that open it. Knows bytes, files of its own and `cryptography`; no SQL, no HTTP, no torch."""

from cloister_privacy.sealing.context import Context
from cloister_privacy.sealing.errors import (
    InvalidKeyId,
    InvalidSeal,
    InvalidWrap,
    KeyExists,
    KeyFileExposed,
    KeyMissing,
    KeyProviderError,
    KeystoreDamaged,
    KeystoreExists,
    KeystoreMissing,
    RootKeyRefused,
    UnsupportedSeal,
    WrongKey,
)
from cloister_privacy.sealing.local import LocalKeyProvider
from cloister_privacy.sealing.provider import KeyProvider
from cloister_privacy.sealing.root import new_key_file, read_key_file
from cloister_privacy.sealing.sealed import CHUNK_BYTES, new_key, open_into, open_sealed, plaintext_length, seal

__all__ = [
    "CHUNK_BYTES",
    "Context",
    "InvalidKeyId",
    "InvalidSeal",
    "InvalidWrap",
    "KeyExists",
    "KeyFileExposed",
    "KeyMissing",
    "KeyProvider",
    "KeyProviderError",
    "KeystoreDamaged",
    "KeystoreExists",
    "KeystoreMissing",
    "LocalKeyProvider",
    "RootKeyRefused",
    "UnsupportedSeal",
    "WrongKey",
    "new_key",
    "new_key_file",
    "open_into",
    "open_sealed",
    "plaintext_length",
    "read_key_file",
    "seal",
]
