"""Engines and transactions: how a database must be set before we trust it, for whom one reads and writes, and what is linked."""

from __future__ import annotations

import logging
import threading
import weakref
from collections.abc import Iterator
from contextlib import closing, contextmanager
from typing import Any

from sqlalchemy import Connection, Engine, create_engine, event, text
from sqlalchemy.orm import Session

from cloister_server.errors import StartRefused, Unavailable
from cloister_server.store import chain
from cloister_server.store.acting import Acting
from cloister_server.store.anchors import Anchors, Draft
from cloister_server.store.decisions import SNAPSHOTS, Snapshots
from cloister_server.store.isolation import acting_for, gated
from cloister_server.store.shares import SHARES, Shares

__all__ = [
    "anchors_of",
    "check_durability",
    "empty_log",
    "in_transaction",
    "new_engine",
    "reading",
    "snapshot",
    "writing",
]

log = logging.getLogger(__name__)

_WRITES, _ANCHORS = "cloister_writes", "cloister_anchors"


class _Begun(threading.local):
    """The connections on which this thread began transactions, as long as these may be open."""

    def __init__(self) -> None:
        self.on: list[weakref.ref[Connection]] = []


_BEGUN = _Begun()


@gated
class _Reading(Session):
    """A session that keeps to the tenants that it acts for."""


class _Writing(_Reading):
    """One whose new ledger and audit rows are linked before it commits."""


event.listen(_Writing, "transient_to_pending", chain.collect)


def new_engine(url: str, *, anchors: Anchors | None = None) -> Engine:
    """An engine on SQLite (WAL, synchronous=FULL, foreign keys on) or PostgreSQL (SERIALIZABLE is not needed: row locks are taken).

    What is written through it is held to `anchors`, and moves them; without them, chains are linked and anchored nowhere.
    """
    options = {_ANCHORS: anchors, SNAPSHOTS: Snapshots(), SHARES: Shares()}
    if not url.startswith("sqlite"):
        of_psycopg = url.replace("postgresql://", "postgresql+psycopg://", 1)
        engine = create_engine(of_psycopg, pool_pre_ping=True, execution_options=options)
        event.listen(engine, "begin", _note_begun)
        return engine
    engine = create_engine(url, connect_args={"timeout": 30, "check_same_thread": False}, execution_options=options)
    event.listen(engine, "connect", _set_pragmas)
    event.listen(engine, "begin", _begin)
    event.listen(engine, "begin", _note_begun)
    return engine


def _set_pragmas(connection: Any, _: object) -> None:
    connection.isolation_level = None  # the driver must not begin transactions of its own; `_begin` does
    for pragma in ("journal_mode=WAL", "synchronous=FULL", "foreign_keys=ON", "secure_delete=ON"):
        connection.execute(f"PRAGMA {pragma}")


def _begin(connection: Connection) -> None:
    # A write transaction takes the lock at once: upgrading from a read would fail under contention.
    writes = connection.get_execution_options().get(_WRITES, False)
    connection.exec_driver_sql("BEGIN IMMEDIATE" if writes else "BEGIN")


def _note_begun(connection: Connection) -> None:
    _BEGUN.on = [*_open(), weakref.ref(connection)]


def _open() -> list[weakref.ref[Connection]]:
    return [each for each in _BEGUN.on if (connection := each()) is not None and connection.in_transaction()]


def in_transaction() -> bool:
    """Whether this thread has a transaction open, on whatever database."""
    return bool(_open())


@contextmanager
def reading(engine: Engine, acting: Acting) -> Iterator[Session]:
    """A transaction that only reads, for whom it says; rolled back at the end."""
    known = {SNAPSHOTS: engine.get_execution_options().get(SNAPSHOTS)}
    with _Reading(engine, expire_on_commit=False, info=acting_for(acting) | known) as session:
        yield session


@contextmanager
def snapshot(engine: Engine, acting: Acting) -> Iterator[Session]:
    """A transaction that only reads, and sees one moment however long it takes."""
    options = {} if engine.dialect.name == "sqlite" else {"isolation_level": "REPEATABLE READ"}
    with reading(engine.execution_options(**options), acting) as session:
        yield session


@contextmanager
def writing(engine: Engine, acting: Acting) -> Iterator[Session]:
    """One transaction, for whom it says: commits when the block ends, rolls back when it raises. Its ledger and audit rows are linked.

    Raises LedgerRolledBack, and writes nothing, where one of those chains does not go on from its anchor.
    """
    drafts: list[Draft] = []
    bound = engine.execution_options(**{_WRITES: True})
    with _Writing(bound, expire_on_commit=False, info=acting_for(acting)) as session:
        try:
            with session.begin():
                yield session
                session.flush()
                chain.extend(session, anchors_of(engine), drafts)
        except BaseException:
            for draft in drafts:
                draft.discard()
            raise
    for draft in drafts:
        try:
            draft.publish()
        except Unavailable as error:  # what was committed is: the anchor stays behind until the next row of its ledger
            log.error("anchor.not_moved", extra={"tenant_id": draft.anchor.tenant_id, "error": str(error)})


def anchors_of(engine: Engine | Connection) -> Anchors | None:
    """What the engine's writes are held to."""
    found: Anchors | None = engine.get_execution_options().get(_ANCHORS)
    return found


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


def empty_log(engine: Engine) -> bool:
    """Take deleted rows out of SQLite's write-ahead log, too; False where a reader is in the way. (Deleted pages are zeroed.)"""
    if engine.dialect.name != "sqlite":
        return True
    with closing(engine.raw_connection()) as connection:
        cursor = connection.cursor()
        cursor.execute("PRAGMA busy_timeout=2000")
        (is_busy, *_) = cursor.execute("PRAGMA wal_checkpoint(TRUNCATE)").fetchone()
    return not is_busy
