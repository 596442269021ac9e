"""Cedar, a policy engine that is not ours, decides as we do on the same grants, and for the same grant."""

from __future__ import annotations

import os
import random
from datetime import UTC, datetime
from ipaddress import IPv6Address, summarize_address_range
from typing import Any

import cedarpy
import pytest
from sqlalchemy import delete

from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.store import decisions
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.queries import ANY
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import Grant, Member
from server.test_decisions import (
    APPS,
    GROUPS,
    HERE,
    NETWORKS,
    THERE,
    from_,
    models_of,
    rows_of,
    suspend,
    world,  # noqa: F401 (a fixture)
)

REQUESTS_A_POLICY = 100
POLICIES = 60 if os.environ.get("SHORT") else 1000
"""Of the long run."""
ADDRESSES = (None, "10.1.2.3", "192.0.2.1", "192.0.2.2", "2001:db8::1")
VERBS = ("model.read", "model.predict")


def test_cedar_agrees(world: Service) -> None:  # noqa: F811 (the fixture)
    assert disagreements(world, policies=10, seed=1) == []


@pytest.mark.long
def test_cedar_agrees_on_a_hundred_thousand_requests(world: Service) -> None:  # noqa: F811 (the fixture)
    assert disagreements(world, policies=POLICIES, seed=2) == []


def test_a_disagreement_is_seen(world: Service, monkeypatch: pytest.MonkeyPatch) -> None:  # noqa: F811 (the fixture)
    """The same with denials that are taken for nothing."""
    asked = decisions.decisive

    def lenient(*given: Any, **of: Any) -> Any:
        found = asked(*given, **of)
        return None if found is None else found._replace(effect="allow")

    monkeypatch.setattr(decisions, "decisive", lenient)
    assert disagreements(world, policies=3, seed=1)


def disagreements(service: Service, *, policies: int, seed: int) -> list[str]:
    """Random policies, and random requests to each: what our snapshot, our query and Cedar do not say alike."""
    draw, ids, found = random.Random(seed), models_of(service), []
    for number in range(policies):
        members = {each for each in (("ann", "here"), ("ben", "here"), ("eve", "there")) if draw.random() < 0.6}
        suspended = {each for each in (HERE, THERE) if draw.random() < 0.1}
        grants = rows_of([_grant(draw) for _ in range(draw.randrange(12))], members, ids)
        with writing(service.engine) as session:
            session.execute(delete(Grant))
            session.execute(delete(Member))
            session.add_all(grants)
            suspend(session, suspended)
        grants = [row for row in grants if isinstance(row, Grant)]
        asked = [_request(draw, ids) for _ in range(REQUESTS_A_POLICY)]
        told = cedarpy.is_authorized_batch(
            [_in_cedar(*each) for each in asked], "\n".join(map(_policy, grants)), _entities(ids, members, suspended)
        )
        with reading(service.engine, ALL_TENANTS) as session:
            for (principal, verb, tenant_id, model_id), theirs in zip(asked, told, strict=True):
                of = {"tenant_id": tenant_id, "resource_id": model_id}
                ours = decisions.decisive(session, principal, verb, **of)
                defined = decisions.decisive_by_query(session, principal, verb, **of)
                by = {grants[int(each.removeprefix("policy"))].id for each in theirs.diagnostics.reasons}
                is_allowed = ours is not None and ours.effect == "allow"
                is_same_grant = ours.grant_id in by if ours is not None else not by
                if theirs.diagnostics.errors or ours != defined or is_allowed != theirs.allowed or not is_same_grant:
                    found.append(
                        f"policy {number}: {principal} {verb} {model_id}: {ours}, {defined}, {theirs.decision}"
                    )
    return found


def _grant(draw: random.Random) -> dict[str, Any]:
    return {
        "tenant_id": draw.choice([HERE, THERE]),
        "holder": draw.choice([*APPS, *GROUPS]),
        "verb": draw.choice(VERBS),
        "resource": draw.choice(["one", "two", ANY]),
        "effect": draw.choice(["allow", "allow", "allow", "deny"]),
        "hours": draw.choice([None, None, -1, 1]),
        "network": draw.choice([None, *NETWORKS[:-1]]),  # in Cedar no IPv4 address is in an IPv6 network
        "outputs": draw.choice([None, "rounded", "labels"]),
        "requests_per_minute": draw.choice([None, 1, 10]),
        "max_epsilon": draw.choice([None, 0.5, 2.0]),
    }


def _request(draw: random.Random, ids: dict[tuple[str, str], str]) -> tuple[Principal, str, str, str]:
    principal = from_(draw.choice(list(APPS.values())), draw.choice(ADDRESSES))
    (tenant_id, _), model_id = draw.choice(list(ids.items()))
    return principal, draw.choice(VERBS), tenant_id, model_id


def _in_cedar(principal: Principal, verb: str, _: str, model_id: str) -> dict[str, Any]:
    context: dict[str, Any] = {"now": int(datetime.now(UTC).timestamp())}
    if principal.address is not None:
        context["address"] = {"__extn": {"fn": "ip", "arg": principal.address}}
    return {
        "principal": f'App::"{principal.id}"',
        "action": f'Action::"{verb}"',
        "resource": f'Model::"{model_id}"',
        "context": context,
    }


def _policy(grant: Grant) -> str:
    kind, relation = ("Group", "in") if grant.principal_id.startswith("grp_") else ("App", "==")
    covered = f'in Tenant::"{grant.tenant_id}"' if grant.resource_id == ANY else f'== Model::"{grant.resource_id}"'
    effect = "permit" if grant.effect == "allow" else "forbid"
    when = ["!resource.suspended"]
    if grant.expires is not None:
        when.append(f"context.now < {int(grant.expires.timestamp())}")
    if grant.address_first is not None and grant.address_last is not None:
        is_in = f'context has address && context.address.isInRange(ip("{_network(grant.address_first, grant.address_last)}"))'
        when.append(f"({is_in})" if grant.effect == "allow" else f"(!(context has address) || ({is_in}))")
    head = f'principal {relation} {kind}::"{grant.principal_id}", action == Action::"{grant.verb}", resource {covered}'
    return f"{effect}({head}) when {{ {' && '.join(when)} }};"


def _network(first: str, last: str) -> str:
    low, high = (IPv6Address(int(digits, 16)) for digits in (first, last))
    if low.ipv4_mapped is not None and high.ipv4_mapped is not None:
        (network,) = summarize_address_range(low.ipv4_mapped, high.ipv4_mapped)
        return str(network)
    (wide,) = summarize_address_range(low, high)
    return str(wide)


def _entities(
    ids: dict[tuple[str, str], str], members: set[tuple[str, str]], suspended: set[str]
) -> list[dict[str, Any]]:
    def entity(kind: str, named: str, *parents: tuple[str, str], **attrs: bool) -> dict[str, Any]:
        above = [{"type": of, "id": parent} for of, parent in parents]
        return {"uid": {"type": kind, "id": named}, "attrs": attrs, "parents": above}

    groups = {name: [("Group", GROUPS[group][1]) for who, group in members if who == name] for name in APPS}
    apps = [entity("App", app.id, *groups[name]) for name, app in APPS.items()]
    return apps + [
        entity("Model", model_id, ("Tenant", tenant_id), suspended=tenant_id in suspended)
        for (tenant_id, _), model_id in ids.items()
    ]
