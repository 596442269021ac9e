"""What a source's owner does to its budget: raise and lower it, bound apps, open blocks; and what each act makes of jobs."""

from __future__ import annotations

import json
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
from sqlalchemy import select
from starlette.testclient import TestClient

from accounts import COLUMNS, Person, grant
from cloister_server import grants, suspension
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.conditions import Conditions
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import AuditRow, now
from people import invited

REASON = "as the board decided"
LITTLE = 0.65
"""So little noise that one run fits the budget, and a second does not."""

WRONG = ["1e999", "-1", "0", "1000.1", '"many"', "null"]
"""As they stand in a body: what no budget can be."""


@pytest.fixture
def owner(http: TestClient, steward: Any, bearer: dict[str, str]) -> Person:
    return Person(http, steward, bearer)


@pytest.fixture
def source(owner: Person) -> str:
    return owner.source()


@pytest.fixture
def rows(owner: Person, source: str) -> str:
    return owner.dataset(source)


@pytest.fixture
def partner(
    http: TestClient,
    service: Service,
    owner: Person,
    source: str,
    rows: str,
    make_client: Callable[..., Any],
    bearer_of: Callable[[Any], Any],
) -> Person:
    """An app of another tenant that may read the source and train on its rows."""
    client = make_client("partners", role="none")
    grant(service, owner.client.tenant_id, client, "source.read", on=source)
    grant(service, owner.client.tenant_id, client, "dataset.read", "dataset.train", on=rows)
    return Person(http, client, bearer_of(client))


def set_budget(owner: Person, source: str, epsilon: float, *, reason: str = REASON, key: str = "") -> Any:
    return owner.ask("PUT", f"/sources/{source}/budget", {"epsilon": epsilon, "reason": reason}, key=key)


def allow(owner: Person, source: str, to: Person, **given: Any) -> Any:
    body = {"reason": REASON, **given}
    return owner.ask("PUT", f"/sources/{source}/allowances/{to.client.id}", body)


def open_block(owner: Person, source: str, name: str, *, key: str = "") -> Any:
    return owner.ask("POST", f"/sources/{source}/blocks", {"name": name, "reason": REASON}, key=key)


def refused(answer: Any, status: int, code: str, words: str = "") -> Any:
    assert (answer.status_code, answer.json()["code"]) == (status, code), answer.text
    assert words in answer.json()["error"]
    return answer.json()


def test_a_budget_is_raised_and_lowered_with_a_reason_that_the_ledger_keeps(owner: Person, source: str) -> None:
    for epsilon, reason in ((12, "more people agreed"), (8, "fewer did")):
        answer = set_budget(owner, source, epsilon, reason=reason)
        assert answer.status_code == 200 and answer.json()["budget"]["epsilon"] == epsilon
    kept = [(each["was"], each["epsilon"], each["reason"]) for each in owner.ledger(source)["items"]]
    assert kept == [(10, 12, "more people agreed"), (12, 8, "fewer did")]


def test_a_raised_budget_admits_what_did_not_fit(owner: Person, source: str, rows: str) -> None:
    plan = owner.plan(rows, noise=LITTLE)
    assert owner.start(plan).status_code == 201
    again = refused(owner.start(plan), 409, "budget_exceeded", "ask the source's owner to raise the budget")
    assert again["details"]["owners"] == [owner.client.id]
    assert set_budget(owner, source, 14).status_code == 200
    owner.train(owner.plan(rows, noise=LITTLE))


def test_a_lowered_budget_admits_less(owner: Person, source: str, rows: str) -> None:
    plan = owner.plan(rows, noise=LITTLE)
    assert set_budget(owner, source, 1).status_code == 200
    refused(owner.start(plan), 422, "plan_impossible", "not what the source promises now")
    assert not owner.plan(rows, noise=LITTLE)["quote"]["fits"]


def test_a_budget_below_what_is_used_is_refused_and_changes_nothing(owner: Person, source: str, rows: str) -> None:
    owner.train(owner.plan(rows))
    before = owner.budget(source)
    refused(set_budget(owner, source, before["spent"] * 0.99), 422, "invalid_request", f"{before['spent']:.3f}")
    assert owner.budget(source) == before
    assert [each["kind"] for each in owner.ledger(source)["items"]] == ["train"]
    assert set_budget(owner, source, before["spent"] * 1.01).status_code == 200


