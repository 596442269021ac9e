"""The end of a tenant: nothing of it opens any more, here or from a backup; every other tenant is as before; one true receipt."""

from __future__ import annotations

import base64
import hashlib
import json
import shutil
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import SecretStr, TypeAdapter
from sqlalchemy import create_engine, func, make_url, select, text
from starlette.testclient import TestClient
from typer.testing import CliRunner

from asked import asked_reading, asked_writing
from cloister.cli import main
from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn, NumberColumn, Schema
from cloister.wire.layers import Encode, Linear
from cloister.wire.plans import SGD, TrainingSpec
from cloister.wire.receipts import Receipt, verify_receipt
from cloister.wire.rows import encode_rows
from cloister_privacy.plan import DPPlan
from cloister_privacy.sealing import InvalidSeal, LocalKeyProvider
from cloister_server import deployment, grants, keys, keystore_backups, processes, shredding, sources, tenants, vault
from cloister_server.app import create_app
from cloister_server.cli.admin import cli
from cloister_server.errors import Conflict, ServerError, TenantKeyRefused, Unavailable
from cloister_server.oauth import verifier
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store import chain
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.key_record import KeyRecord
from cloister_server.store.queries import public_keys
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import (
    App,
    AuditRow,
    Dataset,
    Grant,
    IdempotencyKey,
    Job,
    KeystoreBackup,
    LedgerEntry,
    Model,
    ModelVersion,
    Part,
    SealedObject,
    Tenant,
    TenantKey,
    Unit,
    Weights,
    new_id,
)
from issuers import soon
from key_providers import ACCOUNT, PIN, TOKEN_LABEL, kms_client

pytest_plugins = ("key_providers",)
pytestmark = pytest.mark.xdist_group("key-providers")

COLUMNS: dict[str, Any] = {"age": {"type": "number", "low": 0.0, "high": 120.0}, "who": {"type": "unit"}}
REQUEST = {"inputs": [{"name": "age", "shape": [2], "datatype": "FP32", "data": [30.5, 70]}]}


@pytest.fixture(scope="session")
def weights() -> bytes:
    """A network of one input, trained for a step on a toy."""
    import torch

    from cloister_privacy.training import train

    torch.set_num_threads(1)
    spec = TrainingSpec(
        dataset=new_id("ds"),
        architecture=Architecture(
            inputs={"age": NumberColumn(low=0, high=100)}, layers=(Encode(), Linear(in_features=1, out_features=2)),
            target="kind", output=CategoryColumn(values=("a", "b")), loss="cross_entropy",
        ),
        nominal_size=40, capacity=80, batch_size=10, steps=1, noise_multiplier=1.0, clip=1.0, delta=1e-5,
        optimizer=SGD(learning_rate=0.1),
    )  # fmt: skip
    random = np.random.default_rng(7)
    rows = {"age": random.uniform(0, 100, 40).astype(np.float32), "kind": random.integers(0, 2, 40).astype(np.int32)}
    trained = train(
        spec, rows, plan=DPPlan.of(spec), device="cpu", chunk_steps=1,
        before_chunk=lambda first, end: None, after_chunk=lambda done, snapshot: True,
    )  # fmt: skip
    assert trained is not None
    return trained


@dataclass
class House:
    """A tenant with a client, rows of users, weights and a model that predicts."""

    name: str
    client: Any
    http: TestClient
    bearer: dict[str, str] = field(repr=False)
    dataset: str = ""

    @property
    def id(self) -> str:
        return str(self.client.tenant_id)

    @property
    def operator(self) -> Principal:
        return Principal.operator(self.id, request_id="request-of-a-test")

    def ask(self, method: str, path: str, *, http: TestClient | None = None, **more: Any) -> Any:
        return (http or self.http).request(method, path, headers={**self.bearer, **more.pop("headers", {})}, **more)

    def declare(self, name: str, source: str, *, capacity: int = 100) -> str:
        body = {"source": source, "name": name, "columns": COLUMNS, "nominal_size": 50, "capacity": capacity}
        answer = self.ask("POST", "/v1/datasets", json={**body, "capacity_rows": 2 * capacity})
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def put(self, dataset: str, who: str, *, number: int = 0, key: str = "") -> Any:
        rows = {
            "age": np.array([30.0], np.float32),
            "who": np.frombuffer(who.encode().ljust(64, b"\0"), np.uint8).reshape(1, 64),
            "who.length": np.array([len(who)], np.int32),
        }
        body = encode_rows(TypeAdapter(Schema).validate_python(COLUMNS), rows)
        digest = base64.b64encode(hashlib.sha256(body).digest()).decode()
        headers = {"Content-Digest": f"sha-256=:{digest}:", **({"Idempotency-Key": key} if key else {})}
        return self.ask("PUT", f"/v1/datasets/{dataset}/parts/{number}", content=body, headers=headers)

    def predict(self, *, http: TestClient | None = None) -> Any:
        return self.ask("POST", "/v2/models/kinds/infer", http=http, json=REQUEST)


