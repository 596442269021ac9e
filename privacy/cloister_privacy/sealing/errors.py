"""What sealing and the key providers refuse. No message and no cause tells which byte or which check failed.

PrivacyError
├── InvalidSeal             changed, cut, extended, or of another key or context
│   └── UnsupportedSeal     a format that this release does not read
└── KeyProviderError        also itself: the keystore's files cannot be written
    ├── InvalidKeyId        not a key id
    ├── KeyMissing          never made here, or destroyed
    ├── KeyExists           nothing replaces a key
    ├── InvalidWrap         a wrapped key changed, or of another key or context
    ├── WrongKey            the root key is not this keystore's
    ├── RootKeyRefused      no usable key file or passphrase
    ├── KeyFileExposed      others can read the secret, or another user owns it
    ├── KeystoreExists      create found a keystore
    ├── KeystoreMissing     open found none
    └── KeystoreDamaged     a file of the keystore is not what was written
"""

from __future__ import annotations

from cloister_privacy.errors import PrivacyError

__all__ = [
    "InvalidKeyId",
    "InvalidSeal",
    "InvalidWrap",
    "KeyExists",
    "KeyFileExposed",
    "KeyMissing",
    "KeyProviderError",
    "KeystoreDamaged",
    "KeystoreExists",
    "KeystoreMissing",
    "RootKeyRefused",
    "UnsupportedSeal",
    "WrongKey",
]


class InvalidSeal(PrivacyError):
    """A sealed object that does not open. One message for every reason: which one it was is nobody's to learn."""

    def __init__(self, message: str | None = None) -> None:
        super().__init__(
            message
            or "the sealed object does not open: it was changed, or it belongs to another key or context; "
            "restore it from a copy, or seal its content anew"
        )


class UnsupportedSeal(InvalidSeal):
    """A sealed object of a version or suite that this release does not know; its first bytes say so to anyone."""


class KeyProviderError(PrivacyError):
    """The root of what a key provider refuses."""


class InvalidKeyId(KeyProviderError):
    """A key id that is not lower-case letters, digits, `_`, `-` and single dots, a letter first, 128 at most."""


class KeyMissing(KeyProviderError):
    """The provider has no such key: it was never made here, or it was destroyed."""


class KeyExists(KeyProviderError):
    """A key of this id exists, and nothing replaces a key."""


class InvalidWrap(KeyProviderError):
    """A wrapped key that does not open under this key and context."""

    def __init__(self) -> None:
        super().__init__(
            "the wrapped key does not open: it was changed, or it belongs to another key or context; "
            "restore the row that held it"
        )


class WrongKey(KeyProviderError):
    """The key file or passphrase is sound, but it is not the one that this keystore was made with."""


class RootKeyRefused(KeyProviderError):
    """A key file that is absent or malformed, a passphrase too short, or the one where the other is needed."""


class KeyFileExposed(KeyProviderError):
    """Others can read or write the secret, or another user owns it."""


class KeystoreExists(KeyProviderError):
    """There is a keystore already, and nothing overwrites one."""


class KeystoreMissing(KeyProviderError):
    """There is no keystore in this directory."""


class KeystoreDamaged(KeyProviderError):
    """A file of the keystore does not read as it was written."""
