"""What every key provider does alike: the files of this process, a SoftHSM2 token, moto's KMS, and Vault's stand-in.

No live Vault or OpenBao could be had when this was written; set VAULT_ADDR and VAULT_TOKEN to try one too.
"""

from __future__ import annotations

import base64
import inspect
import logging
import os
import re
import secrets
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cloister_privacy.sealing import (
    AccessRefused,
    Context,
    InvalidKeyId,
    InvalidWrap,
    KeyExists,
    KeyMissing,
    KeyProvider,
    LocalKeyProvider,
    new_key,
    open_provider,
)
from cloister_privacy.sealing.aws_kms import AWSKMSKeyProvider
from cloister_privacy.sealing.aws_kms_held import HeldAWSKMSKeyProvider
from cloister_privacy.sealing.pkcs11 import PKCS11KeyProvider
from cloister_privacy.sealing.vault_transit import VaultTransitKeyProvider
from key_providers import ACCOUNT, PIN, TOKEN_LABEL, VAULT_TOKEN, kms_client

pytest_plugins = ("key_providers",)
pytestmark = pytest.mark.xdist_group("key-providers")  # one token and one KMS for all of them

CONTEXT = Context(tenant="tn_" + "0" * 32, kind="weights", object="obj_" + "1" * 32)
PAGE = (Path(__file__).parents[2] / "docs" / "keys.md").read_text()
LIVE = ["vault live"] if "VAULT_ADDR" in os.environ else []
OURS = ["local", "pkcs11 gcm", "pkcs11 key_wrap", "aws_kms", "vault stand-in", *LIVE]
SECRETS = (PIN, VAULT_TOKEN, ACCOUNT["secret_access_key"])


@dataclass(frozen=True, slots=True)
class Store:
    """Where keys are kept, and how to open it once more as another process would."""

    name: str
    open: Callable[[], KeyProvider]
    line: bytes
    examples: int
    """How many Hypothesis may try: a call over HTTP takes its time."""


makes_and_destroys = pytest.mark.parametrize("store", OURS, indirect=True)
"""For what no provider can do whose key is the customer's: all ids are there at once, for as long as the customer likes."""


@pytest.fixture(params=[*OURS, "aws_kms_held"])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Store:
    name: str = request.param
    if name == "local":
        LocalKeyProvider.create(tmp_path / "keystore", key_file=tmp_path / "root.key")
        local = {"directory": tmp_path / "keystore", "key_file": tmp_path / "root.key"}
        return Store(name, lambda: open_provider("local", **local), b"cloister.wrapped/1\n", 60)
    if name.startswith("pkcs11"):
        token = {"library": request.getfixturevalue("token"), "token_label": TOKEN_LABEL, "pin": PIN}
        wrapping = name.partition(" ")[2]
        return Store(name, lambda: open_provider("pkcs11", **token, wrapping=wrapping), b"cloister.pkcs11/1\n", 40)
    if name == "aws_kms":
        place = {
            "endpoint_url": request.getfixturevalue("kms"),
            "prefix": f"tests-{secrets.token_hex(4)}",
            "timeout_s": 60,
        }
        account = {**ACCOUNT, **place}
        return Store(name, lambda: open_provider("aws_kms", **account), b"cloister.aws-kms/1\n", 8)
    if name == "aws_kms_held":
        url = request.getfixturevalue("kms")
        arn = kms_client(url).create_key(KeyUsage="ENCRYPT_DECRYPT")["KeyMetadata"]["Arn"]
        held = {"key_arn": arn, "endpoint_url": url, "timeout_s": 60} | {
            name: ACCOUNT[name] for name in ACCOUNT if name != "region"
        }
        return Store(name, lambda: open_provider("aws_kms_held", **held), b"cloister.aws-kms-held/1\n", 8)
    if name == "vault stand-in":
        vault = {"address": request.getfixturevalue("vault"), "token": VAULT_TOKEN, "timeout_s": 60}
        return Store(name, lambda: open_provider("vault_transit", **vault), b"cloister.transit/1\n", 20)
    live = {
        "address": os.environ["VAULT_ADDR"],
        "token": os.environ["VAULT_TOKEN"],
        "mount": os.environ.get("VAULT_MOUNT", "transit"),
    }
    return Store(name, lambda: open_provider("vault_transit", **live), b"cloister.transit/1\n", 8)


@pytest.fixture
def keys(store: Store) -> KeyProvider:
    return store.open()


@pytest.fixture
def key_id(keys: KeyProvider) -> str:
    key_id = new_id()
    keys.create_key(key_id)
    return key_id


def new_id() -> str:
    return f"tn_{secrets.token_hex(16)}.{secrets.token_hex(8)}"


