"""Each of the three gates alone keeps every route from another tenant: `visible_to`, the ORM's filter, and row security."""

from __future__ import annotations

from collections.abc import Callable

import pytest

from cloister_server.service import Service
from security.isolation_oracle import VERBS, Row, Who
from security.isolation_questions import ask_of_a_token, ask_why, look
from security.isolation_routes import ABOUT, CREATING, LISTS, PREDICT, PREFIX, Route
from security.isolation_world import World
from security.test_isolation_machine import http, make_world, training  # noqa: F401 (fixtures)
from server.test_isolation import left_alone
from server.test_predict import weights  # noqa: F401 (fixture)

ROUTES = sorted((*ABOUT, *PREDICT), key=lambda route: route.method == "DELETE")
"""What deletes comes last: without a gate it does."""


@pytest.fixture
def world(make_world: Callable[[], World]) -> World:  # noqa: F811 (the fixture)
    """Two tenants."""
    made = make_world()
    made.add_tenant()
    made.add_tenant()
    return made


def stewards(world: World) -> tuple[Who, Who]:
    one, other = (who for who in world.oracle.people if who.name == "steward")
    return one, other


def things_of(world: World, who: Who) -> dict[str, Row]:
    return {row.kind: row for row in world.oracle.rows.values() if row.tenant == who.tenant}


def test_each_gate_alone_keeps_every_route_from_another_tenant(service: Service, world: World) -> None:
    """What `test_isolation_routes` has a rule for, and so every route that reads or writes what is a tenant's."""
    one, other = stewards(world)
    theirs = things_of(world, other)
    for gate in ("policy", "orm", "row security"):
        with left_alone(gate, service):
            for route in ROUTES:
                world.ask(one, route, theirs[route.kind])
            for route in CREATING:
                world.make(one, route)
            for kind in LISTS:
                look(world, one, kind)
            for kind in PREFIX:
                ask_why(world, one, other, VERBS[kind][0], theirs[kind])
            ask_of_a_token(world, one, other)


def test_without_any_gate_every_route_is_seen_to_leak(service: Service, world: World) -> None:
    one, other = stewards(world)
    theirs = things_of(world, other)
    with left_alone("none", service):
        assert [route.name for route in ROUTES if not _leaks(world, one, route, theirs[route.kind])] == []
        for kind in LISTS:
            with pytest.raises(AssertionError):
                look(world, one, kind)


def _leaks(world: World, who: Who, route: Route, thing: Row) -> bool:
    try:
        world.ask(who, route, thing)
    except AssertionError:
        return True
    return False
