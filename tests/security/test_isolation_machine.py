"""No tenant sees, changes or learns of another's: a machine that asks every route about everything, held against an oracle of sets."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Iterator
from random import Random
from typing import Any

import pytest
from httpx2 import Client
from hypothesis import HealthCheck, Phase, seed, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    get_state_machine_test,
    initialize,
    invariant,
    precondition,
    rule,
)

from accounts import COLUMNS
from cloister_server.app import create_app
from cloister_server.service import Service
from direct import direct
from security.isolation_oracle import ANY, VERBS, Row, Who
from security.isolation_questions import ask_of_a_token, ask_why, look
from security.isolation_routes import ABOUT, CREATING, ELSEWHERE, LISTS, PREDICT, PREFIX, Route
from security.isolation_world import World, told
from server.test_predict import weights  # noqa: F401 (fixture)

SHORT = bool(os.environ.get("SHORT"))
STEPS = int(os.environ.get("ISOLATION_STEPS", "300" if SHORT else "100000"))
PARTS = 1 if SHORT else 4
"""A long run is made in parts, which may run side by side (`-n`)."""
ENOUGH = 20_000
"""Steps after which every route was asked across tenants, by whom it is allowed and by whom it is not."""
STEPS_OF_ONE = 200
"""Of one world; then another is made beside it."""

N = st.integers(0, 2**16)
BY_KIND = {kind: [route for route in (*ABOUT, *PREDICT) if route.kind == kind] for kind in PREFIX}
TALLY: Counter[str] = Counter()


class Isolation(RuleBasedStateMachine):
    """Each step is somebody's request, or an operator's act. What must come of it is the oracle's to say."""

    make_world: Callable[[], World]

    @initialize(tenants=st.integers(2, 5), dice=N)
    def begin(self, tenants: int, dice: int) -> None:
        self.dice = Random(dice)
        self.world = self.make_world()
        self.keyed: list[tuple[Who, str, str, Any]] = []
        for _ in range(tenants):
            self.world.add_tenant()

    @invariant()
    def somebody_asks_something(self) -> None:
        """After each step, by dice: Hypothesis leaves out some of the rules for the length of a world."""
        oracle, dice = self.world.oracle, self.dice
        who, route = dice.choice(oracle.people), dice.choice((*ABOUT, *PREDICT))
        rows, fate = oracle.of(route.kind), dice.random()
        shared = [row for row in rows if row.tenant != who.tenant and oracle.sees(who, row)]
        row = dice.choice(shared if shared and dice.random() < 0.5 else rows)
        if fate < 0.2 and not who.is_gone:
            self.world.give(row.tenant, who.id, route.verb, row.id, allows=True, is_over=False)
        elif fate < 0.3 and (given := [each for each in oracle.permits if each.id and each.on == row.id]):
            dice.choice((self.world.withdraw, self.world.expire))(dice.choice(given))
        by = "name" if row.name and not route.place and dice.random() < 0.2 else ""
        self.world.ask(who, route, row, by=by)
        TALLY["steps"] += 1

    def who(self, number: int) -> Who:
        people = self.world.oracle.people
        return people[number % len(people)]

    def row(self, kind: str, number: int) -> Row:
        rows = self.world.oracle.of(kind)
        return rows[number % len(rows)]

    def tenant(self, number: int) -> str:
        return list(self.world.oracle.suspended)[number % len(self.world.oracle.suspended)]

    @rule(who=N, what=st.sampled_from((*ABOUT, *PREDICT)), which=N, by_name=st.booleans())
    def ask(self, who: int, what: Route, which: int, by_name: bool) -> None:
        row = self.row(what.kind, which)
        by = "name" if by_name and row.name and not what.place else ""
        self.world.ask(self.who(who), what, row, by=by)

    @rule(who=N, what=st.sampled_from(CREATING))
    def make(self, who: int, what: Any) -> None:
        self.world.make(self.who(who), what)

    @rule(who=N, kind=st.sampled_from(sorted(LISTS)), limit=st.sampled_from([1, 2, 200]))
    def look_at_a_list(self, who: int, kind: str, limit: int) -> None:
        look(self.world, self.who(who), kind, limit=limit)

    @rule(who=N, other=N, kind=st.sampled_from(sorted(LISTS)))
    def go_on_from_anothers_page(self, who: int, other: int, kind: str) -> None:
        whose, others = self.who(who), self.who(other)
        if not (self.world.oracle.is_let_in(whose) and self.world.oracle.is_let_in(others)):
            return
        cursor = self.world.send(others, "GET", LISTS[kind], params={"limit": 1}).json()["next"]
        if cursor is None:
            return
        all_of, found = self.world.listed(whose, kind), self.world.listed(whose, kind, cursor=cursor)
        assert found == all_of[len(all_of) - len(found) :], (whose, others, cursor)
        TALLY[f"GET {LISTS[kind]}: another's cursor"] += 1

    @rule(who=N, key=st.sampled_from(["k1", "k2"]), name=st.sampled_from(["a", "b"]))
    def make_with_a_key(self, who: int, key: str, name: str) -> None:
        """Whoever used a key gets its own answer again; to everybody else the key is fresh."""
        whose, oracle = self.who(who), self.world.oracle
        body = {"name": f"keyed-{key}", "epsilon": 900.0, "delta": 1e-6 if name == "a" else 1e-7}
        answer = self.world.send(whose, "POST", "/v1/sources", json=body, headers={"Idempotency-Key": key})
        before = [given for by, used, sent, given in self.keyed if (by.id, used, sent) == (whose.id, key, name)]
        was_used = any((by.id, used) == (whose.id, key) for by, used, *_ in self.keyed)
        if not oracle.is_let_in(whose):
            assert answer.status_code == 401
        elif was_used:
            assert (answer.status_code, answer.json()) == (201, before[0]) if before else answer.status_code == 422
        else:
            is_taken = oracle.named(whose, "source", body["name"]) is not None
            may = oracle.may(whose, "source.create", oracle.tenant(whose.tenant))
            assert answer.status_code == (403 if not may else 409 if is_taken else 201), answer.text
            if answer.status_code == 201:
                oracle.made(whose, Row("source", whose.tenant, answer.json()["id"], body["name"]))
                self.keyed.append((whose, key, name, answer.json()))
        assert ("idempotency-replayed" in answer.headers) == (answer.status_code == 201 and was_used)
        TALLY["POST /v1/sources: with a key"] += 1

    @rule(who=N, about=N, which=N, verb=st.sampled_from(sorted(v for k in PREFIX for v in VERBS[k])))
    def ask_for_a_reason(self, who: int, about: int, which: int, verb: str) -> None:
        row = self.row(next(kind for kind in PREFIX if verb in VERBS[kind]), which)
        ask_why(self.world, self.who(who), self.who(about), verb, row)

    @rule(who=N, other=N)
    def ask_of_a_token(self, who: int, other: int) -> None:
        whose, others = self.who(who), self.who(other)
        if whose.secret and others.tenant != whose.tenant:
            ask_of_a_token(self.world, whose, others)

    # What operators do.

    @rule(which=N, kind=st.sampled_from([*PREFIX, "tenant"]), to=N, of_group=st.booleans(), verb=N, is_any=st.booleans(),
          allows=st.sampled_from([True, True, True, False]), is_over=st.sampled_from([False, False, False, True]))  # fmt: skip
    def give(
        self, which: int, kind: str, to: int, of_group: bool, verb: int, is_any: bool, allows: bool, is_over: bool
    ) -> None:
        oracle, verbs = self.world.oracle, VERBS[kind]
        row = oracle.tenant(self.tenant(which)) if kind == "tenant" else self.row(kind, which)
        holders = list(oracle.groups) if of_group else [each.id for each in oracle.people if not each.is_gone]
        if holders:
            holder = holders[to % len(holders)]
            on = ANY if is_any else row.id
            self.world.give(row.tenant, holder, verbs[verb % len(verbs)], on, allows=allows, is_over=is_over)
            self._look_again(kind, holder, row)

    @rule(which=N)
    def withdraw(self, which: int) -> None:
        given = [each for each in self.world.oracle.permits if each.id]
        if given:
            permit = given[which % len(given)]
            self.world.withdraw(permit)
            self._look_at(permit.on, permit.holder)

    @rule(which=N)
    def expire(self, which: int) -> None:
        given = [each for each in self.world.oracle.permits if each.id and not each.is_over]
        if given:
            permit = given[which % len(given)]
            self.world.expire(permit)
            self._look_at(permit.on, permit.holder)

    def _look_at(self, on: str, holder: str) -> None:
        row = self.world.oracle.rows.get(on)
        if row is not None:
            self._look_again(row.kind, holder, row)

    def _look_again(self, kind: str, holder: str, row: Row) -> None:
        """What was granted or withdrawn counts for the very next request of whoever holds it."""
        _, members = self.world.oracle.groups.get(holder, ("", {holder}))
        for who in self.world.oracle.people:
            if who.id in members and kind != "tenant":
                self.world.ask(who, BY_KIND[kind][0], row)

    @rule(tenant=N)
    def add_a_group(self, tenant: int) -> None:
        self.world.add_group(self.tenant(tenant))

    @precondition(lambda self: self.world.oracle.groups)
    @rule(which=N, who=N, is_in=st.booleans())
    def change_a_group(self, which: int, who: int, is_in: bool) -> None:
        group = sorted(self.world.oracle.groups, key=list(self.world.oracle.groups).index)[
            which % len(self.world.oracle.groups)
        ]
        tenant, members = self.world.oracle.groups[group]
        own = [each for each in self.world.oracle.people if each.tenant == tenant and not each.is_gone]
        if is_in and own:
            self.world.put_in(group, own[who % len(own)])
        elif not is_in and members:
            self.world.take_out(group, next(each.id for each in self.world.oracle.people if each.id in members))

    @precondition(lambda self: len(self.world.oracle.groups) > 2)
    @rule(which=N)
    def delete_a_group(self, which: int) -> None:
        self.world.delete_group(list(self.world.oracle.groups)[which % len(self.world.oracle.groups)])

    @rule(tenant=N)
    def suspend(self, tenant: int) -> None:
        if not any(self.world.oracle.suspended.values()):
            self.world.suspend(self.tenant(tenant), is_suspended=True)

    @precondition(lambda self: any(self.world.oracle.suspended.values()))
    @rule()
    def resume(self) -> None:
        suspended = [each for each, is_so in self.world.oracle.suspended.items() if is_so]
        self.world.suspend(suspended[0], is_suspended=False)

    @rule(who=N)
    def remove_somebody(self, who: int) -> None:
        """One of a tenant's at most, and never all of it."""
        whose = self.who(who)
        others = [each for each in self.world.oracle.people if each.tenant == whose.tenant]
        if whose.name != "steward" and not any(each.is_gone for each in others):
            self.world.remove(whose)

    @rule(who=N, path=st.sampled_from(sorted(each for each in ELSEWHERE if ELSEWHERE[each] == "nobody's")))
    def ask_what_is_nobodys(self, who: int, path: str) -> None:
        method, path = path.split()
        answer, anonymous = self.world.send(self.who(who), method, path), self.world.http.request(method, path)
        assert told(answer) == told(anonymous) and answer.status_code == 200
        assert not any(each in answer.text for each in self.world.oracle.owners())
        TALLY[f"{method} {path}: asked"] += 1

    def teardown(self) -> None:
        if hasattr(self, "world"):
            self.world.elsewhere.update(self.world.oracle.owners())


