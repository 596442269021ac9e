"""How many requests a tenant's principals send in a minute, all processes together. Knows SQL; decides nothing else of a request.

One row counts what is taken of the tenant's minute. A process takes shares of what is left of it, and lets requests pass out of
those: no more than the quota ever pass, and counting costs some hundred writes a minute, however many requests there are. What a
process has taken and does not use is lost with the minute: a sixteenth, at most, of what was left when it took it.
"""

from __future__ import annotations

import math
import threading
import time
from dataclasses import dataclass
from weakref import WeakKeyDictionary

from sqlalchemy import Engine, Select, func, select

from cloister_server.errors import RateLimited
from cloister_server.service import Service
from cloister_server.store.acting import for_tenants
from cloister_server.store.session import reading, writing
from cloister_server.store.tables import RequestCount, Tenant

__all__ = ["admit", "admit_from_memory", "taken"]

_MINUTE_S = 60
_SHARES = 16
"""A process takes one of so many of what is left of a minute."""
_ASKING_AT_ONCE = 16
_KEPT_S = 1.0
"""How long it is remembered that a tenant has no quota, or nothing left: another quota holds within that."""


def admit_from_memory(service: Service, tenant_id: str) -> bool:
    """Whether a request of the tenant passes by what this process has taken already; False where the database is to be asked.

    Raises RateLimited.
    """
    return _memory(service).spend(tenant_id, _now())


def admit(service: Service, tenant_id: str) -> None:
    """Count a request of the tenant. Raises RateLimited `request_quota_exceeded` where its minute is used up."""
    memory = _memory(service)
    with memory.asking(tenant_id):
        if memory.spend(tenant_id, _now()):  # of many that came at once one has asked by now
            return
        share = _taken(service, tenant_id)
        if share.left:
            share.left -= 1  # this request's own
            memory.keep(tenant_id, share)
            return
        memory.keep(tenant_id, share)
    if not memory.spend(tenant_id, _now()):
        raise _refusal(share.minute_ends - _now())


def taken(tenant_id: str) -> Select[int]:
    """How many of the requests that a tenant may send in this minute are taken, by whatever process, used or not."""
    this_minute = RequestCount.minute == int(_now() // _MINUTE_S)
    return select(func.coalesce(func.sum(RequestCount.taken), 0)).where(
        RequestCount.tenant_id == tenant_id, this_minute
    )


@dataclass(slots=True)
class _Share:
    """What a process may let pass between two times: a number of requests, or infinity."""

    left: float
    since: float
    until: float
    minute_ends: float
    is_refused: bool
    """Whether nothing was left of the minute: then nobody need ask again so soon."""


class _Memory:
    """The shares of one process, by tenant."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asking = tuple(threading.Lock() for _ in range(_ASKING_AT_ONCE))
        self._shares: dict[str, _Share] = {}

    def asking(self, tenant_id: str) -> threading.Lock:
        """Held while the database is asked about the tenant, once for all who wait."""
        return self._asking[hash(tenant_id) % _ASKING_AT_ONCE]

    def spend(self, tenant_id: str, at: float) -> bool:
        with self._lock:
            share = self._shares.get(tenant_id)
            if share is None or not share.since <= at < share.until:
                return False
            if share.left:
                share.left -= 1
                return True
        if share.is_refused:
            raise _refusal(share.minute_ends - at)
        return False

    def keep(self, tenant_id: str, share: _Share) -> None:
        with self._lock:
            before = self._shares.get(tenant_id)
            is_same = before is not None and before.minute_ends == share.minute_ends and share.since < before.until
            if before is not None and before.left and is_same:
                # Another request asked at the same moment: both shares are one, and not refused before they are used up.
                share.left, share.until, share.is_refused = share.left + before.left, before.until, False
            self._shares[tenant_id] = share


def _taken(service: Service, tenant_id: str) -> _Share:
    """A share of the tenant's minute, counted. Of a tenant without a quota nothing is written."""
    at = _now()
    with reading(service.engine, for_tenants(tenant_id)) as session:
        if session.scalars(_quota(tenant_id)).one() is None:
            return _unbounded(at)
    with writing(service.engine, for_tenants(tenant_id)) as session:
        count = session.get_one(RequestCount, tenant_id, with_for_update=True)
        allowed = session.scalars(_quota(tenant_id)).one()
        if allowed is None:
            return _unbounded(at)
        minute = int(at // _MINUTE_S)
        # The clock of another machine may have come to the next minute already; what is further off was a wrong clock.
        if count.minute not in (minute, minute + 1):
            count.minute, count.taken = minute, 0
        number = math.ceil(max(0, allowed - count.taken) / _SHARES)
        count.taken += number
        ends = float((count.minute + 1) * _MINUTE_S)
    return _Share(number, at, ends if number else min(at + _KEPT_S, ends), minute_ends=ends, is_refused=not number)


def _unbounded(at: float) -> _Share:
    return _Share(math.inf, at, at + _KEPT_S, minute_ends=math.inf, is_refused=False)


def _quota(tenant_id: str) -> Select[int | None]:
    return select(Tenant.quota_requests).where(Tenant.id == tenant_id)


def _refusal(wait_s: float) -> RateLimited:
    wait = min(_MINUTE_S, max(1, math.ceil(wait_s)))
    return RateLimited(
        f"your tenant has sent as many requests in this minute as its quota allows; try again in {wait} s, or ask the server's "
        "operator for a larger quota",
        code="request_quota_exceeded",
        details={"retry_after_s": wait},
    )


def _now() -> float:
    return time.time()


_memories: WeakKeyDictionary[Engine, _Memory] = WeakKeyDictionary()
"""One memory for each deployment that this process serves; it goes when the engine goes."""
_memories_lock = threading.Lock()


def _memory(service: Service) -> _Memory:
    with _memories_lock:
        found = _memories.get(service.engine)
        if found is None:
            found = _memories[service.engine] = _Memory()
        return found
