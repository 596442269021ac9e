"""What every answer carries, what no request gets past, and what no error tells."""

from __future__ import annotations

import asyncio
import io
import json
import logging
import re
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from sqlalchemy import select, text
from sqlalchemy.exc import IntegrityError, OperationalError
from starlette.exceptions import HTTPException
from starlette.testclient import TestClient

from cloister.wire.rows import RowsRefused
from cloister_privacy.errors import ArchitectureRefused, BatchLargerThanNominal, PlanImpossible, UnitNotSupported
from cloister_privacy.sealing import InvalidSeal
from cloister_server import errors, logs
from cloister_server.api.edge import PUBLIC, Edge, Guard, Limits, StrictJSON
from cloister_server.api.problems import response_to
from cloister_server.api.telling import Telling
from cloister_server.app import create_app
from cloister_server.service import Service
from cloister_server.store.session import reading
from cloister_server.store.tables import AuditRow

JSON = {"Content-Type": "application/json"}


def run(
    app: Any, *, body: list[bytes] | None = None, headers: list[tuple[bytes, bytes]] | None = None, **scope: Any
) -> Any:
    """One raw ASGI request: status, headers and body of its answer, and how many messages were read for it."""
    pieces, sent, read = list(body or [b""]), [], 0

    async def receive() -> dict[str, Any]:
        nonlocal read
        read += 1
        return {"type": "http.request", "body": pieces.pop(0), "more_body": bool(pieces)}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    given = {"type": "http", "method": "POST", "path": "/healthz", "query_string": b"", "headers": headers or []}
    asyncio.run(app({**given, **scope}, receive, send))
    answer = b"".join(message.get("body", b"") for message in sent[1:])
    return sent[0]["status"], dict(sent[0]["headers"]), answer, read


def test_every_answer_has_an_id_and_its_headers(http: TestClient, bearer: dict[str, str]) -> None:
    for path in ("/healthz", "/v1/sources", "/v1/nothing", "/v2", "/v2/models/nothing", "/nowhere"):
        for headers in ({}, bearer):
            answer = http.get(path, headers=headers)
            assert re.fullmatch(r"[A-Za-z0-9_-]{8,64}", answer.headers["x-request-id"]), path
            assert answer.headers["cache-control"] == "no-store"
            assert answer.headers["x-content-type-options"] == "nosniff"
            assert "default-src 'none'" in answer.headers["content-security-policy"]
            if answer.status_code >= 400:
                assert answer.json().keys() == {"error", "code", "request_id", "details"}
                assert answer.json()["request_id"] == answer.headers["x-request-id"]


@pytest.mark.parametrize(
    ("given", "is_kept"), [("my-own-id_1", True), ("short", False), ("a b c d e f", False), ("x" * 65, False)]
)
def test_a_valid_request_id_is_kept_and_another_replaced(http: TestClient, given: str, is_kept: bool) -> None:
    assert (http.get("/healthz", headers={"X-Request-Id": given}).headers["x-request-id"] == given) == is_kept


def test_only_what_is_public_is_answered_without_a_token(http: TestClient) -> None:
    described = http.get("/openapi.json").json()["paths"]
    for path, methods in described.items():
        for method in methods:
            answer = http.request(method, path.replace("{", "").replace("}", ""))
            assert (answer.json().get("code") == "unauthenticated") == (path not in PUBLIC), (method, path, answer.text)
    for path in ("/v1/nothing", "/nowhere", "/v2/models/m", "/v2/models/m/infer", "/v1", "/docs", "//v1/sources"):
        assert http.get(path).status_code == 401, path


def test_nothing_of_a_body_is_read_before_the_token_is_verified(service: Service) -> None:
    for path in ("/v1/sources", "/v2/models/m/infer", "/v1/datasets/d/parts/0"):
        status, _, _, read = run(create_app(service), path=path, body=[b"x"] * 5)
        assert (status, read) == (401, 0)


def test_a_body_is_refused_by_its_declared_length_before_it_is_read(service: Service) -> None:
    for path, limit in (("/oauth/token", 2**20), ("/v2/models/m/infer", service.settings.max_body_bytes)):
        headers = [(b"content-length", str(limit + 1).encode())]
        status, _, body, read = run(create_app(service), path=path, headers=headers)
        assert (status, json.loads(body)["code"], read) == (413, "too_large", 0)


def test_a_body_that_declares_nothing_is_counted_as_it_is_read(service: Service) -> None:
    status, _, body, read = run(create_app(service), path="/oauth/token", body=[b"x" * 2**19] * 10)
    assert (status, json.loads(body)["code"], read) == (413, "too_large", 3)


def test_parts_and_predictions_may_be_large_and_documents_may_not(service: Service, bearer: dict[str, str]) -> None:
    headers = [(b"authorization", bearer["Authorization"].encode()), (b"content-type", b"application/json")]
    big = [b'{"x":"' + b"y" * 2**20, b'"}']
    for path, method, code in (
        ("/v1/sources", "POST", "too_large"),
        ("/v2/models/m/infer", "POST", "not_found"),
        ("/v1/datasets/d/parts/0", "PUT", "not_found"),
    ):
        status, _, body, _ = run(create_app(service), path=path, method=method, body=list(big), headers=list(headers))
        assert json.loads(body)["code"] == code, (path, status)