@pytest.fixture
def furnish(
    service: Service, http: TestClient, make_client: Callable[..., Any], bearer_of: Callable[..., Any], weights: bytes
) -> Callable[[str], House]:
    def make(name: str) -> House:
        house = House(name, make_client(name), http, {})
        house.bearer = bearer_of(house.client)
        source = house.ask("POST", "/v1/sources", json={"name": "people", "unit": "user", "epsilon": 3, "delta": 1e-5})
        house.dataset = house.declare("rows", source.json()["id"])
        assert house.put(house.dataset, f"anna@{name}", key=f"part-of-{name}").status_code == 201
        assert house.ask("POST", f"/v1/datasets/{house.dataset}/complete").status_code == 200
        assert house.ask("POST", "/v1/weights", content=weights).status_code == 201
        publish(service, house, weights)
        assert house.predict().status_code == 200
        return house

    return make


def publish(service: Service, house: House, weights: bytes) -> None:
    with asked_writing(service) as session:
        model = Model(tenant_id=house.id, id=new_id("mdl"), name="kinds", champion=1)
        session.add(model)
        session.flush()
        of = {"tenant_id": house.id, "kind": "weights"}
        sealed = vault.seal_object(session, service.blobs, weights, **of)  # type: ignore[arg-type]
        session.add(
            ModelVersion(tenant_id=house.id, model_id=model.id, version=1, job_id=new_id("job"), weights_id=sealed,
                         certificate={})
        )  # fmt: skip


def shred(service: Service, house: House) -> Receipt:
    return verified(service, shredding.shred(service, house.operator))


def verified(service: Service, envelope: Any) -> Receipt:
    with reading(service.engine) as session:
        return verify_receipt(envelope, public_keys(session, "certificate"))


def count(service: Service, table: type[Any], *where: Any) -> int:
    with reading(service.engine) as session:
        return int(session.scalar(select(func.count()).select_from(table).where(*where)) or 0)


def blobs_of(service: Service, tenant_id: str) -> list[Path]:
    place = service.settings.data_dir / "objects" / tenant_id
    return [path for path in place.rglob("*") if path.is_file()] if place.is_dir() else []


def assert_nothing_is_left(service: Service, house: House) -> None:
    for table in (SealedObject, Part, Unit, Weights, IdempotencyKey, App, Grant):
        assert count(service, table, table.tenant_id == house.id) == 0, table.__tablename__
    assert blobs_of(service, house.id) == []
    with reading(service.engine) as session:
        states = set(session.scalars(select(TenantKey.state).where(TenantKey.tenant_id == house.id)))
        assert states == {"destroyed"}
        assert session.get_one(Tenant, house.id).status == "shredded"
        chain.verify(session, house.id)


def counted(service: Service, house: House) -> int:
    """The sealed objects that a receipt counts: not those whose number tells of rows."""
    beside_rows = SealedObject.kind.not_in(("part", "units"))
    return count(service, SealedObject, SealedObject.tenant_id == house.id, beside_rows)


