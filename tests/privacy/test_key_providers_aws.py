"""The AWS KMS provider on moto's server, which is not AWS: where the two differ, the tests say so."""

from __future__ import annotations

import base64
import json
import secrets
import time
from collections.abc import Callable
from typing import Any

import pytest

from cloister_privacy.sealing import (
    AccessRefused,
    Context,
    InvalidWrap,
    KeyExists,
    KeyMissing,
    KeyProvider,
    KeyProviderError,
    KeyUnfit,
    ProviderUnavailable,
    new_key,
    open_provider,
)
from cloister_privacy.sealing.aws_kms import AWSKMSKeyProvider
from key_providers import ACCOUNT, Faulty, kms_client, served

pytest_plugins = ("key_providers",)
pytestmark = pytest.mark.xdist_group("key-providers")

CONTEXT = Context(tenant="tn_1", kind="weights", object="obj_1")


def new_id() -> str:
    return f"tn_{secrets.token_hex(16)}.{secrets.token_hex(8)}"


def calls(keys: KeyProvider) -> list[Callable[[], Any]]:
    return [
        lambda: keys.has_key("system"),
        lambda: keys.wrap("system", new_key(), context=CONTEXT),
        lambda: keys.unwrap("system", b"cloister.aws-kms/1\n\0\1xx", context=CONTEXT),
        lambda: keys.create_key("system"),
        lambda: keys.destroy_key("system"),
    ]


@pytest.fixture
def prefix() -> str:
    return f"tests-{secrets.token_hex(4)}"


@pytest.fixture
def aws(kms: str, prefix: str) -> AWSKMSKeyProvider:
    keys = open_provider("aws_kms", **ACCOUNT, endpoint_url=kms, prefix=prefix, timeout_s=60.0)
    assert isinstance(keys, AWSKMSKeyProvider)
    return keys


@pytest.fixture
def raw(kms: str) -> Any:
    return kms_client(kms)


def described(raw: Any, prefix: str, key_id: str) -> dict[str, Any]:
    metadata: dict[str, Any] = raw.describe_key(KeyId=f"alias/{prefix}/{key_id}")["KeyMetadata"]
    return metadata


def test_a_key_of_ours_is_one_kms_key_with_an_alias_and_a_tag(aws: AWSKMSKeyProvider, raw: Any, prefix: str) -> None:
    key_id = new_id()
    aws.create_key(key_id)
    metadata = described(raw, prefix, key_id.replace(".", "/"))
    assert (metadata["KeySpec"], metadata["KeyUsage"]) == ("SYMMETRIC_DEFAULT", "ENCRYPT_DECRYPT")
    assert (metadata["Origin"], metadata["MultiRegion"]) == ("AWS_KMS", False)
    tags = raw.list_resource_tags(KeyId=metadata["KeyId"])["Tags"]
    assert tags == [{"TagKey": "cloister:key-id", "TagValue": key_id}]


def test_the_encryption_context_holds_every_field_and_their_borders(
    aws: AWSKMSKeyProvider, raw: Any, prefix: str
) -> None:
    aws.create_key("system")
    wrapped = aws.wrap("system", b"secret", context=CONTEXT)
    kms_id = described(raw, prefix, "system")["KeyId"]
    head = b"cloister.aws-kms/1\n" + len(kms_id).to_bytes(2) + kms_id.encode()
    assert wrapped.startswith(head)
    bound = {
        "cloister:context": base64.b64encode(CONTEXT.to_bytes()).decode(),
        "cloister:tenant": "tn_1",
        "cloister:kind": "weights",
        "cloister:object": "obj_1",
    }
    blob = wrapped[len(head) :]
    assert raw.decrypt(CiphertextBlob=blob, EncryptionContext=bound)["Plaintext"] == b"secret"
    for name in bound:
        with pytest.raises(raw.exceptions.InvalidCiphertextException):
            raw.decrypt(CiphertextBlob=blob, EncryptionContext={**bound, name: "another"})


def test_destroying_schedules_the_deletion_that_moto_alone_does_not_heed(
    aws: AWSKMSKeyProvider, raw: Any, prefix: str
) -> None:
    """AWS refuses to decrypt while a deletion is pending; moto still does, so what is shown here is our own refusal.

    On both, the key is there for the waiting days and an administrator can cancel: the receipt says no more than that.
    """
    aws.create_key("system")
    wrapped = aws.wrap("system", b"secret", context=CONTEXT)
    kms_id = described(raw, prefix, "system")["KeyId"]
    aws.destroy_key("system")
    metadata = raw.describe_key(KeyId=kms_id)["KeyMetadata"]
    assert metadata["KeyState"] == "PendingDeletion"
    assert 6 <= (metadata["DeletionDate"].timestamp() - time.time()) / 86400 <= 7.01
    blob = wrapped[len(b"cloister.aws-kms/1\n") + 2 + len(kms_id) :]
    context = {
        "cloister:context": base64.b64encode(CONTEXT.to_bytes()).decode(),
        **{f"cloister:{field}": getattr(CONTEXT, field) for field in ("tenant", "kind", "object")},
    }
    assert raw.decrypt(CiphertextBlob=blob, EncryptionContext=context)["Plaintext"] == b"secret"
    with pytest.raises(KeyMissing):
        aws.unwrap("system", wrapped, context=CONTEXT)
    assert aws.destruction.waiting_days == 7 and "7 days" in aws.destruction.claim


