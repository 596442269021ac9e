"""What sealing and the key providers refuse. No message and no cause tells which byte or which check failed.

PrivacyError
├── InvalidSeal             changed, cut, extended, or of another key or context
│   └── UnsupportedSeal     a format that this release does not read
├── LengthMismatch          a stream to seal is shorter or longer than was declared
├── ArenaFull               the limit of an arena leaves no room
└── KeyProviderError        also itself: the keystore's files cannot be written
    ├── InvalidKeyId        not a key id
    ├── KeyWithheld         the provider answered, and the key is not to be had: trying again does not help
    │   ├── KeyMissing      never made here, or destroyed
    │   ├── KeyUnfit        a key whose attributes or state are not those of a key that may be used
    │   └── AccessRefused   a PIN, a token or credentials that are wrong, or may not do this
    ├── KeyExists           nothing replaces a key
    ├── InvalidWrap         a wrapped key changed, or of another key or context
    ├── WrongKey            the root key is not this keystore's
    ├── RootKeyRefused      no usable key file or passphrase
    ├── KeyFileExposed      others can read the secret, or another user owns it
    ├── KeystoreExists      create found a keystore
    ├── KeystoreMissing     open found none
    ├── KeystoreDamaged     a file of the keystore is not what was written
    ├── ProviderUnavailable no answer, or none in time: trying again may help
    ├── ProviderMissing     the software that speaks to the provider is not installed
    └── InvalidAnswer       the provider answered with something that is no answer
"""

from __future__ import annotations

from cloister_privacy.errors import PrivacyError

__all__ = [
    "AccessRefused",
    "ArenaFull",
    "InvalidAnswer",
    "InvalidKeyId",
    "InvalidSeal",
    "InvalidWrap",
    "KeyExists",
    "KeyFileExposed",
    "KeyMissing",
    "KeyProviderError",
    "KeyUnfit",
    "KeyWithheld",
    "KeystoreDamaged",
    "KeystoreExists",
    "KeystoreMissing",
    "LengthMismatch",
    "ProviderMissing",
    "ProviderUnavailable",
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


class LengthMismatch(PrivacyError):
    """A stream that is not of the length that its header has told already; what was written of it is no object."""


class ArenaFull(PrivacyError):
    """An arena that has leased all that its limit allows."""


class KeyProviderError(PrivacyError):
    """The root of what a key provider refuses."""


class InvalidKeyId(KeyProviderError):
    """A key id that is not lower-case letters, digits, `_`, `-` and single dots, a letter first, 128 at most."""


class KeyWithheld(KeyProviderError):
    """This key is not to be had, whoever asks again: it is not there, was taken away, or we have no access to it.

    Only its kinds are raised. A key that its holder revokes is one of them, and an outage never is. Of credentials that
    are wrong nobody here can tell whether they were withdrawn or never right.
    """


class KeyMissing(KeyWithheld):
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


class KeyUnfit(KeyWithheld):
    """A key of this id is there, but it can be exported, is disabled, or is not of the kind that the provider uses."""


class ProviderUnavailable(KeyProviderError):
    """The provider cannot be reached, or did not answer in time; what was asked for may still have been done."""


class ProviderMissing(KeyProviderError):
    """A library or a package that this provider needs is not installed, or is not one."""


class AccessRefused(KeyWithheld):
    """The provider answered, and refuses us: a wrong PIN, a bad token, credentials that may not do this."""


class InvalidAnswer(KeyProviderError):
    """The provider answered with something that is no answer to what it was asked."""
