"""Real deployments for the end-to-end tests: real processes on a free port, on SQLite and on PostgreSQL."""

from __future__ import annotations

import secrets
from collections.abc import Iterator

import numpy as np
import pytest
from sklearn.datasets import load_digits

import cloister
from databases import new_postgres_database
from harness import App, Deployment
from journeys import SQLITE


@pytest.fixture(scope="session", params=[SQLITE, pytest.param("postgres", marks=pytest.mark.xdist_group("postgres"))])
def deployment(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Deployment]:
    """A running deployment that the tests of a session share; each makes tenants of its own."""
    root = tmp_path_factory.mktemp(f"cloister-{request.param}")
    made = Deployment(root)
    if request.param == "postgres":
        urls = new_postgres_database(request.getfixturevalue("postgres"))
        made = Deployment(root, database_url=urls.runtime, owner_database_url=urls.owner)
    made.admin("init")
    made.start()
    try:
        yield made
    finally:
        made.stop()


@pytest.fixture
def app(deployment: Deployment) -> App:
    """A steward's app of a tenant of this test's own."""
    return deployment.app(deployment.tenant(f"t{secrets.token_hex(6)}"), "steward")


@pytest.fixture
def client(deployment: Deployment, app: App) -> Iterator[cloister.Cloister]:
    with deployment.client(app) as client:
        yield client


@pytest.fixture(scope="session")
def digits() -> dict[str, np.ndarray]:
    """Real scans of digits, in an order of our own."""
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    return {"scan": images.reshape(-1, 8, 8).astype(np.float32)[order], "digit": labels[order].astype(np.int32)}
