"""Random access to a sealed object: a range opens the chunks that cover it. Knows chunks and memory; nothing of tensors."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

from cloister_privacy.sealing.chunks import HEADER_BYTES, Chunks
from cloister_privacy.sealing.context import Context
from cloister_privacy.sealing.memory import zero
from cloister_privacy.sealing.sources import Sealed, source_of

__all__ = ["SealedReader"]


class SealedReader:
    """One sealed object, any range of which can be opened.

    Raises InvalidSeal unless header, length, key and context agree. A range is given out after the tags of all its
    chunks have passed: these are the bytes at this place of this object, and nothing is proven of the rest of it.
    Threads may share a reader; one read takes `threads` of its own, which pays from some megabytes on.
    """

    __slots__ = ("_chunks", "_source", "_threads")

    def __init__(self, sealed: Sealed, *, key: bytes, context: Context, threads: int = 1) -> None:
        if threads < 1:
            raise ValueError("threads must be at least 1")
        self._source, self._threads = source_of(sealed), threads
        length = self._source.length
        start = bytes(self._source.view(0, min(length, HEADER_BYTES)))
        self._chunks = Chunks.to_open(start, sealed_length=length, key=key, context=context)

    @property
    def length(self) -> int:
        """The plaintext's, as the header says; proven by the first read that passes."""
        return self._chunks.header.length

    def read(self, start: int, stop: int) -> memoryview:
        """The plaintext from `start` to before `stop`, read-only. Raises ValueError where it has no such bytes."""
        self._check(start, stop)
        plaintext = memoryview(bytearray(stop - start))
        self._open(start, plaintext)
        return plaintext.toreadonly()

    def read_into(self, buffer: bytearray | memoryview, *, start: int = 0) -> int:
        """Fill the caller's writable memory with the plaintext from `start` on; the number of bytes, all of the buffer's.

        While this runs the buffer holds bytes that nobody has vouched for: let no one else see it before the return.
        On failure it is zeroed and InvalidSeal is raised. Raises ValueError where there are not so many bytes.
        """
        target = memoryview(buffer).cast("B")
        if target.readonly:
            raise ValueError("the buffer must be writable")
        self._check(start, start + len(target))
        self._open(start, target)
        return len(target)

    def _check(self, start: int, stop: int) -> None:
        if not 0 <= start <= stop <= self.length:
            raise ValueError(f"the object has {self.length} bytes; bytes {start} to {stop} are not all there")

    def _open(self, start: int, target: memoryview) -> None:
        """All chunks that cover the range: those at its edges by way of memory of ours, the others straight."""
        size, stop = self._chunks.header.chunk_bytes, start + len(target)
        first, last = start // size, max(stop - 1, 0) // size
        if not len(target) and self.length:
            return  # no chunk covers nothing, but that of the empty object
        is_whole = {index: start <= a and b <= stop for index in (first, last) for a, b in [self._chunks.plain(index)]}
        try:
            for index in [index for index in is_whole if not is_whole[index]]:
                self._open_part(index, target, start=start)
            whole = range(first + (not is_whole[first]), last + is_whole[last])
            self._open_chunks(whole, target, at=start)
        except BaseException:
            # The cipher leaves the plaintext of a chunk whose tag failed; and other chunks passed, but not the whole.
            zero(target)
            raise

    def _open_part(self, index: int, target: memoryview, *, start: int) -> None:
        begin, end = self._chunks.plain(index)
        chunk = memoryview(bytearray(end - begin))
        try:
            self._chunks.open_into(index, self._source.view(*self._chunks.sealed(index)), chunk)
            low, high = max(begin, start), min(end, start + len(target))
            target[low - start : high - start] = chunk[low - begin : high - begin]
        finally:
            zero(chunk)

    def _open_chunks(self, indices: range, target: memoryview, *, at: int) -> None:
        """Whole chunks into their places in `target`, which begins at byte `at` of the plaintext."""
        failed: list[int] = []

        def open_some(mine: range) -> None:
            for index in mine:
                if failed:
                    return
                start, stop = self._chunks.plain(index)
                try:
                    sealed = self._source.view(*self._chunks.sealed(index))
                    self._chunks.open_into(index, sealed, target[start - at : stop - at])
                except BaseException:
                    failed.append(index)
                    raise

        threads = min(self._threads, len(indices))
        if threads <= 1:
            open_some(indices)
            return
        with ThreadPoolExecutor(threads) as pool:  # it ends when every thread has: nothing is written after that
            others = [pool.submit(open_some, indices[turn::threads]) for turn in range(1, threads)]
            try:
                open_some(indices[::threads])
            finally:
                for other in others:
                    other.exception()
        for other in others:
            other.result()
