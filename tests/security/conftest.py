"""The deployments of tests/server, and the same served on loopback for clients that are not ours."""

from __future__ import annotations

import contextlib
import secrets
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
import uvicorn

from asked import asked_writing
from cloister_server import deployment, operators, tenants
from cloister_server.app import create_app
from cloister_server.oauth import authorizations, device_endpoint, passphrases
from cloister_server.service import Service
from operators import Operating, first_operator
from people import Human, invited
from ports import free_port
from server.conftest import (  # noqa: F401 (fixtures)
    Client,
    bearer,
    bearer_of,
    http,
    make_client,
    new_service,
    postgres_template,
    service,
    shared_services,
    sqlite_template,
    steward,
)

_ON = {
    "test_isolation_gates": ["postgres"],
    "test_isolation_machine": ["sqlite", "postgres"],
    "test_suspension": ["sqlite", "postgres"],
    "test_token_ends": ["sqlite", "postgres"],
}
"""The databases of tests whose answer is a database's; the others run on SQLite."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "service" in metafunc.fixturenames:
        module = metafunc.module.__name__.rpartition(".")[2]
        metafunc.parametrize("service", _ON.get(module, ["sqlite"]), indirect=True)


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Service]:
    """A deployment that answers at its own issuer's URL, in a thread of this process."""
    root = tmp_path_factory.mktemp("served")
    opened = new_service(root, port=free_port())
    with serving(opened):
        yield opened
    opened.engine.dispose()


@contextlib.contextmanager
def serving(service: Service) -> Iterator[None]:  # noqa: F811 (a service, not the fixture)
    config = uvicorn.Config(create_app(service), port=service.settings.port, log_config=None, lifespan="off")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    deadline = time.monotonic() + 120
    while not server.started and time.monotonic() < deadline:
        time.sleep(0.02)
    assert server.started
    try:
        yield
    finally:
        server.should_exit = True
        thread.join(300)
        assert not thread.is_alive(), "it serves on"


@pytest.fixture
def second_process(service: Service) -> Iterator[Service]:  # noqa: F811 (the fixture)
    """The same deployment as another process has it: an engine, and so a memory, of its own."""
    opened = deployment.open_service(service.settings)
    yield opened
    opened.engine.dispose()


@pytest.fixture(scope="session")
def new_app(served: Service) -> Callable[..., Client]:
    """Makes a client of the served deployment."""

    def make(name: str, *, tenant: str = "acme", **more: Any) -> Client:
        with asked_writing(served) as session:
            found = next((each for each in tenants.tenants(session) if each.name == tenant), None)
            made = found or tenants.create_tenant(session, served.keys, name=tenant, request_id="request-of-a-test")
            session.flush()
            operator = tenants.operator_of(made, request_id="request-of-a-test")
            given = {"role": "steward", **more}
            app, secret = tenants.create_client(session, served.keys, operator, name=name, **given)
            return Client(made.id, app.id, secret or "")

    return make


@pytest.fixture
def online(served: Service, new_app: Any, quick: None) -> Iterator[Human]:
    """A person in a browser of their own."""
    with httpx2.Client(base_url=served.settings.issuer, timeout=60) as browser:
        yield invited(served, browser, f"ada{secrets.token_hex(4)}").enrol()


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Passphrases that cost little, and devices that may ask at once."""
    monkeypatch.setattr(passphrases, "MEMORY_KIB", 64)
    for module in (authorizations, device_endpoint):
        monkeypatch.setattr(module, "INTERVAL_S", 1)


@pytest.fixture
def operator(http: Any, service: Service, quick: None) -> Human:  # noqa: F811 (the fixtures)
    """The first operator, in the browser of the test."""
    token = operators.first_admin_token(service)
    assert token is not None
    return first_operator(service, http, token=token.get_secret_value())


@pytest.fixture
def operating(http: Any, service: Service, operator: Human) -> Operating:  # noqa: F811 (the fixtures)
    return Operating(http, service.settings.issuer).log_in(operator)


NODE = Path(__file__).parent / "node"
