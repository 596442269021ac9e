"""Party 0's material of one generation, fetched ahead by a thread of its own. Knows the dealer's link and the spool; opens nothing."""

from __future__ import annotations

import json
import threading

from cloister_privacy.mpc.dealer import CONTROL_BYTES, REFUSED
from cloister_privacy.mpc.deployment import Limits
from cloister_privacy.mpc.errors import MaterialExhausted, PrivateInferenceError, RequestDropped
from cloister_privacy.mpc.keystream import Index
from cloister_privacy.mpc.links import Deadline, Link
from cloister_privacy.mpc.spool import Spool

__all__ = ["Stock"]

_LOOK_S = 0.2
_KINDS = 8
"""For how many numbers of rows material is kept ready: those that are joined, and some more."""


class Stock:
    """Ends with the dealer's link, or with `close`."""

    def __init__(self, dealer: Link, spool: Spool, *, limits: Limits) -> None:
        self._dealer, self._spool, self._limits = dealer, spool, limits
        self._changed = threading.Condition()
        self._wanted = [1]
        """Numbers of rows, the latest last."""
        self._counts: dict[int, int] = {}
        self._sizes: dict[int, int] = {}
        self._refused: dict[int, MaterialExhausted] = {}
        self._waiting: int | None = None
        self._ended: PrivateInferenceError | None = None
        self._thread = threading.Thread(target=self._run, name="mpc-stock", daemon=True)
        self._thread.start()

    @property
    def is_over(self) -> bool:
        return self._ended is not None

    def take(self, rows: int, deadline: Deadline) -> tuple[Index, bytes]:
        """The next index of so many rows and its sealed corrections. Raises MaterialExhausted and RequestDropped."""
        with self._changed:
            self._wanted = [*[each for each in self._wanted if each != rows][1 - _KINDS :], rows]
            self._spool.clear(but=self._wanted)
            self._waiting = rows
            self._changed.notify_all()
            try:
                while (found := self._spool.take(rows)) is None:
                    if self._ended is not None:
                        raise self._ended
                    if rows in self._refused:
                        raise self._refused.pop(rows)
                    if deadline.is_past:
                        raise MaterialExhausted(
                            "the dealer has given no material in time; nothing was spent, try again"
                        )
                    self._changed.wait(min(deadline.left_s, _LOOK_S))
            finally:
                self._waiting = None
            self._changed.notify_all()
            return found

    def close(self) -> None:
        with self._changed:
            if self._ended is None:
                self._ended = RequestDropped("the group is being formed anew; try again")
            self._changed.notify_all()
        self._dealer.close()
        self._thread.join()
        self._spool.clear()

    def _run(self) -> None:
        try:
            while True:
                with self._changed:
                    rows = self._next()
                    if rows is None and self._ended is None:
                        self._changed.wait(_LOOK_S)
                        rows = self._next()
                    if self._ended is not None:
                        return
                if rows is not None:
                    self._fetch(rows)
                elif self._dealer.wait(Deadline.after(0)):
                    raise RequestDropped("the dealer ended the generation; form anew and try again")
        except PrivateInferenceError as exc:
            with self._changed:
                self._ended = self._ended or exc
                self._changed.notify_all()

    def _next(self) -> int | None:
        """Whose material to fetch: what somebody waits for, then the latest that is short and has room."""
        if self._waiting is not None and not self._spool.count(self._waiting) and self._waiting not in self._refused:
            return self._waiting
        for rows in reversed(self._wanted):
            is_short = self._spool.count(rows) < self._limits.ahead and rows not in self._refused
            if is_short and rows in (*self._sizes, 1) and self._spool.has_room(self._sizes.get(rows, 0)):
                return rows
        return None

    def _fetch(self, rows: int) -> None:
        index = Index(rows, self._counts.get(rows, 0) + 1)
        self._counts[rows] = index.count
        deadline = Deadline.after(self._limits.request_s)
        most = self._limits.disk_bytes
        self._dealer.send(json.dumps({"rows": rows, "count": index.count, "most": most}).encode(), deadline)
        answer = self._dealer.receive(most + most // 8 + CONTROL_BYTES, deadline)  # sealed it is somewhat longer
        status, body = answer[:1], answer[1:]
        with self._changed:
            try:
                if status == REFUSED:
                    raise MaterialExhausted(body.decode("utf-8", errors="replace"))
                self._sizes[rows] = len(body)
                if rows == self._waiting and not self._spool.has_room(len(body)):
                    self._spool.clear()  # what somebody waits for comes before what is kept ahead
                self._spool.put(index, body)
            except MaterialExhausted as exc:
                self._refused[rows] = exc
            self._changed.notify_all()