def test_a_wrapped_key_unwraps_after_the_provider_is_opened_again(store: Store, keys: KeyProvider, key_id: str) -> None:
    secret = new_key()
    wrapped = keys.wrap(key_id, secret, context=CONTEXT)
    assert store.open().unwrap(key_id, wrapped, context=CONTEXT) == secret


def test_a_secret_of_any_bearable_length_wraps_and_another_is_a_mistake(keys: KeyProvider, key_id: str) -> None:
    for length in (1, 7, 32, 138, 4096):
        secret = os.urandom(length)
        assert keys.unwrap(key_id, keys.wrap(key_id, secret, context=CONTEXT), context=CONTEXT) == secret
    for length in (0, 2**16 + 1):
        with pytest.raises(ValueError, match="secret to wrap"):
            keys.wrap(key_id, bytes(length), context=CONTEXT)


def test_any_secret_wraps_under_any_context_and_opens_under_no_other(
    store: Store, keys: KeyProvider, key_id: str
) -> None:
    field = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=255)
    contexts = st.builds(Context, tenant=field, kind=field, object=field)

    @settings(max_examples=store.examples, deadline=None, suppress_health_check=[HealthCheck.too_slow])
    @given(secret=st.binary(min_size=1, max_size=4096), context=contexts, other=contexts)
    def holds(secret: bytes, context: Context, other: Context) -> None:
        wrapped = keys.wrap(key_id, secret, context=context)
        assert keys.unwrap(key_id, wrapped, context=context) == secret
        if other != context:
            with pytest.raises(InvalidWrap):
                keys.unwrap(key_id, wrapped, context=other)

    holds()


def test_a_wrapped_key_is_bound_to_its_context(keys: KeyProvider, key_id: str) -> None:
    wrapped = keys.wrap(key_id, new_key(), context=CONTEXT)
    others = [replace(CONTEXT, **{field: "another"}) for field in ("tenant", "kind", "object")]
    others.append(Context(tenant=CONTEXT.tenant + "w", kind="eights", object=CONTEXT.object))
    others.append(Context(tenant=CONTEXT.kind, kind=CONTEXT.tenant, object=CONTEXT.object))
    for other in others:
        with pytest.raises(InvalidWrap):
            keys.unwrap(key_id, wrapped, context=other)


def test_a_change_of_any_byte_a_cut_and_an_addition_are_refused(store: Store, keys: KeyProvider, key_id: str) -> None:
    wrapped = keys.wrap(key_id, new_key(), context=CONTEXT)
    # Where the ciphertext itself names a key that is not there, moto says that access to it is denied; AWS says
    # InvalidCiphertextException of any ciphertext that was changed.
    refused = (InvalidWrap, AccessRefused) if store.name.startswith("aws_kms") else InvalidWrap
    for position in range(0, len(wrapped), 1 if store.examples > 8 else 7):
        changed = bytearray(wrapped)
        changed[position] ^= 0x01
        for forged in (bytes(changed), wrapped[:position]):
            with pytest.raises(refused):
                keys.unwrap(key_id, forged, context=CONTEXT)
    for forged in (wrapped[:-1], wrapped + b"\0", wrapped + bytes(8), b"", wrapped * 300):
        with pytest.raises(InvalidWrap):
            keys.unwrap(key_id, forged, context=CONTEXT)
    keys.unwrap(key_id, wrapped, context=CONTEXT)


def test_a_wrapped_key_says_its_format_and_another_version_is_refused(
    store: Store, keys: KeyProvider, key_id: str
) -> None:
    wrapped = keys.wrap(key_id, new_key(), context=CONTEXT)
    assert wrapped.startswith(store.line)
    with pytest.raises(InvalidWrap):
        keys.unwrap(key_id, wrapped.replace(b"/1\n", b"/2\n", 1), context=CONTEXT)


def test_another_providers_wrapped_key_is_refused(keys: KeyProvider, key_id: str, store: Store) -> None:
    for line in (
        b"cloister.wrapped/1\n",
        b"cloister.pkcs11/1\n\1",
        b"cloister.aws-kms/1\n",
        b"cloister.aws-kms-held/1\n",
        b"cloister.transit/1\n\0\0\0\1",
    ):
        if not line.startswith(store.line):
            with pytest.raises(InvalidWrap):
                keys.unwrap(key_id, line + os.urandom(80), context=CONTEXT)


def test_a_key_wraps_for_itself_alone(keys: KeyProvider, key_id: str) -> None:
    other = new_id()
    keys.create_key(other)
    wrapped = keys.wrap(key_id, new_key(), context=CONTEXT)
    with pytest.raises(InvalidWrap):
        keys.unwrap(other, wrapped, context=CONTEXT)


