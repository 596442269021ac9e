"""Calls to AWS KMS, within a time, and the named error for whatever goes wrong. Knows boto3; not whose a key is, nor its name."""

from __future__ import annotations

import base64
import os
import re
from collections.abc import Callable, Mapping
from typing import Any

from cloister_privacy.sealing.context import Context, length_prefixed
from cloister_privacy.sealing.errors import (
    AccessRefused,
    InvalidAnswer,
    InvalidWrap,
    KeyMissing,
    KeyProviderError,
    KeyUnfit,
    ProviderMissing,
    ProviderUnavailable,
)
from cloister_privacy.sealing.provider import check_secret
from cloister_privacy.sealing.remote import call_within, check_address, keep_silent

__all__ = ["DESTROYED", "KMSCalls", "Refusal", "encryption_context", "key_missing", "metadata_of", "text_of"]

DESTROYED = ("PendingDeletion", "PendingReplicaDeletion")
"""The states of a key that KMS was told to delete."""

_LARGEST_CIPHERTEXT = 6144
"""Of a CiphertextBlob, by KMS' own documentation of Decrypt."""
_BUSY = ("Creating", "Updating", "Unavailable")
_GONE = ("NotFoundException",)
_STATE_REFUSED = ("DisabledException", "KMSInvalidStateException")
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


class KMSCalls:
    """KMS in one region, for keys of one kind: `fit` says what a key's metadata must be, `line` begins what they wrap.

    A key is named as KMS names it, by an alias or an ARN, and in errors by its id here.
    """

    __slots__ = ("_client_of", "_fit", "_line", "_make_client", "_timeout_s")

    def __init__(
        self,
        *,
        line: bytes,
        fit: Mapping[str, tuple[object, ...]],
        region: str,
        endpoint_url: str | None,
        access_key_id: str | None,
        secret_access_key: str | None,
        session_token: str | None,
        timeout_s: float,
    ) -> None:
        """Call nobody yet. Raises ValueError for a setting that cannot be, and ProviderMissing without boto3."""
        if not re.fullmatch(r"[a-z0-9-]{1,64}", region):
            raise ValueError("a region is lower-case letters, digits and '-', as in eu-central-1")
        if (access_key_id is None) != (secret_access_key is None):
            raise ValueError("give both access_key_id and secret_access_key, or neither")
        if endpoint_url is not None:
            check_address(endpoint_url)
        _boto3()
        self._line, self._fit, self._timeout_s = line, fit, timeout_s

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

    def describe(self, name: str) -> dict[str, Any] | None:
        """A key's metadata, its state among them; None where KMS has no such key."""
        try:
            answer = self.call("describe_key", KeyId=name)
        except Refusal as exc:
            if exc.code in _GONE:
                return None
            raise exc.named() from None
        metadata = metadata_of(answer)
        text_of(metadata, "KeyState")
        return metadata

    def require_usable(self, name: str, key_id: str) -> tuple[str, str]:
        """The KMS key's own id, and its ARN, by which alone KMS finds a key of another account.

        Raises KeyMissing, KeyUnfit or ProviderUnavailable unless the key can be used.
        """
        there = self.describe(name)
        if there is None or there["KeyState"] in DESTROYED:
            raise key_missing(key_id)
        self.require_fit(there, key_id)
        if there["KeyState"] in _BUSY:
            raise ProviderUnavailable(f"KMS says that the key {key_id!r} is {there['KeyState'].lower()}; try again")
        if there["KeyState"] != "Enabled":
            state = there["KeyState"].lower()
            raise KeyUnfit(f"the key {key_id!r} is {state} in KMS; enable it there if it is to be used again")
        return text_of(there, "KeyId"), text_of(there, "Arn")

    def require_fit(self, metadata: dict[str, Any], key_id: str) -> None:
        """Raise KeyUnfit for a key of another kind."""
        for field, values in self._fit.items():
            if metadata.get(field) not in values:
                raise KeyUnfit(
                    f"the KMS key of {key_id!r} is of no kind that is used here: its {field} is not "
                    f"{' or '.join(map(str, values))}; see in KMS where it came from"
                )

    def wrap(self, name: str, key_id: str, secret: bytes, *, context: dict[str, str]) -> bytes:
        """The line, the KMS key's own id behind its length, and KMS' ciphertext."""
        check_secret(secret)
        kms_id, arn = self.require_usable(name, key_id)
        answer = self.ask(name, key_id, "encrypt", KeyId=arn, Plaintext=secret, EncryptionContext=context)
        return self._line + length_prefixed(kms_id) + _bytes_of(answer, "CiphertextBlob", _LARGEST_CIPHERTEXT)

    def unwrap(self, name: str, key_id: str, wrapped: bytes, *, context: dict[str, str]) -> bytes:
        """The secret that was wrapped. Raises InvalidWrap, or why the key cannot be used."""
        kms_id, arn = self.require_usable(name, key_id)
        head = self._line + length_prefixed(kms_id)
        sealed = wrapped[len(head) :]
        if wrapped[: len(head)] != head or not 1 <= len(sealed) <= _LARGEST_CIPHERTEXT:
            raise InvalidWrap()
        answer = self.ask(name, key_id, "decrypt", KeyId=arn, CiphertextBlob=sealed, EncryptionContext=context)
        return _bytes_of(answer, "Plaintext", 4096)

    def ask(self, name: str, key_id: str, operation: str, **fields: Any) -> dict[str, Any]:
        """One call about a key. Raises the named error whatever goes wrong."""
        try:
            return self.call(operation, **fields)
        except Refusal as exc:
            if exc.code in _GONE + _STATE_REFUSED:
                self.require_usable(name, key_id)  # says which it is, unless KMS does not show it yet
            if exc.code in _GONE:
                raise key_missing(key_id) from None
            if exc.code in _STATE_REFUSED:
                raise KeyUnfit(
                    f"KMS refuses the key {key_id!r} for its state ({exc.code}); see there whether it is enabled"
                ) from None
            raise exc.named() from None

    def call(self, operation: str, **fields: Any) -> dict[str, Any]:
        """One call. Raises Refusal with AWS' own code, or the named error where there was no answer of KMS."""
        exceptions = _exceptions()
        try:
            act = getattr(self._client(), operation)
            answer = call_within(self._timeout_s, lambda: act(**fields), provider="AWS KMS")
        except exceptions.ClientError as exc:
            raise Refusal(exc) from None
        except (
            exceptions.NoCredentialsError,
            exceptions.PartialCredentialsError,
            exceptions.ProfileNotFound,
        ):
            raise AccessRefused("there are no AWS credentials; give the process a role, or set them") from None
        except (
            exceptions.HTTPClientError,
            exceptions.ConnectionError,
            exceptions.CredentialRetrievalError,  # whoever lends them is away: nobody withdrew them
        ) as exc:
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


