"""A key that a customer holds in AWS KMS, on moto's server, which is not AWS: where the two differ, the tests say so."""

from __future__ import annotations

import base64
import json
import secrets
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from cloister_privacy.sealing import (
    AccessRefused,
    Context,
    InvalidAnswer,
    InvalidWrap,
    KeyMissing,
    KeyProvider,
    KeyProviderError,
    KeyUnfit,
    KeyWithheld,
    ProviderMissing,
    ProviderUnavailable,
    new_key,
    open_provider,
)
from key_providers import ACCOUNT, FAULTS, SLOW, Faulty, kms_client, refusals, served

pytest_plugins = ("key_providers",)
pytestmark = pytest.mark.xdist_group("key-providers")

CONTEXT = Context(tenant="tn_1", kind="weights", object="obj_1")
TIMEOUT_S, SLOW_TIMEOUT_S = 60.0, 0.7
CREDENTIALS = {name: ACCOUNT[name] for name in ("access_key_id", "secret_access_key")}
ARN = "arn:aws:kms:eu-central-1:123456789012:key/0d5e0a7c-5a4f-4a2e-9a53-1e3d2a0f8b11"
LINE = b"cloister.aws-kms-held/1\n"
DESCRIBED = {
    "KeyId": ARN.rpartition("/")[2],
    "Arn": ARN,
    "KeyState": "Enabled",
    "KeyManager": "CUSTOMER",
    "KeySpec": "SYMMETRIC_DEFAULT",
    "KeyUsage": "ENCRYPT_DECRYPT",
}


@pytest.fixture
def customer(kms: str) -> Any:
    """KMS itself, as the customer's own administrator sees it."""
    return kms_client(kms)


@pytest.fixture
def arn(customer: Any) -> str:
    return new_arn(customer)


@pytest.fixture
def held(kms: str, arn: str) -> KeyProvider:
    return opened(arn, kms)


def new_arn(customer: Any, **more: Any) -> str:
    made: str = customer.create_key(**{"KeyUsage": "ENCRYPT_DECRYPT", **more})["KeyMetadata"]["Arn"]
    return made


def bare(arn: str) -> str:
    """A key's id without its account, which moto wants for what changes a key's state."""
    return arn.rpartition("/")[2]


def opened(arn: str, address: str, **more: Any) -> KeyProvider:
    pytest.importorskip("boto3", reason="boto3 is not installed: pip install 'cloister[aws]'")
    return open_provider(
        "aws_kms_held", **{**CREDENTIALS, "key_arn": arn, "endpoint_url": address, "timeout_s": TIMEOUT_S, **more}
    )


def uses(keys: KeyProvider, wrapped: bytes = b"") -> list[Callable[[], Any]]:
    """Whatever needs the customer's key."""
    return [
        lambda: keys.create_key("tn_1.a"),
        lambda: keys.wrap("tn_1.a", new_key(), context=CONTEXT),
        lambda: keys.unwrap("tn_1.a", wrapped, context=CONTEXT),
    ]


def test_ids_share_the_customers_key_and_open_nothing_of_each_other(held: KeyProvider, customer: Any, arn: str) -> None:
    before = len(customer.list_keys()["Keys"])
    wrapped = {}
    for key_id in ("tn_1.a", "tn_1.b", "tn_1"):
        held.create_key(key_id)
        wrapped[key_id] = held.wrap(key_id, key_id.encode(), context=CONTEXT)
    assert len(customer.list_keys()["Keys"]) == before
    kms_id = bare(arn)
    for key_id, own in wrapped.items():
        assert own.startswith(LINE + len(kms_id).to_bytes(2) + kms_id.encode())
        assert held.unwrap(key_id, own, context=CONTEXT) == key_id.encode()
        for other in wrapped.keys() - {key_id}:
            with pytest.raises(InvalidWrap):
                held.unwrap(other, own, context=CONTEXT)
        with pytest.raises(InvalidWrap):
            held.unwrap(key_id, own, context=replace(CONTEXT, object="obj_2"))


