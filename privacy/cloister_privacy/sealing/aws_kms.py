"""The AWS KMS key provider: one KMS key for each of ours, found by its alias. Knows boto3; nothing of files or tokens.

A wrapped key is `cloister.aws-kms/1\\n`, the KMS key's own id behind its length, and KMS' ciphertext.
"""

from __future__ import annotations

import base64
import os
import re
import time
from collections.abc import Callable
from typing import Any

from cloister_privacy.sealing.context import Context, length_prefixed
from cloister_privacy.sealing.errors import (
    AccessRefused,
    InvalidAnswer,
    InvalidWrap,
    KeyExists,
    KeyMissing,
    KeyProviderError,
    KeyUnfit,
    ProviderMissing,
    ProviderUnavailable,
)
from cloister_privacy.sealing.provider import Destruction, check_key_id, check_secret
from cloister_privacy.sealing.remote import call_within, check_address, keep_silent

__all__ = ["AWSKMSKeyProvider"]

_LINE = b"cloister.aws-kms/1\n"
_PREFIX = re.compile(r"[a-zA-Z0-9_-]{1,64}")
_TAG = "cloister:key-id"
_LARGEST_CIPHERTEXT = 6144
"""Of a CiphertextBlob, by KMS' own documentation of Decrypt."""
_FIT = {
    "KeyManager": ("CUSTOMER",),
    "KeySpec": ("SYMMETRIC_DEFAULT",),
    "KeyUsage": ("ENCRYPT_DECRYPT",),
    "Origin": ("AWS_KMS", "AWS_CLOUDHSM"),  # imported material may be kept elsewhere
    "MultiRegion": (False,),  # a replica would outlive the destruction
}
_DESTROYED = ("PendingDeletion", "PendingReplicaDeletion")
_WRAP_REFUSED = ("InvalidCiphertextException", "IncorrectKeyException", "InvalidKeyUsageException")
_ACCESS_REFUSED = (
    "AccessDenied",
    "AccessDeniedException",
    "ExpiredTokenException",
    "IncompleteSignature",
    "InvalidClientTokenId",
    "InvalidSignatureException",
    "MissingAuthenticationToken",
    "NotAuthorized",
    "OptInRequired",
    "SignatureDoesNotMatch",
    "UnrecognizedClientException",
)
_UNAVAILABLE = (
    "DependencyTimeoutException",
    "KMSInternalException",
    "KeyUnavailableException",
    "LimitExceededException",
    "RequestExpired",
    "ServiceUnavailable",
    "ThrottlingException",
)