def opened(service: Service, house: House) -> dict[str, bytes | str]:
    """What each of a tenant's sealed objects opens to, or the code of the refusal."""
    found: dict[str, bytes | str] = {}
    with asked_reading(service) as session:
        for row in session.scalars(select(SealedObject).where(SealedObject.tenant_id == house.id)):
            of: dict[str, Any] = {"tenant_id": house.id, "object_id": row.id}
            try:
                found[row.id] = (
                    vault.data_key(session, **of).secret
                    if row.kind == "units"
                    else vault.open_object(session, service.blobs, **of)
                )
            except (ServerError, InvalidSeal) as error:
                found[row.id] = str(getattr(error, "code", type(error).__name__))
    return found


@pytest.fixture
def backed_up(service: Service, tmp_path: Path, request: pytest.FixtureRequest) -> Callable[..., Callable[..., Any]]:
    """Copies the data directory and the database; what it gives opens the copy, on the live keystore and providers."""

    def back_up(*also_open: Service) -> Callable[..., Any]:
        for each in (service, *also_open):
            each.engine.dispose()
        copy, url = tmp_path / "restored", service.settings.database_url
        shutil.copytree(service.settings.data_dir, copy)
        if service.settings.is_sqlite:
            url = SecretStr(f"sqlite:///{copy}/cloister.db")
        else:
            url = SecretStr(_copied(url.get_secret_value(), request.getfixturevalue("postgres")))

        @contextmanager
        def restore(live: Service = service) -> Iterator[Service]:
            settings = live.settings.model_copy(update={"data_dir": copy, "database_url": url})
            restored = deployment.open_service(settings)
            yield restored
            restored.engine.dispose()

        return restore

    return back_up


def _copied(url: str, superuser_url: str) -> str:
    """The URL of a copy of a PostgreSQL database that nobody is connected to."""
    name, copy = str(make_url(url).database), f"copy{new_id('db')[3:15]}"
    admin = create_engine(
        superuser_url.replace("postgresql://", "postgresql+psycopg://", 1), isolation_level="AUTOCOMMIT"
    )
    with admin.connect() as connection:
        connection.execute(text(f"CREATE DATABASE {copy} TEMPLATE {name}"))
    admin.dispose()
    return url.replace(f"/{name}?", f"/{copy}?", 1)


@pytest.fixture
def with_providers(service: Service, tmp_path: Path) -> Iterator[Callable[..., Service]]:
    """Opens the deployment with a provider file that names these."""
    made: list[Service] = []

    def opened_with(**providers: dict[str, Any]) -> Service:
        path = tmp_path / "providers.json"
        path.write_text(json.dumps({"format": "cloister.key-providers/1", "default": "local", "providers": providers}))
        path.chmod(0o600)
        made.append(deployment.open_service(service.settings.model_copy(update={"key_providers": path})))
        return made[-1]

    yield opened_with
    for each in made:
        each.engine.dispose()


def second_keystore(tmp_path: Path) -> dict[str, Any]:
    LocalKeyProvider.create(tmp_path / "second", key_file=tmp_path / "second.key")
    return {"kind": "local", "directory": str(tmp_path / "second"), "key_file": str(tmp_path / "second.key")}


@pytest.mark.parametrize("kept_by", ["local", "softhsm"])
def test_nothing_of_a_shredded_tenant_opens_from_a_backup_and_every_other_tenant_does(
    kept_by: str,
    service: Service,
    furnish: Callable[[str], House],
    backed_up: Callable[..., Callable[..., Any]],
    with_providers: Callable[..., Service],
    request: pytest.FixtureRequest,
    http: TestClient,
) -> None:
    victim, other = furnish("acme"), furnish("other")
    if kept_by == "softhsm":
        library = str(request.getfixturevalue("token"))
        service = with_providers(hsm={"kind": "pkcs11", "library": library, "token_label": TOKEN_LABEL, "pin": PIN})
        keys.migrate(service, to="hsm", tenant_id=victim.id, request_id="request-of-a-test")
        keys.destroy(service, victim.id, version=1, request_id="request-of-a-test")
    before, others = opened(service, victim), opened(service, other)
    assert len(before) >= 5 and all(isinstance(each, bytes) for each in [*before.values(), *others.values()])
    predicted = other.predict().json()["outputs"]
    blobs = {path: path.read_bytes() for path in blobs_of(service, other.id)}
    restore = backed_up(service)

    receipt = shred(service, victim)

    assert_nothing_is_left(service, victim)
    assert opened(service, other) == others and other.predict().json()["outputs"] == predicted
    assert {path: path.read_bytes() for path in blobs_of(service, other.id)} == blobs
    with restore(service) as restored, TestClient(create_app(restored), raise_server_exceptions=False) as again:
        assert opened(restored, victim) == dict.fromkeys(before, "tenant_key_refused")
        assert blobs_of(restored, victim.id), "the backup has the bytes, and no key to them"
        assert opened(restored, other) == others
        assert other.predict(http=again).json()["outputs"] == predicted
        refused = victim.predict(http=again)
        assert (refused.status_code, refused.json()["code"]) == (403, "tenant_key_refused")
    newest = receipt.keys[-1]
    assert (newest.outcome, newest.waiting_days, newest.gone) == ("destroyed", 0, newest.destroyed)
    assert (newest.kind, newest.provider) == (("local", "local") if kept_by == "local" else ("pkcs11", "hsm"))
    assert newest.claim == service.keys.of(newest.provider).destruction.claim
    if kept_by == "softhsm":
        assert [key.outcome for key in receipt.keys] == ["earlier", "destroyed"]