def test_the_encryption_context_names_the_id_for_the_customers_trail(
    held: KeyProvider, customer: Any, arn: str
) -> None:
    wrapped = held.wrap("tn_1.a", b"secret", context=CONTEXT)
    blob = wrapped[len(LINE) + 2 + len(bare(arn)) :]
    bound = {
        "cloister:key-id": "tn_1.a",
        "cloister:context": base64.b64encode(CONTEXT.to_bytes()).decode(),
        "cloister:tenant": "tn_1",
        "cloister:kind": "weights",
        "cloister:object": "obj_1",
    }
    assert customer.decrypt(KeyId=arn, CiphertextBlob=blob, EncryptionContext=bound)["Plaintext"] == b"secret"
    for name in bound:
        for wrong in ({**bound, name: "another"}, {key: bound[key] for key in bound if key != name}):
            with pytest.raises(customer.exceptions.InvalidCiphertextException):
                customer.decrypt(KeyId=arn, CiphertextBlob=blob, EncryptionContext=wrong)


def test_two_customers_keys_open_nothing_of_each_other(held: KeyProvider, customer: Any, kms: str) -> None:
    other = opened(new_arn(customer), kms)
    with pytest.raises(InvalidWrap):
        other.unwrap("tn_1.a", held.wrap("tn_1.a", b"secret", context=CONTEXT), context=CONTEXT)


def test_a_key_that_the_customer_disables_is_withheld_until_it_is_enabled_again(
    held: KeyProvider, customer: Any, arn: str
) -> None:
    wrapped = held.wrap("tn_1.a", b"secret", context=CONTEXT)
    assert held.has_key("tn_1.a")
    customer.disable_key(KeyId=bare(arn))
    for use in (*uses(held, wrapped), lambda: held.has_key("tn_1.a")):
        with pytest.raises(KeyUnfit, match="disabled"):
            use()
    customer.enable_key(KeyId=bare(arn))
    assert held.has_key("tn_1.a")
    assert held.unwrap("tn_1.a", wrapped, context=CONTEXT) == b"secret"


def test_a_key_that_the_customer_has_ordered_to_be_deleted_is_missing_though_moto_still_decrypts(
    held: KeyProvider, customer: Any, arn: str
) -> None:
    """AWS refuses to decrypt while a deletion is pending; moto does not, so what is shown here is our own refusal."""
    wrapped = held.wrap("tn_1.a", b"secret", context=CONTEXT)
    customer.schedule_key_deletion(KeyId=bare(arn), PendingWindowInDays=7)
    assert not held.has_key("tn_1.a")
    for use in uses(held, wrapped):
        with pytest.raises(KeyMissing):
            use()
    customer.cancel_key_deletion(KeyId=bare(arn))
    with pytest.raises(KeyUnfit, match="disabled"):  # as KMS leaves it
        held.unwrap("tn_1.a", wrapped, context=CONTEXT)
    customer.enable_key(KeyId=bare(arn))
    assert held.unwrap("tn_1.a", wrapped, context=CONTEXT) == b"secret"


def test_a_key_whose_policy_shuts_us_out_is_access_refused_until_it_lets_us_in(
    held: KeyProvider, customer: Any, arn: str
) -> None:
    """Of policies moto heeds a denial of DescribeKey alone; Encrypt and Decrypt denied are answered below, over HTTP."""
    wrapped = held.wrap("tn_1.a", b"secret", context=CONTEXT)
    policy = customer.get_key_policy(KeyId=arn, PolicyName="default")["Policy"]
    denial = {"Effect": "Deny", "Principal": "*", "Action": ["kms:DescribeKey"], "Resource": "*"}
    customer.put_key_policy(
        KeyId=arn, PolicyName="default", Policy=json.dumps({"Version": "2012-10-17", "Statement": [denial]})
    )
    for use in (*uses(held, wrapped), lambda: held.has_key("tn_1.a")):
        with pytest.raises(AccessRefused):
            use()
    customer.put_key_policy(KeyId=arn, PolicyName="default", Policy=policy)
    assert held.unwrap("tn_1.a", wrapped, context=CONTEXT) == b"secret"


