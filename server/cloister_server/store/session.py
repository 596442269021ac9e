"""Engines and transactions: how a database must be set before we trust it, and when a transaction takes the write lock."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.orm import Session

from cloister_server.errors import StartRefused

__all__ = ["check_durability", "new_engine", "reading", "writing"]

_WRITES = "cloister_writes"


def new_engine(url: str) -> Engine:
    """An engine on SQLite (WAL, synchronous=FULL, foreign keys on) or PostgreSQL (SERIALIZABLE is not needed: row locks are taken)."""
    if not url.startswith("sqlite"):
        return create_engine(url.replace("postgresql://", "postgresql+psycopg://", 1), pool_pre_ping=True)
    engine = create_engine(url, connect_args={"timeout": 30, "check_same_thread": False})
    event.listen(engine, "connect", _set_pragmas)
    event.listen(engine, "begin", _begin)
    return engine


def _set_pragmas(connection: Any, _: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions of its own; `_begin` does
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    # A write transaction takes the lock at once: upgrading from a read would fail under contention.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


@contextmanager
def reading(engine: Engine) -> Iterator[Session]:
    """A transaction that only reads; rolled back at the end."""
    with Session(engine, expire_on_commit=False) as session:
        yield session


@contextmanager
def writing(engine: Engine) -> Iterator[Session]:
    """One transaction: commits when the block ends, rolls back when it raises."""
    with Session(engine.execution_options(**{_WRITES: True}), expire_on_commit=False) as session, session.begin():
        yield session


def check_durability(engine: Engine) -> None:
    """Refuse a database that may forget a committed charge (nothing may refund a budget by accident)."""
    with engine.connect() as connection:
        if engine.dialect.name == "sqlite":
            synchronous = connection.execute(text("PRAGMA synchronous")).scalar_one()
            journal = connection.execute(text("PRAGMA journal_mode")).scalar_one()
            if synchronous < 2 or journal != "wal":
                raise StartRefused(
                    f"SQLite runs with synchronous={synchronous}, journal_mode={journal}; a crash could refund a budget; "
                    "put the database on a local file system that supports WAL and synchronous=FULL"
                )
            return
        for setting in ("fsync", "synchronous_commit", "full_page_writes"):
            value = connection.execute(text(f"SHOW {setting}")).scalar_one()
            if value == "off":
                raise StartRefused(
                    f"PostgreSQL runs with {setting}=off; a crash could refund a budget; set {setting}=on and restart it"
                )
