"""Predictions by the Open Inference Protocol v2: what is answered, what is refused, and who is asked each time."""

from __future__ import annotations

import asyncio
import gzip
import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from asked import asked_writing
from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn, NumberColumn
from cloister.wire.layers import Encode, Linear
from cloister.wire.plans import SGD, TrainingSpec
from cloister_privacy.plan import DPPlan
from cloister_server import grants, models, policy, vault
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.serving import Serving
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import AuditRow, Model, ModelVersion, new_id

AGES = {"name": "age", "shape": [2], "datatype": "FP32", "data": [30.5, 70]}
COLOURS = {"name": "colour", "shape": [2], "datatype": "INT64", "data": [0, 2]}
REQUEST = {"inputs": [AGES, COLOURS]}
FIELDS = {"error", "code", "request_id", "details"}


@dataclass(frozen=True)
class Published:
    """A model of one tenant with two versions; the second is the champion."""

    tenant_id: str
    id: str
    name: str


@pytest.fixture(scope="session")
def weights() -> bytes:
    """A network of two inputs and three classes, trained for a step on a toy."""
    import torch

    from cloister_privacy.training import train

    torch.set_num_threads(1)
    spec = TrainingSpec(
        dataset=new_id("ds"),
        architecture=Architecture(
            inputs={"age": NumberColumn(low=0, high=100), "colour": CategoryColumn(values=("red", "green", "blue"))},
            layers=(Encode(), Linear(in_features=4, out_features=3)),
            target="kind",
            output=CategoryColumn(values=("a", "b", "c")),
            loss="cross_entropy",
        ),
        nominal_size=40, capacity=80, batch_size=10, steps=1, noise_multiplier=1.0, clip=1.0, delta=1e-5,
        optimizer=SGD(learning_rate=0.1),
    )  # fmt: skip
    random = np.random.default_rng(7)
    rows = {
        "age": random.uniform(0, 100, 40).astype(np.float32),
        "colour": random.integers(0, 3, 40).astype(np.int32),
        "kind": random.integers(0, 3, 40).astype(np.int32),
    }
    trained = train(
        spec, rows, plan=DPPlan.of(spec), device="cpu", chunk_steps=1,
        before_chunk=lambda first, end: None, after_chunk=lambda done, snapshot: True,
    )  # fmt: skip
    assert trained is not None
    return trained


@pytest.fixture
def published(service: Service, steward: Any, weights: bytes) -> Published:
    with reading(service.engine) as session:
        there = session.scalar(select(Model.id).where(Model.tenant_id == steward.tenant_id))
    return Published(steward.tenant_id, there, "kinds") if there else publish(service, steward.tenant_id, weights)


def publish(service: Service, tenant_id: str, weights: bytes, *, name: str = "kinds", versions: int = 2) -> Published:
    """A model whose versions are sealed and stored as the worker does it."""
    with asked_writing(service) as session:
        model = Model(tenant_id=tenant_id, id=new_id("mdl"), name=name, champion=versions)
        session.add(model)
        session.flush()
        for number in range(1, versions + 1):
            sealed = vault.seal_object(session, service.blobs, weights, tenant_id=tenant_id, kind="weights")
            session.add(
                ModelVersion(
                    tenant_id=tenant_id, model_id=model.id, version=number, job_id=new_id("job"), weights_id=sealed,
                    certificate={},
                )
            )  # fmt: skip
    return Published(tenant_id, model.id, name)


def grant(service: Service, published: Published, to: Any, verb: str) -> str:
    operator = Principal.operator(published.tenant_id, request_id="request-of-a-test")
    with writing(service.engine) as session:
        return grants.add(session, operator, to=to.id, verb=verb, resource_id=published.id).id


def refused(answer: Any, status: int, code: str) -> str:
    """The sentence of a refusal in the one shape of this server."""
    assert (answer.status_code, answer.json().get("code")) == (status, code), answer.text
    assert answer.json().keys() == FIELDS and answer.json()["request_id"] == answer.headers["x-request-id"]
    return str(answer.json()["error"])


def test_what_the_protocol_says_of_the_server_is_said_without_a_token(http: TestClient) -> None:
    assert http.get("/v2").json() == {"name": "cloister", "version": "2", "extensions": []}
    for path in ("/v2/health/live", "/v2/health/ready"):
        assert http.get(path).status_code == 200, path


