"""Owners and partners of a source as their requests go over the wire: declare, bound, open, plan, train, read the ledger."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from httpx2 import Response
from starlette.testclient import TestClient

from asked import asked_writing
from cloister_server import grants, request_rate
from cloister_server.errors import RateLimited
from cloister_server.principal import Principal
from cloister_server.service import Service

__all__ = ["COLUMNS", "Person", "grant", "requests_passed"]

COLUMNS: dict[str, Any] = {
    "x": {"type": "number", "low": 0, "high": 1},
    "y": {"type": "category", "values": ["a", "b"]},
}


@dataclass
class Person:
    """One client's requests. Each but `ask` fails the test where it is refused."""

    http: TestClient
    client: Any
    bearer: dict[str, str] = field(repr=False)

    def ask(self, method: str, path: str, body: Any = None, *, key: str = "") -> Response:
        headers = {**self.bearer, **({"Idempotency-Key": key} if key else {})}
        more = {} if body is None else {"json": body}
        return self.http.request(method, f"/v1{path}", headers=headers, **more)

    def told(self, method: str, path: str, body: Any = None) -> Any:
        answer = self.ask(method, path, body)
        assert answer.is_success, answer.text
        return answer.json()

    def source(self, name: str = "people", *, epsilon: float = 10, delta: float = 1e-5, **more: Any) -> str:
        given = {"name": name, "epsilon": epsilon, "delta": delta, **more}
        return str(self.told("POST", "/sources", given)["id"])

    def budget(self, source: str) -> Any:
        return self.told("GET", f"/sources/{source}")["budget"]

    def dataset(self, source: str, name: str = "rows", **changed: Any) -> str:
        """A ready dataset; nobody is ever told that it has no rows."""
        declared = {"source": source, "name": name, "columns": COLUMNS, "nominal_size": 1000, "capacity": 2000}
        made = str(self.told("POST", "/datasets", declared | changed)["id"])
        self.told("POST", f"/datasets/{made}/complete")
        return made

    def plan(self, dataset: str, *others: str, noise: float = 4.0, epochs: float = 1) -> Any:
        """A plan of ten steps an epoch."""
        asked = {"dataset": dataset, "target": "y", "privacy": {"noise_multiplier": noise}, "batch_size": 100}
        return self.told("POST", "/plans", {**asked, "epochs": epochs, "with_datasets": list(others)})

    def start(self, plan: Any, *, model: str = "m", key: str = "") -> Response:
        return self.ask("POST", "/jobs", {"training": plan["training"], "model": model}, key=key)

    def train(self, plan: Any, *, model: str = "m") -> str:
        answer = self.start(plan, model=model)
        assert answer.status_code == 201, answer.text
        return str(answer.json()["id"])

    def ledger(self, source: str, **params: Any) -> Any:
        query = "&".join(f"{name}={value}" for name, value in params.items())
        return self.told("GET", f"/sources/{source}/ledger{'?' if query else ''}{query}")


def grant(service: Service, tenant_id: str, to: Any, *verbs: str, on: str) -> None:
    """Let a client do these verbs to one resource of the tenant, as an operator does."""
    operator = Principal.operator(tenant_id, request_id="request-of-a-test")
    with asked_writing(service) as session:
        for verb in verbs:
            grants.add(session, operator, to=to.id, verb=verb, resource_id=on)


def requests_passed(service: Service, tenant_id: str) -> int:
    """How many requests of a tenant pass in this process before one is refused."""
    number = 0
    while True:
        try:
            if not request_rate.admit_from_memory(service, tenant_id):
                request_rate.admit(service, tenant_id)
        except RateLimited:
            return number
        number += 1
