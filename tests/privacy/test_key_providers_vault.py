"""The Vault provider on a stand-in of the documented interface: shapes, errors and bindings, and none of it on a live Vault."""

from __future__ import annotations

import secrets
import socket
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler
from typing import Any

import pytest

from cloister_privacy.sealing import (
    AccessRefused,
    Context,
    InvalidAnswer,
    InvalidKeyId,
    KeyExists,
    KeyMissing,
    KeyProviderError,
    KeyUnfit,
    ProviderUnavailable,
    new_key,
)
from cloister_privacy.sealing.vault_transit import VaultTransitKeyProvider
from key_providers import VAULT_TOKEN, Faulty, served

pytest_plugins = ("key_providers",)
pytestmark = pytest.mark.xdist_group("key-providers")

CONTEXT = Context(tenant="tn_1", kind="weights", object="obj_1")


def new_id() -> str:
    return f"tn_{secrets.token_hex(16)}.{secrets.token_hex(8)}"


@pytest.fixture
def policy(vault_state: dict[str, dict[str, Any]]) -> Iterator[dict[str, Any]]:
    yield vault_state["policy"]
    vault_state["policy"].clear()


@pytest.fixture
def transit(vault: str) -> VaultTransitKeyProvider:
    return VaultTransitKeyProvider(vault, token=VAULT_TOKEN)


def test_a_transit_key_is_derived_and_cannot_be_exported(
    transit: VaultTransitKeyProvider, vault_state: dict[str, dict[str, Any]]
) -> None:
    key_id = new_id()
    transit.create_key(key_id)
    assert vault_state["keys"][key_id].fields == {
        "type": "aes256-gcm96",
        "derived": True,
        "exportable": False,
        "allow_plaintext_backup": False,
        "deletion_allowed": False,
    }


@pytest.mark.parametrize(
    "change",
    [
        {"type": "chacha20-poly1305"},
        {"derived": False},
        {"exportable": True},
        {"allow_plaintext_backup": True},
        {"imported_key": True},
        {"convergent_encryption": True},
    ],
    ids=str,
)
def test_a_transit_key_of_another_kind_is_neither_used_nor_said_to_be_destroyed(
    transit: VaultTransitKeyProvider, vault_state: dict[str, dict[str, Any]], change: dict[str, Any]
) -> None:
    key_id = new_id()
    transit.create_key(key_id)
    vault_state["keys"][key_id].fields.update(change)
    for refused in (
        lambda: transit.has_key(key_id),
        lambda: transit.wrap(key_id, new_key(), context=CONTEXT),
        lambda: transit.unwrap(key_id, b"", context=CONTEXT),
        lambda: transit.destroy_key(key_id),
    ):
        with pytest.raises(KeyUnfit, match=next(iter(change))):
            refused()
    assert key_id in vault_state["keys"]


def test_what_an_older_version_of_a_transit_key_wrapped_still_opens(
    transit: VaultTransitKeyProvider, vault_state: dict[str, dict[str, Any]]
) -> None:
    key_id = new_id()
    transit.create_key(key_id)
    older = transit.wrap(key_id, b"older", context=CONTEXT)
    vault_state["keys"][key_id].versions.append(secrets.token_bytes(32))  # as `vault write -f transit/keys/ID/rotate`
    newer = transit.wrap(key_id, b"newer", context=CONTEXT)
    head = len(b"cloister.transit/1\n")
    assert (older[head : head + 4], newer[head : head + 4]) == (b"\0\0\0\1", b"\0\0\0\2")
    assert transit.unwrap(key_id, older, context=CONTEXT) == b"older"
    assert transit.unwrap(key_id, newer, context=CONTEXT) == b"newer"


def test_a_destroyed_key_is_not_made_anew_by_wrapping(
    transit: VaultTransitKeyProvider, policy: dict[str, Any], vault_state: dict[str, dict[str, Any]]
) -> None:
    """A token whose policy says `create` on encrypt would have Vault do just that."""
    policy["may_upsert"] = True
    key_id = new_id()
    transit.create_key(key_id)
    transit.destroy_key(key_id)
    with pytest.raises(KeyMissing):
        transit.wrap(key_id, new_key(), context=CONTEXT)
    assert key_id not in vault_state["keys"]


