"""Migrating is upgrading: it can be done again, by an owner that is no superuser, and leaves a role that owns nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from pydantic import SecretStr
from sqlalchemy import Engine, text
from sqlalchemy.exc import DBAPIError

from cloister_server.errors import StartRefused
from cloister_server.settings import Settings
from cloister_server.store import migrate
from cloister_server.store.session import check_durability, new_engine
from cloister_server.store.tables import Table
from databases import DatabaseURLs, new_postgres_database


def settings_of(urls: DatabaseURLs, data_dir: Path) -> Settings:
    owner = SecretStr(urls.owner) if urls.owner else None
    return Settings(data_dir=data_dir, database_url=SecretStr(urls.runtime), owner_database_url=owner)


def test_migrating_again_changes_nothing_on_postgresql(postgres: str, tmp_path: Path) -> None:
    urls = new_postgres_database(postgres)
    for _ in range(2):
        migrate.upgrade(settings_of(urls, tmp_path))
    engine = new_engine(urls.runtime)
    migrate.check_current(engine)
    check_durability(engine)
    with engine.connect() as connection, pytest.raises(DBAPIError, match="permission denied"):
        connection.execute(text("CREATE TABLE mine (id int)"))
    engine.dispose()


def test_a_mighty_runtime_role_is_refused(postgres: str, tmp_path: Path) -> None:
    urls = new_postgres_database(postgres)
    superuser = urls.runtime.replace(urls.runtime.partition("//")[2].partition("@")[0], "postgres:")
    with pytest.raises(StartRefused, match="superuser"):
        migrate.upgrade(settings_of(DatabaseURLs(superuser, urls.owner), tmp_path))


def test_migrating_again_changes_nothing_on_sqlite(tmp_path: Path) -> None:
    settings = settings_of(DatabaseURLs(f"sqlite:///{tmp_path}/cloister.db"), tmp_path)
    for _ in range(2):
        migrate.upgrade(settings)
    engine = new_engine(settings.database_url.get_secret_value())
    migrate.check_current(engine)
    check_durability(engine)
    engine.dispose()


def test_the_migrations_make_the_tables_that_the_code_knows(tmp_path: Path) -> None:
    engine = migrated(tmp_path)
    with engine.connect() as connection:
        assert compare_metadata(MigrationContext.configure(connection), Table.metadata) == []
    engine.dispose()


def test_a_ledger_written_before_overflow_keeps_its_rows_and_stays_append_only(tmp_path: Path) -> None:
    engine = migrated(tmp_path)
    stepped(engine, command.downgrade, "0001")
    with engine.begin() as connection:
        connection.execute(text("INSERT INTO tenants VALUES ('t', 't', '2026-01-01')"))
        connection.execute(
            text("INSERT INTO sources VALUES ('t', 's', 's', 'row', 'add_remove', 1, 1e-6, 0, 'o', '2026-01-01')")
        )
        connection.execute(
            text("INSERT INTO ledger VALUES ('t', 's', 1, 'reserve', 'j', NULL, NULL, 9, 'p', '{}', '2026-01-01')")
        )
    stepped(engine, command.upgrade, "head")
    with engine.begin() as connection:
        assert connection.execute(text("SELECT steps, overflow FROM ledger")).all() == [(9, 0.0)]
        with pytest.raises(DBAPIError, match="append-only"):
            connection.execute(text("UPDATE ledger SET overflow = 1"))
    engine.dispose()


def migrated(root: Path) -> Engine:
    settings = settings_of(DatabaseURLs(f"sqlite:///{root}/cloister.db"), root)
    migrate.upgrade(settings)
    return new_engine(settings.database_url.get_secret_value())


def stepped(engine: Engine, step: Callable[[Config, str], None], revision: str) -> None:
    config = migrate._config()
    with engine.begin() as connection:
        config.attributes["connection"] = connection
        step(config, revision)
