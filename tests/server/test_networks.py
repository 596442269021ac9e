"""The opened models of a process: how long a withdrawn key is outlived, who waits for whom, what is held against a certificate."""

from __future__ import annotations

import hashlib
import json
import logging
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from sqlalchemy.pool import QueuePool
from starlette.testclient import TestClient

from asked import asked_reading, asked_writing
from certificates import CERTIFICATE, signed
from cloister.wire.architecture import Architecture
from cloister.wire.certificate import sign, verify
from cloister.wire.columns import CategoryColumn, NumberColumn
from cloister.wire.layers import Encode, Linear
from cloister_privacy.architecture import Network, build, from_bytes, to_bytes
from cloister_privacy.sealing import LocalKeyProvider, ProviderUnavailable
from cloister_server import deployment, models, tenants, vault
from cloister_server.app import create_app
from cloister_server.errors import ServerError, TenantKeyRefused, Unavailable
from cloister_server.networks import Networks
from cloister_server.service import Service
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.queries import public_keys
from cloister_server.store.session import writing
from cloister_server.store.tables import Model, ModelVersion, new_id
from issuers import soon

HELD = "held"
"""The name of a key provider, of a tenant of the same name."""
KEPT_S = 0.5
"""Shorter than the settings allow."""
ROWS = {"age": np.array([30.5, 70.0], np.float32)}
REQUEST = {"inputs": [{"name": "age", "shape": [2], "datatype": "FP32", "data": [30.5, 70]}]}
SPEC = Architecture(
    inputs={"age": NumberColumn(low=0, high=100)},
    layers=(Encode(), Linear(in_features=1, out_features=64), Linear(in_features=64, out_features=3)),
    target="kind",
    output=CategoryColumn(values=("a", "b", "c")),
    loss="cross_entropy",
)
BLOCK = 2**16
"""What an arena takes for one of these."""


class Keeper:
    """Who holds the key of the tenant `held`: in a keystore elsewhere, on a line that may be slow or cut."""

    def __init__(self, directory: Path) -> None:
        self.directory, self._away = directory, directory.with_name("withdrawn")
        self.is_cut, self.asked = False, 0
        self.answers = threading.Event()
        self.answers.set()

    def interrupt(self, provider: LocalKeyProvider) -> None:
        """What happens before the provider does what it does."""
        if provider._directory == self.directory:
            self.asked += 1
            assert self.answers.wait(120)
            if self.is_cut:
                raise ProviderUnavailable("the line is cut")

    def withdraw(self) -> None:
        self._away.mkdir()
        for key in self.directory.glob("*.kek"):
            key.rename(self._away / key.name)

    def give_back(self) -> None:
        for key in self._away.iterdir():
            key.rename(self.directory / key.name)