class AWSKMSKeyProvider:
    """A KeyProvider over AWS KMS: `alias/PREFIX/KEY-ID`, a dot in the id being a slash, names the KMS key of an id.

    The context is the encryption context of every call, so it stands in CloudTrail in the clear: it is made of ids.
    """

    __slots__ = ("_client_of", "_make_client", "_pending_days", "_prefix", "_timeout_s")

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
        if not re.fullmatch(r"[a-z0-9-]{1,64}", region):
            raise ValueError("a region is lower-case letters, digits and '-', as in eu-central-1")
        if not _PREFIX.fullmatch(prefix):
            raise ValueError("an alias prefix has 1 to 64 letters, digits, '_' and '-'")
        if not 7 <= pending_days <= 30:
            raise ValueError(f"AWS waits 7 to 30 days before it deletes a key, not {pending_days}")
        if (access_key_id is None) != (secret_access_key is None):
            raise ValueError("give both access_key_id and secret_access_key, or neither")
        if endpoint_url is not None:
            check_address(endpoint_url)
        self._prefix, self._pending_days, self._timeout_s = prefix, pending_days, timeout_s

        def make_client() -> Any:
            boto3, config = _boto3(), _config(timeout_s)
            session = boto3.session.Session(
                aws_access_key_id=access_key_id,
                aws_secret_access_key=secret_access_key,
                aws_session_token=session_token,
                region_name=region,
            )
            return session.client("kms", endpoint_url=endpoint_url, config=config)

        self._make_client: Callable[[], Any] = make_client
        self._client_of: tuple[int, Any] = (0, None)
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
        if there is not None and there["KeyState"] not in _DESTROYED:
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
        kms_id = _text(_metadata(made), "KeyId")
        try:
            self._call("create_alias", AliasName=self._alias(key_id), TargetKeyId=kms_id)
        except _Refusal as exc:
            self._ask(key_id, "schedule_key_deletion", KeyId=kms_id, PendingWindowInDays=self._pending_days)
            raise (_key_exists(key_id) if exc.code == "AlreadyExistsException" else exc.named()) from None
        self._await(key_id)

    def has_key(self, key_id: str) -> bool:
        """Whether the key is here and not destroyed. Raises KeyUnfit for one that is disabled or of another kind."""
        check_key_id(key_id)
        try:
            self._fit(key_id)
        except KeyMissing:
            return False
        return True

    def wrap(self, key_id: str, key: bytes, *, context: Context) -> bytes:
        """Encrypt a secret of up to 4,096 bytes in KMS, bound to its context."""
        check_key_id(key_id)
        check_secret(key)
        kms_id = self._fit(key_id)
        answer = self._ask(
            key_id, "encrypt", KeyId=kms_id, Plaintext=key, EncryptionContext=_encryption_context(context)
        )
        return _LINE + length_prefixed(kms_id) + _bytes(answer, "CiphertextBlob", _LARGEST_CIPHERTEXT)

    def unwrap(self, key_id: str, wrapped: bytes, *, context: Context) -> bytes:
        """The secret that was wrapped. Raises InvalidWrap or KeyMissing."""
        check_key_id(key_id)
        kms_id = self._fit(key_id)
        head = _LINE + length_prefixed(kms_id)
        sealed = wrapped[len(head) :]
        if wrapped[: len(head)] != head or not 1 <= len(sealed) <= _LARGEST_CIPHERTEXT:
            raise InvalidWrap()
        answer = self._ask(
            key_id, "decrypt", KeyId=kms_id, CiphertextBlob=sealed, EncryptionContext=_encryption_context(context)
        )
        return _bytes(answer, "Plaintext", 4096)

    def destroy_key(self, key_id: str) -> None:
        """Schedule the KMS key's deletion, after which KMS refuses its use, and remove its alias. Raises KeyMissing.

        The key is deleted days later, as `destruction` says. KMS goes on for some seconds where it has not heard yet.
        """
        check_key_id(key_id)
        there = self._describe(key_id)
        if there is None:
            raise _key_missing(key_id)
        if there["KeyState"] not in _DESTROYED:
            _check_fit(there, key_id)
            kms_id = _text(there, "KeyId")
            self._ask(key_id, "schedule_key_deletion", KeyId=kms_id, PendingWindowInDays=self._pending_days)
        self._ask(key_id, "delete_alias", AliasName=self._alias(key_id))

    def _alias(self, key_id: str) -> str:
        """Aliases take no dots, and key ids no slashes."""
        return f"alias/{self._prefix}/{key_id.replace('.', '/')}"

    def _describe(self, key_id: str) -> dict[str, Any] | None:
        try:
            answer = self._call("describe_key", KeyId=self._alias(key_id))
        except _Refusal as exc:
            if exc.code == "NotFoundException":
                return None
            raise exc.named() from None
        metadata = _metadata(answer)
        _text(metadata, "KeyState")
        return metadata

    def _fit(self, key_id: str) -> str:
        """The KMS key's own id. Raises KeyMissing, KeyUnfit or ProviderUnavailable unless it can be used."""
        there = self._describe(key_id)
        if there is None or there["KeyState"] in _DESTROYED:
            raise _key_missing(key_id)
        _check_fit(there, key_id)
        if there["KeyState"] in ("Creating", "Updating", "Unavailable"):
            raise ProviderUnavailable(f"KMS says that the key {key_id!r} is {there['KeyState'].lower()}; try again")
        if there["KeyState"] != "Enabled":
            raise KeyUnfit(f"the key {key_id!r} is disabled in KMS; enable it there if it is to be used again")
        return _text(there, "KeyId")

    def _await(self, key_id: str) -> None:
        """KMS tells of a new alias everywhere within seconds, and not at once."""
        give_up = time.monotonic() + self._timeout_s
        while self._describe(key_id) is None:
            if time.monotonic() > give_up:
                raise ProviderUnavailable(f"KMS made the key {key_id!r} and does not show it yet; look for it later")
            time.sleep(0.2)

    def _ask(self, key_id: str, operation: str, **fields: Any) -> dict[str, Any]:
        """One call about a key. Raises the named error whatever goes wrong."""
        try:
            return self._call(operation, **fields)
        except _Refusal as exc:
            if exc.code in ("NotFoundException", "KMSInvalidStateException", "DisabledException"):
                self._fit(key_id)  # says which it is, unless it changed back meanwhile
            raise exc.named() from None

    def _call(self, operation: str, **fields: Any) -> dict[str, Any]:
        """One call. Raises _Refusal with AWS' own code, or the named error where there was no answer of KMS."""
        exceptions = _exceptions()
        try:
            act = getattr(self._client(), operation)
            answer = call_within(self._timeout_s, lambda: act(**fields), provider="AWS KMS")
        except exceptions.ClientError as exc:
            raise _Refusal(exc) from None
        except (
            exceptions.NoCredentialsError,
            exceptions.PartialCredentialsError,
            exceptions.CredentialRetrievalError,
            exceptions.ProfileNotFound,
        ):
            raise AccessRefused("there are no AWS credentials; give the process a role, or set them") from None
        except (exceptions.HTTPClientError, exceptions.ConnectionError) as exc:
            raise ProviderUnavailable(
                f"AWS KMS cannot be reached ({type(exc).__name__}); see to the network and the endpoint, then try again"
            ) from None
        except exceptions.BotoCoreError as exc:
            raise InvalidAnswer(
                f"AWS KMS' answer could not be read ({type(exc).__name__}); see to the endpoint"
            ) from None
        except (ValueError, TypeError, AttributeError, KeyError, RecursionError):  # botocore's, over what is no answer
            raise InvalidAnswer("AWS KMS' answer could not be read; see what listens at the endpoint") from None
        if not isinstance(answer, dict):
            raise InvalidAnswer("AWS KMS' answer is no object; see what listens at the endpoint")
        return answer

    def _client(self) -> Any:
        """Of this process: a child of a fork would share its parent's connections."""
        pid, client = self._client_of
        if pid != os.getpid():
            client = self._make_client()
            self._client_of = (os.getpid(), client)
        return client


