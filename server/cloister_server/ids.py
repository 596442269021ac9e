"""Names of 128 bits, random ones drawn from the operating system many at a time: each request takes some. None is a secret."""

from __future__ import annotations

import os
from collections import deque
from time import time_ns

__all__ = ["ordered_hex", "random_hex"]

_AT_ONCE = 256
_BYTES = 16

_drawn: deque[str] = deque()
os.register_at_fork(after_in_child=_drawn.clear)


def random_hex() -> str:
    """32 hexadecimal digits that nobody has seen before, and that were drawn a while ago, some hundred at a time: no key, no token."""
    while True:
        try:
            return _drawn.pop()
        except IndexError:
            drawn = os.urandom(_AT_ONCE * _BYTES).hex()
            _drawn.extend(drawn[at : at + 2 * _BYTES] for at in range(0, len(drawn), 2 * _BYTES))


def ordered_hex() -> str:
    """The same, of which the first half is the time in microseconds: rows that are written together lie together in an index."""
    return f"{time_ns() // 1000:016x}{random_hex()[16:]}"