@pytest.fixture
def http(service: Service) -> Iterator[Client]:
    with direct(create_app(service)) as client:
        yield client


@pytest.fixture
def training(http: Client, make_client: Callable[..., Any], bearer_of: Any) -> dict[str, Any]:
    """A whole specification of a run on a dataset such as every tenant has."""
    bearer = bearer_of(make_client("planner"))
    source = {"name": "people", "epsilon": 900.0, "delta": 1e-6}
    made = http.post("/v1/sources", json=source, headers=bearer).json()["id"]
    declared = {"source": made, "name": "rows", "columns": COLUMNS, "nominal_size": 1000, "capacity": 2000}
    dataset = http.post("/v1/datasets", json=declared, headers=bearer).json()["id"]
    asked = {"dataset": dataset, "target": "y", "privacy": {"noise_multiplier": 4.0}, "batch_size": 100, "epochs": 1}
    plan = http.post("/v1/plans", json=asked, headers=bearer)
    assert plan.status_code == 200, plan.text
    return dict(plan.json()["training"])


@pytest.fixture
def make_world(service: Service, http: Client, weights: bytes, training: dict[str, Any]) -> Callable[[], World]:  # noqa: F811 (the fixture)
    elsewhere: set[str] = set()
    given = {"weights": weights, "training": training, "tally": TALLY, "elsewhere": elsewhere}
    return lambda: World(service, http, **given)


