"""Every route is one of those that the isolation machine asks, and none tells another tenant's things from what never existed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from cloister_server.app import _api
from cloister_server.service import Service
from security.isolation_routes import ABOUT, CREATING, ELSEWHERE, LISTS, POLICY, PREDICT, TOKENS
from security.isolation_world import World
from security.test_isolation_machine import http, make_world, training  # noqa: F401 (fixtures)
from server.test_predict import weights  # noqa: F401 (fixture)


def routes(service: Service) -> set[str]:
    """Every method and path of the framework's tables, and those of the protocol that is beside it."""
    api = _api(service)
    beside = {"GET /v2", "GET /v2/health/live", "GET /v2/health/ready"}
    found = {*_walked(api.routes), *beside, *(f"{route.method} {route.path}" for route in PREDICT)}
    described = {f"{method.upper()} {path}" for path, of in api.openapi()["paths"].items() for method in of}
    assert described <= found, "the framework keeps its table of routes elsewhere"
    return found


def _walked(table: Any) -> Iterator[str]:
    for each in table:
        if hasattr(each, "original_router"):  # an included one
            yield from _walked(each.original_router.routes)
        else:
            yield from (f"{method} {each.path}" for method in each.methods if method != "HEAD")


def test_every_route_has_a_rule(service: Service) -> None:
    """A new route is added to `isolation_routes`, with what it names and the verb that allows it."""
    known = {f"{route.method} {route.path}" for route in (*ABOUT, *CREATING, *PREDICT)}
    known |= {*POLICY, *TOKENS, *ELSEWHERE, *(f"GET {path}" for path in LISTS.values())}
    there = routes(service)
    assert there - known == set(), "these routes have no rule"
    assert known - there == set(), "these rules are of no route"


def test_no_route_tells_what_another_tenant_has_from_what_never_existed(
    make_world: Callable[[], World],  # noqa: F811 (the fixture)
) -> None:
    world = make_world()
    world.add_tenant()
    world.add_tenant()
    steward = world.oracle.people[0]
    for route in (*ABOUT, *PREDICT):
        theirs = next(row for row in world.oracle.of(route.kind) if row.tenant != steward.tenant)
        world.ask(steward, route, theirs)
        assert world.tally[f"{route.name}: not there across tenants"] > 0


def test_who_may_write_to_one_tenant_and_read_of_another_writes_to_the_one(make_world: Callable[[], World]) -> None:  # noqa: F811 (the fixture)
    world = make_world()
    world.add_tenant()
    world.add_tenant()
    one, other = (who for who in world.oracle.people if who.name == "steward")
    declare, read, delete = (
        next(each for each in ABOUT if each.name == name)
        for name in ("POST /v1/datasets (body.source)", "GET /v1/datasets/{dataset}", "DELETE /v1/datasets/{dataset}")
    )
    theirs = next(row for row in world.oracle.of("dataset") if row.tenant == other.tenant)
    world.give(other.tenant, one.id, "dataset.read", theirs.id, allows=True, is_over=False)
    assert world.ask(one, read, theirs).is_success
    source = next(row for row in world.oracle.of("source") if row.tenant == one.tenant)
    made = world.ask(one, declare, source).json()["id"]
    assert world.ask(one, delete, world.oracle.rows[made]).is_success