class _Refusal(Exception):
    """What KMS answered instead; its message is left behind, since nobody knows what it quotes."""

    def __init__(self, error: Any) -> None:
        told = error.response if isinstance(error.response, dict) else {}
        code = told.get("Error", {}).get("Code") if isinstance(told.get("Error"), dict) else None
        self.code = code if isinstance(code, str) and re.fullmatch(r"[A-Za-z.]{1,64}", code) else "unknown"
        status = told.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        self.status = status if isinstance(status, int) else 0
        super().__init__(self.code)

    def named(self) -> KeyProviderError:
        if self.code in _WRAP_REFUSED:
            return InvalidWrap()
        if self.code in _ACCESS_REFUSED:
            return AccessRefused(
                f"AWS KMS refuses our credentials or their permissions ({self.code}); see docs/keys.md"
            )
        if self.code in _UNAVAILABLE or self.status >= 500 or self.status == 429:
            return ProviderUnavailable(f"AWS KMS could not do it ({self.code}, status {self.status}); try again")
        if self.code == "unknown":
            return InvalidAnswer(f"what answered with status {self.status} is not AWS KMS; see to the endpoint")
        return KeyProviderError(f"AWS KMS refused ({self.code}); see docs/keys.md for what the provider asks of it")


def _boto3() -> Any:
    try:
        import boto3
    except ImportError:
        raise ProviderMissing("AWS KMS needs boto3; run `pip install 'cloister[aws]'`") from None
    keep_silent("boto3", "botocore", "urllib3")
    return boto3


def _exceptions() -> Any:
    _boto3()
    import botocore.exceptions

    return botocore.exceptions


def _config(timeout_s: float) -> Any:
    """Three tries within the time; the environment names no other endpoint than the caller's."""
    import botocore.config

    return botocore.config.Config(
        connect_timeout=min(3.0, timeout_s),
        read_timeout=timeout_s / 2,
        retries={"total_max_attempts": 3, "mode": "standard"},
        ignore_configured_endpoint_urls=True,
    )


def _encryption_context(context: Context) -> dict[str, str]:
    """The exact bytes that every provider binds, and the fields by name for policies and for who reads the trail."""
    return {
        "cloister:context": base64.b64encode(context.to_bytes()).decode("ascii"),
        "cloister:tenant": context.tenant,
        "cloister:kind": context.kind,
        "cloister:object": context.object,
    }


def _check_fit(metadata: dict[str, Any], key_id: str) -> None:
    for name, values in _FIT.items():
        if metadata.get(name) not in values:
            raise KeyUnfit(
                f"the KMS key of {key_id!r} was not made here: its {name} is not {' or '.join(map(str, values))}; "
                "see in KMS where it came from"
            )


def _metadata(answer: dict[str, Any]) -> dict[str, Any]:
    metadata = answer.get("KeyMetadata")
    if not isinstance(metadata, dict):
        raise InvalidAnswer("AWS KMS' answer describes no key; see what listens at the endpoint")
    return metadata


def _text(metadata: dict[str, Any], name: str) -> str:
    value = metadata.get(name)
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]{1,255}", value):
        raise InvalidAnswer(f"AWS KMS' answer has no {name}; see what listens at the endpoint")
    return value


def _bytes(answer: dict[str, Any], name: str, limit: int) -> bytes:
    value = answer.get(name)
    if not isinstance(value, bytes) or not 1 <= len(value) <= limit:
        raise InvalidAnswer(f"AWS KMS' answer has no {name}; see what listens at the endpoint")
    return value


def _key_exists(key_id: str) -> KeyExists:
    return KeyExists(f"KMS has a key {key_id!r} already, and nothing replaces a key; take another id")


def _key_missing(key_id: str) -> KeyMissing:
    return KeyMissing(f"there is no key {key_id!r} in KMS: it was destroyed, or this is another account or region")
