"""How often each grant was used in the last minute, in this process. Knows sessions by what they have at hand; asks no database."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from contextlib import suppress

from sqlalchemy.orm import Session

__all__ = ["RATES", "Rates", "give_back", "take"]

RATES = "rates"
"""Under this name a session's `info` has the engine's rates."""

_TAKEN = "rates_taken"
_MINUTE_S = 60.0
_MOST_GRANTS = 10_000


class Rates:
    """The uses of the last minute, by grant."""

    def __init__(self) -> None:
        self._uses: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, grant_id: str, *, per_minute: int, at: float) -> float:
        """Count a use, if it is one of `per_minute` in any minute: 0, or the seconds to wait, and then none is counted."""
        with self._lock:
            uses = self._uses.setdefault(grant_id, deque())
            self._uses.move_to_end(grant_id)
            while len(self._uses) > _MOST_GRANTS:
                self._uses.popitem(last=False)
            while uses and uses[0] <= at - _MINUTE_S:
                uses.popleft()
            if len(uses) >= per_minute:
                return uses[0] + _MINUTE_S - at
            uses.append(at)
            return 0.0

    def forget(self, grant_id: str, at: float) -> None:
        """Count a use no more that was taken then."""
        with self._lock, suppress(KeyError, ValueError):
            self._uses[grant_id].remove(at)


def take(session: Session, grant_id: str, *, per_minute: int) -> float:
    """A use of a grant in this transaction: 0, or the seconds to wait for one."""
    at, rates = time.monotonic(), session.info[RATES]
    wait_s: float = rates.take(grant_id, per_minute=per_minute, at=at)
    if wait_s == 0:
        session.info.setdefault(_TAKEN, []).append((grant_id, at))
    return wait_s


def give_back(session: Session) -> None:
    """Count what this transaction took no more: it runs again, and will take it then."""
    for grant_id, at in session.info.pop(_TAKEN, ()):
        session.info[RATES].forget(grant_id, at)
