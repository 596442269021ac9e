"""Keys that move to another provider: everything opens meanwhile, whoever was started before, and whose key is a customer's."""

from __future__ import annotations

import secrets
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import Engine

from cloister_privacy.sealing import KeyProviderError, LocalKeyProvider
from cloister_server import deployment, keys, rewrapping
from cloister_server.errors import Conflict
from cloister_server.keyring import KeyRing
from cloister_server.service import Service
from cloister_server.vault import SYSTEM
from key_providers import ACCOUNT, PIN, TOKEN_LABEL
from rotated import AT_ONCE, OBJECTS, ON_SQLITE, Killed, Sealed, name, new_service, secrets_of, states

pytest_plugins = ("key_providers",)
pytestmark = pytest.mark.xdist_group("key-providers")


@pytest.fixture(autouse=True)
def _small_transactions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rewrapping, "_AT_ONCE", AT_ONCE)


@pytest.fixture
def service(engine: Engine, tmp_path: Path) -> Service:
    return new_service(engine, tmp_path)


@pytest.fixture
def acme(service: Service) -> Sealed:
    return Sealed(service)


@ON_SQLITE
def test_a_begun_rotation_into_another_provider_is_finished_or_discarded_by_name(
    acme: Sealed, service: Service
) -> None:
    def die(*_: Any) -> None:
        raise Killed

    with pytest.raises(Killed):
        acme.migrate(on_progress=die)
    with pytest.raises(Conflict, match=r"into 'second' was begun.*migrate --to second.*--tenant acme --version 2"):
        acme.rotate()
    acme.destroy(2)
    assert acme.rotate().version == 3
    assert states(service, acme.id) == [
        (1, "local", "decrypt-only", 0),
        (2, "second", "destroyed", 0),
        (3, "local", "active", OBJECTS),
    ]
    acme.require_all_open()


@pytest.fixture(params=["local", "pkcs11", "aws_kms"])
def third(request: pytest.FixtureRequest, service: Service, tmp_path: Path) -> str:
    """The name of a provider that came into the provider file after `service` was opened."""
    if request.param == "local":
        LocalKeyProvider.create(tmp_path / "third", key_file=tmp_path / "third.key")
        given = {"directory": str(tmp_path / "third"), "key_file": str(tmp_path / "third.key")}
    elif request.param == "pkcs11":
        given = {"library": str(request.getfixturevalue("token")), "token_label": TOKEN_LABEL, "pin": PIN}
    else:
        given = {"endpoint_url": request.getfixturevalue("kms"), **ACCOUNT}
    name(tmp_path, third={"kind": request.param, **given})
    return "third"


@ON_SQLITE
def test_all_keys_move_to_another_provider_under_processes_that_were_started_before(
    acme: Sealed, service: Service, third: str
) -> None:
    running = KeyRing.from_message(service.keys.to_message())
    other, before = Sealed(service, "other", count=2), secrets_of(service)
    operator = Service(service.settings, service.engine, deployment.open_keys(service.settings), service.blobs)
    done = keys.migrate(operator, to=third, request_id="request-of-a-test")
    assert {each.tenant for each in done.rotated} == {SYSTEM, acme.id, other.id} and not done.left and not done.refused
    for each in (acme, other):
        each.seal()  # by the keys of a process that had never heard of the provider
        each.require_all_open(running)
        assert states(service, each.id)[1] == (2, third, "active", len(each.contents))
    assert secrets_of(service, running) == before
    assert keys.migrate(operator, to=third, request_id="request-of-a-test").rotated == [], "nothing is left to do"
    for tenant_id in (SYSTEM, acme.id, other.id):
        keys.destroy(operator, tenant_id, version=1, request_id="request-of-a-test")
    assert not list(service.settings.key_dir.glob("*.kek"))
    acme.require_all_open()
    back = keys.migrate(operator, to="local", request_id="request-of-a-test")
    assert [each.tenant for each in back.rotated] == [SYSTEM], (
        "while the default is another, theirs may be the tenants' own"
    )
    assert {each.tenant for each in back.left} == {acme.id, other.id}


@ON_SQLITE
def test_a_migration_that_died_among_tenants_goes_on_with_those_that_are_left(acme: Sealed, service: Service) -> None:
    others = [Sealed(service, f"t{number}", count=2) for number in range(3)]
    seen: list[str] = []

    def die(tenant_id: str, step: str, _: int) -> None:
        seen.append(tenant_id)
        if tenant_id == others[1].id and step == "active":
            raise Killed

    with pytest.raises(Killed):
        keys.migrate(service, to="second", request_id="request-of-a-test", on_progress=die)
    for each in (acme, *others):
        each.require_all_open()
    done = keys.migrate(service, to="second", request_id="request-of-a-test")
    assert [each.tenant for each in done.rotated] == [others[1].id, others[2].id]
    for each in (acme, *others):
        assert states(service, each.id) == [
            (1, "local", "decrypt-only", 0),
            (2, "second", "active", len(each.contents)),
        ]


@ON_SQLITE
def test_a_customers_own_key_moves_only_where_the_customer_is_named(acme: Sealed, service: Service, third: str) -> None:
    operator = Service(service.settings, service.engine, deployment.open_keys(service.settings), service.blobs)
    own = Sealed(operator, "own", count=2, provider=third)
    done = keys.migrate(operator, to="second", request_id="request-of-a-test")
    assert [each.tenant for each in done.left] == [own.id] and "of its own" in done.left[0].why
    assert states(service, own.id) == [(1, third, "active", 2)]
    assert own.migrate("second").rotated[0].rewrapped == 2
    own.require_all_open()


@ON_SQLITE
def test_a_provider_with_a_wrong_setting_is_named_and_not_quoted(service: Service, tmp_path: Path) -> None:
    secret = secrets.token_hex(16)
    name(tmp_path, odd={"kind": "vault_transit", "pin": secret}, worse={"kind": "aws_kms", "timeout_s": secret})
    for provider in ("odd", "worse"):
        with pytest.raises(KeyProviderError, match=provider) as refusal:
            service.keys.of(provider).has_key("tn_1.first")
        assert secret not in str(refusal.value)


@ON_SQLITE
def test_a_provider_file_that_was_broken_since_refuses_the_new_name_alone(
    acme: Sealed, service: Service, tmp_path: Path
) -> None:
    with pytest.raises(KeyProviderError, match="no key provider 'third'"):
        service.keys.of("third")
    (tmp_path / "providers.json").write_text("{")
    with pytest.raises(KeyProviderError, match="cannot be read as JSON"):
        service.keys.of("third")
    acme.rotate(to="second")
    acme.require_all_open()