@pytest.fixture
def keeper(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Keeper:
    made, unwrap = Keeper(tmp_path / "elsewhere"), LocalKeyProvider.unwrap

    def interrupted(self: LocalKeyProvider, *given: Any, **more: Any) -> bytes:
        made.interrupt(self)
        return unwrap(self, *given, **more)

    monkeypatch.setattr(LocalKeyProvider, "unwrap", interrupted)
    return made


@pytest.fixture
def opened(service: Service, keeper: Keeper, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Opens the deployment again with other settings, and with the provider `held`, in which the tenant `held` has its key."""
    LocalKeyProvider.create(keeper.directory, key_file=tmp_path / "held.key")
    held = {"kind": "local", "directory": str(keeper.directory), "key_file": str(tmp_path / "held.key")}
    file = tmp_path / "providers.json"
    file.touch(mode=0o600)
    file.write_text(json.dumps({"format": "cloister.key-providers/1", "default": "local", "providers": {HELD: held}}))
    made: list[Service] = []

    def open_again(**settings: Any) -> Service:
        given = {"key_providers": file, "key_cache_s": KEPT_S, **settings}
        made.append(deployment.open_service(service.settings.model_copy(update=given)))
        with asked_writing(made[-1]) as session:
            for name, provider in ((HELD, HELD), ("acme", None)):
                tenants.create_tenant(
                    session, made[-1].keys, name=name, request_id="request-of-a-test", provider=provider
                )
        return made[-1]

    yield open_again
    for each in made:
        each.engine.dispose()


def publish(service: Service, tenant: str, *, versions: int = 1, spec: Architecture = SPEC) -> list[ModelVersion]:
    """Versions of a model as a worker publishes them, certificate and all; each has weights of its own."""
    with asked_writing(service) as session:
        tenant_id = tenants.find_tenant(session, tenant).id
        model = Model(tenant_id=tenant_id, id=new_id("mdl"), name=f"m{new_id('x')[-12:]}", champion=versions)
        session.add(model)
        session.flush()
        made = [_version(session, service, model, number, to_bytes(build(spec))) for number in range(1, versions + 1)]
        session.add_all(made)
    return made


def _version(session: Any, service: Service, model: Model, number: int, body: bytes) -> ModelVersion:
    key_id, private_key = vault.certificate_signer(session, service.keys)
    certificate = CERTIFICATE.model_copy(
        update={
            "tenant": model.tenant_id,
            "model": model.id,
            "name": model.name,
            "version": number,
            "weights_digest": hashlib.sha256(body).hexdigest(),
            "architecture_digest": hashlib.sha256(SPEC.model_dump_json().encode()).hexdigest(),
        }
    )
    return ModelVersion(
        tenant_id=model.tenant_id,
        model_id=model.id,
        version=number,
        job_id=new_id("job"),
        weights_id=vault.seal_object(session, service.blobs, body, tenant_id=model.tenant_id, kind="weights"),
        certificate=sign(certificate, private_key=private_key, key_id=key_id),
    )


def network_of(networks: Networks, version: ModelVersion) -> Network:
    """The version's network, however long that takes."""
    found = networks.get(version)
    return found.result(120) if isinstance(found, Future) else found


def answer(network: Network) -> list[float]:
    return [float(each) for each in network.predict(ROWS)["probabilities"].ravel()]


def expected(service: Service, version: ModelVersion) -> list[float]:
    """What the version's weights answer when they are opened by themselves."""
    with asked_reading(service) as session:
        body = vault.open_object(session, service.blobs, tenant_id=version.tenant_id, object_id=version.weights_id)
    return answer(from_bytes(body))


class Clock:
    """By which models are kept, and which stands where it is put."""

    def __init__(self) -> None:
        self.at = 0.0

    def monotonic(self) -> float:
        return self.at


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    made = Clock()
    monkeypatch.setattr("cloister_server.networks.time", made)
    return made


def test_each_version_is_answered_with_its_own_weights_and_no_tenant_with_anothers(
    opened: Callable[..., Service],
) -> None:
    service = opened()
    networks = Networks(service)
    versions = [*publish(service, HELD, versions=3), *publish(service, "acme", versions=3)]
    answers = [expected(service, each) for each in versions]
    assert len({tuple(each) for each in answers}) == 6
    with ThreadPoolExecutor(8) as pool:
        for _ in range(3):
            found = list(pool.map(lambda each: answer(network_of(networks, each)), versions))
            assert found == answers


def test_many_who_ask_at_once_open_a_model_once_and_of_the_weights_there_is_one_copy(
    opened: Callable[..., Service], keeper: Keeper
) -> None:
    service = opened(key_cache_s=60)
    networks, (version,) = Networks(service), publish(service, HELD)
    keeper.asked = 0
    with ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: network_of(networks, version), range(64)))
    assert len(set(map(id, found))) == 1
    assert keeper.asked == 1
    assert networks._arena.held_bytes == BLOCK
    places = [each.data_ptr() for each in found[0].state_dict().values()]
    assert max(places) - min(places) < BLOCK, "the network computes on what was opened, and copied none of it"


def test_a_withdrawn_key_is_outlived_by_no_more_than_was_promised(
    opened: Callable[..., Service], keeper: Keeper, clock: Clock
) -> None:
    service = opened()
    networks, (held,), (other,) = Networks(service), publish(service, HELD), publish(service, "acme")
    assert answer(network_of(networks, held)) == expected(service, held)
    keeper.withdraw()
    clock.at += KEPT_S / 4
    assert network_of(networks, held), "nobody is asked yet"
    clock.at += 3 * KEPT_S / 4
    for _ in range(2):
        with pytest.raises(TenantKeyRefused) as refusal:
            network_of(networks, held)
        assert refusal.value.status == 403 and refusal.value.code == "tenant_key_refused"
        assert network_of(networks, other)
    keeper.give_back()
    assert answer(network_of(networks, held)) == expected(service, held)


def test_an_idle_process_forgets_what_it_opened_and_zeroes_it(
    opened: Callable[..., Service], keeper: Keeper, clock: Clock
) -> None:
    service = opened()
    networks, (version,) = Networks(service), publish(service, HELD)
    network_of(networks, version)
    (weight,) = [each for each in network_of(networks, version).state_dict().values() if each.shape == (64, 1)]
    place, size = weight.data_ptr(), weight.nbytes
    assert _memory(place, size).strip(b"\0"), "the weights lie there"
    asked = keeper.asked
    del weight
    clock.at += KEPT_S
    soon(lambda: networks._arena.leased_bytes == 0)
    assert not _memory(place, size).strip(b"\0"), "and now they do not, though the memory is held for the next"
    assert networks._arena.held_bytes == BLOCK
    assert keeper.asked == asked, "nobody was asked for a key that nobody needs"
    soon(lambda: not networks._is_swept)
    assert answer(network_of(networks, version)) == expected(service, version)


