"""A real deployment for every test: initialised on disk, opened, and served in this process."""

from __future__ import annotations

import secrets
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from pydantic import SecretStr
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from asked import asked_writing
from cloister_server import deployment, tenants
from cloister_server.app import create_app
from cloister_server.grants import Role
from cloister_server.principal import Principal
from cloister_server.service import Service
from cloister_server.settings import Settings
from cloister_server.store import shares
from databases import DatabaseURLs, new_postgres_database, postgres_copy


@dataclass(frozen=True)
class Client:
    """An app, and the secret that was shown once."""

    tenant_id: str
    id: str
    secret: str = field(repr=False)

    @property
    def principal(self) -> Principal:
        return Principal(self.tenant_id, self.id, "app", "request-of-a-test")


MINUTE = 30_000_000
"""Some minute, counted from 1970."""


class MinuteClock:
    """The clock that minutes are counted by, which stands where it is put."""

    def __init__(self) -> None:
        self.at = MINUTE * 60.0

    def __call__(self) -> float:
        return self.at


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> MinuteClock:
    clock = MinuteClock()
    monkeypatch.setattr(shares, "_now", clock)
    return clock


def new_service(root: Path, urls: DatabaseURLs | None = None, **more: Any) -> Service:
    """What `cloister-admin init` makes, in `root`; on SQLite where no database is named."""
    return deployment.initialise(_settings(root, urls, **more))


def _settings(root: Path, urls: DatabaseURLs | None, **more: Any) -> Settings:
    given: dict[str, Any] = {"data_dir": root / "data", "key_dir": root / "keystore", "key_file": root / "root.key"}
    if urls is not None and urls.owner:
        given |= {"database_url": SecretStr(urls.runtime), "owner_database_url": SecretStr(urls.owner)}
    return Settings(**given, **more)


@pytest.fixture
def make_client(service: Service) -> Callable[..., Client]:
    """Makes an app of a tenant, which is made where there is none of its name."""

    def make(tenant: str = "acme", *, role: Role = "steward", **more: Any) -> Client:
        with asked_writing(service) as session:
            made = _tenant(session, service, tenant)
            operator = tenants.operator_of(made, request_id="request-of-a-test")
            name = f"a{secrets.token_hex(4)}"
            app, secret = tenants.create_client(session, service.keys, operator, name=name, role=role, **more)
            return Client(made.id, app.id, secret or "")

    return make


def _tenant(session: Session, service: Service, name: str) -> Any:
    found = next((each for each in tenants.tenants(session) if each.name == name), None)
    made = found or tenants.create_tenant(session, service.keys, name=name, request_id="request-of-a-test")
    session.flush()  # the app's grants are decided on its row
    return made


@pytest.fixture(scope="session")
def sqlite_template(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, None]:
    """A deployment on SQLite that others are copied from."""
    return _template(tmp_path_factory.mktemp("sqlite"), None), None


@pytest.fixture(scope="session")
def postgres_template(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, DatabaseURLs]:
    """A deployment on PostgreSQL that others are copied from."""
    urls = new_postgres_database(postgres)
    return _template(tmp_path_factory.mktemp("postgres"), urls), urls


def _template(root: Path, urls: DatabaseURLs | None) -> Path:
    new_service(root, urls).engine.dispose()
    return root


_ON_BOTH = {
    "test_chain", "test_collection", "test_decisions", "test_grant_rate", "test_idempotency", "test_isolation", "test_oauth",
    "test_policy", "test_quotas", "test_shredding", "test_units",
}  # fmt: skip
"""The tests whose answer is a database's; each costs a database on PostgreSQL, and the others run on SQLite alone."""


def pytest_generate_tests(metafunc: pytest.Metafunc) -> None:
    if "service" in metafunc.fixturenames:
        is_on_both = metafunc.module.__name__.rpartition(".")[2] in _ON_BOTH
        metafunc.parametrize("service", ["sqlite", "postgres"] if is_on_both else ["sqlite"], indirect=True)


@pytest.fixture(scope="module")
def shared_services() -> Iterator[dict[str, Service]]:
    """By kind of database, those of a module's tests that are marked `shared`."""
    opened: dict[str, Service] = {}
    yield opened
    for each in opened.values():
        each.engine.dispose()


@pytest.fixture
def service(request: pytest.FixtureRequest, shared_services: dict[str, Service]) -> Iterator[Service]:
    """A deployment as `cloister-admin init` left it, of this test's own; of its module's where it is marked `shared`."""
    if request.node.get_closest_marker("shared") is None:
        opened = _copy(request, request.getfixturevalue("tmp_path"))
        yield opened
        opened.engine.dispose()
        return
    if request.param not in shared_services:
        root = request.getfixturevalue("tmp_path_factory").mktemp("shared")
        shared_services[request.param] = _copy(request, root)
    yield shared_services[request.param]


def _copy(request: pytest.FixtureRequest, to: Path) -> Service:
    root, template = request.getfixturevalue(f"{request.param}_template")
    shutil.copytree(root, to, dirs_exist_ok=True)
    urls = None if template is None else postgres_copy(request.getfixturevalue("postgres"), template)
    return deployment.open_service(_settings(to, urls))


@pytest.fixture
def http(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def bearer_of(http: TestClient) -> Callable[[Client], dict[str, str]]:
    """The header that an app's requests carry."""

    def fetch(client: Client) -> dict[str, str]:
        answer = http.post("/oauth/token", data={"grant_type": "client_credentials"}, auth=(client.id, client.secret))
        assert answer.status_code == 200, answer.text
        return {"Authorization": f"Bearer {answer.json()['access_token']}"}

    return fetch


@pytest.fixture
def steward(make_client: Callable[..., Client]) -> Client:
    return make_client()


@pytest.fixture
def bearer(bearer_of: Callable[[Client], dict[str, str]], steward: Client) -> dict[str, str]:
    """The header that the steward's requests carry."""
    return bearer_of(steward)
