"""The rows of requests whose deed writes none: those of many requests in one transaction, and in one step of each tenant's chain.

A request waits for its row, and is answered once that is durable: killed at any instant, a process has answered nothing that the
log does not tell. Knows the audit log and threads; decides nothing, and knows nothing of HTTP but a route's name and a status.
"""

from __future__ import annotations

import asyncio
import logging
import threading
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from typing import Any, TypeVar
from weakref import WeakKeyDictionary

from sqlalchemy import Engine
from sqlalchemy.orm import Session

from cloister_server import audit
from cloister_server.errors import LedgerRolledBack, ServerError, Unavailable
from cloister_server.policy import DECIDED, Decided
from cloister_server.principal import Principal
from cloister_server.store import chain
from cloister_server.store.acting import for_tenants
from cloister_server.store.session import writing

__all__ = ["Noted", "keep"]

log = logging.getLogger(__name__)

T = TypeVar("T")

_MOST_WAITING = 4096
"""Requests, of one process. Whoever comes when as many wait is refused at once."""
_IDLE_S = 1.0
"""How long a thread that has nothing to write stays."""
_THREADS: Mapping[str, int] = {"sqlite": 1}
"""Of an engine. SQLite has one writer, who takes all tenants' rows at once. Elsewhere each takes one tenant's, so that whoever holds a
tenant's chain keeps no other tenant waiting."""
_MOST_THREADS = 4


@dataclass(slots=True)
class Noted:
    """What was decided for one request, and whether a deed's own transaction has told of it already."""

    decided: list[Decided] = field(default_factory=list)
    is_told: bool = False

    def within(self, work: Callable[[Session], T]) -> Callable[[Session], T]:
        """The work of a transaction, with what is decided in it noted, however often it runs anew."""
        before = len(self.decided)

        def noting(session: Session) -> T:
            del self.decided[before:]
            session.info[DECIDED] = self.decided
            return work(session)

        return noting

    def of_deed(self, work: Callable[[Session], T]) -> Callable[[Session], tuple[T, bool]]:
        """The same of one that writes; and whether it tells of itself, once it is committed."""
        return self.within(lambda session: (work(session), chain.tells(session)))


async def keep(engine: Engine, principal: Principal, noted: Noted, *, route: tuple[str, str], status: int) -> None:
    """Tell of a request that is about to be answered so, and return once that is durable.

    A row for each decision; where none was taken and it is answered, as a list of one's own is, one that has the route's method and
    template for verb and resource. Raises Unavailable `audit_unavailable` where the log cannot be written. Of a tenant whose ledger
    is older than its anchor, which can be read and whose chain must not go on, the rows are in the process' own log instead.
    """
    if noted.is_told:
        return
    told: Iterable[tuple[str, str, str | None]]
    told = dict.fromkeys((each.verb, each.resource_id, each.grant_id) for each in noted.decided)
    if not told:
        if status >= 400:
            return
        told = ((*route, None),)
    outcome = "allowed" if status < 400 else "allowed: not done"  # never why: a refusal may be about rows
    rows = [audit.values_of(principal, verb, on, outcome=outcome, grant_id=grant) for verb, on, grant in told]
    await _batches_of(engine).append(engine, principal.tenant_id, rows)


@dataclass(frozen=True, slots=True)
class _Waiting:
    rows: list[dict[str, Any]]
    loop: asyncio.AbstractEventLoop
    written: asyncio.Future[None]


_ByTenant = dict[str, list[_Waiting]]


class _Batches:
    """Who waits for rows of one engine, by tenant, and the threads that write them."""

    def __init__(self, engine: Engine) -> None:
        self._most_threads = _THREADS.get(engine.dialect.name, _MOST_THREADS)
        self._takes_all = self._most_threads == 1
        self._changed = threading.Condition()
        self._waiting: _ByTenant = {}
        self._writing: set[str] = set()
        self._count = self._threads = self._idle = 0

    async def append(self, engine: Engine, tenant_id: str, rows: list[dict[str, Any]]) -> None:
        loop = asyncio.get_running_loop()
        written = loop.create_future()
        with self._changed:
            if self._count >= _MOST_WAITING:
                raise _unavailable()
            if self._idle:
                self._changed.notify()
            elif self._threads < self._most_threads:
                self._begin(engine)
            self._waiting.setdefault(tenant_id, []).append(_Waiting(rows, loop, written))
            self._count += 1
        await written

    def _begin(self, engine: Engine) -> None:
        """Raises Unavailable where the machine has no thread left and none writes: nobody waits for one that never began."""
        try:
            threading.Thread(target=self._run, args=(engine,), name="audit", daemon=True).start()
        except RuntimeError:
            if not self._threads:
                raise _unavailable() from None
        else:
            self._threads += 1

    def _run(self, engine: Engine) -> None:
        while taken := self._take():
            _write(engine, taken)
            with self._changed:
                self._writing -= taken.keys()
                if self._waiting:
                    self._changed.notify()

    def _take(self) -> _ByTenant:
        """All that waits, or one tenant's, which nobody else is writing; nothing where the thread is to end."""
        with self._changed:
            while not (free := self._waiting.keys() - self._writing):
                self._idle += 1
                is_told = self._changed.wait(_IDLE_S)
                self._idle -= 1
                if not is_told and not self._waiting:
                    self._threads -= 1
                    return {}
            tenants = free if self._takes_all else {next(each for each in self._waiting if each in free)}
            taken = {each: self._waiting.pop(each) for each in tenants}
            self._writing |= taken.keys()
            self._count -= sum(map(len, taken.values()))
            return taken


def _write(engine: Engine, taken: _ByTenant) -> None:
    rows = [row for waiting in taken.values() for each in waiting for row in each.rows]
    refusal: ServerError | None = None
    try:
        with writing(engine, for_tenants(*taken)) as session:
            chain.add(session, rows)
    except Exception as error:
        if len(taken) > 1:  # one tenant's chain is no other's matter
            for tenant_id, waiting in taken.items():
                _write(engine, {tenant_id: waiting})
            return
        if isinstance(error, LedgerRolledBack):
            for row in rows:
                log.warning("audit.beside_the_chain", extra={**row, "time": row["time"].isoformat()})
        else:
            log.error("audit.not_written", extra={"error": type(error).__name__, "tenant_id": next(iter(taken))})
            refusal = _unavailable()
    by_loop: dict[asyncio.AbstractEventLoop, list[asyncio.Future[None]]] = defaultdict(list)
    for waiting in taken.values():
        for each in waiting:
            by_loop[each.loop].append(each.written)
    for loop, futures in by_loop.items():
        with suppress(RuntimeError):  # the loop is closed: nobody is answered there any more
            loop.call_soon_threadsafe(_settle, futures, refusal)


def _settle(futures: list[asyncio.Future[None]], refusal: ServerError | None) -> None:
    for each in futures:
        if each.done():
            continue
        if refusal is None:
            each.set_result(None)
        else:
            each.set_exception(refusal)


def _unavailable() -> Unavailable:
    return Unavailable(
        "the audit log cannot be written at this moment, and nothing is answered without its row there; retry in a moment",
        code="audit_unavailable",
    )


_batches: WeakKeyDictionary[Engine, _Batches] = WeakKeyDictionary()
"""Those of each deployment that this process serves. Their threads end when nothing is left to write."""
_batches_lock = threading.Lock()


def _batches_of(engine: Engine) -> _Batches:
    with _batches_lock:
        found = _batches.get(engine)
        if found is None:
            found = _batches[engine] = _Batches(engine)
        return found
