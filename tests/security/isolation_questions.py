"""What is asked besides things by their ids: what there is, why one may, and of a token. The oracle says what must be told."""

from __future__ import annotations

from typing import Any

from security.isolation_oracle import Row, Who
from security.isolation_routes import LISTS, PREFIX
from security.isolation_world import World, told

__all__ = ["ask_of_a_token", "ask_why", "look"]


def look(world: World, whose: Who, kind: str, *, limit: int = 200) -> None:
    """A list has all that one may see, once, and nothing besides."""
    if not world.oracle.is_let_in(whose):
        assert world.send(whose, "GET", LISTS[kind]).status_code == 401
        return
    found = world.listed(whose, kind, limit=limit)
    assert len(found) == len(set(found)), found
    assert set(found) == world.oracle.seen(whose, kind), (whose, kind)
    world.tally[f"GET {LISTS[kind]}: listed"] += 1


def ask_why(world: World, whose: Who, other: Who, verb: str, row: Row) -> None:
    """One is told what one's own tenant's policy says of another, and nothing of anybody's besides."""
    oracle = world.oracle

    def explained(principal: str, resource: str) -> Any:
        given = {"principal": principal, "verb": verb, "resource": resource}
        return world.send(whose, "GET", "/v1/policy/explain", params=given)

    def holders(resource: str) -> Any:
        return world.send(whose, "GET", "/v1/policy/who-can", params={"verb": verb, "resource": resource})

    why, who_can = explained(other.id, row.id), holders(row.id)
    world.tally["GET /v1/policy: asked"] += 1
    if not oracle.is_let_in(whose):
        assert (why.status_code, who_can.status_code) == (401, 401)
    elif not oracle.may(whose, "policy.read", oracle.tenant(whose.tenant)):
        assert (why.status_code, who_can.status_code) == (403, 403)
    elif row.tenant != whose.tenant:
        absent = f"{PREFIX[row.kind]}_{'0' * 32}"
        assert told(why) == told(explained(other.id, absent)) and told(who_can) == told(holders(absent))
        assert (why.status_code, who_can.status_code) == (404, 404)
    else:
        can = {each.id for each in oracle.people if not each.is_gone and oracle.may(each, verb, row)}
        assert {each["principal"] for each in who_can.json()["holders"]} == can, who_can.text
        if other.tenant == whose.tenant or oracle.holds_directly(other, whose.tenant):
            assert why.status_code == 404 if other.is_gone else why.json()["allowed"] == oracle.may(other, verb, row)
        else:
            nobody = f"{other.id.partition('_')[0]}_{'0' * 32}"
            assert told(why) == told(explained(nobody, row.id)) and why.status_code == 404


def ask_of_a_token(world: World, whose: Who, others: Who) -> None:
    """A client is told of its own tenant's tokens alone, and ends its own alone."""
    oracle = world.oracle
    assert whose.secret and others.tenant != whose.tenant
    token, noise = others.bearer["Authorization"].removeprefix("Bearer "), "a.b.c"
    for path in ("/oauth/introspect", "/oauth/revoke"):
        as_client = {"auth": (whose.id, whose.secret)}
        asked, same = (world.http.post(path, data={"token": each}, **as_client) for each in (token, noise))
        assert told(asked) == told(same)
        assert asked.is_success == oracle.is_let_in(whose), asked.text
    mine = world.send(others, "GET", "/v1/whoami")
    assert mine.status_code == (200 if oracle.is_let_in(others) else 401), (
        "its token was ended by another tenant's client"
    )
    assert not oracle.is_let_in(others) or mine.json()["id"] == others.id
    world.tally["tokens: asked"] += 1
