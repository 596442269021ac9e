"""Who waits for an answer: at party 0 a queue in turns, at party 1 shares until they are asked for. Bounded; knows no sockets."""

from __future__ import annotations

import threading
import time
from collections import OrderedDict, deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future
from dataclasses import dataclass, field
from itertools import zip_longest

from cloister.wire.shares import Shares

__all__ = ["Busy", "Held", "Queue", "Request"]


class Busy(Exception):
    """There is no place; the message is for the caller."""

    def __init__(self) -> None:
        super().__init__("too many requests wait at this party; try again in a moment")


@dataclass(frozen=True, slots=True)
class Request:
    """A share of somebody's input, and where the share of the answer goes. Cancelled when nobody waits any more."""

    caller: str
    shares: Shares = field(repr=False)
    answer: Future[Shares] = field(default_factory=Future, repr=False)

    @property
    def rows(self) -> int:
        return len(next(iter(self.shares.tensors.values())))


class Queue:
    """Callers take turns, and each one's requests come in order. Raises Busy beyond `most` in all and `most_each` of one caller."""

    def __init__(self, *, most: int, most_each: int) -> None:
        self._most, self._most_each = most, most_each
        self._changed = threading.Condition()
        self._waiting: OrderedDict[str, deque[Request]] = OrderedDict()

    def put(self, request: Request) -> None:
        with self._changed:
            self._forget_cancelled()
            of_caller = self._waiting.get(request.caller, ())
            if len(of_caller) >= self._most_each or sum(map(len, self._waiting.values())) >= self._most:
                raise Busy
            self._waiting.setdefault(request.caller, deque()).append(request)
            self._changed.notify()

    def take(self, *, wait_s: float, most_rows: int = 1) -> list[Request]:
        """The next requests, which cannot be cancelled from then on; none where none came in time.

        As many in their turns as have together a power of two of rows, and `most_rows` at most; else the next alone.
        """
        until = time.monotonic() + wait_s
        with self._changed:
            while True:
                self._forget_cancelled()
                taken = [self._next() for _ in range(_joined((each.rows for each in self._in_turns()), most_rows))]
                # One that was cancelled just now is left out, and the others may be no power of two: they are answered all the same.
                if found := [each for each in taken if each.answer.set_running_or_notify_cancel()]:
                    return found
                if not taken and not self._changed.wait(until - time.monotonic()) and time.monotonic() >= until:
                    return []

    def left(self) -> list[Request]:
        """All that wait, in their turns, and wait no more."""
        return [request for taken in iter(lambda: self.take(wait_s=0), []) for request in taken]

    def _in_turns(self) -> Iterator[Request]:
        """As `_next` gives them."""
        for turn in zip_longest(*self._waiting.values()):
            yield from filter(None, turn)

    def _next(self) -> Request:
        caller, requests = self._waiting.popitem(last=False)
        request = requests.popleft()
        if requests:
            self._waiting[caller] = requests  # behind all others
        return request

    def _forget_cancelled(self) -> None:
        for caller, requests in list(self._waiting.items()):
            left = deque(each for each in requests if not each.answer.cancelled())
            if left:
                self._waiting[caller] = left
            else:
                del self._waiting[caller]


def _joined(rows: Iterable[int], most: int) -> int:
    """How many of those that wait are taken: none of none."""
    count = total = 0
    for number, more in enumerate(rows, start=1):
        total += more
        if number > 1 and total > most:
            break
        if number == 1 or total.bit_count() == 1:
            count = number
    return count


class Held:
    """Shares by their request's id. Raises Busy as `Queue` does, and where an id is held already."""

    def __init__(self, *, most: int, most_each: int) -> None:
        self._most, self._most_each = most, most_each
        self._lock = threading.Lock()
        self._held: dict[bytes, Request] = {}

    def put(self, request: Request) -> None:
        with self._lock:
            self._held = {key: each for key, each in self._held.items() if not each.answer.cancelled()}
            of_caller = sum(each.caller == request.caller for each in self._held.values())
            if request.shares.request in self._held or len(self._held) >= self._most or of_caller >= self._most_each:
                raise Busy
            self._held[request.shares.request] = request

    def take(self, request: bytes) -> Request | None:
        """That request, which cannot be cancelled from then on; None where it is not there."""
        with self._lock:
            found = self._held.pop(request, None)
        return found if found is not None and found.answer.set_running_or_notify_cancel() else None

    def left(self) -> list[Request]:
        """All that are held, and are no more."""
        with self._lock:
            held = list(self._held)
        return [found for each in held if (found := self.take(each)) is not None]
