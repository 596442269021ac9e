"""Which version of a model answers, and whether that is allowed, in one statement of the driver's own: predictions are many.

It only ever says yes, of a model of one's own tenant, by a snapshot of the very revision that the statement read. Whatever else there
is to say (another tenant's model, a denial, a rate, a snapshot that is not there) is left to the sessions and their gates.

Requests that wait for the event loop together share a statement: each of them had come before it was asked.
"""

from __future__ import annotations

import asyncio
import weakref
from typing import Any, NamedTuple

from sqlalchemy import Engine

from cloister_server.principal import Principal
from cloister_server.store.decisions import SNAPSHOTS, Decisive, Snapshots

__all__ = ["Served", "Serving"]

_BUSY_S = 0.05
"""Of SQLite's own patience: whoever asks is the event loop."""

_SERVED = """
SELECT policy_revisions.revision, models.id, models.name, model_versions.version, model_versions.weights_id
FROM models
JOIN model_versions ON model_versions.tenant_id = models.tenant_id AND model_versions.model_id = models.id
    AND model_versions.version = coalesce(?, models.champion)
JOIN policy_revisions ON policy_revisions.tenant_id = models.tenant_id
WHERE models.tenant_id = ? AND models.{} = ?
"""
_BY_NAME, _BY_ID = _SERVED.format("name"), _SERVED.format("id")


class Served(NamedTuple):
    """A version of a model, and the grant that allows what was asked of it."""

    model_id: str
    model: str
    version: int
    weights_id: str
    by: Decisive


class Serving:
    """A connection of its own, for one event loop. On PostgreSQL, where a question is a round trip, it leaves all to the sessions."""

    def __init__(self, engine: Engine) -> None:
        self._snapshots: Snapshots = engine.get_execution_options()[SNAPSHOTS]
        self._read: dict[tuple[Any, ...], Any] = {}
        self._forgets: asyncio.AbstractEventLoop | None = None
        self._connection: Any = None
        if engine.dialect.name == "sqlite":
            pooled = engine.raw_connection()
            self._connection = pooled.driver_connection
            pooled.detach()
            self._connection.execute(f"PRAGMA busy_timeout={int(_BUSY_S * 1000)}")
            weakref.finalize(self, self._connection.close)

    def find(
        self, principal: Principal, verb: str, id_or_name: str, number: int | None, *, is_id: bool
    ) -> Served | None:
        """The version that answers (the champion where none is named) if the principal may do the verb to it; else None, which
        denies nothing."""
        if self._connection is None:
            return None
        row = self._row(_BY_ID if is_id else _BY_NAME, number, principal.tenant_id, id_or_name)
        if row is None:
            return None
        snapshot = self._snapshots.kept(principal.tenant_id, row[0])
        if snapshot is None:
            return None
        by = snapshot.decided(snapshot, principal, verb, row[1])
        if by is None or by.effect != "allow" or by.conditions.requests_per_minute is not None:
            return None
        _, model_id, model, version, weights_id = row
        return Served(model_id, model, version, weights_id, by)

    def _row(self, statement: str, *asked: Any) -> Any:
        """The statement's row, if there is one: as it is now, or was when the first asked of those that the loop had ready then.

        What the loop is given to do meanwhile, it does after it forgot.
        """
        read, loop = self._read, asyncio.get_running_loop()
        if loop is not self._forgets:  # one that stopped before it forgot never will
            read.clear()
            self._forgets = loop
        key = (statement, asked)
        if key not in read:
            if not read:
                loop.call_soon(read.clear)
            try:
                read[key] = self._connection.execute(statement, asked).fetchone()
            except self._connection.Error:
                return None
        return read[key]
