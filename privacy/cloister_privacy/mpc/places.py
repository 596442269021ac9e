"""So many connections at once: the oldest that nobody vouches for makes room. Knows descriptors; nothing of what is sent."""

from __future__ import annotations

import contextlib
import socket
import threading

__all__ = ["Places"]


class Places:
    """Silence holds nobody up: who comes takes the place of the one that has lasted longest, of those that are not kept.

    Of those that are kept, nobody has more than `most_each`.
    """

    def __init__(self, most: int, *, most_each: int | None = None) -> None:
        self._most, self._lock = most, threading.Lock()
        self._most_each = most if most_each is None else most_each
        self._passing: list[socket.socket] = []
        """The oldest first."""
        self._kept: dict[socket.socket, str] = {}
        """And whose each is."""

    def take(self, descriptor: int) -> socket.socket | None:
        """A handle of this connection, for `keep` and `leave`, or None where all are kept. Raises OSError where no descriptor is left.

        Whose place is taken finds the end of its connection: it is shut down, by a handle of its own, and never closed from here.
        """
        with self._lock:
            if len(self._kept) >= self._most:
                return None
            handle = socket.socket(fileno=socket.dup(descriptor))
            if len(self._passing) + len(self._kept) >= self._most:
                with contextlib.suppress(OSError):
                    self._passing.pop(0).shutdown(socket.SHUT_RDWR)
            self._passing.append(handle)
            return handle

    def keep(self, handle: socket.socket, whose: str) -> bool:
        """It makes room for nobody any more, and is the first's who says so; one that made room already has ended, and stays so.

        False where so many of theirs are kept: then it is as it was.
        """
        with self._lock:
            if handle not in self._passing:
                return True
            if list(self._kept.values()).count(whose) >= self._most_each:
                return False
            self._passing.remove(handle)
            self._kept[handle] = whose
            return True

    def leave(self, handle: socket.socket) -> None:
        """Its place is free, where it has one still."""
        with self._lock:
            self._kept.pop(handle, None)
            with contextlib.suppress(ValueError):
                self._passing.remove(handle)
        handle.close()