@pytest.mark.parametrize("revoke", ["disable", "delete", "leave"])
def test_destroying_leaves_the_customers_key_as_it_is_whatever_its_state(
    held: KeyProvider, kms: str, customer: Any, arn: str, revoke: str
) -> None:
    if revoke == "disable":
        customer.disable_key(KeyId=bare(arn))
    if revoke == "delete":
        customer.schedule_key_deletion(KeyId=bare(arn), PendingWindowInDays=7)
    before = customer.describe_key(KeyId=arn)["KeyMetadata"]
    for keys in (held, opened(arn, kms)):
        keys.destroy_key("tn_1.a")
        assert (keys.destruction.is_ours, keys.destruction.waiting_days) == (False, 0)
        assert "only the customer" in keys.destruction.claim and "not destroyed here" in keys.destruction.claim
    assert customer.describe_key(KeyId=arn)["KeyMetadata"] == before


def test_a_customers_imported_or_multi_region_key_is_the_customers_choice(customer: Any, kms: str) -> None:
    arn = new_arn(customer, MultiRegion=True)
    assert "/mrk-" in arn and opened(arn, kms).has_key("tn_1.a")
    opened(arn, kms).wrap("tn_1.a", b"secret", context=CONTEXT)  # moto cuts ids of this length, so it opens none
    imported = opened(new_arn(customer, Origin="EXTERNAL"), kms)
    imported.create_key("tn_1.a")
    assert imported.unwrap("tn_1.a", imported.wrap("tn_1.a", b"secret", context=CONTEXT), context=CONTEXT) == b"secret"


@pytest.mark.parametrize(
    ("state", "named"),
    [
        ("PendingImport", KeyUnfit),  # the customer took imported material out again
        ("PendingReplicaDeletion", KeyMissing),
        ("Unavailable", ProviderUnavailable),  # a key store of the customer's own that is not connected
    ],
)
def test_a_state_that_moto_never_shows_is_told_by_name(state: str, named: type[KeyProviderError]) -> None:
    answer = json.dumps({"KeyMetadata": {**DESCRIBED, "KeyState": state}}).encode()
    with served(Faulty, faults=[lambda handler: handler.answer(200, answer)]) as address:
        for use in uses(opened(ARN, address)):
            with pytest.raises(named):
                use()


@pytest.mark.parametrize(
    "unfit",
    [
        {"KeySpec": "RSA_2048", "KeyUsage": "ENCRYPT_DECRYPT"},
        {"KeySpec": "RSA_2048", "KeyUsage": "SIGN_VERIFY"},
        {"KeySpec": "HMAC_256", "KeyUsage": "GENERATE_VERIFY_MAC"},
    ],
    ids=str,
)
def test_a_key_of_another_kind_is_refused(customer: Any, kms: str, unfit: dict[str, Any]) -> None:
    keys = opened(new_arn(customer, **unfit), kms)
    for use in (*uses(keys), lambda: keys.has_key("tn_1.a")):
        with pytest.raises(KeyUnfit, match="of no kind that is used here"):
            use()


def test_a_key_that_is_in_another_region_or_nowhere_is_missing(kms: str, arn: str) -> None:
    for elsewhere in (arn.replace("eu-central-1", "us-east-1"), arn[:-36] + ARN[-36:]):
        keys = opened(elsewhere, kms)
        assert not keys.has_key("tn_1.a")
        for use in uses(keys):
            with pytest.raises(KeyMissing, match="region"):
                use()


@pytest.mark.parametrize("fault", FAULTS)
def test_kms_that_is_slow_or_answers_garbage_is_never_told_as_a_revocation(fault: str) -> None:
    with served(Faulty, faults=[FAULTS[fault]]) as address:
        keys = opened(ARN, address, timeout_s=SLOW_TIMEOUT_S if fault in SLOW else TIMEOUT_S)
        begun = time.monotonic()
        for refusal in refusals(*uses(keys), lambda: keys.has_key("tn_1.a")):
            assert isinstance(refusal, (ProviderUnavailable, InvalidAnswer))
            assert not isinstance(refusal, KeyWithheld) and "oops" not in str(refusal)
        if fault in SLOW:
            assert time.monotonic() - begun < 50, "before it would have answered"
        keys.destroy_key("tn_1.a")