@makes_and_destroys
def test_a_key_that_was_never_made_is_missing(keys: KeyProvider, key_id: str) -> None:
    wrapped = keys.wrap(key_id, new_key(), context=CONTEXT)
    unknown = new_id()
    assert keys.has_key(key_id) and not keys.has_key(unknown)
    for refused in (
        lambda: keys.wrap(unknown, new_key(), context=CONTEXT),
        lambda: keys.unwrap(unknown, wrapped, context=CONTEXT),
        lambda: keys.destroy_key(unknown),
    ):
        with pytest.raises(KeyMissing, match=unknown):
            refused()


@makes_and_destroys
def test_a_destroyed_key_is_gone_for_everybody(store: Store, keys: KeyProvider, key_id: str) -> None:
    other = store.open()
    wrapped = keys.wrap(key_id, new_key(), context=CONTEXT)
    other.unwrap(key_id, wrapped, context=CONTEXT)
    keys.destroy_key(key_id)
    for provider in (keys, other, store.open()):
        assert not provider.has_key(key_id)
        for refused in (
            lambda: provider.unwrap(key_id, wrapped, context=CONTEXT),  # noqa: B023 (called at once)
            lambda: provider.wrap(key_id, new_key(), context=CONTEXT),  # noqa: B023 (called at once)
            lambda: provider.destroy_key(key_id),  # noqa: B023 (called at once)
        ):
            with pytest.raises(KeyMissing):
                refused()


@makes_and_destroys
def test_a_key_made_anew_under_a_destroyed_id_opens_nothing_old(keys: KeyProvider, key_id: str) -> None:
    wrapped = keys.wrap(key_id, new_key(), context=CONTEXT)
    keys.destroy_key(key_id)
    keys.create_key(key_id)
    with pytest.raises(InvalidWrap):
        keys.unwrap(key_id, wrapped, context=CONTEXT)
    keys.unwrap(key_id, keys.wrap(key_id, new_key(), context=CONTEXT), context=CONTEXT)


@makes_and_destroys
def test_a_key_id_is_used_once_and_nothing_replaces_a_key(store: Store, keys: KeyProvider, key_id: str) -> None:
    secret = new_key()
    wrapped = keys.wrap(key_id, secret, context=CONTEXT)
    for provider in (keys, store.open()):
        with pytest.raises(KeyExists):
            provider.create_key(key_id)
    assert keys.unwrap(key_id, wrapped, context=CONTEXT) == secret


def test_a_key_id_that_is_none_is_refused(keys: KeyProvider) -> None:
    none = ["", "..", "../system", "a/b", "/etc/passwd", "A", "1a", "a..b", ".a", "a.", "a\n", "a\0", "\xe9", "a" * 129]
    for key_id in none:
        for refused in (
            lambda: keys.create_key(key_id),  # noqa: B023 (called at once)
            lambda: keys.has_key(key_id),  # noqa: B023 (called at once)
            lambda: keys.wrap(key_id, new_key(), context=CONTEXT),  # noqa: B023 (called at once)
            lambda: keys.unwrap(key_id, b"", context=CONTEXT),  # noqa: B023 (called at once)
            lambda: keys.destroy_key(key_id),  # noqa: B023 (called at once)
        ):
            with pytest.raises(InvalidKeyId):
                refused()


def test_the_longest_and_the_strangest_key_ids_are_taken_and_told_apart(keys: KeyProvider, store: Store) -> None:
    start = "a" + secrets.token_hex(8)
    ids = [
        start,
        start + "_",
        start + ".b",
        start + "-b",
        start + "_b",
        start + ".b.c",
        start + "x" * (128 - len(start)),
    ]
    for key_id in ids:
        assert keys.has_key(key_id) is (store.name == "aws_kms_held")
        keys.create_key(key_id)
    wrapped = {key_id: keys.wrap(key_id, key_id.encode(), context=CONTEXT) for key_id in ids}
    assert all(keys.unwrap(key_id, wrapped[key_id], context=CONTEXT) == key_id.encode() for key_id in ids)


def test_threads_share_a_provider(keys: KeyProvider, key_id: str) -> None:
    start = threading.Barrier(4)

    def work(number: int) -> None:
        start.wait()
        context = replace(CONTEXT, object=f"obj_{number}")
        for _ in range(6):
            secret = new_key()
            wrapped = keys.wrap(key_id, secret, context=context)
            assert keys.unwrap(key_id, wrapped, context=context) == secret
            with pytest.raises(InvalidWrap):
                keys.unwrap(key_id, wrapped, context=CONTEXT)

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(work, range(4)))


@makes_and_destroys
def test_threads_that_make_one_key_make_it_once(keys: KeyProvider, store: Store) -> None:
    if store.name == "vault live":
        pytest.skip("an older Vault does not tell which of two made the key")
    key_id, start = new_id(), threading.Barrier(4)

    def make(_: int) -> bool:
        start.wait()
        try:
            keys.create_key(key_id)
        except KeyExists:
            return False
        return True

    with ThreadPoolExecutor(4) as pool:
        assert sum(pool.map(make, range(4))) == 1
    keys.unwrap(key_id, keys.wrap(key_id, new_key(), context=CONTEXT), context=CONTEXT)


