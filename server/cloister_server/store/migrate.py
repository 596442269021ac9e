"""The schema's version: brought to the newest by `cloister-admin init`, checked at every start. Knows the two roles.

On PostgreSQL the owner migrates and the runtime role only reads and writes rows; of the ledger and the audit log it
may neither change nor delete any.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from sqlalchemy import Connection, Engine, inspect, make_url, text

from cloister_server.errors import StartRefused
from cloister_server.settings import Settings
from cloister_server.store import identities, issuers, operators  # noqa: F401 (their tables are the role's too)
from cloister_server.store.session import new_engine
from cloister_server.store.tables import AuditRow, Balance, LedgerEntry, Link, Table

if TYPE_CHECKING:
    from alembic.config import Config

__all__ = ["NEWEST", "check_current", "upgrade"]

NEWEST = "0017"
"""The last of the migrations. Said here, since every process looks whether its database is there, and one alone needs Alembic."""

_APPEND_ONLY = {table.__tablename__ for table in (LedgerEntry, Balance, Link, AuditRow)}


def upgrade(settings: Settings) -> None:
    """Migrate to the newest schema and (PostgreSQL) make the runtime role and its rights. Running it again is harmless."""
    if settings.is_sqlite:
        _migrate(new_engine(settings.database_url.get_secret_value()))
        return
    if settings.owner_database_url is None:
        raise StartRefused(
            "PostgreSQL needs the owner's URL to migrate: set CLOISTER_OWNER_DATABASE_URL for `cloister-admin init` only"
        )
    owner = new_engine(settings.owner_database_url.get_secret_value())
    runtime = make_url(settings.database_url.get_secret_value())
    if runtime.username == owner.url.username:
        raise StartRefused(
            "the runtime URL names the owner's role; the service must run as a role that owns nothing: "
            "give CLOISTER_DATABASE_URL a user of its own (init creates it)"
        )
    _migrate(owner)
    try:
        with owner.begin() as connection:
            _set_runtime_role(connection, str(runtime.username), str(runtime.password or ""))
    finally:
        owner.dispose()
    _migrate_workflows(settings, str(runtime.username))


def check_current(engine: Engine) -> None:
    """Refuse to run on a schema that is not the newest this release knows."""
    with engine.connect() as connection:
        has_version = inspect(connection).has_table("alembic_version")
        current = list(connection.scalars(text("SELECT version_num FROM alembic_version"))) if has_version else []
    if not current:
        raise StartRefused("the database is empty: this deployment is not initialised; run `cloister-admin init`")
    if current != [NEWEST]:
        raise StartRefused(
            f"the database is at migration {', '.join(current)} and this release needs {NEWEST}; stop all servers, back up, "
            "then run `cloister-admin init`"
        )


def _migrate(engine: Engine) -> None:
    from alembic import command

    config = _config()
    try:
        with engine.connect() as connection:
            if engine.dialect.name == "sqlite":
                # To change a column SQLite copies the table and drops the old one, which rows elsewhere still refer to.
                _driver(connection).execute("PRAGMA foreign_keys=OFF")
            with connection.begin():
                config.attributes["connection"] = connection
                command.upgrade(config, "head")
                if engine.dialect.name == "sqlite" and connection.exec_driver_sql("PRAGMA foreign_key_check").first():
                    raise StartRefused("after the migration rows refer to rows that are not there; nothing was changed")
    finally:
        engine.dispose()


def _driver(connection: Connection) -> Any:
    """The driver's own connection, on which no transaction is begun yet."""
    return connection.connection.driver_connection


def _migrate_workflows(settings: Settings, role: str) -> None:
    """The durable queue's own schema, made by the owner: the runtime role may not create one."""
    from dbos import DBOS

    assert settings.owner_database_url is not None  # noqa: S101 (checked by the caller)
    DBOS.migrate(settings.owner_database_url.get_secret_value(), application_role=role)


def _set_runtime_role(connection: Connection, role: str, password: str) -> None:
    quote = connection.dialect.identifier_preparer.quote
    found = connection.execute(
        text(
            "SELECT rolsuper OR rolcreaterole OR rolcreatedb OR rolbypassrls AS is_mighty FROM pg_roles WHERE rolname = :role"
        ),
        {"role": role},
    ).one_or_none()
    if found is not None and found.is_mighty:
        raise StartRefused(
            f"the runtime role {role!r} is a superuser, or may create roles or databases, or passes by row security; "
            "name a role in CLOISTER_DATABASE_URL that may do none of it (init creates it)"
        )
    literal = connection.scalar(text("SELECT quote_literal(:password)"), {"password": password})
    verb = "CREATE" if found is None else "ALTER"
    connection.exec_driver_sql(f"{verb} ROLE {quote(role)} LOGIN PASSWORD {literal}".replace("%", "%%"))
    connection.exec_driver_sql(f"GRANT USAGE ON SCHEMA public TO {quote(role)}")
    connection.exec_driver_sql(f"GRANT SELECT ON alembic_version TO {quote(role)}")
    for table in Table.metadata.tables:
        rights = "SELECT, INSERT" if table in _APPEND_ONLY else "SELECT, INSERT, UPDATE, DELETE"
        connection.exec_driver_sql(f"REVOKE ALL ON {quote(table)} FROM {quote(role)}")
        connection.exec_driver_sql(f"GRANT {rights} ON {quote(table)} TO {quote(role)}")


def _config() -> Config:
    """Migrations lie beside the package in the wheel, and at the top of the repository in an editable install."""
    from alembic.config import Config

    here = Path(__file__).resolve().parents[1]
    shipped, source = here / "_migrations", here.parents[1] / "migrations"
    config = Config()
    config.set_main_option("script_location", str(shipped if shipped.is_dir() else source))
    return config
