"""Furnished tenants, to be shredded: a client, rows of users, weights, and a model that predicts.

PYTEST_DONT_REWRITE: its fixtures are a plug-in of the modules that also import its names, before pytest can.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pydantic import TypeAdapter
from sqlalchemy import func, select
from starlette.testclient import TestClient

from asked import asked_writing
from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn, NumberColumn, Schema
from cloister.wire.layers import Encode, Linear
from cloister.wire.plans import SGD, TrainingSpec
from cloister.wire.receipts import Receipt, verify_receipt
from cloister.wire.rows import encode_rows
from cloister_privacy.plan import DPPlan
from cloister_privacy.sealing import LocalKeyProvider
from cloister_server import deployment, shredding, vault
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store import chain
from cloister_server.store.queries import public_keys
from cloister_server.store.session import reading
from cloister_server.store.tables import (
    App,
    Grant,
    IdempotencyKey,
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
