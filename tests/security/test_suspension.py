"""A suspended tenant: nobody acts for it or on what it has, in this process or another; all of it is there when it is resumed."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from accounts import Person, grant
from cloister_server import budgets, shredding, suspension
from cloister_server.errors import Conflict, Unauthenticated
from cloister_server.oauth import verifier
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.queries import VERBS
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import Attempt, AuditRow, Job, LedgerEntry
from cloister_server.work.attempts import run_attempt
from cloister_server.work.template import Template

Bearers = Callable[[Any], dict[str, str]]


def operator(client: Any) -> Principal:
    return Principal.operator(client.tenant_id, request_id="request-of-a-test")


def suspend(service: Service, client: Any) -> suspension.Suspension:
    with writing(service.engine) as session:
        return suspension.suspend(session, service, operator(client))


def resume(service: Service, client: Any) -> suspension.Suspension:
    with writing(service.engine) as session:
        return suspension.resume(session, service, operator(client))


def asks(service: Service, bearer: dict[str, str]) -> str:
    headers = [(name.lower().encode(), value.encode()) for name, value in bearer.items()]
    return verifier.authenticate(service, headers, method="GET", path="/v1/sources").id


def asked_for_token(http: TestClient, client: Any) -> Any:
    return http.post("/oauth/token", data={"grant_type": "client_credentials"}, auth=(client.id, client.secret))


def test_its_clients_get_no_token_and_those_that_they_have_are_refused_here_at_once_and_elsewhere_within_a_second(
    http: TestClient, service: Service, second_process: Service, make_client: Callable[..., Any], bearer_of: Bearers,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    ours, theirs = make_client("acme"), make_client("other")
    person = Person(http, ours, bearer_of(ours))
    source, others = person.source(), bearer_of(theirs)
    assert asks(second_process, person.bearer) == ours.id

    first = suspend(service, ours)
    assert (first.name, first.jobs_not_over) == ("acme", 0) and first.suspended is not None
    assert person.ask("GET", f"/sources/{source}").status_code == 401
    refused = asked_for_token(http, ours)
    assert (refused.status_code, refused.json()["error"]) == (400, "unauthorized_client")
    assert "suspended" in refused.json()["error_description"]
    assert http.post("/oauth/token", data={"grant_type": "client_credentials"}, auth=(ours.id, "x")).status_code == 401
    later = time.monotonic() + 1.01
    with monkeypatch.context() as change:
        change.setattr(verifier, "monotonic", lambda: later)
        with pytest.raises(Unauthenticated):
            asks(second_process, person.bearer)
    assert http.get("/v1/sources", headers=others).status_code == 200, "another tenant is as before"
    assert suspend(service, ours).suspended == first.suspended, "it is suspended since it was"

    assert resume(service, ours).suspended is None
    assert person.told("GET", f"/sources/{source}")["id"] == source
    assert asked_for_token(http, ours).status_code == 200
    with reading(service.engine) as session:
        acts = select(AuditRow.verb, AuditRow.outcome, AuditRow.principal_id).where(AuditRow.verb.like("tenant.%e%"))
        kept = session.execute(acts.where(AuditRow.tenant_id == ours.tenant_id)).all()
    deeds = [row.verb for row in kept if row.verb in ("tenant.suspend", "tenant.resume")]
    assert sorted(deeds) == ["tenant.resume", "tenant.suspend"]
    assert {(row.outcome, row.principal_id) for row in kept} == {("allowed", "operator")}


def test_who_was_granted_something_of_it_loses_it_meanwhile_and_keeps_what_is_its_own(
    http: TestClient, service: Service, make_client: Callable[..., Any], bearer_of: Bearers
) -> None:
    ours, partner = make_client("acme"), make_client("other")
    person, friend = Person(http, ours, bearer_of(ours)), Person(http, partner, bearer_of(partner))
    shared, own = person.source("shared"), friend.source("own")
    dataset = person.dataset(shared)
    for verb, on in (("source.read", shared), ("dataset.read", dataset)):
        grant(service, ours.tenant_id, partner, verb, on=on)

    def seen() -> tuple[Any, ...]:
        listed = sorted(each["id"] for each in friend.told("GET", "/sources")["items"])
        return listed, *(friend.ask("GET", path).status_code for path in (f"/sources/{shared}", f"/datasets/{dataset}"))

    suspend(service, ours)
    assert seen() == ([own], 404, 404)
    resume(service, ours)
    assert seen() == (sorted([own, shared]), 200, 200)


def test_its_jobs_do_not_begin_stop_at_a_chunk_boundary_and_wait(
    http: TestClient,
    service: Service,
    make_client: Callable[..., Any],
    bearer_of: Bearers,
    template: Template,
) -> None:
    ours = make_client("acme")
    person = Person(http, ours, bearer_of(ours))
    job_id = person.train(person.plan(person.dataset(person.source())))
    place = {"tenant_id": ours.tenant_id, "job_id": job_id, "attempt": 1}
    assert suspend(service, ours).jobs_not_over == 1
    with pytest.raises(budgets.TenantSuspended):
        run_attempt(service, ours.tenant_id, job_id, template=template, stopping=threading.Event())
    with reading(service.engine) as session:
        assert session.get_one(Job, (ours.tenant_id, job_id)).status == "queued"
        assert session.scalars(select(Attempt).where(Attempt.job_id == job_id)).all() == []

    resume(service, ours)
    with writing(service.engine) as session:
        session.get_one(Job, (ours.tenant_id, job_id)).attempt = 1
        budgets.open_chunk(session, **place, first_step=0, steps=5)
    suspend(service, ours)
    with pytest.raises(budgets.TenantSuspended), writing(service.engine) as session:
        budgets.open_chunk(session, **place, first_step=5, steps=5)
    with reading(service.engine) as session:
        chunks = select(LedgerEntry.steps).where(LedgerEntry.job_id == job_id, LedgerEntry.kind == "chunk")
        assert session.scalars(chunks).all() == [5], "what was opened stays charged, and nothing besides"
    resume(service, ours)
    with writing(service.engine) as session:
        budgets.open_chunk(session, **place, first_step=5, steps=5)


def test_a_suspended_tenant_can_be_shredded_and_a_shredded_one_is_not_suspended(
    service: Service, make_client: Callable[..., Any]
) -> None:
    ours = make_client("acme")
    suspend(service, ours)
    shredding.shred(service, operator(ours))
    for act in (suspend, resume):
        with pytest.raises(Conflict, match="shredded"):
            act(service, ours)


def test_a_grant_on_what_a_suspended_tenant_has_decides_nothing_for_any_verb(
    service: Service, make_client: Callable[..., Any]
) -> None:
    from cloister_server.policy import Allow, Deny, decide

    ours, partner = make_client("acme"), make_client("other", role="none")
    grant(service, ours.tenant_id, partner, *VERBS, on="*")

    def decided() -> set[type[Any]]:
        with reading(service.engine) as session:
            where = {"tenant_id": ours.tenant_id, "resource_id": "any"}
            return {type(decide(session, partner.principal, verb, **where)) for verb in VERBS}

    assert decided() == {Allow}
    suspend(service, ours)
    assert decided() == {Deny}
    resume(service, ours)
    assert decided() == {Allow}