def test_a_budget_of_all_blocks_stays_above_what_is_used_of_any(owner: Person, source: str, rows: str) -> None:
    open_block(owner, source, "day2")
    owner.train(owner.plan(owner.dataset(source, "more", block="day2")))
    refused(set_budget(owner, source, 0.1), 422, "invalid_request", "cannot be taken back")


@pytest.mark.parametrize("epsilon", WRONG)
def test_what_no_budget_can_be_is_refused(owner: Person, source: str, epsilon: str) -> None:
    for path in ("budget", f"allowances/{owner.client.id}"):
        if (path, epsilon) == (f"allowances/{owner.client.id}", "null"):
            continue  # there it lifts the bound
        answer = owner.http.put(
            f"/v1/sources/{source}/{path}",
            content=f'{{"epsilon": {epsilon}, "reason": "{REASON}"}}',
            headers={**owner.bearer, "Content-Type": "application/json"},
        )
        assert refused(answer, 422, "invalid_request")["details"]["fields"]
    assert owner.budget(source)["revision"] == 0 and owner.budget(source)["epsilon"] == 10


@pytest.mark.parametrize("epsilon", ["NaN", "Infinity", "-Infinity"])
def test_a_budget_is_a_number(owner: Person, source: str, epsilon: str) -> None:
    body, headers = f'{{"epsilon": {epsilon}, "reason": "x"}}', {**owner.bearer, "Content-Type": "application/json"}
    refused(owner.http.put(f"/v1/sources/{source}/budget", content=body, headers=headers), 400, "bad_request")
    assert owner.budget(source)["revision"] == 0


@pytest.mark.parametrize("reason", [None, "", "x" * 501])
def test_an_act_without_a_reason_is_refused(owner: Person, source: str, reason: str | None) -> None:
    for path in ("budget", f"allowances/{owner.client.id}"):
        body = {"epsilon": 5} if reason is None else {"epsilon": 5, "reason": reason}
        refused(owner.ask("PUT", f"/sources/{source}/{path}", body), 422, "invalid_request")


def test_only_an_owner_acts_on_a_source(
    http: TestClient,
    owner: Person,
    source: str,
    partner: Person,
    make_client: Callable[..., Any],
    bearer_of: Callable[[Any], Any],
) -> None:
    client = make_client("elsewhere")
    stranger = Person(http, client, bearer_of(client))
    before = owner.budget(source)
    for person, status, code in ((partner, 403, "forbidden"), (stranger, 404, "not_found")):
        refused(set_budget(person, source, 20), status, code)
        refused(allow(person, source, partner, epsilon=5), status, code)
        refused(open_block(person, source, "mine"), status, code)
    assert owner.budget(source) == before


def test_acts_are_audited(owner: Person, source: str, partner: Person, service: Service) -> None:
    set_budget(owner, source, 12)
    allow(owner, source, partner, epsilon=5)
    open_block(owner, source, "day2")
    set_budget(partner, source, 20)
    verbs = ("source.set_budget", "source.allow", "source.open_block")
    with reading(service.engine) as session:
        done = session.scalars(select(AuditRow).where(AuditRow.verb.in_(verbs)).order_by(AuditRow.time)).all()
        denied = session.scalars(select(AuditRow).where(AuditRow.principal_id == partner.client.id)).all()
    assert [(row.verb, row.resource_id) for row in done] == [
        ("source.set_budget", source),
        ("source.allow", source),
        ("source.open_block", f"{source}/1"),
    ]
    assert [(row.verb, row.outcome) for row in denied] == [("source.own", "denied: no grant matched")]


def test_an_allowance_bounds_one_app_and_nobody_else(owner: Person, source: str, rows: str, partner: Person) -> None:
    assert allow(owner, source, partner, epsilon=0.6).json() == {
        "source": source,
        "client": partner.client.id,
        "epsilon": 0.6,
        "expires": None,
    }
    plan = partner.plan(rows)
    partner.train(plan, model="a")
    told = partner.budget(source)
    assert told["allowance"] == 0.6 and told["left"] == pytest.approx(0.6 - told["spent"])
    assert not partner.plan(rows)["quote"]["fits"]
    over = refused(partner.start(plan, model="b"), 409, "budget_exceeded", "the 0.6 that your allowance of source")
    assert over["details"]["left"] == pytest.approx(told["left"])
    assert partner.budget(source) == told, "a refusal charges nothing"
    owner.train(plan, model="c")


