"""Migrating is upgrading: it can be done again, by an owner that is no superuser, and leaves a role that owns nothing."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from alembic import command
from alembic.autogenerate import compare_metadata
from alembic.config import Config
from alembic.runtime.migration import MigrationContext
from alembic.script import ScriptDirectory
from pydantic import SecretStr
from sqlalchemy import Engine, create_engine, text
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


def test_the_newest_migration_is_the_one_that_every_start_looks_for() -> None:
    assert ScriptDirectory.from_config(migrate._config()).get_heads() == [migrate.NEWEST]


@pytest.mark.parametrize(
    "done",
    [
        "DROP TABLE alembic_version",
        "DELETE FROM alembic_version",
        "UPDATE alembic_version SET version_num = '0016'",
        "INSERT INTO alembic_version VALUES ('0016')",
    ],
)
def test_a_schema_that_is_not_the_newest_alone_is_refused_by_name(tmp_path: Path, done: str) -> None:
    engine = migrated(tmp_path)
    with engine.begin() as connection:
        connection.execute(text(done))
    with pytest.raises(StartRefused, match="cloister-admin init"):
        migrate.check_current(engine)
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


def test_jobs_from_before_queries_keep_their_attempts(tmp_path: Path) -> None:
    engine = migrated(tmp_path)
    with engine.begin() as connection:
        connection.execute(text("PRAGMA defer_foreign_keys=ON"))
        connection.execute(
            text(
                "INSERT INTO jobs (tenant_id, id, source_id, dataset_id, model_id, principal_id, request_id, spec_id, status,"
                " steps, epsilon, delta, steps_done, attempt, cancel_requested, created)"
                " VALUES ('t', 'j', 's', 'd', 'm', 'p', 'r', 'o', 'done', 1, 1, 1e-6, 1, 1, 0, '2026-01-01')"
            )
        )
        connection.execute(
            text(
                "INSERT INTO attempts (tenant_id, job_id, number, started, from_step) VALUES ('t', 'j', 1, '2026-01-01', 0)"
            )
        )
        for table, columns in (
            ("sources", "'t', 's', 's', 'row', 'add_remove', 1, 1e-6, 0, 'o', '2026-01-01'"),
            ("models", "'t', 'm', 'm', 0, '2026-01-01'"),
        ):
            connection.execute(text(f"INSERT INTO {table} VALUES ({columns})"))  # noqa: S608 (words of this test)
        connection.execute(
            text(
                "INSERT INTO datasets (tenant_id, id, source_id, name, columns, nominal_size, capacity, capacity_rows,"
                " part_rows, parts, status, created) VALUES ('t', 'd', 's', 'd', '{}', 1, 1, 1, 1, 1, 'ready', '2026-01-01')"
            )
        )
    engine.dispose()
    unchecked = create_engine(engine.url)
    stepped(unchecked, command.downgrade, "0004")
    unchecked.dispose()
    engine = migrated(tmp_path)
    with engine.connect() as connection:
        assert connection.execute(
            text("SELECT jobs.kind, number FROM attempts JOIN jobs ON jobs.id = job_id")
        ).all() == [("train", 1)]
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
