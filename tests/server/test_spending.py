"""A source's ledger as it is read: all of it by its owner, and by everyone else nothing but its own."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy import Engine, select
from starlette.testclient import TestClient

from accounts import Person, grant
from cloister.wire.plans import Event
from cloister_server import budgets, spending, tenants
from cloister_server.errors import NotFound
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import App, Grant, Job, LedgerEntry, Source, Tenant, new_id

REASON = "the board said so, of which nobody else is told"
OWNERS = ("principal", "principal_name", "reason", "was", "client_name")
"""What nobody but an owner is told."""


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
def invite(
    http: TestClient, service: Service, owner: Person, make_client: Callable[..., Any], bearer_of: Callable[[Any], Any]
) -> Callable[..., Person]:
    """A partner of another tenant, or of this one, that may read the source and train on some datasets."""

    def made(source: str, *datasets: str, tenant: str = "partners") -> Person:
        client = make_client(tenant, role="none")
        grant(service, owner.client.tenant_id, client, "source.read", on=source)
        for dataset in datasets:
            grant(service, owner.client.tenant_id, client, "dataset.read", "dataset.train", on=dataset)
        return Person(http, client, bearer_of(client))

    return made


def name_of(service: Service, person: Person) -> str:
    with reading(service.engine) as session:
        return str(session.scalar(select(App.name).where(App.id == person.client.id)))


def test_an_owner_sees_who_used_what_and_when(
    owner: Person, source: str, rows: str, invite: Callable[..., Person], service: Service
) -> None:
    partner, colleague = invite(source, rows), invite(source, rows, tenant="acme")
    plan = owner.plan(rows)
    jobs = [person.train(plan, model=model) for person, model in ((owner, "a"), (partner, "b"), (colleague, "c"))]
    page = owner.ledger(source)
    assert page["is_of_all"] and page["next"] is None
    assert [each["job"] for each in page["items"]] == jobs
    assert [each["principal"] for each in page["items"]] == [each.client.id for each in (owner, partner, colleague)]
    named = [name_of(service, owner), f"partners/{name_of(service, partner)}", name_of(service, colleague)]
    assert [each["principal_name"] for each in page["items"]] == named
    for each, model in zip(page["items"], "abc", strict=True):
        assert (each["kind"], each["model"], each["dataset"], each["block"]) == ("train", model, "rows", "first")
        assert (each["steps_reserved"], each["steps_charged"], each["is_settled"]) == (10, 10, False)
        assert (each["epsilon"], each["delta"]) == (plan["epsilon"], plan["delta"])
        event = {name: plan["event"][name] for name in ("mechanism", "steps", "noise_multiplier", "sampling_rate")}
        assert each["charge"] == {**event, "epsilon": None}


def test_spent_is_what_was_used_right_after_a_line(owner: Person, source: str, rows: str) -> None:
    told = []
    for model in "ab":
        owner.train(owner.plan(rows), model=model)
        told.append(owner.budget(source)["spent"])
    assert [each["spent"] for each in owner.ledger(source)["items"]] == told
    assert told[0] < told[1]


def test_an_owner_sees_its_acts_with_their_reasons(
    owner: Person, source: str, invite: Callable[..., Person], service: Service
) -> None:
    partner = invite(source)
    owner.told("PUT", f"/sources/{source}/budget", {"epsilon": 12, "reason": "the study goes on"})
    allowance = {"epsilon": 1.5, "expires": "2100-01-01T00:00:00Z", "reason": REASON}
    owner.told("PUT", f"/sources/{source}/allowances/{partner.client.id}", allowance)
    with writing(service.engine) as session:
        row = session.get_one(Source, (owner.client.tenant_id, source))
        budgets.write_off(session, row, principal_id="operator", reason="an old backup was restored")
    raised, allowed, written_off = owner.ledger(source)["items"]
    assert (raised["kind"], raised["was"], raised["epsilon"]) == ("budget", 10, 12)
    assert (raised["principal"], raised["reason"]) == (owner.client.id, "the study goes on")
    assert (allowed["kind"], allowed["epsilon"], allowed["reason"]) == ("allowance", 1.5, REASON)
    assert (allowed["client"], allowed["expires"]) == (partner.client.id, "2100-01-01T00:00:00Z")
    assert allowed["client_name"] == f"partners/{name_of(service, partner)}"
    assert (written_off["kind"], written_off["principal"]) == ("write_off", "operator")
    assert written_off["principal_name"] is None and written_off["reason"] == "an old backup was restored"
    assert all(each["job"] is None and each["spent"] is None for each in (raised, allowed, written_off))


def test_everyone_else_sees_its_own_and_not_a_trace_of_others(
    owner: Person, source: str, rows: str, invite: Callable[..., Person], service: Service
) -> None:
    one, other = invite(source, rows), invite(source, rows, tenant="others")
    for person, bound in ((one, 1.5), (other, 2.5)):
        body = {"epsilon": bound, "reason": REASON}
        owner.told("PUT", f"/sources/{source}/allowances/{person.client.id}", body)
    owner.told("PUT", f"/sources/{source}/budget", {"epsilon": 12, "reason": REASON})
    theirs = [owner.train(owner.plan(rows), model="a"), other.train(owner.plan(rows, noise=5), model="b")]
    mine = one.train(owner.plan(rows), model="c")
    answer = one.ask("GET", f"/sources/{source}/ledger")
    page = answer.json()
    assert not page["is_of_all"]
    allowed, job = page["items"]
    assert (allowed["kind"], allowed["epsilon"], allowed["client"]) == ("allowance", 1.5, one.client.id)
    assert (job["job"], job["model"], job["dataset"]) == (mine, "c", "rows")
    assert all(each[name] is None for each in page["items"] for name in OWNERS)
    traces = [*theirs, owner.client.id, other.client.id, name_of(service, owner), name_of(service, other), REASON]
    assert not [trace for trace in traces if trace in answer.text]
    times = {each["time"] for each in owner.ledger(source)["items"]} - {each["time"] for each in page["items"]}
    assert len(times) == 4 and not [time for time in times if time in answer.text]
    assert job["spent"] == one.budget(source)["spent"] < owner.budget(source)["spent"]


def test_what_others_do_changes_nothing_that_one_is_told(
    owner: Person, source: str, rows: str, invite: Callable[..., Person]
) -> None:
    one = invite(source, rows)
    one.train(owner.plan(rows), model="a")
    before = one.ask("GET", f"/sources/{source}/ledger").content
    job = owner.train(owner.plan(rows), model="b")
    owner.told("POST", f"/jobs/{job}/cancel")
    owner.told("PUT", f"/sources/{source}/budget", {"epsilon": 11, "reason": REASON})
    assert one.ask("GET", f"/sources/{source}/ledger").content == before


def test_who_may_not_read_the_source_sees_no_ledger(
    http: TestClient,
    service: Service,
    owner: Person,
    source: str,
    rows: str,
    make_client: Callable[..., Any],
    bearer_of: Callable[[Any], Any],
) -> None:
    owner.train(owner.plan(rows))
    stranger, predictor, uploader = make_client("elsewhere"), make_client(role="predictor"), make_client(role="none")
    grant(service, owner.client.tenant_id, uploader, "dataset.create", on=source)

    def ask(client: Any, of: str) -> tuple[int, str]:
        answer = Person(http, client, bearer_of(client)).ask("GET", f"/sources/{of}/ledger")
        return answer.status_code, answer.json()["error"]

    nowhere = ask(stranger, "src_" + "0" * 32)
    assert nowhere[0] == 404
    assert ask(stranger, source) == ask(stranger, "people") == ask(predictor, source) == nowhere
    assert ask(uploader, source)[0] == 403


def test_a_job_is_one_line_however_many_chunks_and_attempts_it_took(
    owner: Person, source: str, rows: str, service: Service
) -> None:
    job = owner.train(owner.plan(rows))
    (reserved,) = owner.ledger(source)["items"]
    key = (owner.client.tenant_id, job)
    for attempt, firsts in ((1, (0, 3)), (2, (3, 6))):
        with writing(service.engine) as session:
            session.get_one(Job, key).attempt = attempt
        for first in firsts:
            with writing(service.engine) as session:
                budgets.open_chunk(session, tenant_id=key[0], job_id=job, attempt=attempt, first_step=first, steps=3)
    (running,) = owner.ledger(source)["items"]
    assert running == {**reserved, "steps_charged": 12}, "the recomputed steps are charged as well"
    with writing(service.engine) as session:
        budgets.settle(session, session.get_one(Job, key))
    assert owner.ledger(source)["items"] == [{**running, "is_settled": True}]


def test_a_job_that_never_ran_is_told_as_settled_for_nothing(owner: Person, source: str, rows: str) -> None:
    job = owner.train(owner.plan(rows))
    owner.told("POST", f"/jobs/{job}/cancel")
    (line,) = owner.ledger(source)["items"]
    assert (line["steps_reserved"], line["steps_charged"], line["is_settled"]) == (10, 0, True)
    assert line["spent"] > 0 == owner.budget(source)["spent"]


def test_a_job_on_two_blocks_is_a_line_in_each(owner: Person, source: str, rows: str) -> None:
    owner.told("POST", f"/sources/{source}/blocks", {"name": "day2", "reason": "a new day"})
    more = owner.dataset(source, "more", block="day2")
    owner.train(owner.plan(rows))
    job = owner.train(owner.plan(rows, more), model="both")
    opened, alone, *both = owner.ledger(source)["items"]
    assert (opened["kind"], opened["block"], opened["reason"]) == ("block", "day2", "a new day")
    assert [(each["job"], each["block"], each["dataset"]) for each in both] == [
        (job, "first", "rows"),
        (job, "day2", None),
    ]
    spent = {each["name"]: each["spent"] for each in owner.budget(source)["blocks"]}
    assert {each["block"]: each["spent"] for each in both} == spent
    assert alone["spent"] < spent["first"] and spent["day2"] < spent["first"]


def test_a_query_is_told_like_any_job(owner: Person, source: str, rows: str) -> None:
    asked = {"dataset": rows, "queries": [{"type": "count"}], "epsilon": 0.5}
    owner.told("POST", "/queries", {"query": asked})
    (line,) = owner.ledger(source)["items"]
    assert (line["kind"], line["model"], line["dataset"], line["steps_reserved"]) == ("query", None, "rows", 1)
    assert (line["charge"]["mechanism"], line["charge"]["epsilon"]) == ("discrete_laplace", 0.5)
    assert line["spent"] == owner.budget(source)["spent"]


def test_pages_hold_every_line_once(owner: Person, source: str, rows: str) -> None:
    plan = owner.plan(rows)
    for model in "abc":
        job = owner.train(plan, model=model)
        owner.told("POST", f"/jobs/{job}/cancel")  # a row between, of which no line begins
    owner.told("PUT", f"/sources/{source}/budget", {"epsilon": 11, "reason": "more"})
    whole, found, params = owner.ledger(source)["items"], [], {"limit": 2}
    while True:
        page = owner.ledger(source, **params)
        found.append(page["items"])
        if page["next"] is None:
            break
        params["cursor"] = page["next"]
    assert [len(each) for each in found] == [2, 2] and [*found[0], *found[1]] == whole
    assert [each["revision"] for each in whole] == sorted({each["revision"] for each in whole})


@pytest.mark.parametrize("cursor", ["x", "-1", "1.5", "\u0661", "9" * 19, "2026-01-01~src_1", "%00", ""])
def test_a_cursor_of_no_page_is_refused(owner: Person, source: str, cursor: str) -> None:
    assert owner.ask("GET", f"/sources/{source}/ledger?cursor={cursor}").status_code == 422


@pytest.mark.parametrize("limit", ["0", "201", "x"])
def test_a_page_has_from_1_to_200_lines(owner: Person, source: str, limit: str) -> None:
    assert owner.ask("GET", f"/sources/{source}/ledger?limit={limit}").status_code == 422


def test_a_client_that_is_no_more_keeps_its_line_and_loses_its_name(
    owner: Person, source: str, rows: str, invite: Callable[..., Person], service: Service
) -> None:
    partner = invite(source, rows, tenant="acme")
    partner.train(owner.plan(rows))
    operator = Principal.operator(owner.client.tenant_id, request_id="request-of-a-test")
    with writing(service.engine) as session:
        tenants.remove_client(session, service, operator, partner.client.id)
    (line,) = owner.ledger(source)["items"]
    assert (line["principal"], line["principal_name"]) == (partner.client.id, None)


def test_lines_from_before_balances_were_written_down_tell_the_same(
    owner: Person, source: str, rows: str, service: Service
) -> None:
    for model in "ab":
        owner.train(owner.plan(rows), model=model)
    old = owner.source("old")
    with writing(service.engine) as session:
        for row in session.scalars(select(LedgerEntry).where(LedgerEntry.source_id == source)).all():
            columns = {each.key: getattr(row, each.key) for each in LedgerEntry.__table__.columns}
            job_id = row.job_id and new_id("job")
            session.add(LedgerEntry(**{**columns, "source_id": old, "job_id": job_id}))
    told, before = owner.ledger(source)["items"], owner.ledger(old)["items"]
    assert [each["spent"] for each in before] == [each["spent"] for each in told]
    assert [(each["kind"], each["model"], each["epsilon"]) for each in before] == [("job", None, None)] * 2


def test_the_operator_sees_the_whole_ledger_of_its_tenant_alone(
    owner: Person, source: str, rows: str, service: Service
) -> None:
    owner.train(owner.plan(rows))

    def seen(tenant_id: str) -> Any:
        operator = Principal.operator(tenant_id, request_id="request-of-a-test")
        with reading(service.engine) as session:
            return spending.of_source(session, operator, source, cursor=None, limit=50)

    assert seen(owner.client.tenant_id).model_dump(mode="json") == owner.ledger(source)
    with pytest.raises(NotFound):
        seen("tn_" + "0" * 32)


EVENT = Event(
    mechanism="poisson_subsampled_gaussian", noise_multiplier=4, sampling_rate=0.1, steps=10, unit="row",
    adjacency="add_remove",
)  # fmt: skip


def test_either_database_tells_each_its_own(engine: Engine) -> None:
    here, source_id = new_id("tn"), new_id("src")
    own, one, other = (Principal(here, new_id("ap"), "app", "request-of-a-test") for _ in range(3))
    with writing(engine) as session:
        session.add(Tenant(id=here, name="here"))
        source = Source(
            tenant_id=here, id=source_id, name="people", unit="row", adjacency="add_remove", epsilon=10.0, delta=1e-5,
            public=False, owner_id=own.id,
        )  # fmt: skip
        session.add(source)
        session.flush()
        for principal, verb in ((own, "source.read"), (own, "source.own"), (one, "source.read")):
            session.add(
                Grant(
                    tenant_id=here, id=new_id("gr"), principal_id=principal.id, effect="allow", verb=verb,
                    resource_id=source_id,
                )
            )  # fmt: skip
        for principal in (one, other):
            given = {"to": principal.id, "epsilon": 5.0, "expires": None, "reason": REASON}
            budgets.allow(session, source, principal_id=own.id, **given)
            budgets.reserve(session, source, job_id=new_id("job"), principal_id=principal.id, event=EVENT, blocks=(0,))
    with reading(engine) as session:
        whole, its_own = (spending.of_source(session, each, source_id, cursor=None, limit=50) for each in (own, one))
        rest = spending.of_source(session, own, source_id, cursor="1", limit=2)
    assert [each.kind for each in whole.items] == ["allowance", "job"] * 2
    assert [each.principal for each in whole.items] == [own.id, one.id, own.id, other.id]
    assert [each.revision for each in its_own.items] == [each.revision for each in whole.items[:2]]
    assert rest.items == whole.items[1:3] and rest.next == str(whole.items[2].revision)