def test_an_allowance_is_of_every_block_by_itself(
    owner: Person, source: str, rows: str, partner: Person, service: Service
) -> None:
    allow(owner, source, partner, epsilon=0.6)
    open_block(owner, source, "day2")
    more = owner.dataset(source, "more", block="day2")
    grant(service, owner.client.tenant_id, partner.client, "dataset.read", "dataset.train", on=more)
    partner.train(partner.plan(rows), model="a")
    partner.train(partner.plan(more), model="b")
    refused(partner.start(partner.plan(more), model="c"), 409, "budget_exceeded")


def test_an_allowance_ends_and_is_lifted(owner: Person, source: str, rows: str, partner: Person) -> None:
    plan = partner.plan(rows)
    allow(owner, source, partner, expires=(now() + timedelta(hours=1)).isoformat())
    partner.train(plan, model="a")
    allow(owner, source, partner, expires=(now() - timedelta(seconds=1)).isoformat())
    ended = refused(partner.start(plan, model="b"), 409, "allowance_expired", "ask the source's owner for a new one")
    assert ended["details"]["owners"] == [owner.client.id]
    assert not partner.plan(rows)["quote"]["fits"] and owner.plan(rows)["quote"]["fits"]
    assert allow(owner, source, partner).status_code == 200
    partner.train(plan, model="b")
    kinds = [each["kind"] for each in partner.ledger(source)["items"]]
    assert kinds == ["allowance", "train", "allowance", "allowance", "train"]


def test_an_allowance_lies_within_the_budget_and_is_of_somebody(owner: Person, source: str, partner: Person) -> None:
    refused(allow(owner, source, partner, epsilon=10.5), 422, "invalid_request", "within the source's 10")
    refused(allow(owner, source, partner, expires="2030-01-01T00:00:00"), 422, "invalid_request")
    for nobody in ("ap_" + "0" * 32, "nobody"):
        body = {"epsilon": 5, "reason": REASON}
        refused(owner.ask("PUT", f"/sources/{source}/allowances/{nobody}", body), 404, "not_found", "no such client")


def test_a_client_of_another_tenant_is_as_none_until_something_is_granted_to_it(
    owner: Person, source: str, rows: str, service: Service, make_client: Callable[..., Any]
) -> None:
    body, stranger = {"epsilon": 5, "reason": REASON}, make_client("strangers", role="none")

    def told(client: str) -> tuple[int, Any]:
        answer = owner.ask("PUT", f"/sources/{source}/allowances/{client}", body)
        return answer.status_code, {**answer.json(), "request_id": ""}

    assert told(stranger.id) == told("ap_" + "0" * 32)
    grant(service, owner.client.tenant_id, stranger, "dataset.train", on=rows)
    assert told(stranger.id)[0] == 200


def test_an_allowance_is_of_a_person_as_of_an_app(owner: Person, source: str, rows: str, service: Service) -> None:
    here, there = (
        invited(service, owner.http, name, tenant=tenant, role="none")
        for name, tenant in (("ada", "acme"), ("eve", "globex"))
    )

    def told(client: str) -> tuple[int, Any]:
        body = {"epsilon": 5, "reason": REASON}
        answer = owner.ask("PUT", f"/sources/{source}/allowances/{client}", body)
        return answer.status_code, {**answer.json(), "request_id": ""}

    assert told("ada") == told(here.id) and told(here.id)[1]["client"] == here.id
    assert told(there.id) == told("us_" + "0" * 32) == told("eve")
    grant(service, owner.client.tenant_id, there, "dataset.train", on=rows)
    assert told(there.id)[1]["client"] == there.id


