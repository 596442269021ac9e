"""The AWS KMS key provider: one KMS key for each of ours, found by its alias. Knows what KMS does; not how it is called.

A wrapped key is `cloister.aws-kms/1\\n`, the KMS key's own id behind its length, and KMS' ciphertext.
"""

from __future__ import annotations

import re
import time
from typing import Any

from cloister_privacy.sealing.context import Context
from cloister_privacy.sealing.errors import KeyExists, KeyMissing, ProviderUnavailable
from cloister_privacy.sealing.kms_calls import (
    DESTROYED,
    KMSCalls,
    Refusal,
    encryption_context,
    key_missing,
    metadata_of,
    text_of,
)
from cloister_privacy.sealing.provider import Destruction, check_key_id

__all__ = ["AWSKMSKeyProvider"]

_LINE = b"cloister.aws-kms/1\n"
_PREFIX = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_TAG = "cloister:key-id"
_FIT = {
    "KeyManager": ("CUSTOMER",),
    "KeySpec": ("SYMMETRIC_DEFAULT",),
    "KeyUsage": ("ENCRYPT_DECRYPT",),
    "Origin": ("AWS_KMS", "AWS_CLOUDHSM"),  # imported material may be kept elsewhere
    "MultiRegion": (False,),  # a replica would outlive the destruction
}


class AWSKMSKeyProvider:
    """A KeyProvider over AWS KMS: `alias/PREFIX/KEY-ID`, a dot in the id being a slash, names the KMS key of an id.

    The context is the encryption context of every call, so it stands in CloudTrail in the clear: it is made of ids.
    """

    __slots__ = ("_kms", "_pending_days", "_prefix", "_timeout_s")

    def __init__(
        self,
        *,
        region: str,
        prefix: str = "cloister",
        pending_days: int = 7,
        endpoint_url: str | None = None,
        access_key_id: str | None = None,
        secret_access_key: str | None = None,
        session_token: str | None = None,
        timeout_s: float = 10.0,
    ) -> None:
        """Ask KMS for a key that need not be there: wrong credentials and a wrong endpoint are told at once.

        Without credentials here, AWS' own chain finds them (instance role, profile, environment). `timeout_s` bounds
        every call, its retries included. Raises ProviderMissing, ProviderUnavailable, AccessRefused or InvalidAnswer.
        """
        if not _PREFIX.fullmatch(prefix):
            raise ValueError("an alias prefix has 1 to 64 letters, digits, '_' and '-'")
        if not 7 <= pending_days <= 30:
            raise ValueError(f"AWS waits 7 to 30 days before it deletes a key, not {pending_days}")
        self._prefix, self._pending_days, self._timeout_s = prefix, pending_days, timeout_s
        self._kms = KMSCalls(
            line=_LINE,
            fit=_FIT,
            region=region,
            endpoint_url=endpoint_url,
            access_key_id=access_key_id,
            secret_access_key=secret_access_key,
            session_token=session_token,
            timeout_s=timeout_s,
        )
        self._describe("cloister")

    @property
    def destruction(self) -> Destruction:
        return Destruction(
            waiting_days=self._pending_days,
            claim=f"AWS KMS was told to delete the key. It refuses every use of it from then on, and deletes it after "
            f"{self._pending_days} days; until then an administrator of the AWS account can take that back.",
        )

    def __repr__(self) -> str:
        return f"AWSKMSKeyProvider({self._prefix!r})"

    def create_key(self, key_id: str) -> None:
        """Make a KMS key and its alias, and wait until KMS shows it. Raises KeyExists.

        A failure in between may leave a KMS key without an alias: nothing uses it, and its tag says what it was for.
        """
        check_key_id(key_id)
        there = self._describe(key_id)
        if there is not None and there["KeyState"] not in DESTROYED:
            raise _key_exists(key_id)
        if there is not None:  # the process died between the two steps of its destruction
            self._ask(key_id, "delete_alias", AliasName=self._alias(key_id))
        made = self._ask(
            key_id,
            "create_key",
            Description=f"Cloister key-encryption key {key_id}",
            KeySpec="SYMMETRIC_DEFAULT",
            KeyUsage="ENCRYPT_DECRYPT",
            MultiRegion=False,
            Tags=[{"TagKey": _TAG, "TagValue": key_id}],
        )
        kms_id = text_of(metadata_of(made), "KeyId")
        try:
            self._kms.call("create_alias", AliasName=self._alias(key_id), TargetKeyId=kms_id)
        except Refusal as exc:
            self._ask(key_id, "schedule_key_deletion", KeyId=kms_id, PendingWindowInDays=self._pending_days)
            raise (_key_exists(key_id) if exc.code == "AlreadyExistsException" else exc.named()) from None
        self._await(key_id)

    def has_key(self, key_id: str) -> bool:
        """Whether the key is here and not destroyed. Raises KeyUnfit for one that is disabled or of another kind."""
        check_key_id(key_id)
        try:
            self._kms.require_usable(self._alias(key_id), key_id)
        except KeyMissing:
            return False
        return True

    def wrap(self, key_id: str, key: bytes, *, context: Context) -> bytes:
        """Encrypt a secret of up to 4,096 bytes in KMS, bound to its context."""
        check_key_id(key_id)
        return self._kms.wrap(self._alias(key_id), key_id, key, context=encryption_context(context))

    def unwrap(self, key_id: str, wrapped: bytes, *, context: Context) -> bytes:
        """The secret that was wrapped. Raises InvalidWrap or KeyMissing."""
        check_key_id(key_id)
        return self._kms.unwrap(self._alias(key_id), key_id, wrapped, context=encryption_context(context))

    def destroy_key(self, key_id: str) -> None:
        """Schedule the KMS key's deletion, after which KMS refuses its use, and remove its alias. Raises KeyMissing.

        The key is deleted days later, as `destruction` says. KMS goes on for some seconds where it has not heard yet.
        """
        check_key_id(key_id)
        there = self._describe(key_id)
        if there is None:
            raise key_missing(key_id)
        if there["KeyState"] not in DESTROYED:
            self._kms.require_fit(there, key_id)
            kms_id = text_of(there, "KeyId")
            self._ask(key_id, "schedule_key_deletion", KeyId=kms_id, PendingWindowInDays=self._pending_days)
        self._ask(key_id, "delete_alias", AliasName=self._alias(key_id))

    def _alias(self, key_id: str) -> str:
        """Aliases take no dots, and key ids no slashes."""
        return f"alias/{self._prefix}/{key_id.replace('.', '/')}"

    def _describe(self, key_id: str) -> dict[str, Any] | None:
        return self._kms.describe(self._alias(key_id))

    def _ask(self, key_id: str, operation: str, **fields: Any) -> dict[str, Any]:
        return self._kms.ask(self._alias(key_id), key_id, operation, **fields)

    def _await(self, key_id: str) -> None:
        """KMS tells of a new alias everywhere within seconds, and not at once."""
        give_up = time.monotonic() + self._timeout_s
        while self._describe(key_id) is None:
            if time.monotonic() > give_up:
                raise ProviderUnavailable(f"KMS made the key {key_id!r} and does not show it yet; look for it later")
            time.sleep(0.2)


def _key_exists(key_id: str) -> KeyExists:
    return KeyExists(f"KMS has a key {key_id!r} already, and nothing replaces a key; take another id")
