"""What any holder of key-encryption keys can do: a file, an HSM or a cloud's KMS alike."""

from __future__ import annotations

from typing import Protocol

from cloister_privacy.sealing.context import Context

__all__ = ["KeyProvider"]


class KeyProvider(Protocol):
    """Keeps key-encryption keys by id and never gives one out. Every method raises KeyProviderError where it refuses."""

    def create_key(self, key_id: str) -> None:
        """Make a fresh key, durable before the return. Raises KeyExists; nothing replaces a key."""
        ...

    def has_key(self, key_id: str) -> bool:
        """Whether the key is here and not destroyed."""
        ...

    def wrap(self, key_id: str, key: bytes, *, context: Context) -> bytes:
        """Encrypt a data key (or another short secret) under the named key, bound to its context."""
        ...

    def unwrap(self, key_id: str, wrapped: bytes, *, context: Context) -> bytes:
        """The secret that was wrapped. Raises InvalidWrap under another key or context, KeyMissing once destroyed."""
        ...

    def destroy_key(self, key_id: str) -> None:
        """Destroy the key, durably before the return: what it wraps never opens again. Raises KeyMissing."""
        ...