def test_kms_that_is_down_is_unavailable_and_stands_in_no_shreddings_way() -> None:
    with served(Faulty, faults=[FAULTS["closes"]]) as address:
        pass
    keys = opened(ARN, address)
    for use in (*uses(keys), lambda: keys.has_key("tn_1.a")):
        with pytest.raises(ProviderUnavailable):
            use()
    keys.destroy_key("tn_1.a")


@pytest.mark.parametrize(
    ("status", "code", "named"),
    [
        (400, "AccessDeniedException", AccessRefused),
        (400, "DisabledException", KeyUnfit),
        (400, "KMSInvalidStateException", KeyUnfit),
        (400, "NotFoundException", KeyMissing),
        (400, "IncorrectKeyException", InvalidWrap),
        (500, "KeyUnavailableException", ProviderUnavailable),
        (500, "KMSInternalException", ProviderUnavailable),
        (400, "ThrottlingException", ProviderUnavailable),
    ],
)
def test_a_refusal_of_the_act_alone_is_told_by_name(status: int, code: str, named: type[KeyProviderError]) -> None:
    """KMS may refuse a key that was revoked a moment ago, and describe it as it was."""

    def act(handler: Faulty) -> None:
        if handler.headers["X-Amz-Target"].endswith("DescribeKey"):
            handler.answer(200, json.dumps({"KeyMetadata": DESCRIBED}).encode())
        else:
            handler.answer(status, json.dumps({"__type": code, "message": "words of the server"}).encode())

    wrapped = LINE + len(bare(ARN)).to_bytes(2) + bare(ARN).encode() + b"ciphertext"
    with served(Faulty, faults=[act]) as address:
        keys = opened(ARN, address)
        for use in uses(keys, wrapped):
            with pytest.raises(named) as refusal:
                use()
            assert "words of the server" not in str(refusal.value)


def test_every_call_names_the_key_by_its_arn_since_it_is_of_another_account() -> None:
    """moto finds a key of its one account by its bare id too; AWS does so for the account that calls, and no other."""
    named = []

    class Recording(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_POST(self) -> None:
            asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            named.append((self.headers["X-Amz-Target"], asked["KeyId"]))
            given = {"CiphertextBlob": asked.get("Plaintext"), "Plaintext": asked.get("CiphertextBlob")}
            content = json.dumps({"KeyMetadata": DESCRIBED, **given}).encode()
            self.send_response(200)
            self.send_header("Content-Length", str(len(content)))
            self.end_headers()
            self.wfile.write(content)

    with served(Recording) as address:
        opened(ARN, address).create_key("tn_1.a")
    described, encrypted, decrypted = (f"TrentService.{each}" for each in ("DescribeKey", "Encrypt", "Decrypt"))
    assert named == [(each, ARN) for each in (described, encrypted, described, decrypted)]


def test_a_kms_that_gives_back_another_secret_does_not_pass_for_the_customers_key() -> None:
    content = base64.b64encode(secrets.token_bytes(32)).decode()
    answer = json.dumps({"KeyMetadata": DESCRIBED, "CiphertextBlob": content, "Plaintext": content}).encode()
    with (
        served(Faulty, faults=[lambda handler: handler.answer(200, answer)]) as address,
        pytest.raises(InvalidAnswer, match="another secret"),
    ):
        opened(ARN, address).create_key("tn_1.a")


def test_without_its_library_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "boto3", None)
    with pytest.raises(ProviderMissing, match="pip install 'cloister"):
        open_provider("aws_kms_held", key_arn=ARN)


@pytest.mark.parametrize(
    "wrong",
    [
        {"key_arn": "arn:aws:kms:eu-central-1:123456789012:alias/ours"},
        {"key_arn": bare(ARN)},
        {"key_arn": ARN.replace(":kms:", ":s3:")},
        {"key_arn": ARN + "\n"},
        {"secret_access_key": None},
        {"endpoint_url": "http://kms.example"},
    ],
    ids=str,
)
def test_a_setting_that_cannot_be_is_a_mistake_told_at_once(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError):
        open_provider("aws_kms_held", **{"key_arn": ARN, **CREDENTIALS, **wrong})