def _memory(place: int, size: int) -> bytes:
    import ctypes

    return ctypes.string_at(place, size)


def test_a_model_in_use_is_asked_for_again_and_nobody_waits_for_that(
    opened: Callable[..., Service], keeper: Keeper, clock: Clock
) -> None:
    service = opened()
    networks, (version,) = Networks(service), publish(service, HELD)
    network = network_of(networks, version)
    keeper.asked = 0
    for _ in range(14):
        clock.at += KEPT_S / 4
        assert networks.get(version) is network
        soon(lambda: not networks._openings)
    assert keeper.asked == 7, "whenever half of the time was over"


def test_a_request_under_way_keeps_what_it_began_with(
    opened: Callable[..., Service], keeper: Keeper, clock: Clock
) -> None:
    service = opened()
    networks, (version,) = Networks(service), publish(service, HELD)
    network, right = network_of(networks, version), expected(service, version)
    keeper.withdraw()
    clock.at += KEPT_S
    soon(lambda: not networks._opened)
    assert networks._arena.leased_bytes == BLOCK
    assert answer(network) == right
    del network
    assert networks._arena.leased_bytes == 0


def test_while_a_provider_is_away_its_tenants_are_refused_and_nobody_else(
    opened: Callable[..., Service], keeper: Keeper, clock: Clock
) -> None:
    service = opened()
    networks, (held,), (other,) = Networks(service), publish(service, HELD), publish(service, "acme")
    network_of(networks, held)
    keeper.is_cut = True
    keeper.asked = 0
    for _ in range(3):
        clock.at += KEPT_S / 4
        assert network_of(networks, held), "an outage is no withdrawal"
        soon(lambda: not networks._openings)
    assert keeper.asked == 2
    clock.at += KEPT_S / 4
    with pytest.raises(Unavailable) as refusal:
        network_of(networks, held)
    assert refusal.value.status == 503
    assert network_of(networks, other)
    keeper.is_cut = False
    assert answer(network_of(networks, held)) == expected(service, held)


def test_a_slow_provider_holds_up_nobody_elses_requests(
    opened: Callable[..., Service],
    keeper: Keeper,
    make_client: Callable[..., Any],
) -> None:
    service = opened()
    (held,), (other,) = publish(service, HELD), publish(service, "acme")
    callers = {HELD: make_client(HELD), "acme": make_client("acme")}
    with TestClient(create_app(service), raise_server_exceptions=False) as http:
        headers = {}
        for name, caller in callers.items():
            told = http.post(
                "/oauth/token", data={"grant_type": "client_credentials"}, auth=(caller.id, caller.secret)
            ).json()
            headers[name] = {"Authorization": f"Bearer {told['access_token']}"}

        def infer(name: str, version: ModelVersion) -> Any:
            return http.post(f"/v2/models/{version.model_id}/infer", json=REQUEST, headers=headers[name])

        assert infer("acme", other).status_code == 200
        keeper.answers.clear()
        keeper.asked = 0
        with ThreadPoolExecutor(40) as pool:
            waiting = [pool.submit(infer, HELD, held) for _ in range(40)]
            soon(lambda: keeper.asked == 1)
            pool_of_connections = service.engine.pool
            assert isinstance(pool_of_connections, QueuePool)
            for _ in range(20):
                assert infer("acme", other).status_code == 200
            assert not any(each.done() for each in waiting)
            soon(lambda: pool_of_connections.checkedout() == 0)  # who waits holds none to the database
            keeper.answers.set()
            assert {each.result(120).status_code for each in waiting} == {200}
        assert keeper.asked <= 2


def test_a_tenant_whose_provider_hangs_takes_no_endless_number_of_threads(
    opened: Callable[..., Service], keeper: Keeper
) -> None:
    service = opened()
    networks, versions, (other,) = Networks(service), publish(service, HELD, versions=18), publish(service, "acme")
    keeper.answers.clear()
    opening = [networks.get(each) for each in versions[:16]]
    with pytest.raises(Unavailable, match="at once"):
        networks.get(versions[16])
    assert networks.get(versions[0]) is opening[0], "whoever asks for one of these waits with the others"
    assert answer(network_of(networks, other)) == expected(service, other)
    keeper.answers.set()
    for each in opening:
        assert isinstance(each, Future) and each.result(120)
    assert network_of(networks, versions[17])


def test_the_models_asked_for_least_recently_make_room(opened: Callable[..., Service], keeper: Keeper) -> None:
    service = opened(key_cache_s=60, model_cache_bytes=3 * BLOCK)
    networks, versions = Networks(service), publish(service, HELD, versions=4)
    for version in versions[:3]:
        network_of(networks, version)
    first = networks.get(versions[0])
    assert isinstance(network_of(networks, versions[3]), Network)
    assert networks.get(versions[0]) is first, "it was asked for since"
    assert networks._arena.held_bytes == 3 * BLOCK
    assert [place.version for place in networks._opened] == [3, 4, 1]