@pytest.mark.parametrize(
    "headers",
    [
        [(b"x-%d" % each, b"") for each in range(70)],
        [(b"x", b"y" * 20_000)],
        [(b"content-length", b"-1")],
        [(b"content-length", b"1"), (b"content-length", b"2")],
        [(b"content-length", "٣".encode())],
    ],
    ids=["many", "large", "negative", "twice", "other digits"],
)
def test_heads_that_are_too_much_are_refused(service: Service, headers: list[tuple[bytes, bytes]]) -> None:
    status, _, body, _ = run(create_app(service), headers=headers, method="GET")
    assert (status, json.loads(body)["code"]) == (400, "bad_request")


@pytest.mark.parametrize(
    "body",
    [
        '{"name": "p", "epsilon": NaN, "delta": 1e-5}',
        '{"name": "p", "epsilon": Infinity, "delta": 1e-5}',
        '{"name": "p", "epsilon": 1, "epsilon": 100, "delta": 1e-5}',
        '{"name": "p"',
        "[" * 100_000,
        "\ud800".encode("utf-8", "surrogatepass").decode("latin-1"),
    ],
    ids=["nan", "infinity", "twice", "cut", "deep", "not-utf8"],
)
def test_json_that_two_readers_could_read_differently_is_refused(
    http: TestClient, bearer: dict[str, str], body: str
) -> None:
    answer = http.post("/v1/sources", content=body.encode("latin-1"), headers=bearer | JSON)
    assert answer.status_code == 400 and answer.json()["code"] == "bad_request", answer.text


def test_a_number_too_large_for_a_float_is_refused_by_its_model(http: TestClient, bearer: dict[str, str]) -> None:
    answer = http.post("/v1/sources", content='{"name": "p", "epsilon": 1e999, "delta": 1e-5}', headers=bearer | JSON)
    assert answer.status_code == 422


def test_a_validation_error_names_fields_and_repeats_no_value(http: TestClient, bearer: dict[str, str]) -> None:
    secret = "patient-4711"
    body = {"name": f"{secret}!", "unit": secret, "epsilon": secret, "delta": 2, "more": secret}
    answer = http.post("/v1/sources", json=body, headers=bearer)
    assert answer.status_code == 422 and answer.json()["code"] == "invalid_request"
    assert {field["field"] for field in answer.json()["details"]["fields"]} == {
        "name",
        "unit",
        "epsilon",
        "delta",
        "more",
    }
    assert secret not in answer.text
    columns = {"x": {"type": secret, "low": 0, "high": 1}}
    tagged = http.post("/v1/datasets", json={"source": "s", "name": "d", "columns": columns}, headers=bearer)
    assert tagged.status_code == 422 and secret not in tagged.text


@pytest.mark.parametrize(
    ("failure", "status", "code"),
    [
        (BatchLargerThanNominal("b"), 422, "batch_too_large"),
        (PlanImpossible("p"), 422, "plan_impossible"),
        (UnitNotSupported("u"), 422, "unit_not_supported"),
        (ArchitectureRefused("a"), 422, "invalid_request"),
        (RowsRefused("age", 3, "is too old"), 422, "rows_refused"),
        (errors.BudgetExceeded("no"), 409, "budget_exceeded"),
        (errors.RateLimited("slow"), 429, "rate_limited"),
        (errors.StartRefused("wrong keystore at /secret"), 503, "unavailable"),
        (OperationalError("SELECT patient", {"x": "patient"}, Exception("patient")), 503, "unavailable"),
        (IntegrityError("INSERT patient", {"x": "patient"}, Exception("patient")), 503, "unavailable"),
        (HTTPException(404), 404, "not_found"),
        (HTTPException(405), 405, "bad_request"),
        (InvalidSeal(), 500, "internal"),
        (ValueError("patient 4711"), 500, "internal"),
        (KeyError("patient"), 500, "internal"),
    ],
)
def test_a_failure_is_told_as_much_as_its_kind_allows(failure: Exception, status: int, code: str) -> None:
    answer = response_to(failure, request_id="request-of-a-test")
    body = json.loads(answer.body)
    assert (answer.status_code, body["code"], body["request_id"]) == (status, code, "request-of-a-test")
    assert ("retry-after" in answer.headers) == (code in ("unavailable", "rate_limited"))
    if code in ("internal", "unavailable"):
        assert "patient" not in answer.body.decode() and "/secret" not in answer.body.decode()


def test_rows_refused_tell_their_uploader_where() -> None:
    body = json.loads(response_to(RowsRefused("age", 3, "is too old"), request_id="r").body)
    assert body["details"] == {"column": "age", "row": 3, "problem": "is too old"}