def test_the_receipt_counts_what_was_deleted_and_what_stays_is_there(
    service: Service, furnish: Callable[[str], House]
) -> None:
    house = furnish("acme")
    objects = counted(service, house)
    kept = {
        table: count(service, table, table.tenant_id == house.id)
        for table in (Dataset, Model, ModelVersion, LedgerEntry)
    }
    rows = count(service, AuditRow, AuditRow.tenant_id == house.id)
    with reading(service.engine) as session:
        planned = shredding.plan(session, house.operator)
    receipt = shred(service, house)
    assert receipt.deleted == {
        "wrapped_keys": objects, "uploaded_weights": 1, "clients": 1, "accounts": 0, "grants": planned["grants"],
    }  # fmt: skip
    assert all(planned[name] == many for name, many in receipt.deleted.items() if name in planned)
    assert {table: count(service, table, table.tenant_id == house.id) for table in kept} == kept
    assert count(service, AuditRow, AuditRow.tenant_id == house.id) == rows + 2
    assert receipt.tenant == house.id and receipt.begun <= receipt.keys[0].destroyed <= receipt.issued
    assert {"keystore_copies", "flash", "providers", "database", "memory", "clients", "exports", "recordings"} <= set(
        receipt.not_covered
    )
    assert str(service.settings.key_cache_s) in receipt.not_covered["memory"]
    with reading(service.engine) as session:
        assert shredding.receipt(session, house.operator) == shredding.shred(service, house.operator)


def test_a_client_is_refused_within_a_second_and_others_lose_what_they_had_been_granted(
    service: Service, furnish: Callable[[str], House], monkeypatch: pytest.MonkeyPatch
) -> None:
    victim, other = furnish("acme"), furnish("other")
    with writing(service.engine) as session:
        grants.add(session, victim.operator, to=other.client.id, verb="dataset.read", resource_id="*")
        grants.add(session, other.operator, to=victim.client.id, verb="dataset.read", resource_id="*")
    assert other.ask("GET", f"/v1/datasets/{victim.dataset}").status_code == 200
    shred(service, victim)
    later = time.monotonic() + 1.01
    monkeypatch.setattr(verifier.time, "monotonic", lambda: later)
    assert victim.predict().status_code == victim.ask("GET", "/v1/datasets").status_code == 401
    asked = victim.http.post(
        "/oauth/token", data={"grant_type": "client_credentials"}, auth=(victim.client.id, victim.client.secret)
    )
    assert asked.status_code == 401
    assert other.ask("GET", f"/v1/datasets/{victim.dataset}").status_code == 404
    assert count(service, Grant, Grant.principal_id == victim.client.id) == 0
    assert other.predict().status_code == 200