def test_an_opened_block_has_a_budget_of_its_own(owner: Person, source: str, rows: str) -> None:
    owner.train(owner.plan(rows, noise=LITTLE))
    assert open_block(owner, source, "day2").json() == {"source": source, "number": 1, "name": "day2"}
    more = owner.dataset(source, "more", block="day2")
    refused(owner.start(owner.plan(rows, noise=LITTLE), model="b"), 409, "budget_exceeded")
    plan = owner.plan(more, noise=LITTLE)
    assert plan["quote"]["fits"] and plan["quote"]["before"] == 0 and plan["quote"]["block"] == 1
    owner.train(plan, model="b")
    first, second = owner.budget(source)["blocks"]
    assert (first["name"], second["name"]) == ("first", "day2")
    assert first["spent"] == second["spent"] == plan["quote"]["after"]
    both = owner.plan(rows, more, noise=0.45)
    assert not both["quote"]["fits"] and refused(owner.start(both, model="c"), 409, "budget_exceeded")


def test_a_run_on_two_blocks_is_charged_to_each_for_all_of_their_people(owner: Person, source: str, rows: str) -> None:
    open_block(owner, source, "day2")
    more = owner.dataset(source, "more", block="day2", nominal_size=3000, capacity=4000)
    plan = owner.plan(rows, more)
    spec = plan["training"]
    assert (spec["nominal_size"], spec["capacity"], spec["with_datasets"]) == (4000, 6000, [more])
    assert plan["event"]["sampling_rate"] == 100 / 4000
    owner.train(plan)
    assert {each["spent"] for each in owner.budget(source)["blocks"]} == {plan["quote"]["after"]}


@pytest.mark.parametrize("name", ["day2", "first"])
def test_a_block_s_name_is_its_own(owner: Person, source: str, name: str) -> None:
    open_block(owner, source, "day2")
    refused(open_block(owner, source, name), 409, "conflict", "choose another name")
    assert open_block(owner, owner.source("others"), "day2").status_code == 201


def test_a_dataset_of_a_block_that_is_not_there_is_refused(owner: Person, source: str) -> None:
    body = {"source": source, "name": "d", "block": "day9", "columns": COLUMNS, "nominal_size": 10, "capacity": 20}
    refused(owner.ask("POST", "/datasets", body), 422, "invalid_request", "it has first, and its owner opens more")


@pytest.mark.parametrize(("nominal_size", "is_refused"), [(99_999, False), (100_000, True), (2**30, True)])
def test_a_delta_that_would_let_a_person_be_revealed_whole_is_refused(
    owner: Person, source: str, nominal_size: int, is_refused: bool
) -> None:
    body = {"source": source, "name": "d", "columns": COLUMNS, "nominal_size": nominal_size, "capacity": nominal_size}
    answer = owner.ask("POST", "/datasets", body)
    if is_refused:
        refused(answer, 422, "invalid_request", f"1e-05 is not below 1 / nominal_size = {1 / nominal_size:g}")
    else:
        assert answer.status_code == 201


def test_datasets_of_one_block_are_not_trained_on_together(owner: Person, source: str, rows: str) -> None:
    again = owner.dataset(source, "again")
    asked = {"dataset": rows, "target": "y", "privacy": {"noise_multiplier": 4}}
    for others in ([again], [rows]):
        told = owner.ask("POST", "/plans", {**asked, "with_datasets": others})
        refused(told, 422, "invalid_request", "same block, whose people would then count twice")
    spec = owner.plan(rows)["training"]
    forged = {"training": {**spec, "with_datasets": [again], "nominal_size": 2000, "capacity": 4000}, "model": "m"}
    refused(owner.ask("POST", "/jobs", forged), 422, "invalid_request", "same block")
    assert owner.budget(source)["revision"] == 0


def test_datasets_of_other_sources_or_columns_are_not_trained_on_together(
    owner: Person, source: str, rows: str
) -> None:
    open_block(owner, source, "day2")
    wider = {**COLUMNS, "x": {"type": "number", "low": 0, "high": 2}}
    asked = {"dataset": rows, "target": "y", "privacy": {"noise_multiplier": 4}}
    for other in (owner.dataset(owner.source("others"), "o"), owner.dataset(source, "w", block="day2", columns=wider)):
        told = owner.ask("POST", "/plans", {**asked, "with_datasets": [other]})
        refused(told, 422, "invalid_request", "not of one source with the same columns")


