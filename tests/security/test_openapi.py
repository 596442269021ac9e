"""The API does what its description says, whatever is sent: schemathesis over the OpenAPI document, with real tokens.

Every check of schemathesis' is made of every answer: no 5xx, no status, content type, header or shape that the document does not
have, nothing without a token, nothing after it was deleted, no method that is not there.
"""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import schemathesis
from schemathesis.config import SchemathesisConfig
from schemathesis.engine import events, from_schema
from starlette.testclient import TestClient

from accounts import Person
from accounts import grant as granted
from cloister_server import operators
from cloister_server.app import create_app
from cloister_server.service import Service
from operators import Operating, first_operator
from server.conftest import Client
from server.test_predict import publish, weights  # noqa: F401 (a fixture)

ROUNDS = 2 if os.environ.get("SHORT") else 20
RAW = ("application/vnd.cloister.rows", "application/vnd.cloister.sealed-rows", "application/vnd.cloister.weights")
NAMED = ("path.source", "path.dataset", "path.job", "path.model", "body.source", "body.dataset", "body.query.dataset")
"""Where what is there is asked for half of the time; the other half it is anything."""
REFUSED = ("400", "403", "404", "409", "422", "429")
"""What may come of a request that holds by the document: more is to hold than a schema can say."""
ADMIN = "^/v1/admin/"
"""Whose tokens need a proof with each request: asked by an operator of its own."""


@pytest.fixture
def names(http: TestClient, service: Service, make_client: Any, bearer_of: Any, weights: bytes) -> dict[str, Any]:  # noqa: F811
    """Two tenants that have one of everything each: the credentials of the first, and the names of both."""
    found: dict[str, Any] = {}
    for tenant in ("theirs", "ours"):
        client = make_client(tenant)
        person = Person(http, client, bearer_of(client))
        source = person.source()
        dataset = person.dataset(source)
        job = person.train(person.plan(dataset))
        model = publish(service, client.tenant_id, weights)
        granted(service, client.tenant_id, client, "model.read", on=model.id)
        found |= {"client": client, tenant: [source, dataset, job, model.id]}
    return found


@pytest.fixture
def checked(service: Service, names: dict[str, Any]) -> Callable[..., Counter[int]]:
    """Runs schemathesis, and fails the test with everything that it found; else how often each status was answered."""
    for media_type in RAW:
        schemathesis.serializer(media_type)(lambda context, value: bytes(getattr(value, "value", b"")))
    app = create_app(service)

    def check(*, seed: int, examples: int, phases: tuple[str, ...], but: str) -> Counter[int]:
        config = _config(names, seed=seed, examples=examples, phases=phases)
        return _run(schemathesis.openapi.from_asgi("/openapi.json", app, config=config).exclude(path_regex=but))

    return check


def _config(names: dict[str, Any], *, seed: int, examples: int, phases: tuple[str, ...], token: str = "") -> Any:
    client: Client = names["client"]
    basic = {"Client": {"username": client.id, "password": client.secret}}
    auth: Any = {"dynamic": {"openapi": {"HTTPBearer": _token_of(client)}}, "openapi": basic}
    if token:
        auth = {"openapi": {"HTTPBearer": {"bearer": token}, **basic}}
    there = ["people", "rows", "m", "kinds", *names["ours"], *names["theirs"]]
    return SchemathesisConfig.from_dict(
        {
            "seed": seed,
            "continue-on-failure": True,
            "generation": {
                "max-examples": examples,
                "deterministic": True,
                "no-shrink": True,
                "database": "none",
            },
            "phases": {
                name: {"enabled": name in phases, **({"max-steps": 10} if name == "stateful" else {})}
                for name in ("examples", "coverage", "fuzzing", "stateful")
            },
            "checks": {"positive_data_acceptance": {"expected-statuses": ["2xx", *REFUSED]}},
            "auth": auth,
            "dictionaries": {"there": {"values": there}},
            "parameters": {place: {"dictionary": "there", "probability": 0.5} for place in NAMED},
        }
    )


