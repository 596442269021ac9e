"""A write happens once for each Idempotency-Key, whatever the network makes of its answer."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from sqlalchemy import func, null, select, update
from starlette.testclient import TestClient

from accounts import Person, grant
from cloister_server import grants
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import AuditRow, Grant, IdempotencyKey, Source

BODY = {"name": "people", "epsilon": 3, "delta": 1e-5}


def count(service: Service, table: type[Any]) -> int:
    with reading(service.engine) as session:
        return int(session.scalar(select(func.count()).select_from(table)) or 0)


def keyed(bearer: dict[str, str], key: str = "key-of-a-test") -> dict[str, str]:
    return {**bearer, "Idempotency-Key": key}


def test_a_retry_gets_the_same_document_and_writes_nothing(http: TestClient, service: Service, bearer: Any) -> None:
    first = http.post("/v1/sources", json=BODY, headers=keyed(bearer))
    again = http.post("/v1/sources", json=BODY, headers=keyed(bearer))
    assert first.status_code == again.status_code == 201
    assert first.content == again.content
    assert "idempotency-replayed" not in first.headers and again.headers["idempotency-replayed"] == "true"
    assert count(service, Source) == 1


def test_a_key_with_another_body_is_refused(http: TestClient, service: Service, bearer: Any) -> None:
    http.post("/v1/sources", json=BODY, headers=keyed(bearer))
    other = http.post("/v1/sources", json={**BODY, "epsilon": 4}, headers=keyed(bearer))
    assert other.status_code == 422 and other.json()["code"] == "idempotency_mismatch"
    assert count(service, Source) == 1


def test_a_refused_write_keeps_nothing_and_its_key_is_free_again(
    http: TestClient, service: Service, bearer: Any
) -> None:
    http.post("/v1/sources", json=BODY, headers=keyed(bearer, "the-first"))
    granted = count(service, Grant)
    clash = {**BODY, "epsilon": 9}
    assert http.post("/v1/sources", json=clash, headers=keyed(bearer)).json()["code"] == "conflict"
    assert count(service, IdempotencyKey) == 1 and count(service, Grant) == granted
    assert http.post("/v1/sources", json={**clash, "name": "others"}, headers=keyed(bearer)).status_code == 201


def test_a_denied_write_leaves_its_denial_and_nothing_else(
    http: TestClient, service: Service, make_client: Callable[..., Any], bearer_of: Callable[[Any], dict[str, str]]
) -> None:
    predictor = make_client(role="predictor")
    before = count(service, Grant)
    answer = http.post("/v1/sources", json=BODY, headers=keyed(bearer_of(predictor)))
    assert answer.status_code == 403 and answer.json()["code"] == "forbidden"
    assert count(service, Source) == count(service, IdempotencyKey) == 0 and count(service, Grant) == before
    with reading(service.engine) as session:
        (row,) = session.scalars(select(AuditRow).where(AuditRow.principal_id == predictor.id))
    assert (row.verb, row.outcome) == ("source.create", "denied: no grant matched")
    assert row.request_id == answer.headers["x-request-id"]


def test_two_principals_may_use_the_same_key(
    http: TestClient, service: Service, make_client: Callable[..., Any], bearer_of: Callable[[Any], dict[str, str]]
) -> None:
    for tenant in ("one", "two"):
        answer = http.post("/v1/sources", json=BODY, headers=keyed(bearer_of(make_client(tenant))))
        assert answer.status_code == 201 and "idempotency-replayed" not in answer.headers
    assert count(service, Source) == 2


def test_of_requests_at_the_same_time_one_runs_and_the_others_replay(
    http: TestClient, service: Service, bearer: Any
) -> None:
    with ThreadPoolExecutor(6) as pool:
        answers = list(pool.map(lambda _: http.post("/v1/sources", json=BODY, headers=keyed(bearer)), range(6)))
    assert {answer.status_code for answer in answers} == {201}
    assert len({answer.content for answer in answers}) == 1
    assert sum("idempotency-replayed" not in answer.headers for answer in answers) == 1
    assert count(service, Source) == 1


def test_a_write_without_a_key_runs_every_time(http: TestClient, service: Service, bearer: Any) -> None:
    assert http.post("/v1/sources", json=BODY, headers=bearer).status_code == 201
    assert http.post("/v1/sources", json=BODY, headers=bearer).json()["code"] == "conflict"
    assert count(service, IdempotencyKey) == 0


def test_a_retry_is_refused_as_the_write_itself_once_its_grant_is_gone(
    http: TestClient, service: Service, make_client: Callable[..., Any], bearer_of: Callable[[Any], dict[str, str]]
) -> None:
    owner = Person(http, make_client(role="none"), {})
    operator = Principal.operator(owner.client.tenant_id, request_id="request-of-a-test")
    given = {"to": owner.client.id, "verb": "source.create", "resource_id": owner.client.tenant_id}
    grant(service, owner.client.tenant_id, owner.client, "source.create", on=owner.client.tenant_id)
    owner.bearer = bearer_of(owner.client)
    first = owner.ask("POST", "/sources", BODY, key="one")
    assert first.status_code == 201
    with writing(service.engine) as session:
        grants.remove_all(session, operator, **given)
    refused = owner.ask("POST", "/sources", BODY, key="one")
    assert refused.status_code == 403 and refused.json()["code"] == "forbidden"
    with reading(service.engine) as session:
        denials = select(AuditRow).where(AuditRow.outcome != "allowed", AuditRow.principal_id == owner.client.id)
        (row,) = session.scalars(denials)
    assert (row.verb, row.outcome) == ("source.create", "denied: no grant matched")
    assert row.request_id == refused.headers["x-request-id"]
    grant(service, owner.client.tenant_id, owner.client, "source.create", on=owner.client.tenant_id)
    assert owner.ask("POST", "/sources", BODY, key="one").content == first.content
    assert count(service, Source) == 1


def test_an_answer_from_before_what_allowed_it_was_kept_is_refused_by_name(
    http: TestClient, service: Service, bearer: Any
) -> None:
    http.post("/v1/sources", json=BODY, headers=keyed(bearer))
    with writing(service.engine) as session:
        session.execute(update(IdempotencyKey).values(proofs=null()))
    again = http.post("/v1/sources", json=BODY, headers=keyed(bearer))
    assert again.status_code == 409 and again.json()["code"] == "answer_not_kept"
    assert count(service, Source) == 1


def test_a_key_of_another_form_is_refused(http: TestClient, bearer: Any) -> None:
    for key in ("", "a b", "x" * 129, "ä"):
        answer = http.post("/v1/sources", json=BODY, headers={**bearer, "Idempotency-Key": key.encode()})
        assert answer.status_code == 422, key