def test_who_loses_the_race_for_a_name_is_told_by_vaults_warning(
    transit: VaultTransitKeyProvider, monkeypatch: pytest.MonkeyPatch
) -> None:
    key_id = new_id()
    transit.create_key(key_id)
    with monkeypatch.context() as patch:
        patch.setattr(VaultTransitKeyProvider, "_read", lambda *_: None)  # it looked before the other was there
        with pytest.raises(KeyExists):
            transit.create_key(key_id)


def test_a_key_that_is_destroyed_while_it_is_used_is_missing(
    transit: VaultTransitKeyProvider, monkeypatch: pytest.MonkeyPatch, vault_state: dict[str, dict[str, Any]]
) -> None:
    key_id = new_id()
    transit.create_key(key_id)
    wrapped = transit.wrap(key_id, b"secret", context=CONTEXT)
    real = VaultTransitKeyProvider._data

    def just_destroyed(self: VaultTransitKeyProvider, *given: Any, **fields: Any) -> dict[str, Any]:
        vault_state["keys"].pop(key_id, None)
        return real(self, *given, **fields)

    monkeypatch.setattr(VaultTransitKeyProvider, "_data", just_destroyed)
    with pytest.raises(KeyMissing):
        transit.unwrap(key_id, wrapped, context=CONTEXT)


def test_a_wrong_token_a_forbidding_policy_and_a_sealed_vault_are_told_apart(
    vault: str, transit: VaultTransitKeyProvider, policy: dict[str, Any]
) -> None:
    for token in ("s.another", "", "two words", "s.\n"):
        with pytest.raises(AccessRefused):
            VaultTransitKeyProvider(vault, token=token)
    key_id = new_id()
    transit.create_key(key_id)
    policy["denied"] = {("POST", "encrypt"), ("DELETE", "keys")}
    with pytest.raises(AccessRefused, match="policy"):
        transit.wrap(key_id, new_key(), context=CONTEXT)
    with pytest.raises(AccessRefused, match="policy"):
        transit.destroy_key(key_id)
    assert transit.has_key(key_id)
    policy["is_sealed"] = True
    with pytest.raises(ProviderUnavailable, match="sealed"):
        transit.has_key(key_id)
    policy.clear()
    transit.destroy_key(key_id)


def test_an_engine_that_is_not_there_is_no_missing_key(vault: str) -> None:
    with pytest.raises(KeyProviderError, match="no transit engine at 'elsewhere'"):
        VaultTransitKeyProvider(vault, token=VAULT_TOKEN, mount="elsewhere")
    for mount in ("", "../sys", "a b", "transit/", "/transit"):
        with pytest.raises(ValueError, match="mount"):
            VaultTransitKeyProvider(vault, token=VAULT_TOKEN, mount=mount)


def test_a_key_id_that_vault_cannot_name_is_refused(transit: VaultTransitKeyProvider) -> None:
    with pytest.raises(InvalidKeyId, match="Vault"):
        transit.create_key("ends-with-")


def test_a_redirect_does_not_carry_the_token_away() -> None:
    pytest.importorskip("hvac")
    seen: list[str] = []

    class Elsewhere(BaseHTTPRequestHandler):
        def log_message(self, *_: Any) -> None:
            pass

        def do_GET(self) -> None:
            seen.append(self.path)
            self.send_error(404)

    with served(Elsewhere) as elsewhere:
        faults = [lambda handler: handler.answer(307, b"", Location=elsewhere + "/v1/transit/keys/cloister")]
        with served(Faulty, faults=faults) as address, pytest.raises(InvalidAnswer, match="307"):
            VaultTransitKeyProvider(address, token=VAULT_TOKEN)
    assert not seen


def test_the_environment_points_vault_nowhere_else(vault: str, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))
        nowhere = f"http://127.0.0.1:{closed.getsockname()[1]}"
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "VAULT_ADDR"):
        monkeypatch.setenv(name, nowhere)
    monkeypatch.delenv("NO_PROXY", raising=False)
    monkeypatch.delenv("no_proxy", raising=False)
    assert not VaultTransitKeyProvider(vault, token=VAULT_TOKEN).has_key(new_id())
