"""Migrating is upgrading: it can be done again, by an owner that is no superuser, and leaves a role that owns nothing."""

from __future__ import annotations

from pathlib import Path

import pytest
from pydantic import SecretStr
from sqlalchemy import text
from sqlalchemy.exc import DBAPIError

from cloister_server.errors import StartRefused
from cloister_server.settings import Settings
from cloister_server.store import migrate
from cloister_server.store.session import check_durability, new_engine
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