def _run(make_world: Callable[[], World], steps: int, most: int, *phases: Phase, drawn_by: int = 0) -> None:
    machine = type("Isolation", (Isolation,), {"make_world": staticmethod(make_world)})
    test = get_state_machine_test(
        machine,
        settings=settings(
            max_examples=-(-steps // most), stateful_step_count=most, database=None, deadline=None,
            suppress_health_check=list(HealthCheck), phases=(Phase.generate, *phases),
        ),
    )  # fmt: skip
    seed(drawn_by)(test)()


def test_no_tenant_sees_changes_or_learns_of_anothers(make_world: Callable[[], World]) -> None:
    _run(make_world, 16, 8)


@pytest.mark.long
@pytest.mark.parametrize("part", range(PARTS))
def test_no_tenant_sees_changes_or_learns_of_anothers_for_long(make_world: Callable[[], World], part: int) -> None:
    TALLY.clear()
    steps = -(-STEPS // PARTS)
    drawn_by = part
    while (left := steps - TALLY["steps"]) > 0:  # the first world is Hypothesis's smallest, and others end early
        _run(make_world, left + STEPS_OF_ONE, STEPS_OF_ONE, Phase.shrink, drawn_by=drawn_by)
        drawn_by += PARTS
    for route in (*ABOUT, *PREDICT) if steps >= ENOUGH else ():
        for outcome in ("not there across tenants", "allowed across tenants"):
            assert TALLY[f"{route.name}: {outcome}"], f"{route.name} was never {outcome}"
