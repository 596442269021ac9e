"""What a decision costs beside Cedar and casbin, each with the grants of one tenant at hand.

make bench NAME=policy [ARGS="--quick"]

A thousand tenants of 50 principals (5 groups) and 100 resources lie in one SQLite database. Ours is `policy.decide` in a reading
transaction of the request's own, with the look whether the tenant's revision is still that of the snapshot; `changed` is that where
another connection has just committed something, so that the revision itself is read. Cedar has the tenant's policies and
entities parsed before; casbin an enforcer of the tenant's own, with roles and deny-override. All are asked the same and must agree.
One answers all requests of a tenant before the next does, in an order drawn anew for each tenant: no server has several, and what
one leaves in the processor's caches is no part of the next one's decision. The peers are installed into `.venv-bench-policy` at the
first run, out of the dependency group `bench-policy`.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import sqlite3
import statistics
import subprocess
import sys
import tempfile
import time
import tomllib
from collections.abc import Callable
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Any

from pydantic import SecretStr
from sqlalchemy import Engine, insert

ROOT = Path(__file__).resolve().parents[1]
PEERS_VENV = ROOT / ".venv-bench-policy"
PRINCIPALS, RESOURCES, GROUPS, GRANTS = 50, 100, 5, 265
VERBS = ("dataset.read", "dataset.train", "model.read", "model.predict")

_CASBIN = """
[request_definition]
r = sub, act, obj
[policy_definition]
p = sub, act, obj, eft
[role_definition]
g = _, _
[policy_effect]
e = some(where (p.eft == allow)) && !some(where (p.eft == deny))
[matchers]
m = g(r.sub, p.sub) && r.act == p.act && (p.obj == "*" || r.obj == p.obj)
"""


def tenant_of(draw: random.Random, number: int) -> dict[str, Any]:
    """Grants and members of one tenant, as plain names."""
    tenant = f"tn_{number:032x}"
    apps = [f"ap_{number:016x}{each:016x}" for each in range(PRINCIPALS)]
    groups = [f"grp_{number:016x}{each:016x}" for each in range(GROUPS)]
    resources = [f"mdl_{number:016x}{each:016x}" for each in range(RESOURCES)]
    grants = [
        (
            f"gr_{number:016x}{each:016x}",
            draw.choice(groups if draw.random() < 0.2 else apps),
            draw.choice(VERBS),
            "*" if draw.random() < 0.05 else draw.choice(resources),
            "deny" if draw.random() < 0.05 else "allow",
        )
        for each in range(GRANTS)
    ]
    return {
        "tenant": tenant, "apps": apps, "resources": resources, "grants": grants,
        "members": [(app, draw.choice(groups)) for app in apps],
    }  # fmt: skip


def fill(engine: Engine, tenants: list[dict[str, Any]]) -> None:
    from cloister_server.store.acting import ALL_TENANTS
    from cloister_server.store.session import writing
    from cloister_server.store.tables import Grant, Group, Member

    for one in tenants:
        of = {"tenant_id": one["tenant"]}
        with writing(engine, ALL_TENANTS) as session:
            groups = sorted({group for _, group in one["members"]})
            session.execute(insert(Group), [{**of, "id": each, "name": each} for each in groups])
            session.execute(insert(Member), [{**of, "principal_id": app, "group_id": g} for app, g in one["members"]])
            fields = ("id", "principal_id", "verb", "resource_id", "effect")
            session.execute(insert(Grant), [{**of, **dict(zip(fields, each, strict=True))} for each in one["grants"]])


class Cedar:
    def __init__(self, one: dict[str, Any]) -> None:
        import cedarpy

        self._asked = cedarpy.is_authorized
        lines = []
        for _, holder, verb, resource, effect in one["grants"]:
            who = f'in Group::"{holder}"' if holder.startswith("grp_") else f'== App::"{holder}"'
            what = "" if resource == "*" else f' == Model::"{resource}"'
            kind = "permit" if effect == "allow" else "forbid"
            lines.append(f'{kind}(principal {who}, action == Action::"{verb}", resource{what});')
        entities = [
            {"uid": {"type": "App", "id": app}, "attrs": {}, "parents": [{"type": "Group", "id": group}]}
            for app, group in one["members"]
        ]
        self._policies = cedarpy.PolicySet.from_str("\n".join(lines))
        self._entities = cedarpy.Entities.from_json_str(json.dumps(entities))

    def decide(self, app: str, verb: str, resource: str) -> bool:
        asked = {
            "principal": f'App::"{app}"',
            "action": f'Action::"{verb}"',
            "resource": f'Model::"{resource}"',
            "context": {},
        }
        return bool(self._asked(asked, self._policies, self._entities).allowed)


class Casbin:
    def __init__(self, one: dict[str, Any]) -> None:
        import casbin

        model = casbin.Model()
        model.load_model_from_text(_CASBIN)
        self._enforcer = casbin.Enforcer(model)
        self._enforcer.add_policies([[holder, verb, what, effect] for _, holder, verb, what, effect in one["grants"]])
        self._enforcer.add_grouping_policies([list(each) for each in one["members"]])

    def decide(self, app: str, verb: str, resource: str) -> bool:
        return bool(self._enforcer.enforce(app, verb, resource))


def measure(*, tenants: int, requests: int) -> list[dict[str, float]]:
    """The median decision of each, in microseconds, for each of some tenants."""
    from cloister_server import policy
    from cloister_server.principal import Principal
    from cloister_server.settings import Settings
    from cloister_server.store import migrate
    from cloister_server.store.acting import for_principal
    from cloister_server.store.session import new_engine, reading

    draw = random.Random(1)  # noqa: S311 (the same policies each time)
    made = [tenant_of(draw, number) for number in range(tenants)]
    medians = []
    with tempfile.TemporaryDirectory() as root:
        url = f"sqlite:///{root}/cloister.db"
        migrate.upgrade(Settings(data_dir=Path(root), database_url=SecretStr(url)))
        engine = new_engine(url)
        fill(engine, made)
        other = sqlite3.connect(f"{root}/cloister.db", isolation_level=None)
        other.execute("CREATE TABLE somebody (wrote INTEGER)")

        def ask(one: dict[str, Any], app: str, verb: str, resource: str, *, is_changed: bool) -> tuple[float, bool]:
            principal = Principal(one["tenant"], app, "app", "bench")
            if is_changed:
                other.execute("INSERT INTO somebody VALUES (1)")
            with reading(engine, for_principal(principal)) as session:
                session.connection()  # which begins the transaction
                tenant_id, decide, clock = one["tenant"], policy.decide, time.perf_counter
                began = clock()
                answer = decide(session, principal, verb, tenant_id=tenant_id, resource_id=resource)
                took_s = clock() - began
            return took_s * 1e6, isinstance(answer, policy.Allow)

        def ask_peer(peer: Cedar | Casbin, *asked: str) -> tuple[float, bool]:
            began = time.perf_counter()
            is_allowed = peer.decide(*asked)
            return (time.perf_counter() - began) * 1e6, is_allowed

        for one in draw.sample(made, min(8, tenants)):
            asked = [[draw.choice(each) for each in (one["apps"], VERBS, one["resources"])] for _ in range(requests)]
            sides: dict[str, Callable[..., tuple[float, bool]]] = {
                "ours": partial(ask, one, is_changed=False),
                "changed": partial(ask, one, is_changed=True),
                "cedar": partial(ask_peer, Cedar(one)),
                "casbin": partial(ask_peer, Casbin(one)),
            }
            median, told = dict[str, float](), set[tuple[bool, ...]]()
            for name in draw.sample(list(sides), len(sides)):
                sides[name](*asked[0])  # which makes the tenant's snapshot, if it is ours
                took_us, answers = zip(*(sides[name](*each) for each in asked), strict=True)
                median[name] = statistics.median(took_us)
                told.add(answers)
            if len(told) != 1:
                differing = [each for each, *answers in zip(asked, *told, strict=True) if len(set(answers)) > 1]
                raise SystemExit(f"they do not agree about {one['tenant']}: {differing}")
            medians.append(median)
        other.close()
        engine.dispose()
    return medians


def install_peers() -> None:
    python = PEERS_VENV / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS_VENV)], check=True)
        wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["bench-policy"]
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", *wanted], check=True)
    sys.path += [str(path) for path in PEERS_VENV.glob("lib/python*/site-packages")]


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--quick", action="store_true", help="fifty tenants and few requests")
    asked = parser.parse_args()
    install_peers()
    tenants, requests = (50, 40) if asked.quick else (1000, 100)
    medians = measure(tenants=tenants, requests=requests)
    ratios = {
        f"{peer}_over_{ours}": round(statistics.median(each[peer] / each[ours] for each in medians), 1)
        for ours in ("ours", "changed")
        for peer in ("cedar", "casbin")
    }
    conditions = {
        "tenants": tenants, "principals": PRINCIPALS, "resources": RESOURCES, "grants": tenants * GRANTS, "requests": 8 * requests,
        "cedarpy": version("cedarpy"), "casbin": version("casbin"), "python": platform.python_version(), "database": "SQLite",
        "warm": "the tenant's snapshot, policies or enforcer is at hand; the requests are random",
        "order": "one answers all requests of a tenant before the next",
        "timed": "the decision, which of ours each has a transaction of its own, whose beginning is not timed",
        "revision": "part of each decision that is timed: ours asks whether anything was committed, changed reads it",
    }  # fmt: skip
    print(json.dumps({"name": "policy", "ratios": ratios, "conditions": conditions}))


if __name__ == "__main__":
    main()
