"""What any holder of key-encryption keys can do: a file, an HSM or a cloud's KMS alike. Knows none of them."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Protocol

from cloister_privacy.sealing.context import Context
from cloister_privacy.sealing.errors import InvalidKeyId

__all__ = ["LARGEST_SECRET", "Destruction", "KeyProvider", "check_key_id", "check_secret"]

LARGEST_SECRET = 4096
"""Bytes that every provider wraps; AWS KMS takes no more."""
_KEY_ID = re.compile(r"[a-z][a-z0-9_-]*(\.[a-z0-9_-]+)*")


@dataclass(frozen=True, slots=True)
class Destruction:
    """What a receipt may say of a key that was destroyed here, and nothing beyond it."""

    waiting_days: int
    """How long the provider can still be told to give the key back; 0 where it is gone when `destroy_key` returns."""
    claim: str
    is_ours: bool = True
    """Whether the key is ours to destroy. False: it is a customer's, and `destroy_key` leaves it as it is."""


class KeyProvider(Protocol):
    """Keeps key-encryption keys by id and never gives one out. Every method raises KeyProviderError where it refuses.

    Of its kinds, ProviderUnavailable alone means that trying again may help; where a change was asked for, it may have
    been made. KeyWithheld alone means that the key, or our access to it, is not to be had: it was never there, or was
    taken away. Providers may be shared by threads. After a fork each process opens its own.
    """

    @property
    def destruction(self) -> Destruction:
        """How final `destroy_key` is."""
        ...

    def create_key(self, key_id: str) -> None:
        """Make a fresh key, durable before the return. Raises KeyExists; nothing replaces a key.

        Where the key is a customer's, nothing is made: it proves that the customer's key can be used.
        """
        ...

    def has_key(self, key_id: str) -> bool:
        """Whether the key is here and not destroyed. Raises KeyUnfit for one that is here and not as it was made."""
        ...

    def wrap(self, key_id: str, key: bytes, *, context: Context) -> bytes:
        """Encrypt a data key (or another secret of up to 4,096 bytes) under the named key, bound to its context."""
        ...

    def unwrap(self, key_id: str, wrapped: bytes, *, context: Context) -> bytes:
        """The secret that was wrapped. Raises InvalidWrap under another key or context, KeyMissing once destroyed."""
        ...

    def destroy_key(self, key_id: str) -> None:
        """Destroy the key: from the return on, what it wraps opens for nobody here. Raises KeyMissing.

        How final that is, and whether the key is ours to destroy, `destruction` says. KeyUnfit, where copies of it may be
        elsewhere that no receipt knows of.
        """
        ...


def check_key_id(key_id: str) -> None:
    """Raise InvalidKeyId for what is no key id. All providers take the same ones, but Vault none that ends with '-'."""
    if len(key_id) > 128 or not _KEY_ID.fullmatch(key_id):
        raise InvalidKeyId("a key id has 1 to 128 lower-case letters, digits, '_', '-' and single dots, a letter first")


def check_secret(secret: bytes) -> None:
    """Raise ValueError where a secret is empty or longer than every provider bears."""
    if not 1 <= len(secret) <= LARGEST_SECRET:
        raise ValueError(f"a secret to wrap has 1 to {LARGEST_SECRET} bytes, not {len(secret)}")