def test_a_shredded_tenant_takes_nothing_new_from_the_operator_either(
    service: Service, furnish: Callable[[str], House]
) -> None:
    house, other = furnish("acme"), furnish("other")
    shred(service, house)
    acts: list[Callable[[Any], object]] = [
        lambda session: tenants.create_client(session, service.keys, house.operator, name="new", role="steward"),
        lambda session: tenants.rotate_client(session, service.keys, house.operator, house.client.id),
        lambda session: grants.add(session, house.operator, to=other.client.id, verb="model.predict", resource_id="*"),
        lambda session: sources.create(
            session, house.operator, sources.wire.CreateSource(name="s", epsilon=1, delta=1e-5), owner_id="ap_x"
        ),
    ]
    for act in acts:
        with pytest.raises(Conflict) as refused:
            service.write(ALL_TENANTS, act)
        assert refused.value.code == "tenant_shredded"
    with pytest.raises(Conflict):
        keys.rotate(service, house.id, request_id="request-of-a-test")
    with pytest.raises(TenantKeyRefused), asked_writing(service) as session:
        vault.seal_object(session, service.blobs, b"x", tenant_id=house.id, kind="part")
    assert_nothing_is_left(service, house)


class Died(BaseException):
    """The process is gone at this instant."""


def test_a_shredding_that_dies_at_any_step_is_finished_by_the_next_with_one_receipt(
    service: Service, furnish: Callable[[str], House], monkeypatch: pytest.MonkeyPatch
) -> None:
    if not service.settings.is_sqlite:
        pytest.skip("a transaction that is committed is committed on every database")
    left = 0

    def deed(act: Callable[..., Any]) -> Callable[..., Any]:
        """Dies behind the deed that the countdown ends at."""

        def dying(*given: Any, **more: Any) -> Any:
            nonlocal left
            done = act(*given, **more)
            left -= 1
            if left == 0:
                raise Died
            return done

        return dying

    @contextmanager
    def dying_writing(engine: Any, acting: Any) -> Iterator[Any]:
        with writing(engine, acting) as session:
            yield session
        deed(lambda: None)()

    monkeypatch.setattr(shredding, "writing", dying_writing)
    monkeypatch.setattr(LocalKeyProvider, "destroy_key", deed(LocalKeyProvider.destroy_key))
    monkeypatch.setattr(type(service.blobs), "delete", deed(type(service.blobs).delete))
    for instant in range(1, 100):
        house = furnish(f"t{instant}")
        service.blobs.put(house.id, new_id("obj"), b"stored by a process that died before it could name it")
        objects = counted(service, house)
        deaths = 0
        for left in (instant, instant // 2 + 1, 0):  # noqa: B007 (the countdown reads it)
            try:
                envelope = shredding.shred(service, house.operator)
                break
            except Died:
                deaths += 1
                with reading(service.engine) as session:
                    assert session.get_one(Tenant, house.id).status != "active"
        receipt = verified(service, envelope)
        assert receipt.keys[0].outcome == "destroyed"
        assert receipt.deleted["wrapped_keys"] == objects and receipt.deleted["clients"] == 1
        assert_nothing_is_left(service, house)
        for verb in ("tenant.shred", "tenant.shredded"):
            assert count(service, AuditRow, AuditRow.tenant_id == house.id, AuditRow.verb == verb) == 1
        if not deaths:
            break
    assert 5 < instant < 40, "it died at every instant there is"


def test_a_provider_that_is_away_leaves_the_tenant_closed_and_the_next_run_goes_on(
    service: Service, furnish: Callable[[str], House], with_providers: Callable[..., Service], tmp_path: Path
) -> None:
    house = furnish("acme")
    both = with_providers(second=second_keystore(tmp_path))
    keys.migrate(both, to="second", tenant_id=house.id, request_id="request-of-a-test")
    with pytest.raises(Conflict, match="no key provider 'second'") as refused:
        shredding.shred(service, house.operator)
    assert refused.value.code == "shredding_unfinished" and "run the command again" in refused.value.message
    with pytest.raises(TenantKeyRefused), asked_writing(both) as session:
        vault.seal_object(session, both.blobs, b"x", tenant_id=house.id, kind="part")
    with reading(service.engine) as session:
        assert session.get_one(Tenant, house.id).status == "shredding"
        with pytest.raises(Conflict, match="not shredded yet"):
            shredding.receipt(session, house.operator)
    receipt = shred(both, house)
    assert [(key.provider, key.outcome) for key in receipt.keys] == [("local", "destroyed"), ("second", "destroyed")]
    assert list((tmp_path / "second").glob("*.kek")) == []
    assert_nothing_is_left(service, house)


def test_keys_that_a_restored_database_does_not_know_are_destroyed_with_the_others(
    service: Service, furnish: Callable[[str], House], backed_up: Callable[..., Any]
) -> None:
    house = furnish("acme")
    restore = backed_up(service)
    keys.rotate(service, house.id, request_id="request-of-a-test")
    with reading(service.engine) as session:
        older, newer = session.scalars(
            select(TenantKey.key_id).where(TenantKey.tenant_id == house.id).order_by(TenantKey.version)
        )
    with restore() as restored:
        receipt = shred(restored, house)
        assert_nothing_is_left(restored, house)
    assert [(key.key_id, key.outcome) for key in receipt.keys] == [(older, "destroyed"), (newer, "destroyed")]
    assert not any(service.keys.of("local").has_key(each) for each in (older, newer))


def test_no_key_is_made_that_cannot_be_put_on_record(service: Service) -> None:
    directory = service.settings.key_record_dir
    before = {path.name: path.read_bytes() for path in directory.iterdir()}
    shutil.rmtree(directory)
    directory.write_text("in the way")
    with pytest.raises(Unavailable, match="on no record is not made"):
        service.keys.of("local").create_key("tn_1.first")
    directory.unlink()
    assert not service.keys.of("local").has_key("tn_1.first")
    deployment.initialise(service.settings).engine.dispose()
    again = {path.name: path.read_bytes() for path in directory.iterdir()}
    assert again.keys() == before.keys() and before, "an upgrade puts the keys on record that there are"
    (directory / next(iter(before))).write_text("{")
    with pytest.raises(Unavailable, match="damaged"):
        KeyRecord(directory).of("system")


def test_a_provider_that_its_customer_took_away_holds_up_no_shredding_and_the_receipt_says_so(
    service: Service, furnish: Callable[[str], House], with_providers: Callable[..., Service], tmp_path: Path
) -> None:
    house = furnish("acme")
    both = with_providers(second={**second_keystore(tmp_path), "holder": "customer"})
    keys.migrate(both, to="second", tenant_id=house.id, request_id="request-of-a-test")
    (tmp_path / "second").rename(tmp_path / "withdrawn")
    without = deployment.open_service(both.settings)
    local, withdrawn = shred(without, house).keys
    without.engine.dispose()
    assert (local.outcome, withdrawn.outcome, withdrawn.waiting_days, withdrawn.gone) == (
        "destroyed", "unreached", None, None,
    )  # fmt: skip
    assert "could not be reached" in withdrawn.claim and "the customer's to see to" in withdrawn.claim
    assert list((tmp_path / "withdrawn").glob("*.kek")), "nothing is claimed that was not done"
    assert_nothing_is_left(service, house)


def test_a_key_that_was_gone_before_is_not_said_to_have_been_destroyed(
    service: Service, furnish: Callable[[str], House]
) -> None:
    house = furnish("acme")
    with reading(service.engine) as session:
        key_id = session.get_one(TenantKey, (house.id, 1)).key_id
    service.keys.of("local").destroy_key(key_id)
    (key,) = shred(service, house).keys
    assert (key.outcome, key.waiting_days, key.gone) == ("absent", None, None)
    assert "not known" in key.claim


def test_a_customers_own_key_is_left_to_the_customer_even_where_it_is_disabled(
    service: Service, furnish: Callable[[str], House], with_providers: Callable[..., Service], kms: str
) -> None:
    house, customer = furnish("acme"), kms_client(kms)
    made = customer.create_key(KeyUsage="ENCRYPT_DECRYPT")["KeyMetadata"]
    credentials = {name: ACCOUNT[name] for name in ("access_key_id", "secret_access_key")}
    held = {"kind": "aws_kms_held", "key_arn": made["Arn"], "endpoint_url": kms, **credentials}
    both = with_providers(acme=held)
    keys.migrate(both, to="acme", tenant_id=house.id, request_id="request-of-a-test")
    customer.disable_key(KeyId=made["KeyId"])
    receipt = shred(both, house)
    assert [(key.provider, key.outcome) for key in receipt.keys] == [("local", "destroyed"), ("acme", "left")]
    assert receipt.keys[1].kind == "aws_kms_held" and receipt.keys[1].gone is None
    assert customer.describe_key(KeyId=made["KeyId"])["KeyMetadata"]["KeyState"] == "Disabled"
    assert_nothing_is_left(service, house)


def test_the_receipt_names_the_backups_of_the_keystore_that_may_hold_the_keys(
    service: Service, furnish: Callable[[str], House], tmp_path: Path
) -> None:
    house = furnish("acme")
    made = keystore_backups.backup(service, tmp_path / "keystore.tar")
    with writing(service.engine) as session:
        first = session.get_one(TenantKey, (house.id, 1)).created
        session.add(KeystoreBackup(id=new_id("kb"), place="/older", created=first - timedelta(days=1)))
    keys.rotate(service, house.id, request_id="request-of-a-test")
    keys.destroy(service, house.id, version=1, request_id="request-of-a-test")
    with writing(service.engine) as session:  # it was long ago
        session.get_one(KeystoreBackup, made.id).created -= timedelta(minutes=20)
        session.get_one(TenantKey, (house.id, 1)).created -= timedelta(minutes=30)
    (copy,) = shred(service, house).keystore_copies
    assert (copy.id, copy.place, copy.keys) == (made.id, str(tmp_path / "keystore.tar"), (1,))


def test_work_that_does_not_end_holds_the_shredding_up_and_is_cancelled_once_it_does(
    service: Service, furnish: Callable[[str], House], monkeypatch: pytest.MonkeyPatch
) -> None:
    house = furnish("acme")
    asked = {"dataset": house.dataset, "queries": [{"type": "count"}], "epsilon": 0.5}
    started = house.ask("POST", "/v1/queries", json={"query": asked})
    assert started.status_code == 201, started.text
    job_id = started.json()["id"]
    monkeypatch.setattr(shredding, "_CHILD_S", 0.2)
    lock = service.settings.data_dir / "locks" / f"{job_id}.lock"
    with processes.locked(lock, wait_s=1, what="a child"), pytest.raises(Conflict, match=job_id) as refused:
        shredding.shred(service, house.operator)
    assert refused.value.code == "shredding_unfinished"
    with reading(service.engine) as session:
        job = session.get_one(Job, (house.id, job_id))
        assert job.cancel_requested and job.status == "queued"
        assert session.get_one(TenantKey, (house.id, 1)).state == "decrypt-only", "what runs can still end in order"
    shred(service, house)
    with reading(service.engine) as session:
        assert session.get_one(Job, (house.id, job_id)).status == "cancelled"
    settled = (LedgerEntry.job_id == job_id, LedgerEntry.kind == "settle", LedgerEntry.steps == 0)
    assert count(service, LedgerEntry, *settled) == 1
    assert not lock.exists()
    assert_nothing_is_left(service, house)


def test_requests_that_race_the_shredding_leave_nothing(
    service: Service, furnish: Callable[[str], House], weights: bytes
) -> None:
    house = furnish("acme")
    source = house.ask("POST", "/v1/sources", json={"name": "more", "unit": "user", "epsilon": 9, "delta": 1e-5})
    datasets = [house.declare(f"d{each}", source.json()["id"]) for each in range(3)]
    answers: list[tuple[int, str]] = []
    stop, under_way = threading.Event(), threading.Event()

    def upload(dataset: str, at: int) -> None:
        for turn in range(1000):
            if stop.is_set():
                return
            for answer in (
                house.put(dataset, f"user-{at}-{turn}", key=f"k{at}-{turn}"),
                house.ask("POST", "/v1/weights", content=weights),
                house.ask(
                    "POST",
                    "/v1/queries",
                    json={"query": {"dataset": house.dataset, "queries": [{"type": "count"}], "epsilon": 1e-3}},
                ),
            ):
                answers.append((answer.status_code, str(answer.json().get("code"))))
            if turn:
                under_way.set()

    threads = [threading.Thread(target=upload, args=(each, at)) for at, each in enumerate(datasets)]
    for thread in threads:
        thread.start()
    try:
        assert under_way.wait(120)
        shredding.shred(service, house.operator)
        soon(lambda: sum(status == 401 for status, _ in answers) >= 9)
    finally:
        stop.set()
        for thread in threads:
            thread.join(120)
    assert {status for status, _ in answers} >= {201, 401}
    assert {status for status, _ in answers} <= {201, 401, 403, 404, 409}, set(answers)
    assert_nothing_is_left(service, house)


def test_the_command_asks_for_the_name_shows_a_plan_and_prints_a_receipt_that_verifies(
    service: Service, furnish: Callable[[str], House], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: Any
) -> None:
    if not service.settings.is_sqlite:
        pytest.skip("the command is the same on every database")
    house = furnish("acme")
    settings = service.settings
    given = {"DATA_DIR": settings.data_dir, "KEY_DIR": settings.key_dir, "KEY_FILE": settings.key_file}
    for name, value in {**given, "DATABASE_URL": settings.database_url.get_secret_value()}.items():
        monkeypatch.setenv(f"CLOISTER_{name}", str(value))
    run = CliRunner().invoke
    plan = json.loads(run(cli, ["tenant", "shred", "acme", "--dry-run"]).stdout)
    assert (plan["status"], plan["clients"], plan["uploaded_weights"]) == ("active", 1, 1) and "users" not in plan
    assert plan["keys"] == [{"version": 1, "provider": "local", "state": "active"}]
    for confirm in (["--confirm", "acne"], ["--confirm", ""], []):
        refused = run(cli, ["tenant", "shred", "acme", *confirm, "--json"])
        assert (refused.exit_code, refused.stdout, json.loads(refused.stderr)["code"]) == (1, "", "not_confirmed")
    assert json.loads(run(cli, ["tenant", "shred", "acme", "--dry-run"]).stdout) == plan
    refused = run(cli, ["tenant", "receipt", "acme"])
    assert refused.exit_code == 1 and "is not shredded" in refused.stderr and house.predict().status_code == 200

    done = run(cli, ["tenant", "shred", "acme", "--confirm", "acme", "--json"])
    assert done.exit_code == 0, (done.stderr, done.exception)
    again = run(cli, ["tenant", "shred", "acme", "--confirm", "acme", "--json"])
    assert json.loads(done.stdout) == json.loads(again.stdout)
    printed = run(cli, ["tenant", "receipt", house.id])
    assert json.loads(printed.stdout) == json.loads(done.stdout)
    (tmp_path / "receipt.json").write_text(printed.stdout)
    with reading(service.engine) as session:
        (tmp_path / "keys.json").write_text(json.dumps(public_keys(session, "certificate")))
    verify = ["verify", str(tmp_path / "receipt.json"), "--keys", str(tmp_path / "keys.json")]
    assert main(verify) == 0 and "tenant acme was shredded" in capsys.readouterr().out
    assert run(cli, ["tenant", "shred", "nobody", "--confirm", "nobody"]).exit_code == 1
    listed = json.loads(run(cli, ["tenant", "list", "--json"]).stdout)
    assert [(each["name"], each["status"]) for each in listed] == [("acme", "shredded")]


def test_on_sqlite_no_wrapped_key_and_no_mac_lingers_in_the_files_of_the_database(
    service: Service, furnish: Callable[[str], House]
) -> None:
    if not service.settings.is_sqlite:
        pytest.skip("PostgreSQL keeps deleted rows until they are vacuumed, and the receipt says so")
    house = furnish("acme")
    with reading(service.engine) as session:
        secrets = [*session.scalars(select(SealedObject.wrapped_key).where(SealedObject.tenant_id == house.id))]
        secrets += [mac for mac in session.scalars(select(Unit.mac)) if mac]
        secrets += [mac for mac in session.scalars(select(Part.content_mac)) if mac]
    assert len(secrets) > 5

    def on_disk() -> bytes:
        return b"".join(path.read_bytes() for path in service.settings.data_dir.glob("cloister.db*"))

    assert all(secret[:64] in on_disk() for secret in secrets)
    shred(service, house)
    assert not [secret for secret in secrets if secret[-32:] in on_disk()]
