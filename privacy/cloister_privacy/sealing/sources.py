"""Where sealed bytes lie: memory, a mapped file, a file object. Knows how to read them; nothing of what they mean."""

from __future__ import annotations

import io
import mmap
import threading
from pathlib import Path
from typing import BinaryIO, Protocol

from cloister_privacy.sealing.errors import InvalidSeal

__all__ = ["Bytes", "Sealed", "Source", "source_of"]

Bytes = bytes | bytearray | memoryview

Sealed = Bytes | Path | BinaryIO
"""What an object can be opened from. A Path is mapped: fastest, for a file that nobody rewrites or cuts meanwhile, as the
files of a store that writes each object once. A file object (it must seek) is read, each byte once, into memory of ours."""


class Source(Protocol):
    """Sealed bytes of a known length, any part of which can be had."""

    @property
    def length(self) -> int: ...

    def view(self, start: int, stop: int) -> memoryview:
        """These bytes. Raises InvalidSeal where they are not there. Threads may share a source."""
        ...


def source_of(sealed: Sealed) -> Source:
    """The bytes, wherever they are. Raises OSError where a file cannot be read."""
    if isinstance(sealed, Path):
        return _Memory(_mapped(sealed))
    if isinstance(sealed, (bytes, bytearray, memoryview)):
        return _Memory(memoryview(sealed).cast("B"))
    return _File(sealed)


class _Memory:
    """Bytes in memory or mapped into it; a mapping goes with the last view of it."""

    __slots__ = ("_bytes", "length")

    def __init__(self, sealed: memoryview) -> None:
        self._bytes, self.length = sealed, len(sealed)

    def view(self, start: int, stop: int) -> memoryview:
        return self._bytes[start:stop]


class _File:
    """A file object that seeks; one thread at a time reads it."""

    __slots__ = ("_file", "_lock", "length")

    def __init__(self, file: BinaryIO) -> None:
        self._file, self._lock = file, threading.Lock()
        self.length = file.seek(0, io.SEEK_END)

    def view(self, start: int, stop: int) -> memoryview:
        with self._lock:
            self._file.seek(start)
            content = self._file.read(stop - start)
            while content is not None and len(content) < stop - start:  # a raw file may give less than asked
                more = self._file.read(stop - start - len(content))
                if not more:
                    break
                content += more
        if content is None or len(content) != stop - start:  # cut since its length was told
            raise InvalidSeal()
        return memoryview(content)


def _mapped(path: Path) -> memoryview:
    with path.open("rb") as file:
        if not file.seek(0, io.SEEK_END):
            return memoryview(b"")  # nothing to map
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))