def test_metadata_says_what_the_model_reads_and_answers(
    http: TestClient, bearer: dict[str, str], published: Published
) -> None:
    for path in (published.id, published.name, f"{published.name}/versions/2"):
        assert http.get(f"/v2/models/{path}", headers=bearer).json() == {
            "name": "kinds",
            "versions": ["2"],
            "platform": "cloister",
            "inputs": [
                {"name": "age", "datatype": "FP32", "shape": [-1]},
                {"name": "colour", "datatype": "INT64", "shape": [-1]},
            ],
            "outputs": [
                {"name": "probabilities", "datatype": "FP32", "shape": [-1, 3]},
                {"name": "index", "datatype": "INT64", "shape": [-1]},
            ],
        }


def test_a_model_with_a_version_is_ready(http: TestClient, bearer: dict[str, str], published: Published) -> None:
    for path in ("kinds/ready", "kinds/versions/1/ready"):
        answer = http.get(f"/v2/models/{path}", headers=bearer)
        assert answer.status_code == 200 and answer.json() == {"name": "kinds", "ready": True}


def test_rows_are_answered_by_id_and_by_name_with_and_without_a_version(
    http: TestClient, bearer: dict[str, str], published: Published
) -> None:
    for model in (published.id, published.name):
        for version, path in (("2", model), ("1", f"{model}/versions/1"), ("2", f"{model}/versions/2")):
            answer = http.post(f"/v2/models/{path}/infer", json=REQUEST, headers=bearer)
            assert answer.status_code == 200, answer.text
            told = answer.json()
            assert (told["model_name"], told["model_version"]) == ("kinds", version) and "id" not in told
            outputs = {output["name"]: output for output in told["outputs"]}
            assert outputs["probabilities"]["shape"] == [2, 3] and outputs["index"]["shape"] == [2]
            probabilities = np.array(outputs["probabilities"]["data"]).reshape(2, 3)
            assert np.allclose(probabilities.sum(axis=1), 1, atol=1e-5)
            assert outputs["index"]["data"] == probabilities.argmax(axis=1).tolist()


def test_a_request_gets_its_id_back_and_the_outputs_that_it_asks_for(
    http: TestClient, bearer: dict[str, str], published: Published
) -> None:
    body = {**REQUEST, "id": "mine", "outputs": [{"name": "index"}], "parameters": {"known": "elsewhere"}}
    answer = http.post("/v2/models/kinds/infer", json=body, headers=bearer)
    assert answer.json()["id"] == "mine"
    assert [output["name"] for output in answer.json()["outputs"]] == ["index"]
    unknown = http.post(
        "/v2/models/kinds/infer", json={**body, "outputs": [{"name": "index"}, {"name": "age"}]}, headers=bearer
    )
    told = refused(unknown, 422, "invalid_request")
    assert "probabilities" in told and "age" in told


@pytest.mark.parametrize(("encoding", "compress"), [("gzip", gzip.compress), ("deflate", zlib.compress)])
def test_a_compressed_body_is_read(
    http: TestClient,
    bearer: dict[str, str],
    published: Published,
    encoding: str,
    compress: Callable[[bytes], bytes],
) -> None:
    body = compress(json.dumps(REQUEST).encode())
    headers = {**bearer, "Content-Encoding": encoding}
    answer = http.post("/v2/models/kinds/infer", content=body, headers=headers)
    assert answer.status_code == 200, answer.text
    cut = http.post("/v2/models/kinds/infer", content=body[:-6], headers=headers)
    refused(cut, 400, "body_truncated")
    not_compressed = http.post("/v2/models/kinds/infer", content=json.dumps(REQUEST), headers=headers)
    refused(not_compressed, 400, "bad_request")


def test_another_content_encoding_is_refused(http: TestClient, bearer: dict[str, str], published: Published) -> None:
    headers = {**bearer, "Content-Encoding": "br"}
    refused(http.post("/v2/models/kinds/infer", content=b"x", headers=headers), 400, "bad_request")


