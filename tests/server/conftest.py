"""A real deployment for every test: initialised on disk, opened, and served in this process."""

from __future__ import annotations

import secrets
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from databases import DatabaseURLs
from pydantic import SecretStr
from sqlalchemy.orm import Session
from starlette.testclient import TestClient

from cloister_server import deployment, policy, tenants
from cloister_server.app import create_app
from cloister_server.grants import Role
from cloister_server.policy import Principal
from cloister_server.service import Service
from cloister_server.settings import Settings
from cloister_server.store.session import writing


@dataclass(frozen=True)
class Client:
    """An app, and the secret that was shown once."""

    tenant_id: str
    id: str
    secret: str = field(repr=False)

    @property
    def principal(self) -> Principal:
        return Principal(self.tenant_id, self.id, "app", "request-of-a-test")


def new_service(root: Path, urls: DatabaseURLs | None = None, **more: Any) -> Service:
    """What `cloister-admin init` makes, in `root`; on SQLite where no database is named."""
    given: dict[str, Any] = {"data_dir": root / "data", "key_dir": root / "keystore", "key_file": root / "root.key"}
    if urls is not None and urls.owner:
        given |= {"database_url": SecretStr(urls.runtime), "owner_database_url": SecretStr(urls.owner)}
    return deployment.initialise(Settings(**given, **more))


def new_client(service: Service, tenant: str = "acme", *, role: Role = "steward") -> Client:
    """An app of a tenant that is made where there is none of its name."""
    with writing(service.engine) as session:
        made = _tenant(session, service, tenant)
        operator = tenants.operator_of(made, request_id="request-of-a-test")
        app, secret = tenants.create_client(session, service.keys, operator, name=f"a{secrets.token_hex(4)}", role=role)
        return Client(made.id, app.id, secret)


def _tenant(session: Session, service: Service, name: str) -> Any:
    found = next((each for each in tenants.tenants(session) if each.name == name), None)
    made = found or tenants.create_tenant(session, service.keys, name=name, request_id="request-of-a-test")
    session.flush()  # the app's grants are decided on its row
    return made


@pytest.fixture(scope="session")
def database_url() -> DatabaseURLs | None:
    """The database of the server's tests: None is a SQLite file of each test's own."""
    return None


@pytest.fixture
def service(tmp_path: Path, database_url: DatabaseURLs | None) -> Iterator[Service]:
    made = new_service(tmp_path, database_url)
    yield made
    made.engine.dispose()


@pytest.fixture
def http(service: Service) -> Iterator[TestClient]:
    with TestClient(create_app(service), raise_server_exceptions=False) as client:
        yield client


@pytest.fixture
def steward(service: Service) -> Client:
    return new_client(service)


@pytest.fixture
def bearer(http: TestClient, steward: Client) -> dict[str, str]:
    """The header that the steward's requests carry."""
    return bearer_of(http, steward)


def bearer_of(http: TestClient, client: Client) -> dict[str, str]:
    answer = http.post("/oauth/token", data={"grant_type": "client_credentials"}, auth=(client.id, client.secret))
    assert answer.status_code == 200, answer.text
    return {"Authorization": f"Bearer {answer.json()['access_token']}"}


__all__ = ["Client", "bearer_of", "new_client", "new_service", "policy"]