def test_a_destruction_that_was_interrupted_is_one_and_can_be_finished(
    aws: AWSKMSKeyProvider, raw: Any, prefix: str
) -> None:
    for finish in (lambda: aws.destroy_key("system"), lambda: None):
        aws.create_key("system")
        wrapped = aws.wrap("system", b"secret", context=CONTEXT)
        raw.schedule_key_deletion(KeyId=described(raw, prefix, "system")["KeyId"], PendingWindowInDays=7)
        assert not aws.has_key("system")
        with pytest.raises(KeyMissing):
            aws.unwrap("system", wrapped, context=CONTEXT)
        finish()
        aws.create_key("system")
        with pytest.raises(InvalidWrap):
            aws.unwrap("system", wrapped, context=CONTEXT)
        aws.destroy_key("system")


def test_who_loses_the_race_for_an_alias_leaves_no_key_behind(
    aws: AWSKMSKeyProvider, raw: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    aws.create_key("system")
    before = {key["KeyId"] for key in raw.list_keys()["Keys"]}
    with monkeypatch.context() as patch:
        patch.setattr(AWSKMSKeyProvider, "_describe", lambda *_: None)  # it looked before the other was there
        with pytest.raises(KeyExists):
            aws.create_key("system")
    (orphan,) = {key["KeyId"] for key in raw.list_keys()["Keys"]} - before
    assert raw.describe_key(KeyId=orphan)["KeyMetadata"]["KeyState"] == "PendingDeletion"
    aws.unwrap("system", aws.wrap("system", b"secret", context=CONTEXT), context=CONTEXT)


@pytest.mark.parametrize(
    "unfit",
    [
        {"KeySpec": "RSA_2048", "KeyUsage": "ENCRYPT_DECRYPT"},
        {"KeySpec": "HMAC_256", "KeyUsage": "GENERATE_VERIFY_MAC"},
        {"Origin": "EXTERNAL"},
        {"MultiRegion": True},
    ],
    ids=str,
)
def test_a_kms_key_of_another_kind_is_neither_used_nor_said_to_be_destroyed(
    aws: AWSKMSKeyProvider, raw: Any, prefix: str, unfit: dict[str, Any]
) -> None:
    kms_id = raw.create_key(**unfit)["KeyMetadata"]["KeyId"]
    raw.create_alias(AliasName=f"alias/{prefix}/system", TargetKeyId=kms_id)
    for call in (calls(aws)[index] for index in (0, 1, 2, 4)):
        with pytest.raises(KeyUnfit, match="system"):
            call()
    with pytest.raises(KeyExists):
        aws.create_key("system")


def test_a_disabled_key_is_unfit_until_it_is_enabled_and_can_be_destroyed(
    aws: AWSKMSKeyProvider, raw: Any, prefix: str
) -> None:
    aws.create_key("system")
    wrapped = aws.wrap("system", b"secret", context=CONTEXT)
    kms_id = described(raw, prefix, "system")["KeyId"]
    raw.disable_key(KeyId=kms_id)
    with pytest.raises(KeyUnfit, match="disabled"):
        aws.unwrap("system", wrapped, context=CONTEXT)
    raw.enable_key(KeyId=kms_id)
    assert aws.unwrap("system", wrapped, context=CONTEXT) == b"secret"
    raw.disable_key(KeyId=kms_id)
    aws.destroy_key("system")
    assert not aws.has_key("system")


@pytest.mark.parametrize(
    ("status", "code", "named"),
    [
        (400, "AccessDeniedException", AccessRefused),
        (400, "UnrecognizedClientException", AccessRefused),
        (403, "InvalidSignatureException", AccessRefused),
        (400, "ExpiredTokenException", AccessRefused),
        (400, "ThrottlingException", ProviderUnavailable),
        (500, "KMSInternalException", ProviderUnavailable),
        (500, "KeyUnavailableException", ProviderUnavailable),
        (400, "LimitExceededException", ProviderUnavailable),
        (400, "ValidationException", KeyProviderError),
    ],
)
def test_what_kms_refuses_is_told_by_name_and_without_its_words(
    status: int, code: str, named: type[KeyProviderError]
) -> None:
    pytest.importorskip("boto3", reason="boto3 is not installed: pip install 'cloister[aws]'")
    words = json.dumps({"__type": code, "message": "words of the server"}).encode()
    with served(Faulty, faults=[lambda handler: handler.answer(status, words)]) as address:
        with pytest.raises(named) as refusal:
            open_provider("aws_kms", **ACCOUNT, endpoint_url=address, timeout_s=60.0)
        assert "words of the server" not in str(refusal.value) and code in str(refusal.value)


def test_without_credentials_the_start_says_so(monkeypatch: pytest.MonkeyPatch, kms: str, tmp_path: Any) -> None:
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("AWS_SHARED_CREDENTIALS_FILE", str(tmp_path / "none"))
    monkeypatch.setenv("AWS_CONFIG_FILE", str(tmp_path / "none"))
    with pytest.raises(AccessRefused, match="no AWS credentials"):
        open_provider("aws_kms", region=ACCOUNT["region"], endpoint_url=kms)
    monkeypatch.setenv("AWS_PROFILE", "absent")
    with pytest.raises(AccessRefused, match="no AWS credentials"):
        open_provider("aws_kms", region=ACCOUNT["region"], endpoint_url=kms)


@pytest.mark.parametrize(
    "wrong",
    [
        {"prefix": "a/b"},
        {"prefix": ""},
        {"pending_days": 6},
        {"pending_days": 31},
        {"region": "x y"},
        {"access_key_id": None},
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_a_mistake_told_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        open_provider("aws_kms", **{**ACCOUNT, **wrong})
