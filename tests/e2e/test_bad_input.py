"""What is wrong is refused by a name that says what, why and what next; nothing half-written stays."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator
from typing import Any

import httpx2
import numpy as np
import pytest
from safetensors.numpy import save

import cloister
from cloister.wire.rows import encode_rows
from harness import App, Deployment
from journeys import COLUMNS, SQLITE


class Raw:
    """A plain HTTP client with a token: what the SDK would never send can be sent."""

    def __init__(self, deployment: Deployment, app: App) -> None:
        self._http = httpx2.Client(
            base_url=deployment.url, headers={"Authorization": f"Bearer {deployment.token(app)}"}, timeout=60
        )

    def ask(self, method: str, path: str, **more: Any) -> httpx2.Response:
        return self._http.request(method, path, **more)

    def part(self, dataset: str, body: bytes, *, number: int = 0, digest: bytes | None = None) -> httpx2.Response:
        value = base64.b64encode(digest or hashlib.sha256(body).digest()).decode()
        return self.ask(
            "PUT",
            f"/v1/datasets/{dataset}/parts/{number}",
            content=body,
            headers={"Content-Digest": f"sha-256=:{value}:"},
        )


@pytest.fixture
def raw(deployment: Deployment, app: App) -> Iterator[Raw]:
    made = Raw(deployment, app)
    yield made
    made._http.close()


@pytest.fixture
def dataset(raw: Raw) -> str:
    """A declared dataset, waiting for rows."""
    source = raw.ask("POST", "/v1/sources", json={"name": "people", "epsilon": 5, "delta": 1e-5}).json()
    columns = {name: column.model_dump(mode="json") for name, column in COLUMNS.items()}
    body = {"source": source["id"], "name": "d", "columns": columns, "nominal_size": 100, "capacity": 200}
    return str(raw.ask("POST", "/v1/datasets", json=body).json()["id"])


def rows(**changes: Any) -> dict[str, np.ndarray]:
    made = {"scan": np.ones((5, 8, 8), np.float32), "digit": np.zeros(5, np.int32)}
    return {**made, **changes}


def bad_scan(value: float) -> np.ndarray:
    scan = np.ones((5, 8, 8), np.float32)
    scan[3, 2, 1] = value
    return scan


@pytest.mark.parametrize(
    ("bad", "column", "row"),
    [
        (rows(scan=bad_scan(float("nan"))), "scan", 3),
        (rows(scan=bad_scan(float("inf"))), "scan", 3),
        (rows(scan=bad_scan(16.5)), "scan", 3),
        (rows(scan=bad_scan(-0.1)), "scan", 3),
        (rows(digit=np.array([0, 1, 10, 3, 4], np.int32)), "digit", 2),
        (rows(digit=np.array([0, 1, -1, 3, 4], np.int32)), "digit", 2),
        (rows(scan=np.ones((5, 8, 9), np.float32)), "scan", None),
        (rows(scan=np.ones((5, 8, 8), np.float64)), "scan", None),
    ],
)
def test_rows_outside_the_schema_are_refused_by_column_and_row(
    raw: Raw, dataset: str, bad: dict[str, np.ndarray], column: str, row: int | None
) -> None:
    answer = raw.part(dataset, save(bad, metadata={"format": "cloister.rows/1"}))
    assert answer.status_code == 422 and answer.json()["code"] == "rows_refused", answer.text
    assert (answer.json()["details"]["column"], answer.json()["details"]["row"]) == (column, row)
    assert raw.part(dataset, encode_rows(COLUMNS, rows())).status_code == 201, "nothing of the refused part stayed"


def test_a_truncated_an_oversized_and_a_changed_body_are_refused(raw: Raw, dataset: str) -> None:
    body = encode_rows(COLUMNS, rows())
    assert raw.part(dataset, body[:-7], digest=hashlib.sha256(body).digest()).json()["code"] == "digest_mismatch"
    assert raw.part(dataset, body[:-7]).json()["code"] == "rows_refused"
    assert raw.part(dataset, b"\xff" * 64).json()["code"] == "rows_refused"
    assert raw.part(dataset, b"").json()["code"] == "rows_refused"
    assert raw.part(dataset, bytes(65 * 2**20)).json()["code"] == "too_large"
    assert raw.part(dataset, body, number=1).status_code == 422, "beyond the declared capacity"
    many = rows(scan=np.ones((201, 8, 8), np.float32), digit=np.zeros(201, np.int32))
    assert raw.part(dataset, encode_rows(COLUMNS, many)).json()["code"] == "rows_refused"
    assert raw.part(dataset, body).status_code == 201
    exists = raw.part(dataset, body)
    assert exists.status_code == 409 and exists.json()["details"]["part_exists"]


@pytest.mark.parametrize(
    "change",
    [
        {"epsilon": 0}, {"epsilon": -1}, {"epsilon": 1e9}, {"delta": 0}, {"delta": 1}, {"delta": -1e-5},
        {"name": "../x"}, {"name": ""}, {"surprise": 1}, {"unit": "household"}, {"adjacency": "replace"},
    ],
)  # fmt: skip
def test_a_source_of_impossible_numbers_is_refused_with_the_field(raw: Raw, change: dict[str, Any]) -> None:
    answer = raw.ask("POST", "/v1/sources", json={"name": "s", "epsilon": 1, "delta": 1e-5, **change})
    assert answer.status_code == 422 and answer.json()["code"] == "invalid_request"
    assert answer.json()["details"]["fields"][0]["field"] == next(iter(change))
    assert raw.ask("GET", "/v1/sources").json()["items"] == []


def test_numbers_that_json_does_not_know_are_refused(raw: Raw) -> None:
    answer = raw.ask("POST", "/v1/sources", content=b'{"name": "s", "epsilon": NaN, "delta": 1e-5}')
    assert answer.status_code == 422


@pytest.mark.parametrize(
    ("change", "status", "code"),
    [
        ({"batch_size": 101}, 422, "batch_too_large"),
        ({"rows_per_unit": 0}, 422, "invalid_request"),
        ({"rows_per_unit": 2}, 422, "plan_impossible"),
        ({"layers": [{"type": "exec", "code": "1"}]}, 422, "invalid_request"),
        ({"layers": [{"type": "linear", "in_features": 3, "out_features": 10}]}, 422, "invalid_request"),
        ({"target": "nothing"}, 422, "invalid_request"),
        ({"features": ["digit"]}, 422, "invalid_request"),
        ({"privacy": {"epsilon": 0}}, 422, "invalid_request"),
        ({"privacy": {"epsilon": 1, "noise_multiplier": 1}}, 422, "invalid_request"),
        ({"privacy": {"epsilon": 1e-6}}, 422, "plan_impossible"),
        ({"privacy": {"noise_multiplier": 0.0}}, 422, "invalid_request"),
        ({"unknown": 1}, 422, "invalid_request"),
    ],
)
def test_a_plan_that_cannot_be_is_refused_by_name(
    raw: Raw, dataset: str, change: dict[str, Any], status: int, code: str
) -> None:
    answer = raw.ask("POST", "/v1/plans", json={"dataset": dataset, "target": "digit", **change})
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text


def test_training_before_the_upload_is_complete_is_refused(raw: Raw, dataset: str) -> None:
    plan = raw.ask("POST", "/v1/plans", json={"dataset": dataset, "target": "digit"}).json()
    answer = raw.ask("POST", "/v1/jobs", json={"training": plan["training"], "model": "m"})
    assert answer.status_code == 409 and answer.json()["code"] == "dataset_not_ready"


@pytest.mark.parametrize("deployment", [SQLITE], indirect=True)
def test_a_plan_by_user_says_so_and_trains_and_rows_without_a_user_are_refused_at_upload(
    client: cloister.Cloister,
) -> None:
    source = client.sources.create("users", epsilon=5, delta=1e-5, unit="user")
    columns = {"who": cloister.Unit(), "x": cloister.Number(low=0, high=1), "y": cloister.Category(values=("a", "b"))}
    given = {"x": np.zeros(4, np.float32), "y": np.zeros(4, np.int32)}
    sizes = {"nominal_size": 4, "capacity": 10, "capacity_rows": 20}
    with pytest.raises(cloister.CloisterError, match="who"):
        client.datasets.upload("bad", {**given, "who": ["u1", "", "u2", "u2"]}, source=source, columns=columns, **sizes)
    data = client.datasets.upload(
        "ok", {**given, "who": ["u1", "u1", "u2", "u3"]}, source=source, columns=columns, **sizes
    )
    plan = client.plan(data, target="y", epochs=2)
    assert (plan.event.unit, plan.training.capacity, plan.training.rows_per_unit) == ("user", 10, 1)
    assert client.train(plan, model="by-user").wait().predict({"x": given["x"]}).shape == (4,)


def test_a_source_is_public_from_its_creation_or_never(client: cloister.Cloister) -> None:
    assert client.sources.create("weather", epsilon=1, delta=1e-5, public=True).public
    assert not client.sources.create("people", epsilon=1, delta=1e-5).public
