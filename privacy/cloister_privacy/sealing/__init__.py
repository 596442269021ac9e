"""The sealed format, and the keys that open it. Knows bytes, files of its own and `cryptography`; no SQL, no HTTP, no torch.

Tensors out of sealed objects, which need torch, are in `cloister_privacy.sealing.tensors`. Key providers
other than the local one come with `open_provider`, and with the libraries that they need.
"""

from cloister_privacy.sealing.arena import Arena, Lease
from cloister_privacy.sealing.chunks import CHUNK_BYTES
from cloister_privacy.sealing.context import Context
from cloister_privacy.sealing.errors import (
    AccessRefused,
    ArenaFull,
    InvalidAnswer,
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
    KeyUnfit,
    KeyWithheld,
    LengthMismatch,
    ProviderMissing,
    ProviderUnavailable,
    RootKeyRefused,
    UnsupportedSeal,
    WrongKey,
)
from cloister_privacy.sealing.local import LocalKeyProvider
from cloister_privacy.sealing.opening import ProviderKind, open_provider
from cloister_privacy.sealing.provider import Destruction, KeyProvider
from cloister_privacy.sealing.reader import SealedReader
from cloister_privacy.sealing.recovery import RecoveryKey
from cloister_privacy.sealing.root import new_key_file, read_key_file
from cloister_privacy.sealing.sealed import new_key, open_into, open_sealed, plaintext_length, seal
from cloister_privacy.sealing.streams import open_stream, seal_stream

__all__ = [
    "CHUNK_BYTES",
    "AccessRefused",
    "Arena",
    "ArenaFull",
    "Context",
    "Destruction",
    "InvalidAnswer",
    "InvalidKeyId",
    "InvalidSeal",
    "InvalidWrap",
    "KeyExists",
    "KeyFileExposed",
    "KeyMissing",
    "KeyProvider",
    "KeyProviderError",
    "KeyUnfit",
    "KeyWithheld",
    "KeystoreDamaged",
    "KeystoreExists",
    "KeystoreMissing",
    "Lease",
    "LengthMismatch",
    "LocalKeyProvider",
    "ProviderKind",
    "ProviderMissing",
    "ProviderUnavailable",
    "RecoveryKey",
    "RootKeyRefused",
    "SealedReader",
    "UnsupportedSeal",
    "WrongKey",
    "new_key",
    "new_key_file",
    "open_into",
    "open_provider",
    "open_sealed",
    "open_stream",
    "plaintext_length",
    "read_key_file",
    "seal",
    "seal_stream",
]
