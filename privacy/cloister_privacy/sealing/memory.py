"""Private memory for plaintext: zeroed by hand, kept out of core dumps, on large pages. Knows the machine; nothing of seals."""

from __future__ import annotations

import contextlib
import ctypes
import mmap

__all__ = ["Memory", "address_of", "private_memory", "zero"]

Memory = mmap.mmap | bytearray | memoryview


def private_memory(size: int) -> Memory:
    """Zeros that are this process's own. Large pages spare most of the page faults and of the look-ups."""
    memory = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    for advice in ("MADV_HUGEPAGE", "MADV_DONTDUMP"):
        if hasattr(mmap, advice):
            with contextlib.suppress(OSError):  # a kernel without it gives ordinary pages
                memory.madvise(getattr(mmap, advice))
    return memory


def address_of(memory: Memory) -> int:
    """Where writable memory of at least one byte begins."""
    return ctypes.addressof(ctypes.c_char.from_buffer(memory))


def zero(memory: memoryview) -> None:
    """Overwrite writable memory with zeros."""
    if len(memory):
        ctypes.memset(address_of(memory), 0, len(memory))