def test_whatever_fails_inside_is_answered_and_told_by_type_and_place_alone(
    service: Service, caplog: pytest.LogCaptureFixture
) -> None:
    async def failing(*_: Any) -> None:
        raise ZeroDivisionError("patient 4711")

    caplog.set_level(logging.INFO)
    status, _, body, _ = run(Edge(failing, service))
    assert status == 500 and json.loads(body)["code"] == "internal"
    (failed,) = [record for record in caplog.records if record.getMessage() == "request.failed"]
    assert failed.error == "ZeroDivisionError" and any("failing" in place for place in failed.where)
    assert "4711" not in str([vars(record) for record in caplog.records])
    assert b"4711" not in body


def test_a_failure_inside_fastapi_has_our_shape_too(
    http: TestClient, bearer: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*_: Any, **__: Any) -> None:
        raise ZeroDivisionError("patient 4711")

    monkeypatch.setattr("cloister_server.sources.listed", fail)
    answer = http.get("/v1/sources", headers=bearer)
    assert answer.status_code == 500 and answer.json()["code"] == "internal" and "4711" not in answer.text


def test_a_request_is_logged_by_its_route_and_never_by_its_path(
    http: TestClient, bearer: dict[str, str], steward: Any, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "cloister_server")
    http.get("/v1/sources/my-private-name", headers=bearer)
    line = [vars(record) for record in caplog.records if record.getMessage() == "request"][-1]
    assert (line["method"], line["route"], line["status"]) == ("GET", "/v1/sources/{source}", 404)
    assert line["principal"] == steward.id and line["ms"] >= 0 and line["request_id"]
    assert "my-private-name" not in str(line)


@pytest.fixture
def lines(service: Service, monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[], list[dict[str, Any]]]]:
    """The process's log as its operator gets it, with logging put back afterwards."""
    stream, root = io.StringIO(), logging.getLogger()
    before = (root.handlers[:], root.level)
    monkeypatch.setattr("sys.stderr", stream)
    logs.configure(service.settings)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    root.handlers[:], _ = before
    root.setLevel(before[1])


def test_a_log_line_is_json_and_quotes_no_exception(lines: Callable[[], list[dict[str, Any]]]) -> None:
    try:
        raise ValueError("patient 4711")
    except ValueError:
        logging.getLogger("some.library").exception("it failed", extra={"job_id": "job_1"})
    logging.getLogger("authlib.oauth2.rfc6749.grants.client_credentials").info("Issue token %r", "eyJ")
    (line,) = lines()
    assert (line["event"], line["level"], line["error"], line["job_id"]) == (
        "it failed",
        "error",
        "ValueError",
        "job_1",
    )
    assert "4711" not in json.dumps(line)


def test_a_denied_prediction_is_in_the_audit_log(
    http: TestClient, service: Service, bearer: dict[str, str], steward: Any
) -> None:
    answer = http.post("/v2/models/nobodys/infer", json={"inputs": []}, headers=bearer)
    assert answer.status_code == 404
    with reading(service.engine) as session:
        (row,) = session.scalars(
            select(AuditRow).where(AuditRow.outcome.startswith("denied"), AuditRow.principal_id == steward.id)
        )
    assert (row.verb, row.resource_id) == ("model.predict", "nobodys")


def test_ready_means_that_database_migration_and_keys_are_in_order(http: TestClient, service: Service) -> None:
    assert http.get("/healthz").json() == {"status": "up"}
    assert http.get("/readyz").status_code == 200
    with service.engine.begin() as connection:
        connection.execute(text("UPDATE alembic_version SET version_num = 'older'"))
    answer = http.get("/readyz")
    assert answer.status_code == 503 and answer.json()["code"] == "unavailable"
    assert http.get("/healthz").status_code == 200


def test_ready_is_no_more_when_the_keys_are_gone(http: TestClient, service: Service) -> None:
    for key in service.settings.key_dir.glob("*.kek"):
        key.unlink()
    assert http.get("/readyz").status_code == 503


def test_the_layers_stand_in_their_order(service: Service) -> None:
    app: Any = create_app(service)
    layers = []
    while isinstance(app, (Edge, Telling, Limits, Guard, StrictJSON)):
        layers.append(type(app))
        app = app._app
    assert layers == [Edge, Telling, Limits, Guard, StrictJSON]


def test_the_description_tells_of_a_tenants_quota_of_requests_wherever_a_token_is_wanted(http: TestClient) -> None:
    paths = http.get("/openapi.json").json()["paths"]
    del paths["/oauth/device_authorization"]  # which wants none, and says so of an address
    documented = {
        path: operation["responses"].get("429") for path, methods in paths.items() for operation in methods.values()
    }
    assert {path.startswith("/v1/") for path, told in documented.items() if told} == {True}
    for path, told in documented.items():
        if path.startswith("/v1/"):
            assert told["headers"]["Retry-After"]["schema"] == {"type": "integer"}, path
            assert told["content"]["application/json"]["schema"]["$ref"].endswith("/ErrorBody"), path
