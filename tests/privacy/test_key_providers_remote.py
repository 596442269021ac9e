"""The providers over HTTP: AWS KMS on moto's server, Vault on its stand-in, and both before servers that fail.

The Vault tests show shapes, errors and bindings on a stand-in of the documented interface; none of it ran on a live Vault.
"""

from __future__ import annotations

import contextlib
import secrets
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import pytest

from cloister_privacy.sealing import (
    Context,
    InvalidAnswer,
    KeyProvider,
    ProviderMissing,
    ProviderUnavailable,
    new_key,
    open_provider,
)
from cloister_privacy.sealing.aws_kms import AWSKMSKeyProvider
from cloister_privacy.sealing.remote import call_within, check_address
from cloister_privacy.sealing.vault_transit import VaultTransitKeyProvider
from key_providers import ACCOUNT, FAULTS, SLOW, VAULT_TOKEN, Faulty, refusals, served

CONTEXT = Context(tenant="tn_1", kind="weights", object="obj_1")
SLOW_TIMEOUT_S = 0.7
TIMEOUT_S = 60
NO_SUCH_KEY = {
    "aws_kms": lambda handler: handler.answer(400, b'{"__type": "NotFoundException"}'),
    "vault_transit": lambda handler: handler.answer(404, b'{"errors": []}'),
}


def new_id() -> str:
    return f"tn_{secrets.token_hex(16)}.{secrets.token_hex(8)}"


def opened(kind: Any, address: str, **more: Any) -> KeyProvider:
    if kind == "aws_kms":
        pytest.importorskip("boto3", reason="boto3 is not installed: pip install 'cloister[aws]'")
        return open_provider("aws_kms", **{**ACCOUNT, "endpoint_url": address, "timeout_s": TIMEOUT_S, **more})
    pytest.importorskip("hvac", reason="hvac is not installed: pip install 'cloister[vault]'")
    return open_provider("vault_transit", **{"address": address, "token": VAULT_TOKEN, "timeout_s": TIMEOUT_S, **more})


def opened_while_well(kind: Any, address: str, timeout_s: float) -> KeyProvider:
    """Opened for so short a wait that a busy machine may miss it at first."""
    for _ in range(50):
        with contextlib.suppress(ProviderUnavailable):
            return opened(kind, address, timeout_s=timeout_s)
    pytest.fail("no answer in 50 tries of a server that is well")


def calls(keys: KeyProvider) -> list[Callable[[], Any]]:
    return [
        lambda: keys.has_key("system"),
        lambda: keys.wrap("system", new_key(), context=CONTEXT),
        lambda: keys.unwrap("system", b"cloister.aws-kms/1\n\0\1xx", context=CONTEXT),
        lambda: keys.create_key("system"),
        lambda: keys.destroy_key("system"),
    ]


@pytest.mark.parametrize("fault", FAULTS)
@pytest.mark.parametrize("kind", ["aws_kms", "vault_transit"])
def test_a_provider_that_is_slow_or_answers_garbage_is_told_by_name_and_in_time(kind: str, fault: str) -> None:
    faults = [NO_SUCH_KEY[kind]]
    timeout_s = SLOW_TIMEOUT_S if fault in SLOW else TIMEOUT_S
    with served(Faulty, faults=faults) as address:
        keys = opened_while_well(kind, address, timeout_s)
        faults[0] = FAULTS[fault]
        begun = time.monotonic()
        for refusal in refusals(*calls(keys), lambda: opened(kind, address, timeout_s=timeout_s)):
            assert isinstance(refusal, (ProviderUnavailable, InvalidAnswer)) and "oops" not in str(refusal)
        if fault in SLOW:
            assert time.monotonic() - begun < 50, "before it would have answered"


@pytest.mark.parametrize("kind", ["aws_kms", "vault_transit"])
def test_a_provider_that_is_down_is_unavailable_and_serves_again_once_it_is_up(kind: str) -> None:
    faults = [NO_SUCH_KEY[kind]]
    with served(Faulty, faults=faults) as address:
        keys = opened(kind, address)
        assert not keys.has_key("system")
    for call in (*calls(keys), lambda: opened(kind, address)):
        with pytest.raises(ProviderUnavailable):
            call()
    with served(Faulty, faults=faults, port=int(address.rpartition(":")[2])):
        assert not keys.has_key("system")


@pytest.mark.parametrize("kind", ["aws_kms", "vault_transit"])
def test_without_its_library_the_extra_is_named(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, {"aws_kms": "boto3", "vault_transit": "hvac"}[kind], None)
    more = {"aws_kms": {"region": "eu-central-1"}, "vault_transit": {"address": "https://vault", "token": "t"}}[kind]
    with pytest.raises(ProviderMissing, match="pip install 'cloister"):
        open_provider(kind, **more)  # type: ignore[arg-type]  # one of the kinds


def test_a_call_is_left_behind_when_its_time_is_up_and_its_own_error_comes_through() -> None:
    release = threading.Event()
    begun = time.monotonic()
    with pytest.raises(ProviderUnavailable, match="gave no answer within"):
        call_within(0.1, lambda: release.wait(60), provider="a test")
    assert time.monotonic() - begun < 50
    release.set()
    assert call_within(60, lambda: 7, provider="a test") == 7
    with pytest.raises(ZeroDivisionError):
        call_within(60, lambda: 1 / 0, provider="a test")


@pytest.mark.parametrize(
    "address",
    [
        "http://vault.example:8200",
        "http://10.0.0.7",
        "ftp://vault.example",
        "vault.example:8200",
        "https://user:word@vault.example",
        "https://vault.example/?token=x",
        "https://",
        "",
    ],
)
def test_an_address_that_would_show_a_secret_is_refused(address: str) -> None:
    with pytest.raises(ValueError, match=r"address|clear"):
        check_address(address)
    with pytest.raises(ValueError, match=r"address|clear"):
        AWSKMSKeyProvider(region="eu-central-1", endpoint_url=address)
    with pytest.raises(ValueError, match=r"address|clear"):
        VaultTransitKeyProvider(address, token=VAULT_TOKEN)


@pytest.mark.parametrize(
    "address", ["https://vault.example:8200", "http://127.0.0.1:1", "http://[::1]:1", "http://localhost"]
)
def test_an_address_that_shows_none_is_taken(address: str) -> None:
    check_address(address)
