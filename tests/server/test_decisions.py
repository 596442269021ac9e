"""One query defines a decision; snapshots and what is visible agree with it always; conditions are kept to; explanations are it."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from sqlalchemy import delete, event, select, text
from starlette.testclient import TestClient

from accounts import Person
from cloister_server import asking, explanations, grants, groups, people, policy, predict
from cloister_server.errors import Conflict, Forbidden, Invalid, NotFound, RateLimited, Unavailable
from cloister_server.policy import Allow, Deny
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store import decisions
from cloister_server.store.acting import ALL_TENANTS, for_principal
from cloister_server.store.conditions import Conditions, address_key, address_range
from cloister_server.store.queries import ANY, visible_to
from cloister_server.store.session import new_engine, reading, writing
from cloister_server.store.tables import AuditRow, Grant, Group, Member, Model, PolicyRevision, Tenant, new_id, now
from server.conftest import Client, MinuteClock
from server.test_policy import put, resource

HERE, THERE = "tn_" + "1" * 32, "tn_" + "2" * 32
APPS = {name: Principal(tenant, "ap_" + digit * 32, "app", "request-of-a-test") for name, tenant, digit in (
    ("ann", HERE, "1"), ("ben", HERE, "2"), ("eve", THERE, "3"),
)}  # fmt: skip
GROUPS = {"here": (HERE, "grp_" + "1" * 32), "there": (THERE, "grp_" + "2" * 32)}
ADDRESSES = (None, "10.1.2.3", "192.0.2.1", "2001:db8::1", "testclient")
NETWORKS = (None, "10.0.0.0/8", "192.0.2.1", "2001:db8::/32", "::/0")

GRANTS = st.fixed_dictionaries(
    {
        "tenant_id": st.sampled_from([HERE, THERE]),
        "holder": st.sampled_from([*APPS, *GROUPS]),
        "verb": st.sampled_from(["model.read", "model.predict"]),
        "resource": st.sampled_from(["one", "two", ANY]),
        "effect": st.sampled_from(["allow", "allow", "allow", "deny"]),
        "hours": st.sampled_from([None, None, -1, 1]),
        "network": st.sampled_from(NETWORKS),
        "outputs": st.sampled_from([None, None, "rounded", "labels"]),
        "requests_per_minute": st.sampled_from([None, 1, 10]),
        "max_epsilon": st.sampled_from([None, 0.5, 2.0]),
    }
)
MEMBERS = st.sets(st.sampled_from([("ann", "here"), ("ben", "here"), ("eve", "there")]))


def rows_of(
    given_grants: list[dict[str, Any]], members: set[tuple[str, str]], ids: dict[tuple[str, str], str]
) -> list[Any]:
    rows: list[Any] = [Member(tenant_id=GROUPS[group][0], group_id=GROUPS[group][1], principal_id=APPS[name].id)
                       for name, group in members]  # fmt: skip
    for each in given_grants:
        of = dict(each)
        holder, network, hours, name = of.pop("holder"), of.pop("network"), of.pop("hours"), of.pop("resource")
        first, last = (None, None) if network is None else address_range(network)
        rows.append(
            Grant(
                id=new_id("gr"),
                principal_id=APPS[holder].id if holder in APPS else GROUPS[holder][1],
                resource_id=ANY if name == ANY else ids[of["tenant_id"], name],
                expires=None if hours is None else now() + timedelta(hours=hours),
                address_first=first,
                address_last=last,
                **of,
            )
        )
    return rows


@pytest.fixture
def world(service: Service) -> Service:
    """Two tenants, a group in each, two models in each."""
    with writing(service.engine) as session:
        for tenant_id, group_id in GROUPS.values():
            session.add(Tenant(id=tenant_id, name=tenant_id))
            session.flush()
            session.add(Group(tenant_id=tenant_id, id=group_id, name="group"))
            session.add_all(resource(Model, tenant_id, name) for name in ("one", "two"))
    return service


def models_of(service: Service) -> dict[tuple[str, str], str]:
    with reading(service.engine) as session:
        return {(row.tenant_id, row.name): row.id for row in session.scalars(select(Model))}


def from_(principal: Principal, address: str | None) -> Principal:
    return Principal(principal.tenant_id, principal.id, "app", principal.request_id, address)


def suspend(session: Any, tenant_ids: set[str]) -> None:
    """These two of the world's tenants, and not the others."""
    for tenant in session.scalars(select(Tenant).where(Tenant.id.in_([HERE, THERE]))):
        tenant.suspended = now() if tenant.id in tenant_ids else None