def test_models_in_use_are_not_taken_back_and_one_that_never_fits_drives_out_none(
    opened: Callable[..., Service], keeper: Keeper, caplog: pytest.LogCaptureFixture
) -> None:
    service = opened(key_cache_s=60, model_cache_bytes=2 * BLOCK)
    wide = SPEC.model_copy(
        update={"layers": (Encode(), Linear(in_features=1, out_features=20_000), Linear(in_features=20_000, out_features=3))}
    )  # fmt: skip
    networks, versions, (large,) = (
        Networks(service), publish(service, HELD, versions=3), publish(service, "acme", spec=wide),
    )  # fmt: skip
    in_use = [network_of(networks, each) for each in versions[:2]]
    with pytest.raises(Unavailable, match="CLOISTER_MODEL_CACHE_BYTES"):
        network_of(networks, large)
    assert len(networks._opened) == 2
    with pytest.raises(Unavailable, match="beside those in use"):
        network_of(networks, versions[2])
    assert answer(in_use[0]) == expected(service, versions[0])
    del in_use
    assert answer(network_of(networks, versions[2])) == expected(service, versions[2])
    assert {record.message for record in caplog.records if record.levelno == logging.ERROR} == {"model.no_memory"}


@pytest.fixture
def swapped(opened: Callable[..., Service]) -> Callable[..., tuple[Service, ModelVersion, ModelVersion]]:
    """A model of two versions of which somebody changed the row of the second in the database."""

    def swap(strict: bool, **change: Any) -> tuple[Service, ModelVersion, ModelVersion]:
        service = opened(strict=strict, key_cache_s=60)
        first, second = publish(service, "acme", versions=2)
        with writing(service.engine) as session:
            row = session.get_one(ModelVersion, (second.tenant_id, second.model_id, 2))
            for name, of in change.items():
                setattr(row, name, of(first, second) if callable(of) else of)
            changed = row
        return service, first, changed

    return swap


SWAPS: dict[str, dict[str, Any]] = {
    "weights": {"weights_id": lambda first, _: first.weights_id},
    "certificate": {"certificate": lambda first, _: first.certificate},
    "both": {
        "weights_id": lambda first, _: first.weights_id,
        "certificate": lambda first, _: first.certificate,
    },
    "signer": {"certificate": signed()},
    "no certificate": {"certificate": {}},
}


@pytest.mark.parametrize("swap", SWAPS)
def test_strict_refuses_by_name_what_is_not_certified_and_without_it_nobody_notices(
    swapped: Callable[..., tuple[Service, ModelVersion, ModelVersion]],
    swap: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    service, first, second = swapped(strict=True, **SWAPS[swap])
    networks = Networks(service)
    assert answer(network_of(networks, first)) == expected(service, first), "the other version is as it was"
    for _ in range(2):
        with pytest.raises(ServerError) as refusal:
            network_of(networks, second)
        assert (refusal.value.code, refusal.value.status) == ("weights_differ", 500)
    assert [place.version for place in networks._opened] == [1]
    assert [each.levelname for each in caplog.records if each.message == "model.weights_differ"] == ["ERROR"] * 2
    assert networks._arena.leased_bytes == BLOCK, "nothing of the refused one is left"

    relaxed = Service(
        service.settings.model_copy(update={"strict": False}), service.engine, service.keys, service.blobs
    )
    assert answer(network_of(Networks(relaxed), second)) == expected(service, second)


def test_strict_holds_the_schema_against_the_certificate_too(opened: Callable[..., Service]) -> None:
    service = opened(strict=True)
    first, second = publish(service, "acme", versions=2)
    with asked_writing(service) as session:
        key_id, private_key = vault.certificate_signer(session, service.keys)
        other = verify(second.certificate, public_keys(session, "certificate")).model_copy(
            update={"architecture_digest": "0" * 64}
        )
        row = session.get_one(ModelVersion, (second.tenant_id, second.model_id, 2))
        row.certificate = sign(other, private_key=private_key, key_id=key_id)
    with asked_reading(service) as session:
        assert models.schema_of(session, service, first).target == "kind"
        with pytest.raises(ServerError) as refusal:
            models.schema_of(session, service, row)
    assert refusal.value.code == "weights_differ"


def test_a_schema_is_not_remembered_beyond_the_key(opened: Callable[..., Service], keeper: Keeper) -> None:
    service = opened()
    (version,) = publish(service, HELD)
    assert service.read(ALL_TENANTS, lambda session: models.schema_of(session, service, version)).target == "kind"
    keeper.withdraw()
    with pytest.raises(TenantKeyRefused):
        service.read(ALL_TENANTS, lambda session: models.schema_of(session, service, version))
