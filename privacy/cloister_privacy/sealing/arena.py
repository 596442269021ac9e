"""Warm memory for plaintext: leased, zeroed when nothing refers to it any more, and leased again. Knows no seals, no torch."""

from __future__ import annotations

import ctypes
import threading
import weakref
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from cloister_privacy.sealing.errors import ArenaFull
from cloister_privacy.sealing.memory import Memory, address_of, private_memory

__all__ = ["Arena", "Lease"]

_SMALL, _PAGE, _LARGE_PAGE = 2**20, 2**16, 2**21
"""Blocks are whole pages; from a mebibyte on, large ones."""


class Arena:
    """A pool of memory of at most `limit_bytes`, leased and idle together.

    Idle memory is all zero and stays with the process, so that the next lease finds it warm: fresh memory costs several
    times what decrypting into it does. `allocate` makes more of it, as zeros. Threads may share an arena.
    """

    def __init__(self, limit_bytes: int, *, allocate: Callable[[int], Memory] = private_memory) -> None:
        self._limit_bytes, self._allocate = limit_bytes, allocate
        self._lock = threading.Lock()
        self._held_bytes = 0
        self._idle: list[_Block] = []  # longest idle first
        self._returned: deque[_Block] = deque()  # a finalizer appends: it may run anywhere, and takes no lock

    def lease(self, size: int) -> Lease:
        """Memory of exactly `size` bytes, zeros. Raises ArenaFull where the limit leaves no room for it."""
        if size < 1:
            raise ValueError("a lease has at least one byte")
        block = self._block(size)
        region = (ctypes.c_ubyte * size).from_buffer(block.memory)
        weakref.finalize(region, _give_back, block, size, self._returned).atexit = False
        return Lease(memoryview(region).cast("B"))

    def trim(self) -> None:
        """Give the idle memory back to the system."""
        with self._lock:
            self._collect()
            self._evict(self._held_bytes)

    @property
    def held_bytes(self) -> int:
        """Memory taken from the system: leased, or idle and warm."""
        return self._held_bytes

    @property
    def leased_bytes(self) -> int:
        """Memory that a lease or something in it still refers to."""
        with self._lock:
            self._collect()
            return self._held_bytes - sum(block.size for block in self._idle)

    def _block(self, size: int) -> _Block:
        page = _PAGE if size <= _SMALL else _LARGE_PAGE
        whole = -(-size // page) * page
        with self._lock:
            self._collect()
            fitting = [block for block in self._idle if whole <= block.size <= 2 * whole]
            if fitting:
                best = min(fitting, key=lambda block: block.size)
                self._idle.remove(best)
                return best
            self._evict(self._held_bytes + whole - self._limit_bytes)
            if self._held_bytes + whole > self._limit_bytes:
                raise ArenaFull(
                    f"the arena of {self._limit_bytes} bytes has no room for {size} more; "
                    "end a lease and what uses it, or make a larger arena"
                )
            memory = self._allocate(whole)
            self._held_bytes += whole
            return _Block(memory, address_of(memory), whole)

    def _collect(self) -> None:
        while self._returned:
            self._idle.append(self._returned.popleft())

    def _evict(self, wanted_bytes: int) -> None:
        """Drop idle blocks until so many bytes are free or none is idle; they are zero already."""
        while wanted_bytes > 0 and self._idle:
            block = self._idle.pop(0)
            self._held_bytes -= block.size
            wanted_bytes -= block.size


class Lease:
    """Memory out of an arena, until it is released and nothing refers to it any more.

    A view of it or a tensor in it that outlives the lease keeps its bytes; when the last of them is gone they are zeroed,
    and only then can the memory be leased again.
    """

    __slots__ = ("_memory",)

    def __init__(self, memory: memoryview) -> None:
        self._memory: memoryview | None = memory

    @property
    def memory(self) -> memoryview:
        """Writable. Raises ValueError once the lease is released."""
        if self._memory is None:
            raise ValueError("the lease was released; take a new one")
        return self._memory

    def release(self) -> None:
        """End the lease; once more does nothing."""
        self._memory = None

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        self.release()


@dataclass(frozen=True, slots=True, eq=False)
class _Block:
    memory: Memory
    address: int
    size: int


def _give_back(block: _Block, used: int, returned: deque[_Block]) -> None:
    ctypes.memset(block.address, 0, used)
    returned.append(block)