_SUSPENDED = st.sets(st.sampled_from([HERE, THERE]), max_size=1) | st.just(set())
_POLICIES = st.lists(st.tuples(st.lists(GRANTS, max_size=8), MEMBERS, _SUSPENDED), min_size=1, max_size=2)


@settings(max_examples=10, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_POLICIES, st.sampled_from(ADDRESSES))
def test_snapshots_and_what_is_visible_agree_with_the_query(
    world: Service, policies: list[Any], address: str | None
) -> None:
    _always_agree(world, policies, (address,))


LONG_EXAMPLES = 30 if os.environ.get("SHORT") else 200


@pytest.mark.long
@settings(max_examples=LONG_EXAMPLES, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(_POLICIES)
def test_snapshots_and_what_is_visible_agree_with_the_query_for_long(world: Service, policies: list[Any]) -> None:
    _always_agree(world, policies, ADDRESSES)


def _always_agree(world: Service, policies: list[Any], addresses: tuple[str | None, ...]) -> None:
    ids = models_of(world)
    for (
        given_grants,
        members,
        suspended,
    ) in policies:  # each in place of the one before, whose snapshots are there still
        with writing(world.engine) as session:
            session.execute(delete(Grant))
            session.execute(delete(Member))
            session.add_all(rows_of(given_grants, members, ids))
            suspend(session, suspended)
        for principal in (from_(app, address) for app in APPS.values() for address in addresses):
            with reading(world.engine, ALL_TENANTS) as session, reading(world.engine, for_principal(principal)) as own:
                _agree(session, own, principal, ids)


def _agree(session: Any, own: Any, principal: Principal, ids: dict[tuple[str, str], str]) -> None:
    allowed = set()
    for (tenant_id, _), model_id in ids.items():
        for verb in ("model.read", "model.predict"):
            of = {"tenant_id": tenant_id, "resource_id": model_id}
            defined = decisions.decisive_by_query(session, principal, verb, **of)
            assert decisions.decisive(session, principal, verb, **of) == defined  # by a snapshot,
            assert decisions.decisive(session, principal, verb, **of) == defined  # from its memory,
            assert decisions.decisive_of(own, principal, verb, **of) == defined  # for an explanation,
            mine = decisions.decisive(own, principal, verb, **of)  # and as the principal's own request sees it,
            if defined is not None and defined.effect == "allow":
                assert mine == defined
                allowed.add(model_id)
            else:  # who shares nothing shows no denial either
                assert mine in (None, defined)
    assert {row.id for row in own.scalars(visible_to(principal, Model))} == allowed


def test_a_warm_decision_asks_for_the_revision_and_nothing_else(world: Service) -> None:
    model_id = models_of(world)[HERE, "one"]
    with writing(world.engine) as session:
        session.add(
            Grant(
                tenant_id=HERE, id="g", principal_id=APPS["ann"].id, effect="allow", verb="model.read", resource_id=ANY
            )
        )
    seen: list[str] = []
    event.listen(world.engine, "before_cursor_execute", lambda c, cu, sql, *_: seen.append(sql))
    of = {"tenant_id": HERE, "resource_id": model_id}
    with reading(world.engine, for_principal(APPS["ann"])) as session:
        assert policy.decide(session, APPS["ann"], "model.read", **of) == Allow("g")
        seen.clear()
        assert policy.decide(session, APPS["ann"], "model.read", **of) == Allow("g")
    assert seen == []  # the driver itself is asked for the revision


def test_a_change_of_grants_members_or_suspension_is_counted_by_the_database_itself(world: Service) -> None:
    def revision() -> int:
        with reading(world.engine) as session:
            row = session.get(PolicyRevision, (HERE,))
            return 0 if row is None else row.revision

    tenant, group = GROUPS["here"]
    counted = [revision()]
    for statement in (
        "INSERT INTO members (tenant_id, group_id, principal_id, created) VALUES (:tenant, :group, 'ap', '2026-01-01')",
        "UPDATE members SET created = '2026-01-02' WHERE tenant_id = :tenant",
        "DELETE FROM members WHERE tenant_id = :tenant",
        """INSERT INTO grants (tenant_id, id, principal_id, effect, verb, resource_id, created)
        VALUES (:tenant, 'g', 'ap', 'allow', 'v', '*', '2026-01-01')""",
        "UPDATE grants SET effect = 'deny' WHERE tenant_id = :tenant",
        "DELETE FROM grants WHERE tenant_id = :tenant",
        "UPDATE tenants SET suspended = '2026-01-01' WHERE id = :tenant",
        "UPDATE tenants SET suspended = NULL WHERE id = :tenant",
    ):
        with world.engine.begin() as connection:
            connection.execute(text(statement), {"tenant": tenant, "group": group})
        counted.append(revision())
    assert sorted(set(counted)) == counted


def test_a_warm_decision_knows_of_a_suspension_that_another_process_committed(
    service: Service, make_client: Callable[..., Client]
) -> None:
    client, elsewhere = make_client(), new_engine(service.engine.url.render_as_string(hide_password=False))
    model = put(service, Model, client.tenant_id)
    operator = Principal.operator(client.tenant_id, request_id="request-of-a-test")
    of = {"tenant_id": client.tenant_id, "resource_id": model.id}

    def told() -> tuple[bool, str]:
        with reading(service.engine, for_principal(client.principal)) as session:
            allowed = isinstance(policy.decide(session, client.principal, "model.read", **of), Allow)
        with reading(service.engine) as session:
            asked = {"who": client.id, "verb": "model.read", "resource": model.id}
            why = explanations.explain(session, operator, **asked)
        assert why.allowed == allowed
        return allowed, why.reason

    assert [told()[0] for _ in range(2)] == [True, True]
    for suspended in (now(), None):
        with writing(elsewhere) as session:
            session.get_one(Tenant, client.tenant_id).suspended = suspended
        allowed, reason = told()
        assert allowed == (suspended is None) and ("suspended" in reason) != allowed
    elsewhere.dispose()


def test_what_was_changed_and_not_committed_is_decided_upon_there_and_nowhere_else(world: Service) -> None:
    ann, of = APPS["ann"], {"tenant_id": HERE, "resource_id": models_of(world)[HERE, "one"]}
    given = {"tenant_id": HERE, "principal_id": ann.id, "effect": "allow", "verb": "model.read", "resource_id": ANY}
    with pytest.raises(RuntimeError), writing(world.engine, for_principal(ann)) as session:
        session.add(Grant(id="g", **given))
        assert isinstance(policy.decide(session, ann, "model.read", **of), Allow)
        raise RuntimeError("undone")
    with reading(world.engine, for_principal(ann)) as session:
        assert isinstance(policy.decide(session, ann, "model.read", **of), Deny)


def test_a_member_may_what_the_group_may_until_it_is_taken_out(
    service: Service, make_client: Callable[..., Client]
) -> None:
    one, other = make_client(role="none"), make_client(role="none")
    operator = Principal.operator(one.tenant_id, request_id="request-of-a-test")
    model = put(service, Model, one.tenant_id)
    of = {"tenant_id": one.tenant_id, "resource_id": model.id}

    def may(client: Client) -> bool:
        with reading(service.engine, for_principal(client.principal)) as session:
            return isinstance(policy.decide(session, client.principal, "model.predict", **of), Allow)

    with writing(service.engine) as session:
        groups.create(session, operator, name="partners")
        session.flush()
        grants.add(session, operator, to="partners", verb="model.predict", resource_id=model.name)
        assert list(groups.add(session, operator, "partners", one.id).members) == [one.id]
        groups.add(session, operator, "partners", one.id)  # it is in it already
        with pytest.raises(Conflict):
            groups.create(session, operator, name="partners")
        with pytest.raises(Invalid):
            groups.create(session, operator, name="no name")
    assert (may(one), may(other)) == (True, False)
    with writing(service.engine) as session:
        assert groups.remove(session, operator, "partners", one.id).members == {}
        with pytest.raises(NotFound):
            groups.remove(session, operator, "partners", one.id)
    assert not may(one)
    with writing(service.engine) as session:
        groups.add(session, operator, "partners", other.id)
    assert may(other)
    with writing(service.engine) as session:
        groups.delete(session, operator, "partners")
        assert session.scalars(select(Member)).all() == []
    assert not may(other)
    with writing(service.engine) as session, pytest.raises(NotFound):
        groups.add(session, operator, "partners", other.id)


def test_a_group_is_of_its_own_tenants_clients_and_may_be_granted_to_by_another(
    service: Service, make_client: Callable[..., Client]
) -> None:
    mine, theirs = make_client(role="none"), make_client("globex", role="none")
    here, there = (Principal.operator(each.tenant_id, request_id="request-of-a-test") for each in (mine, theirs))
    model = put(service, Model, mine.tenant_id)
    with writing(service.engine) as session:
        groups.create(session, here, name="partners")
        groups.create(session, there, name="team")
        session.flush()
        with pytest.raises(Invalid, match="own tenant"):
            groups.add(session, here, "partners", theirs.id)
        groups.add(session, there, "team", theirs.id)
        grants.add(session, here, to="globex/team", verb="model.predict", resource_id=model.name)
    with reading(service.engine, for_principal(theirs.principal)) as session:
        assert policy.find(session, theirs.principal, "model.predict", Model, model.id).resource.id == model.id
    with reading(service.engine) as session:
        told = explanations.who_can(session, here, verb="model.predict", resource=model.name)
    assert [(each.principal, each.grant.to_name) for each in told.holders] == [(theirs.id, "globex/team")]


def test_people_are_in_groups_and_explained_as_apps_are(service: Service, make_client: Callable[..., Client]) -> None:
    client = make_client(role="none")
    operator = Principal.operator(client.tenant_id, request_id="request-of-a-test")
    model = put(service, Model, client.tenant_id, "fraud")
    with writing(service.engine) as session:
        ann = people.create(session, service, operator, name="ann", role="none").user_id
        group = groups.create(session, operator, name="analysts")
        for taken in ("ann", "analysts"):
            with pytest.raises(Conflict):
                groups.create(session, operator, name=taken)
            with pytest.raises(Conflict):
                people.create(session, service, operator, name=taken, role="none")
        assert groups.add(session, operator, "analysts", "ann").members == {ann: "ann"}
        grants.add(session, operator, to="analysts", verb="model.predict", resource_id="fraud")
    who, of = (
        Principal(client.tenant_id, ann, "user", "request-of-a-test"),
        {"verb": "model.predict", "resource": "fraud"},
    )
    with reading(service.engine, for_principal(who)) as session:
        assert policy.find(session, who, "model.predict", Model, model.id).resource.id == model.id
    with reading(service.engine) as session:
        told = explanations.explain(session, operator, who="ann", **of)
        assert told.allowed and told.grant is not None and told.grant.to_name == "analysts"
        holders = explanations.who_can(session, operator, **of).holders
        assert [(each.principal, each.name) for each in holders] == [(ann, "ann")]
    with writing(service.engine) as session:
        people.remove(session, service, operator, "ann")
        assert session.scalars(select(Member).where(Member.group_id == group.id)).all() == []
    with reading(service.engine, for_principal(who)) as session, pytest.raises(NotFound):
        policy.find(session, who, "model.predict", Model, model.id)


def test_a_grant_from_a_network_counts_for_requests_from_there(world: Service) -> None:
    model_id = models_of(world)[HERE, "one"]
    given = {"tenant_id": HERE, "holder": "ann", "verb": "model.read", "resource": "one", "hours": None}
    allow = {**given, "effect": "allow", "network": "10.0.0.0/8"}
    deny = {**given, "effect": "deny", "network": "10.9.0.0/16"}
    with writing(world.engine) as session:
        session.add_all(rows_of([allow, deny], set(), {(HERE, "one"): model_id}))
    of = {"tenant_id": HERE, "resource_id": model_id}
    for address, may in (
        ("10.1.2.3", True),
        ("::ffff:10.1.2.3", True),
        ("10.9.1.1", False),
        ("11.0.0.1", False),
        (None, False),
    ):
        with reading(world.engine) as session:
            decision = policy.decide(session, from_(APPS["ann"], address), "model.read", **of)
        assert isinstance(decision, Allow) == may, address


@pytest.mark.parametrize(
    ("address", "network", "is_in"),
    [
        ("10.255.255.255", "10.0.0.0/8", True), ("11.0.0.0", "10.0.0.0/8", False), ("9.255.255.255", "10.0.0.0/8", False),
        ("2001:db8::ffff", "2001:db8::/64", True), ("2001:db8:0:1::", "2001:db8::/64", False), ("10.0.0.1", "::/96", False),
        ("10.0.0.1", "10.0.0.1", True), ("0.0.0.1", "0.0.0.0/0", True), ("255.255.255.255", "0.0.0.0/0", True),
        ("::1", "0.0.0.0/0", False),
    ],
)  # fmt: skip
def test_an_address_is_in_a_network_as_numbers_compare(address: str, network: str, is_in: bool) -> None:
    first, last = address_range(network)
    key = address_key(address)
    assert key is not None and (first <= key <= last) == is_in


def test_the_api_knows_where_a_request_comes_from(
    service: Service, make_client: Callable[..., Client], bearer_of: Callable[[Client], dict[str, str]]
) -> None:
    from cloister_server.app import create_app

    client = make_client(role="none")
    operator = Principal.operator(client.tenant_id, request_id="request-of-a-test")
    with writing(service.engine) as session:
        grants.add(session, operator, to=client.id, verb="model.read", resource_id=ANY, network="192.0.2.0/24")
    model, headers = put(service, Model, client.tenant_id), bearer_of(client)
    for address, status in (("192.0.2.7", 200), ("198.51.100.7", 404)):
        http = TestClient(create_app(service), client=(address, 1), base_url=service.settings.issuer)
        assert http.get(f"/v1/models/{model.id}", headers=headers).status_code == status, address
    with reading(service.engine) as session:
        (row,) = session.scalars(select(AuditRow).where(AuditRow.outcome != "allowed"))
    assert (row.principal_id, row.verb, row.resource_id) == (client.id, "model.read", model.id)


def test_a_job_of_more_epsilon_than_the_grant_allows_is_refused_as_plan_and_as_job(
    service: Service,
    http: TestClient,
    make_client: Callable[..., Client],
    bearer_of: Callable[[Client], dict[str, str]],
) -> None:
    owner, partner = make_client(), make_client(role="none")
    ann, ben = Person(http, owner, bearer_of(owner)), Person(http, partner, bearer_of(partner))
    dataset = ann.dataset(ann.source())
    operator = Principal.operator(owner.tenant_id, request_id="request-of-a-test")
    large, small = ann.plan(dataset, noise=2.0), ann.plan(dataset, noise=8.0)
    most = (large["epsilon"] + small["epsilon"]) / 2
    with writing(service.engine) as session:
        bound = Conditions(max_epsilon=most)
        given = grants.add(
            session, operator, to=partner.id, verb="dataset.train", resource_id=dataset, conditions=bound
        )
    refused = ben.ask(
        "POST", "/plans", {"dataset": dataset, "target": "y", "privacy": {"noise_multiplier": 2.0}, "batch_size": 100}
    )
    assert refused.status_code == 403 and refused.json()["details"] == {"max_epsilon": most}, refused.text
    assert ben.start(large).status_code == 403
    assert ben.start(small).status_code == 201
    asked = {"dataset": dataset, "queries": [{"type": "count"}], "epsilon": most + 1}
    assert ben.ask("POST", "/queries/price", asked).status_code == 403
    with reading(service.engine) as session:
        reasons = [row.outcome for row in session.scalars(select(AuditRow).where(AuditRow.principal_id == partner.id))]
    assert sum(f"grant {given.id} allows epsilon {most:g} at most" in each for each in reasons) == 3
    with writing(service.engine) as session:  # an unbound grant beside it decides instead
        grants.add(session, operator, to=partner.id, verb="dataset.train", resource_id=dataset)
    assert ben.plan(dataset, noise=2.0)["epsilon"] == large["epsilon"]


def let_ann_read(world: Service, model_id: str, *, per_minute: int) -> None:
    given = {
        "tenant_id": HERE,
        "holder": "ann",
        "verb": "model.read",
        "resource": "one",
        "hours": None,
        "network": None,
    }
    bound = {**given, "effect": "allow", "requests_per_minute": per_minute}
    with writing(world.engine) as session:
        session.add_all(rows_of([bound], set(), {(HERE, "one"): model_id}))


def test_a_request_that_asks_a_key_provider_and_so_runs_again_is_counted_once(
    world: Service, clock: MinuteClock
) -> None:
    ann, model_id = APPS["ann"], models_of(world)[HERE, "one"]
    let_ann_read(world, model_id, per_minute=2)
    runs = []

    def work(session: Any) -> Any:
        runs.append(policy.find(session, ann, "model.read", Model, model_id))
        return asking.answered(session, Nonce(len(requests)))

    requests: list[Any] = []
    for number in (1, 2):
        requests.append(world.read(for_principal(ann), work))
        assert len(runs) == 2 * number, "it ran twice"
    with pytest.raises(RateLimited):
        world.read(for_principal(ann), work)


@dataclass(frozen=True)
class Nonce:
    """Something that a provider is asked for."""

    number: int

    def ask(self, _: Any) -> int:
        return self.number


def test_outputs_are_bounded_to_labels_or_two_digits() -> None:
    outputs = {"probabilities": np.array([[0.12345, 0.87655, 1e-7]], dtype=np.float32), "index": np.array([1])}
    assert predict.bounded(outputs, None).keys() == outputs.keys()
    assert predict.bounded(outputs, "labels").keys() == {"index"}
    rounded = predict.bounded(outputs, "rounded")
    assert rounded["probabilities"].tolist() == [[np.float32(0.12), np.float32(0.88), np.float32(1e-7)]]
    assert rounded["index"] is outputs["index"] and rounded["probabilities"].dtype == np.float32
    figures = {"value": np.array([-1234.5, 0.0, 0.0], dtype=np.float32)}
    assert predict.bounded(figures, "rounded")["value"].tolist() == [-1200.0, 0.0, 0.0]
    with pytest.raises(Forbidden, match="labels alone"):
        predict.bounded(figures, "labels")
    with pytest.raises(Forbidden):
        predict.bounded(figures, "something newer")


def test_a_condition_that_nothing_would_keep_to_is_refused(
    service: Service, make_client: Callable[..., Client]
) -> None:
    client = make_client()
    operator = Principal.operator(client.tenant_id, request_id="request-of-a-test")
    refused: list[dict[str, Any]] = [
        {"verb": "model.predict", "conditions": Conditions(max_epsilon=1.0)},
        {"verb": "dataset.train", "conditions": Conditions(max_epsilon=0.0)},
        {"verb": "dataset.train", "conditions": Conditions(outputs="labels")},
        {"verb": "model.predict", "conditions": Conditions(outputs="some")},
        {"verb": "model.predict", "conditions": Conditions(requests_per_minute=0)},
        {"verb": "model.predict", "conditions": Conditions(requests_per_minute=1), "effect": "deny"},
        {"verb": "model.predict", "network": "10.0.0.1/8"},
        {"verb": "model.predict", "network": "nowhere"},
        {"verb": "model.predict", "expires": now() - timedelta(seconds=1)},
        {"verb": "model.predict", "expires": now() - timedelta(seconds=1), "effect": "deny"},
    ]
    with writing(service.engine) as session:
        for each in refused:
            with pytest.raises(Invalid):
                grants.add(session, operator, to=client.id, resource_id=ANY, **each)


@pytest.fixture
def explained(service: Service, make_client: Callable[..., Client]) -> Iterator[tuple[Service, Client, Client, Any]]:
    steward, partner = make_client(), make_client(role="none")
    yield service, steward, partner, put(service, Model, steward.tenant_id, "fraud")


def test_an_explanation_is_the_decision_with_the_grants_behind_it(
    explained: Any, http: TestClient, bearer_of: Callable[[Client], dict[str, str]]
) -> None:
    service, steward, partner, model = explained
    operator = Principal.operator(steward.tenant_id, request_id="request-of-a-test")

    def told(**asked: Any) -> dict[str, Any]:
        params = {"principal": partner.id, "verb": "model.predict", "resource": "fraud"} | asked
        answer = http.get("/v1/policy/explain", params=params, headers=bearer_of(steward))
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    assert (told()["allowed"], told()["grant"]) == (False, None)
    with writing(service.engine) as session:
        wide = grants.add(session, operator, to=partner.id, verb="model.predict", resource_id=ANY, network="10.0.0.0/8")
        old = grants.add(session, operator, to=partner.id, verb="model.predict", resource_id=model.id)
        old.expires = now() - timedelta(days=1)
    answer = told(address="10.0.0.1")
    assert (
        answer["allowed"] and answer["grant"]["id"] == wide.id and answer["grant"]["last_address"] == "10.255.255.255"
    )
    assert [each["id"] for each in answer["others"]] == [old.id]
    assert not told()["allowed"]
    with writing(service.engine) as session:
        denial = grants.add(session, operator, to=partner.id, verb="model.predict", resource_id=model.id, effect="deny")
    answer = told(address="10.0.0.1")
    assert (answer["allowed"], answer["grant"]["id"]) == (False, denial.id) and "denies" in answer["reason"]
    for wrong, status in (
        ({"principal": "nobody"}, 404), ({"principal": new_id("ap")}, 404), ({"resource": "nothing"}, 404),
        ({"verb": "model.fly"}, 422), ({"address": "nowhere"}, 422),
    ):  # fmt: skip
        params = {"principal": partner.id, "verb": "model.predict", "resource": "fraud"} | wrong
        assert http.get("/v1/policy/explain", params=params, headers=bearer_of(steward)).status_code == status, wrong


def test_who_can_names_all_whose_decision_is_yes(
    explained: Any, http: TestClient, bearer_of: Callable[[Client], dict[str, str]], make_client: Callable[..., Client]
) -> None:
    service, steward, partner, model = explained
    denied, elsewhere = make_client(role="predictor"), make_client("globex", role="steward")
    operator = Principal.operator(steward.tenant_id, request_id="request-of-a-test")
    with writing(service.engine) as session:
        grants.add(session, operator, to=partner.id, verb="model.predict", resource_id=model.id, network="10.0.0.0/8")
        grants.add(session, operator, to=denied.id, verb="model.predict", resource_id=model.id, effect="deny")
        grants.add(session, operator, to=elsewhere.id, verb="model.predict", resource_id=model.id)
    params = {"verb": "model.predict", "resource": "fraud"}
    answer = http.get("/v1/policy/who-can", params=params, headers=bearer_of(steward)).json()
    assert {each["principal"] for each in answer["holders"]} == {steward.id, partner.id, elsewhere.id}
    assert {each["name"].partition("/")[0] for each in answer["holders"] if each["principal"] == elsewhere.id} == {
        "globex"
    }


def test_policy_is_told_to_whom_it_is_granted_to_read_and_when_the_store_can_be_asked(
    explained: Any, http: TestClient, bearer_of: Callable[[Client], dict[str, str]], monkeypatch: pytest.MonkeyPatch
) -> None:
    _, steward, partner, _ = explained
    paths = (
        "/v1/policy/who-can?verb=model.read&resource=fraud",
        f"/v1/policy/explain?principal={partner.id}&verb=model.read&resource=*",
    )
    for path in paths:
        assert http.get(path, headers=bearer_of(steward)).status_code == 200
        assert http.get(path, headers=bearer_of(partner)).status_code == 403

    def away(*_: Any, **__: Any) -> Any:
        raise Unavailable("gone")

    monkeypatch.setattr(policy, "decisive", away)
    for path in paths:
        assert http.get(path, headers=bearer_of(steward)).status_code == 503


def test_explanations_of_another_tenants_clients_are_of_those_with_grants_here(
    explained: Any, make_client: Callable[..., Client]
) -> None:
    service, steward, _, _ = explained
    elsewhere = make_client("globex")
    asked = {"verb": "model.read", "resource": "fraud"}
    with reading(service.engine, for_principal(steward.principal)) as session:
        for who in (elsewhere.id, new_id("ap")):
            with pytest.raises(NotFound) as refusal:
                explanations.explain(session, steward.principal, who=who, **asked)
            assert str(refusal.value) == str(NotFound("client or user"))
