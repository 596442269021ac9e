"""Requests that write no deed: each leaves its row before it is answered, many in one transaction, and none where it cannot."""

from __future__ import annotations

import asyncio
import threading
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import event, select, text
from starlette.testclient import TestClient

from accounts import Person
from cloister_server import audit, audit_batches
from cloister_server.audit_batches import Noted
from cloister_server.errors import ServerError
from cloister_server.policy import Decided
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store import chain
from cloister_server.store.acting import for_tenants
from cloister_server.store.isolation import OtherTenant
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import AuditRow, Grant, Model

ROUTE = ("GET", "/v1/sources")


@pytest.fixture
def person(http: TestClient, steward: Any, bearer: dict[str, str]) -> Person:
    return Person(http, steward, bearer)


def rows_of(service: Service, request_id: str) -> list[tuple[str, str, str, bool]]:
    """Verb, resource, outcome, and whether a grant of the tenant's is named, of each row of a request."""
    with reading(service.engine) as session:
        grants = set(session.scalars(select(Grant.id)))
        rows = session.scalars(select(AuditRow).where(AuditRow.request_id == request_id).order_by(AuditRow.verb))
        return [(row.verb, row.resource_id, row.outcome, row.grant_id in grants) for row in rows]


def test_what_a_request_was_allowed_is_a_row_whatever_became_of_it(
    service: Service, person: Person, http: TestClient
) -> None:
    source = person.source(name="people")
    dataset = person.dataset(source)

    def ask(method: str, path: str, body: Any = None, *, status: int = 200, request_id: str) -> list[Any]:
        headers = {**person.bearer, "X-Request-Id": request_id}
        answer = http.request(method, path, json=body, headers=headers)
        assert answer.status_code == status, answer.text
        return rows_of(service, request_id)

    told = ask("GET", "/v1/sources/people", request_id="one-of-mine")
    assert told == [("source.read", source, "allowed", True)]
    told = ask("GET", "/v1/sources?limit=7", request_id="a-list-of-mine")
    assert told == [("GET", "/v1/sources", "allowed", False)], "a list takes no decision, and is of what one may see"
    assert ask("GET", "/v1/whoami", request_id="my-own-name") == [("GET", "/v1/whoami", "allowed", False)]
    declared = {"name": "more", "epsilon": 1, "delta": 1e-6}
    told = ask("POST", "/v1/sources", declared, status=201, request_id="a-deed-of-mine")
    assert [each[0] for each in told] == ["source.create"], "a deed tells of itself, once"
    told = ask("POST", "/v1/sources", declared, status=409, request_id="a-name-is-taken")
    assert told == [("source.create", person.client.tenant_id, "allowed: not done", True)]
    told = ask("POST", f"/v1/datasets/{dataset}/complete", status=409, request_id="complete-already")
    assert [(verb, outcome) for verb, _, outcome, _ in told] == [("dataset.upload", "allowed: not done")]
    assert ask("POST", "/v1/sources", {"name": 7}, status=422, request_id="not-authorised") == []
    assert ask("GET", "/v1/nothing", status=404, request_id="nor-anywhere") == []
    told = ask("GET", f"/v1/sources/src_{'0' * 32}", status=404, request_id="denied-to-me")
    assert [outcome for _, _, outcome, _ in told] == ["denied: not visible"]


def test_a_prediction_and_its_refusal_are_told_of(service: Service, person: Person, http: TestClient) -> None:
    with reading(service.engine) as session:
        assert session.scalars(select(Model)).all() == []
    headers = {**person.bearer, "X-Request-Id": "no-such-model"}
    assert http.post("/v2/models/nothing/infer", json={"inputs": []}, headers=headers).status_code == 404
    assert rows_of(service, "no-such-model") == [("model.predict", "nothing", "denied: not visible", False)]


def test_where_the_log_cannot_be_written_nothing_is_answered(
    service: Service, person: Person, http: TestClient
) -> None:
    source = person.source(name="secret-source")
    with service.engine.begin() as connection:
        connection.execute(text("CREATE TRIGGER full BEFORE INSERT ON audit BEGIN SELECT RAISE(ABORT, 'full'); END"))
    for path in (f"/v1/sources/{source}", "/v1/sources", "/v1/whoami"):
        answer = http.get(path, headers=person.bearer)
        assert (answer.status_code, answer.json()["code"]) == (503, "audit_unavailable"), path
        assert "secret-source" not in answer.text and answer.headers["Retry-After"]
    answer = http.post(
        "/v1/sources", json={"name": "secret-source", "epsilon": 1, "delta": 1e-6}, headers=person.bearer
    )
    assert answer.json()["code"] == "audit_unavailable", "nor is a refusal of what was allowed"
    assert http.get("/healthz").status_code == 200
    with service.engine.begin() as connection:
        connection.execute(text("DROP TRIGGER full"))
    assert http.get("/v1/whoami", headers=person.bearer).status_code == 200