def test_no_secret_is_in_a_repr_a_log_a_traceback_or_a_wrapped_key(
    store: Store, caplog: pytest.LogCaptureFixture
) -> None:
    key_id, secret = new_id(), new_key()
    with caplog.at_level(logging.DEBUG):
        keys = store.open()
        keys.create_key(key_id)
        wrapped = keys.wrap(key_id, secret, context=CONTEXT)
        keys.unwrap(key_id, wrapped, context=CONTEXT)
        with pytest.raises(InvalidWrap) as refusal:
            keys.unwrap(key_id, wrapped, context=replace(CONTEXT, object="another"))
    shown = caplog.text + repr(keys) + str(keys) + "".join(traceback.format_exception(refusal.value))
    for each in (secret, *(text.encode() for text in SECRETS)):
        assert each not in wrapped
        for spelling in (
            repr(each)[2:-1],
            each.hex(),
            base64.b64encode(each).decode(),
            base64.b32encode(each).decode(),
        ):
            assert spelling not in shown


def test_a_provider_says_how_final_its_destruction_is(keys: KeyProvider, store: Store) -> None:
    assert keys.destruction.claim.endswith(".")
    assert keys.destruction.waiting_days == (7 if store.name == "aws_kms" else 0)
    assert keys.destruction.is_ours is (store.name != "aws_kms_held")


def test_a_live_vault_is_among_the_providers() -> None:
    if not LIVE:
        pytest.skip("no live Vault or OpenBao at hand: set VAULT_ADDR, VAULT_TOKEN and VAULT_MOUNT (default transit)")


@pytest.mark.parametrize("kind", ["yubikey", "", "LOCAL"])
def test_an_unknown_kind_is_refused_with_those_that_there_are(kind: Any) -> None:
    with pytest.raises(ValueError, match="pkcs11"):
        open_provider(kind)


def test_a_setting_that_is_missing_or_unknown_is_a_mistake_told_at_once(tmp_path: Path) -> None:
    for kind, given_settings in (
        ("local", {}),
        ("local", {"directory": tmp_path, "key_fyle": tmp_path}),
        ("pkcs11", {"library": tmp_path, "token_label": "x"}),
        ("aws_kms", {}),
        ("aws_kms_held", {}),
        ("vault_transit", {"address": "https://vault.example"}),
    ):
        with pytest.raises(TypeError):
            open_provider(kind, **given_settings)  # type: ignore[arg-type]  # the kinds are right, the settings are not


def test_the_local_provider_opens_with_any_one_root(tmp_path: Path) -> None:
    made = LocalKeyProvider.create(tmp_path / "keystore", key_file=tmp_path / "root.key")
    made.create_key("system")
    for root in ({"key_file": tmp_path / "root.key"}, {"root_key": made.root_key}):
        assert open_provider("local", directory=tmp_path / "keystore", **root).has_key("system")
    with pytest.raises(ValueError, match="exactly one"):
        open_provider("local", directory=tmp_path / "keystore", root_key=made.root_key, key_file=tmp_path / "root.key")


def test_no_providers_library_is_loaded_before_it_is_asked_for() -> None:
    script = (
        "import sys\n"
        "import cloister_privacy.sealing, cloister_privacy.sealing.pkcs11, cloister_privacy.sealing.aws_kms\n"
        "import cloister_privacy.sealing.aws_kms_held\n"
        "import cloister_privacy.sealing.vault_transit\n"
        "print(sorted({'pkcs11', 'boto3', 'botocore', 'hvac', 'requests'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout == "[]\n"


def test_the_pages_example_runs_as_it_stands(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (block,) = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)
    exec(compile(block, "docs/keys.md", "exec"), {})  # noqa: S102 (that is the test)


@pytest.mark.parametrize(
    ("kind", "provider"),
    [
        ("pkcs11", PKCS11KeyProvider),
        ("aws_kms", AWSKMSKeyProvider),
        ("aws_kms_held", HeldAWSKMSKeyProvider),
        ("vault_transit", VaultTransitKeyProvider),
    ],
)
def test_the_pages_table_names_every_setting_and_its_default(kind: str, provider: type[Any]) -> None:
    (told,) = re.findall(rf"^\| `{kind}` \|[^|]*\| (.*) \|$", PAGE, re.MULTILINE)
    parameters = list(inspect.signature(provider).parameters.values())
    assert told == ", ".join(
        f"`{each.name}`" if each.default is each.empty else f"`{each.name}={each.default!r}`".replace("'", '"')
        for each in parameters
    )
