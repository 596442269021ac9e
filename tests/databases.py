"""Where the tests' databases and real data come from."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy import create_engine, make_url, text

DATA = Path(__file__).resolve().parents[2] / "shared" / "data"
"""Real data for the suite, beside the repository; tests that need it skip with a reason where it is absent."""


@dataclass(frozen=True)
class DatabaseURLs:
    """The runtime URL and, on PostgreSQL, the owner's."""

    runtime: str
    owner: str = ""


def new_postgres_database(superuser_url: str) -> DatabaseURLs:
    """A fresh database with an owner that is no superuser; `init` makes the runtime role."""
    name = f"t{os.urandom(6).hex()}"
    as_superuser(
        superuser_url,
        f"CREATE ROLE {name}_owner LOGIN CREATEROLE PASSWORD 'owner'",
        f"CREATE DATABASE {name} OWNER {name}_owner",
    )
    return _urls(superuser_url, name, role=name)


def postgres_copy(superuser_url: str, template: DatabaseURLs) -> DatabaseURLs:
    """A fresh database that looks as the template does now; nobody may be connected to the template."""
    role = str(make_url(template.runtime).username).removesuffix("_app")
    name = f"t{os.urandom(6).hex()}"
    as_superuser(superuser_url, f"CREATE DATABASE {name} TEMPLATE {role} OWNER {role}_owner")
    return _urls(superuser_url, name, role=role)


def as_superuser(url: str, *statements: str) -> None:
    """Each in a transaction of its own."""
    admin = create_engine(url.replace("postgresql://", "postgresql+psycopg://", 1), isolation_level="AUTOCOMMIT")
    with admin.connect() as connection:
        for statement in statements:
            connection.execute(text(statement))
    admin.dispose()


def _urls(superuser_url: str, name: str, *, role: str) -> DatabaseURLs:
    socket = superuser_url.partition("?host=")[2]
    return DatabaseURLs(
        runtime=f"postgresql://{role}_app:app@/{name}?host={socket}",
        owner=f"postgresql://{role}_owner:owner@/{name}?host={socket}",
    )
