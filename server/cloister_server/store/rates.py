"""How often each grant was used in the last minute, in this process. Knows no database."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque

__all__ = ["RATES", "Rates"]

RATES = "rates"
"""Under this name a session's `info` has the engine's rates."""

_MINUTE_S = 60.0
_MOST_GRANTS = 10_000


class Rates:
    """The uses of the last minute, by grant."""

    def __init__(self) -> None:
        self._uses: OrderedDict[str, deque[float]] = OrderedDict()
        self._lock = threading.Lock()

    def take(self, grant_id: str, *, per_minute: int) -> float:
        """Count a use, if it is one of `per_minute` in any minute: 0, or the seconds to wait, and then none is counted."""
        at = time.monotonic()
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