def test_many_rows_are_one_transaction_and_one_broken_chain_is_no_other_tenants_matter(
    service: Service, make_client: Callable[..., Any]
) -> None:
    ours, theirs = make_client(), make_client("other")
    with service.engine.begin() as connection:
        refusing = f"WHEN NEW.tenant_id = '{theirs.tenant_id}' BEGIN SELECT RAISE(ABORT, 'broken'); END"
        connection.execute(text(f"CREATE TRIGGER broken BEFORE INSERT ON links {refusing}"))
    commits: list[object] = []
    event.listen(service.engine, "commit", commits.append)

    async def ask(number: int, client: Any) -> str:
        principal = Principal(client.tenant_id, client.id, "app", f"request-{number}")
        noted = Noted([Decided("model.read", ours.tenant_id, "mdl_1", "gr_1")] * 2)
        try:
            await audit_batches.keep(service.engine, principal, noted, route=ROUTE, status=200)
        except ServerError as refusal:
            return refusal.code
        return ""

    async def ask_all() -> list[str]:
        return await asyncio.gather(*(ask(number, ours if number % 10 else theirs) for number in range(200)))

    answers = asyncio.run(ask_all())
    assert answers == ["" if number % 10 else "audit_unavailable" for number in range(200)]
    assert 0 < len(commits) < 150
    with reading(service.engine) as session:
        asked = list(session.scalars(select(AuditRow).where(AuditRow.verb == "model.read")))
        assert {row.tenant_id for row in asked} == {ours.tenant_id} and len(asked) == 180, "one decision, one row"
        chain.verify(session, ours.tenant_id)
        chain.verify(session, theirs.tenant_id)


def test_more_than_may_wait_are_refused_at_once(
    service: Service, steward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(audit_batches, "_MOST_WAITING", 0)
    with pytest.raises(ServerError) as refusal:
        asyncio.run(audit_batches.keep(service.engine, steward.principal, Noted(), route=ROUTE, status=200))
    assert (refusal.value.status, refusal.value.code) == (503, "audit_unavailable")


def test_where_no_thread_can_be_begun_one_is_for_the_next_request(
    service: Service, steward: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    def exhausted(_: threading.Thread) -> None:
        raise RuntimeError("can't start new thread")

    async def ask() -> None:
        told = audit_batches.keep(service.engine, steward.principal, Noted(), route=ROUTE, status=200)
        await asyncio.wait_for(told, 60)

    with monkeypatch.context() as patched, pytest.raises(ServerError) as refusal:
        patched.setattr(threading.Thread, "start", exhausted)
        asyncio.run(ask())
    assert (refusal.value.status, refusal.value.code) == (503, "audit_unavailable")
    asyncio.run(ask())
    with reading(service.engine) as session:
        assert len(session.scalars(select(AuditRow).where(AuditRow.verb == ROUTE[0])).all()) == 1, "of the answered one"


def test_rows_that_go_past_the_orm_are_read_back_as_they_were_linked_and_are_of_ones_own_tenants_alone(
    service: Service, person: Person
) -> None:
    principal = person.client.principal
    grants = (None, "gr_" + "1" * 32)
    rows = [audit.values_of(principal, "v", str(each), outcome="o", grant_id=grants[each % 2]) for each in range(299)]
    with writing(service.engine, for_tenants(principal.tenant_id)) as session:
        chain.add(session, rows)
    with reading(service.engine) as session:
        chain.verify(session, principal.tenant_id)
        found = session.execute(select(AuditRow.__table__).where(AuditRow.verb == "v").order_by(AuditRow.id))
        assert [dict(each._mapping) for each in found] == sorted(rows, key=lambda row: row["id"])
    strange = [*rows[:1], {**rows[1], "tenant_id": "tn_" + "2" * 32}]
    with pytest.raises(OtherTenant), writing(service.engine, for_tenants(principal.tenant_id)) as session:
        chain.add(session, strange)