def test_a_body_that_unpacks_to_more_than_the_limit_is_refused(
    http: TestClient, service: Service, bearer: dict[str, str], published: Published
) -> None:
    packer = zlib.compressobj(1, wbits=zlib.MAX_WBITS | 16)
    zeros = bytes(2**20)
    bomb = (
        b"".join(packer.compress(zeros) for _ in range(service.settings.max_body_bytes // 2**20 + 1)) + packer.flush()
    )
    assert len(bomb) < 2**20
    answer = http.post("/v2/models/kinds/infer", content=bomb, headers={**bearer, "Content-Encoding": "gzip"})
    refused(answer, 413, "too_large")


def test_no_content_type_is_needed(http: TestClient, bearer: dict[str, str], published: Published) -> None:
    request = http.build_request("POST", "/v2/models/kinds/infer", content=json.dumps(REQUEST).encode(), headers=bearer)
    assert "content-type" not in request.headers
    assert http.send(request).status_code == 200


@pytest.mark.shared
@pytest.mark.parametrize(
    "body",
    [
        b"",
        b"age,colour\n30,0",
        b"\xff",
        b"[]",
        b"null",
        b'{"inputs": [',
        b"[" * 100_000,
        json.dumps(REQUEST).replace("30.5", "NaN").encode(),
        json.dumps(REQUEST).replace("30.5", "Infinity").encode(),
        json.dumps(REQUEST).replace("30.5", "1e999").encode(),
    ],
    ids=["empty", "csv", "not-utf8", "list", "null", "cut", "deep", "nan", "infinity", "overflow"],
)
def test_what_is_not_json_of_the_protocol_is_refused(
    http: TestClient, bearer: dict[str, str], published: Published, body: bytes
) -> None:
    answer = http.post("/v2/models/kinds/infer", content=body, headers=bearer)
    assert answer.status_code in (400, 422), answer.text
    refused(answer, answer.status_code, "bad_request" if answer.status_code == 400 else "invalid_request")


@pytest.mark.shared
@pytest.mark.parametrize(
    "inputs",
    [
        [],
        [AGES],
        [AGES, COLOURS, {**AGES, "name": "more"}],
        [AGES, AGES, COLOURS],
        [{**AGES, "shape": [3]}, COLOURS],
        [{**AGES, "shape": [-2]}, COLOURS],
        [{**AGES, "shape": []}, COLOURS],
        [{**AGES, "shape": [2, 1]}, COLOURS],
        [{**AGES, "shape": [2**31] * 8}, COLOURS],
        [{**AGES, "shape": [0], "data": []}, {**COLOURS, "shape": [0], "data": []}],
        [{**AGES, "shape": [1], "data": [1.0]}, COLOURS],
        [{**AGES, "data": [[1.0], [2.0, 3.0]]}, COLOURS],
        [{**AGES, "data": ["a", "b"]}, COLOURS],
        [{**AGES, "data": [None, 1]}, COLOURS],
        [{**AGES, "data": [{}, {}]}, COLOURS],
        [{**AGES, "data": [1e300, 1]}, COLOURS],
        [{**AGES, "data": [10**400, 1]}, COLOURS],
        [{**AGES, "datatype": "BYTES", "data": ["a", "b"]}, COLOURS],
        [{**AGES, "datatype": "FP128"}, COLOURS],
        [{**AGES, "datatype": "BOOL", "data": [True, False]}, COLOURS],
        [AGES, {**COLOURS, "data": [0, 1.5]}],
        [AGES, {**COLOURS, "data": [0, 3]}],
        [AGES, {**COLOURS, "data": [-1, 0]}],
        [AGES, {**COLOURS, "datatype": "FP32"}],
        [AGES, {**COLOURS, "datatype": "UINT8", "data": [0, 256]}],
    ],
)
def test_tensors_that_the_model_does_not_read_are_refused(
    http: TestClient, bearer: dict[str, str], published: Published, inputs: list[Any]
) -> None:
    answer = http.post("/v2/models/kinds/infer", json={"inputs": inputs}, headers=bearer)
    refused(answer, 422, "invalid_request")


def test_a_refusal_repeats_no_value_of_the_rows(http: TestClient, bearer: dict[str, str], published: Published) -> None:
    for data in (["patient-4711", 1], [4711e300, 1], {"patient": 4711}, [[4711], [4711, 1]]):
        answer = http.post("/v2/models/kinds/infer", json={"inputs": [{**AGES, "data": data}, COLOURS]}, headers=bearer)
        assert "4711" not in refused(answer, 422, "invalid_request") + answer.text.replace(
            answer.json()["request_id"], ""
        )


def test_another_tenants_app_is_told_that_there_is_no_such_model(
    http: TestClient, published: Published, make_client: Callable[..., Any], bearer_of: Callable[[Any], dict[str, str]]
) -> None:
    stranger = bearer_of(make_client("other"))
    nothing = http.post(f"/v2/models/{new_id('mdl')}/infer", json=REQUEST, headers=stranger)
    for path in (published.id, published.name, f"{published.id}/versions/1"):
        answer = http.post(f"/v2/models/{path}/infer", json=REQUEST, headers=stranger)
        assert refused(answer, 404, "not_found") == nothing.json()["error"]
        assert http.get(f"/v2/models/{path}", headers=stranger).status_code == 404
        assert http.get(f"/v2/models/{path}/ready", headers=stranger).status_code == 404


def test_who_may_read_a_model_and_not_predict_with_it_is_forbidden(
    http: TestClient,
    service: Service,
    published: Published,
    make_client: Callable[..., Any],
    bearer_of: Callable[[Any], dict[str, str]],
) -> None:
    reader = make_client("other")
    grant(service, published, reader, "model.read")
    headers = bearer_of(reader)
    assert http.get(f"/v1/models/{published.id}", headers=headers).status_code == 200
    answer = http.post(f"/v2/models/{published.id}/infer", json=REQUEST, headers=headers)
    assert "model.predict" in refused(answer, 403, "forbidden")


def test_a_model_without_a_version_is_not_there_to_predict_with(
    http: TestClient, service: Service, bearer: dict[str, str], steward: Any, published: Published, weights: bytes
) -> None:
    publish(service, steward.tenant_id, weights, name="empty", versions=0)
    for path in ("empty", "empty/versions/1", "kinds/versions/3"):
        refused(http.get(f"/v2/models/{path}", headers=bearer), 404, "not_found")
        refused(http.get(f"/v2/models/{path}/ready", headers=bearer), 404, "not_found")
        refused(http.post(f"/v2/models/{path}/infer", json=REQUEST, headers=bearer), 404, "not_found")


def test_a_path_or_a_method_of_no_route_is_not_found(
    http: TestClient, bearer: dict[str, str], published: Published
) -> None:
    for method, path in (
        ("GET", "kinds/infer"),
        ("POST", "kinds"),
        ("POST", "kinds/ready"),
        ("DELETE", "kinds"),
        ("POST", "kinds/versions/0/infer"),
        ("POST", "kinds/versions/01/infer"),
        ("POST", "kinds/versions/9999999999/infer"),
        ("POST", "kinds/versions/x/infer"),
    ):
        refused(http.request(method, f"/v2/models/{path}", headers=bearer), 404, "not_found")


def test_a_network_is_opened_once_and_authorised_on_every_request(
    http: TestClient,
    service: Service,
    published: Published,
    make_client: Callable[..., Any],
    bearer_of: Callable[[Any], dict[str, str]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with reading(service.engine) as session:
        versions = {row.weights_id: row.version for row in session.query(ModelVersion)}
    opened: list[int] = []
    open_network = models.open_network

    def counted(sealed: Any, key: vault.DataKey, **more: Any) -> Any:
        opened.append(versions[key.object_id])
        return open_network(sealed, key, **more)

    monkeypatch.setattr(models, "open_network", counted)
    app = make_client("other")
    held = grant(service, published, app, "model.predict")
    headers = bearer_of(app)
    path = f"/v2/models/{published.id}"
    for _ in range(3):
        assert http.post(f"{path}/infer", json=REQUEST, headers=headers).status_code == 200
    assert opened == [2]
    assert http.post(f"{path}/versions/1/infer", json=REQUEST, headers=headers).status_code == 200
    assert opened == [2, 1]
    with writing(service.engine) as session:
        operator = Principal.operator(published.tenant_id, request_id="request-of-a-test")
        grants.remove(session, operator, held)
    refused(http.post(f"{path}/infer", json=REQUEST, headers=headers), 404, "not_found")
    assert opened == [2, 1]


def test_weights_that_were_touched_are_never_answered_with(
    http: TestClient, service: Service, bearer: dict[str, str], published: Published
) -> None:
    with reading(service.engine) as session:
        row = session.get_one(ModelVersion, (published.tenant_id, published.id, 2))
    path = service.settings.data_dir / "objects" / published.tenant_id / row.weights_id
    sealed = bytearray(path.read_bytes())
    sealed[-1] ^= 1
    path.write_bytes(sealed)
    answer = http.post("/v2/models/kinds/infer", json=REQUEST, headers=bearer)
    refused(answer, 500, "internal")
    assert http.post("/v2/models/kinds/versions/1/infer", json=REQUEST, headers=bearer).status_code == 200


def test_an_open_model_is_answered_from_a_snapshot_that_never_says_yes_for_longer_than_the_grants_do(
    service: Service,
    http: TestClient,
    make_client: Callable[..., Any],
    bearer_of: Callable[..., dict[str, str]],
    weights: bytes,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    client = make_client(role="none")
    model = publish(service, client.tenant_id, weights)
    grant(service, model, client, "model.predict")
    bearer = bearer_of(client)
    slow: list[str] = []
    find = models.find_version
    monkeypatch.setattr(models, "find_version", lambda *given, **more: slow.append(given[2]) or find(*given, **more))

    def ask(name: str = model.name, path: str = "ready") -> int:
        return int(http.get(f"/v2/models/{name}/{path}", headers=bearer).status_code)

    assert ask() == 200 and slow == [model.name], "it is opened"
    assert [ask(), ask(model.id), ask(path="versions/2")] == [200] * 3 and len(slow) == 1
    assert ask(path="versions/7") == 404 and ask("other") == 404 and len(slow) == 3, (
        "what is no is for the gates to say"
    )
    answer = http.post(f"/v2/models/{model.name}/infer", json=REQUEST, headers=bearer)
    assert answer.status_code == 200 and answer.json()["model_version"] == "2" and len(slow) == 3
    with writing(service.engine) as session:
        session.get_one(Model, (model.tenant_id, model.id)).champion = 1
    assert ask() == 200 and len(slow) == 4, "another version than the one that is open"
    with writing(service.engine) as session:
        operator = Principal.operator(model.tenant_id, request_id="request-of-a-test")
        given = {"to": client.id, "verb": "model.predict", "resource_id": model.id}
        denial = grants.add(session, operator, **given, effect="deny").id
    assert ask() == 404 and len(slow) == 5, "on the next request"
    with writing(service.engine) as session:
        grants.remove(session, operator, denial)
    assert ask() == 200 and ask() == 200 and len(slow) == 6
    with reading(service.engine) as session:
        asked = session.scalars(select(AuditRow).where(AuditRow.principal_id == client.id)).all()
    assert len(asked) == 11 and sum(each.outcome == "allowed" for each in asked) == 8, "a row each"


def test_requests_of_one_turn_share_what_is_read_and_who_comes_after_a_change_sees_it(
    service: Service, make_client: Callable[..., Any], weights: bytes
) -> None:
    if service.engine.dialect.name != "sqlite":
        pytest.skip("on PostgreSQL the sessions are asked")
    client = make_client(role="none")
    model = publish(service, client.tenant_id, weights)
    grant(service, model, client, "model.predict")
    with reading(service.engine) as session:
        policy.find(session, client.principal, "model.predict", Model, model.name)  # makes the tenant's snapshot
    serving, asked = Serving(service.engine), list[str]()
    serving._connection.set_trace_callback(asked.append)

    def find() -> int | None:
        found = serving.find(client.principal, "model.predict", model.name, None, is_id=False)
        return None if found is None else found.version

    async def work() -> None:
        assert [find() for _ in range(3)] == [2, 2, 2] and len(asked) == 1
        with writing(service.engine) as session:
            session.get_one(Model, (model.tenant_id, model.id)).champion = 1
        assert find() == 2, "who came before the change"
        await asyncio.sleep(0)
        assert find() == 1 and len(asked) == 2

    async def work_again() -> None:
        assert find() == 1 and len(asked) == 3, "what was read for a loop that stopped is not this one's"

    asyncio.run(work())
    asyncio.run(work_again())