def test_a_dataset_that_one_may_not_train_on_is_not_there_beside_others(
    owner: Person, source: str, rows: str, partner: Person
) -> None:
    open_block(owner, source, "day2")
    more = owner.dataset(source, "more", block="day2")
    asked = {"dataset": rows, "target": "y", "with_datasets": [more]}
    refused(partner.ask("POST", "/plans", asked), 404, "not_found")


def test_a_replayed_request_charges_and_acts_once(owner: Person, source: str, rows: str) -> None:
    plan = owner.plan(rows)
    started = [owner.start(plan, key="one-start") for _ in range(3)]
    assert len({answer.content for answer in started}) == 1 and started[0].status_code == 201
    raised = [set_budget(owner, source, 12, key="one-raise") for _ in range(3)]
    assert len({answer.content for answer in raised}) == 1 and raised[0].status_code == 200
    opened = [open_block(owner, source, "day2", key="one-block") for _ in range(3)]
    assert len({answer.content for answer in opened}) == 1 and opened[0].status_code == 201
    assert [each["kind"] for each in owner.ledger(source)["items"]] == ["train", "budget", "block"]
    assert owner.budget(source)["spent"] == plan["quote"]["after"]
    assert [each["name"] for each in owner.budget(source)["blocks"]] == ["first", "day2"]
    refused(set_budget(owner, source, 13, key="one-raise"), 422, "idempotency_mismatch")


def test_a_replay_is_asked_for_all_that_the_first_request_was_allowed_by(
    owner: Person, source: str, rows: str, partner: Person, service: Service
) -> None:
    plan = partner.plan(rows)
    assert partner.start(plan, key="one").status_code == 201
    train = {"to": partner.client.id, "verb": "dataset.train", "resource_id": rows}
    operator = Principal.operator(owner.client.tenant_id, request_id="request-of-a-test")

    def granted(**bound: Any) -> None:
        with writing(service.engine) as session:
            for each in grants.listed(session, operator, to=partner.client.id):
                if each.verb == "dataset.train":
                    grants.remove(session, operator, each.id)
            grants.add(session, operator, **train, **bound)

    def set_suspended(act: Callable[..., Any]) -> None:
        with writing(service.engine) as session:
            act(session, service, operator)

    assert partner.start(plan, key="one").headers["idempotency-replayed"] == "true"
    granted(conditions=Conditions(max_epsilon=plan["epsilon"] / 2))
    refused(partner.start(plan, key="one"), 403, "forbidden", "at most")
    granted(effect="deny")
    refused(partner.start(plan, key="one"), 403, "forbidden")
    granted()
    set_suspended(suspension.suspend)
    refused(partner.start(plan, key="one"), 404, "not_found")
    set_suspended(suspension.resume)
    assert partner.start(plan, key="one").headers["idempotency-replayed"] == "true"
    assert [each["kind"] for each in owner.ledger(source)["items"]] == ["train"]


def test_a_deletion_is_answered_again_until_the_dataset_s_tenant_is_suspended(
    owner: Person, source: str, partner: Person, service: Service
) -> None:
    declared = {"source": source, "name": "upload", "columns": COLUMNS, "nominal_size": 1000, "capacity": 2000}
    upload = owner.told("POST", "/datasets", declared)["id"]
    grant(service, owner.client.tenant_id, partner.client, "dataset.upload", on=upload)
    first, again = (partner.ask("DELETE", f"/datasets/{upload}", key="gone") for _ in range(2))
    assert first.status_code == 200 and again.content == first.content
    with writing(service.engine) as session:
        operator = Principal.operator(owner.client.tenant_id, request_id="request-of-a-test")
        suspension.suspend(session, service, operator)
    refused(partner.ask("DELETE", f"/datasets/{upload}", key="gone"), 404, "not_found")


def test_what_is_told_of_a_budget_is_plain_json(owner: Person, source: str, rows: str) -> None:
    owner.train(owner.plan(rows))

    def refuse(constant: str) -> Any:
        raise AssertionError(f"{constant} is no JSON")

    for path in ("", "/ledger"):
        json.loads(owner.ask("GET", f"/sources/{source}{path}").content, parse_constant=refuse)