class Refusal(Exception):
    """What KMS answered instead; its message is left behind, since nobody knows what it quotes."""

    def __init__(self, error: Any) -> None:
        told = error.response if isinstance(error.response, dict) else {}
        code = told.get("Error", {}).get("Code") if isinstance(told.get("Error"), dict) else None
        self.code = code if isinstance(code, str) and re.fullmatch(r"[A-Za-z.]{1,64}", code) else "unknown"
        status = told.get("ResponseMetadata", {}).get("HTTPStatusCode", 0)
        self.status = status if isinstance(status, int) else 0
        super().__init__(self.code)

    def named(self) -> KeyProviderError:
        """The error of ours that this is."""
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


def encryption_context(context: Context) -> dict[str, str]:
    """The exact bytes that every provider binds, and the fields by name for policies and for who reads the trail."""
    return {
        "cloister:context": base64.b64encode(context.to_bytes()).decode("ascii"),
        "cloister:tenant": context.tenant,
        "cloister:kind": context.kind,
        "cloister:object": context.object,
    }


def metadata_of(answer: dict[str, Any]) -> dict[str, Any]:
    """What an answer tells of a key."""
    metadata = answer.get("KeyMetadata")
    if not isinstance(metadata, dict):
        raise InvalidAnswer("AWS KMS' answer describes no key; see what listens at the endpoint")
    return metadata


def text_of(metadata: dict[str, Any], name: str) -> str:
    """One field of a key's metadata that is text."""
    value = metadata.get(name)
    if not isinstance(value, str) or not re.fullmatch(r"[!-~]{1,255}", value):
        raise InvalidAnswer(f"AWS KMS' answer has no {name}; see what listens at the endpoint")
    return value


def key_missing(key_id: str) -> KeyMissing:
    """What to raise where KMS has no such key."""
    return KeyMissing(f"there is no key {key_id!r} in KMS: it was destroyed, or this is another account or region")


def _bytes_of(answer: dict[str, Any], name: str, limit: int) -> bytes:
    value = answer.get(name)
    if not isinstance(value, bytes) or not 1 <= len(value) <= limit:
        raise InvalidAnswer(f"AWS KMS' answer has no {name}; see what listens at the endpoint")
    return value


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
