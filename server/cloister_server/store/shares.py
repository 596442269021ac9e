"""How many uses of something pass in a minute, all processes together: a process takes shares of what is left, and spends those.

One row counts what is taken of the clock's minute, and more than the minute has is never taken: so no more ever pass, and counting
costs some hundred writes a minute, however many uses there are. What a process has taken and does not use is lost with the minute:
a sixteenth, at most, of what was left when it took it. Knows threads and the clock; what is used, and where it is counted, is for
`request_rate` and `grant_rate` to say.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from sqlalchemy import Engine

from cloister_server.store.tables import Count

__all__ = ["SHARES", "Share", "Shares", "shares_of", "take", "this_minute", "unbounded"]

SHARES = "shares"
"""Under this name an engine's execution options have its process' shares."""

_MINUTE_S = 60
_SHARES = 16
"""A process takes one of so many of what is left of a minute."""
_ASKING_AT_ONCE = 16
_KEPT_S = 1.0
"""How long it is remembered that there is no bound, or nothing left: another bound holds within that."""
_MOST_KEPT = 10_000


@dataclass(slots=True)
class Share:
    """What a process may let pass between two times: a number of uses, or infinity."""

    left: float
    since: float
    until: float
    minute_ends: float
    is_refused: bool
    """Whether nothing was left of the minute: then nobody need ask again so soon."""
    renews: float = math.inf
    """From then on one use asks again, for all that come meanwhile."""
    is_renewing: bool = False

    def wait_s(self, at: float) -> int:
        """Until the next minute: whole seconds, and a minute at most, whatever the clocks say."""
        return int(min(_MINUTE_S, max(1, math.ceil(self.minute_ends - at))))


class Shares:
    """The shares of one process, by the id of what is used."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._asking = tuple(threading.Lock() for _ in range(_ASKING_AT_ONCE))
        self._kept: dict[str, Share] = {}

    def spend(self, used_id: str) -> int | None:
        """Count a use of what this process has taken: 0, or the seconds to wait; None where the database is to be asked."""
        at = _now()
        with self._lock:
            share = self._kept.get(used_id)
            if share is None or not share.since <= at < share.until:
                return None
            if at >= share.renews:
                share.renews, share.is_renewing = math.inf, True
                return None
            if share.left:
                share.left -= 1
                return 0
        return share.wait_s(at) if share.is_refused else None

    def use(self, used_id: str, taken: Callable[[float], Share]) -> int:
        """Count a use, of a share that is `taken` now where none is left: 0, or the seconds to wait, and then none is counted.

        `taken` counts it in a transaction of its own: the caller has none open.
        """
        with self._asking[hash(used_id) % _ASKING_AT_ONCE]:  # of many that come at once one asks
            if not self._is_renewing(used_id) and (spent := self.spend(used_id)) is not None:
                return spent
            share = taken(_now())
            wait_s = 0 if share.left else share.wait_s(_now())
            if share.left:
                share.left -= 1  # this use's own
            self._keep(used_id, share)
            return wait_s

    def _is_renewing(self, used_id: str) -> bool:
        with self._lock:
            share = self._kept.get(used_id)
            return share is not None and share.is_renewing

    def _keep(self, used_id: str, share: Share) -> None:
        with self._lock:
            self._kept.pop(used_id, None)
            while len(self._kept) >= _MOST_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[used_id] = share


def shares_of(engine: Engine) -> Shares:
    """Those of the deployment that this process serves by the engine, or by one made of it."""
    found: Shares = engine.get_execution_options()[SHARES]
    return found


def take(count: Count, allowed: int, *, at: float) -> Share:
    """A share of what is left of the minute, counted in the row: the caller's transaction has its lock."""
    minute = int(at // _MINUTE_S)
    # The clock of another machine may have come to the next minute already; what is further off was a wrong clock.
    if count.minute not in (minute, minute + 1):
        count.minute, count.taken = minute, 0
    number = math.ceil(max(0, allowed - count.taken) / _SHARES)
    count.taken += number
    begins, ends = float(count.minute * _MINUTE_S), float((count.minute + 1) * _MINUTE_S)
    if not number:
        return Share(0, at, min(at + _KEPT_S, ends), minute_ends=ends, is_refused=True)
    return Share(number, min(at, begins), ends, minute_ends=ends, is_refused=False)


def unbounded(at: float) -> Share:
    """Of what has no bound: nothing is counted."""
    return Share(math.inf, at, at + _KEPT_S, minute_ends=math.inf, is_refused=False, renews=at + _KEPT_S / 2)


def this_minute() -> int:
    """Whole minutes since 1970, by the clock."""
    return int(_now() // _MINUTE_S)


def _now() -> float:
    return time.time()