def _token_of(client: Client) -> dict[str, Any]:
    """Where a token is had, and had again before it expires: no token lives as long as a run may take."""
    asked = {"grant_type": "client_credentials", "client_id": client.id, "client_secret": client.secret}
    return {
        "path": "/oauth/token",
        "payload": asked,
        "payload_content_type": "application/x-www-form-urlencoded",
        "extract_selector": "/access_token",
    }


def _run(schema: Any) -> Counter[int]:
    answered: Counter[int] = Counter()
    wrong: dict[str, str] = {}
    for event in from_schema(schema).execute():
        assert not isinstance(event, (events.NonFatalError, events.FatalError)), vars(event)
        if not isinstance(event, events.ScenarioFinished):
            continue
        sent = {case_id: each.response for case_id, each in event.recorder.interactions.items() if each.response}
        answered.update(response.status_code for response in sent.values())
        for case_id, checks in event.recorder.checks.items():
            for made in checks:
                if made.failure_info is not None:
                    operation = event.recorder.cases[case_id].value.operation.label
                    told = f"{made.failure_info.failure.message}\n{made.failure_info.code_sample}"
                    wrong.setdefault(f"{made.name} of {operation}", f"{told}\n{sent[case_id].text[:500]}")
    assert not wrong, "\n\n".join(f"{what}: {told}" for what, told in sorted(wrong.items()))
    return answered


def test_the_api_is_as_it_is_described(checked: Any) -> None:
    answered = checked(seed=1, examples=3, phases=("fuzzing", "stateful"), but=ADMIN)
    assert {200, 201, 401, 404, 422} <= answered.keys()
    assert answered.total() >= 150


@pytest.fixture
def checked_by_operator(http: TestClient, service: Service) -> Callable[..., Counter[int]]:
    """The same of the operators' operations, with a proof for each request that has their token."""
    token = operators.first_admin_token(service)
    assert token is not None
    human = first_operator(service, http, token=token.get_secret_value())
    operating = Operating(http, service.settings.issuer).log_in(human)
    served = create_app(service)

    async def app(scope: Any, receive: Any, send: Any) -> None:
        if scope["type"] == "http" and (b"authorization", b"Bearer operating") in scope["headers"]:
            proven = operating.headers(scope["path"], method=scope["method"])
            kept = [(name, value) for name, value in scope["headers"] if name not in (b"authorization", b"dpop")]
            scope["headers"] = kept + [(name.lower().encode(), value.encode()) for name, value in proven.items()]
        await served(scope, receive, send)

    def check(*, seed: int, examples: int, of: str = ADMIN) -> Counter[int]:
        no_one = Client("", "ap_", "")
        config = _config(
            {"client": no_one, "ours": [], "theirs": []},
            seed=seed,
            examples=examples,
            phases=("fuzzing",),
            token="operating",
        )
        schema = schemathesis.openapi.from_asgi("/openapi.json", app, config=config)
        return _run(schema.include(path_regex=of).exclude(path_regex="issuer.add$"))  # which would look for anybody

    return check


def test_the_operators_operations_are_as_they_are_described(checked_by_operator: Any) -> None:
    answered = checked_by_operator(seed=1, examples=1, of=f"{ADMIN}(tenant|operator)[.]")
    assert {200, 401} <= answered.keys() and 403 not in answered


@pytest.mark.long
def test_the_api_is_as_it_is_described_however_long_one_tries(checked: Any) -> None:
    answered: Counter[int] = Counter()
    for seed in range(ROUNDS):
        answered += checked(seed=seed, examples=25, phases=("fuzzing", "stateful"), but=ADMIN)
    answered += checked(seed=0, examples=1, phases=("coverage",), but=ADMIN)
    assert {200, 201, 400, 401, 404, 405, 409, 422} <= answered.keys()
    assert answered.total() >= 5000


@pytest.mark.long
def test_the_operators_operations_are_as_they_are_described_however_long_one_tries(checked_by_operator: Any) -> None:
    assert checked_by_operator(seed=2, examples=20).total() >= 500
