"""Sealing and opening as a stream, in memory that does not grow with it. Knows file objects and iterables; nothing of stores."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import BinaryIO, Protocol

from cloister_privacy.sealing.chunks import CHUNK_BYTES, HEADER_BYTES, TAG_BYTES, Chunks
from cloister_privacy.sealing.context import Context
from cloister_privacy.sealing.errors import InvalidSeal, LengthMismatch
from cloister_privacy.sealing.memory import zero
from cloister_privacy.sealing.sources import Bytes

__all__ = ["Sink", "open_stream", "seal_stream"]


class Sink(Protocol):
    """What a stream is written to: a binary file object, or whatever tells how many bytes it took."""

    def write(self, data: memoryview, /) -> int: ...


def seal_stream(
    source: BinaryIO | Iterable[Bytes],
    sink: Sink,
    *,
    length: int,
    key: bytes,
    context: Context,
    chunk_bytes: int = CHUNK_BYTES,
    threads: int = 1,
) -> int:
    """Seal exactly `length` bytes of a file object or an iterable, as `seal` does; the number of bytes written.

    The length stands in the header, so it must be known first. Raises LengthMismatch where the source has fewer bytes or
    more. After any failure the sink holds the beginning of an object that nobody opens: throw it away, and seal
    again under a fresh key. Takes a few chunks of memory: two for each thread, and two more.
    """
    chunks = Chunks.to_seal(length, key=key, context=context, chunk_bytes=chunk_bytes)
    feed = _Feed(source)

    def take(index: int, slot: _Slot) -> None:
        start, stop = chunks.plain(index)
        if feed.fill(slot.plain[: stop - start]) != stop - start:
            raise LengthMismatch(f"the source ended before the {length} bytes that were declared; seal it anew")
        if index == chunks.count - 1 and not feed.is_at_end():
            raise LengthMismatch(f"the source has more than the {length} bytes that were declared; seal it anew")

    def seal_one(index: int, slot: _Slot) -> memoryview:
        start, stop = chunks.plain(index)
        sealed = slot.sealed[: stop - start + TAG_BYTES]
        chunks.seal_into(index, slot.plain[: stop - start], sealed)
        return sealed

    _write(sink, memoryview(chunks.header_bytes))
    _in_order(chunks, take, seal_one, sink=sink, threads=threads)
    return chunks.header.sealed_length


def open_stream(
    source: BinaryIO | Iterable[Bytes], sink: Sink, *, key: bytes, context: Context, threads: int = 1
) -> int:
    """Open an object as it comes, chunk by chunk; the length of the plaintext.

    A chunk is written once its own tag has passed, so that every byte the sink gets is at its place in what was
    sealed: but until this returns, it is a beginning and not the whole. Raises InvalidSeal where the rest is changed,
    cut or extended: throw away then what the sink has got. Who must not see a part takes `open_sealed`.
    """
    feed = _Feed(source)
    start = bytearray(HEADER_BYTES)
    start = start[: feed.fill(memoryview(start))]
    chunks = Chunks.to_open(bytes(start), sealed_length=None, key=key, context=context)

    def take(index: int, slot: _Slot) -> None:
        start, stop = chunks.sealed(index)
        if feed.fill(slot.sealed[: stop - start]) != stop - start:
            raise InvalidSeal()
        if index == chunks.count - 1 and not feed.is_at_end():
            raise InvalidSeal()

    def open_one(index: int, slot: _Slot) -> memoryview:
        start, stop = chunks.plain(index)
        plain = slot.plain[: stop - start]
        chunks.open_into(index, slot.sealed[: stop - start + TAG_BYTES], plain)
        return plain

    _in_order(chunks, take, open_one, sink=sink, threads=threads)
    return chunks.header.length


class _Slot:
    """Memory of ours for one chunk on its way."""

    __slots__ = ("plain", "sealed")

    def __init__(self, size: int) -> None:
        self.plain, self.sealed = memoryview(bytearray(size)), memoryview(bytearray(size + TAG_BYTES))


def _in_order(
    chunks: Chunks,
    take: Callable[[int, _Slot], None],
    work: Callable[[int, _Slot], memoryview],
    *,
    sink: Sink,
    threads: int,
) -> None:
    """Every chunk is taken from the source and written to the sink in order, by this thread; others do the work between."""
    with _slots(min(chunks.header.chunk_bytes, chunks.header.length), threads=threads) as slots:
        if threads == 1:
            for index in range(chunks.count):
                take(index, slots[0])
                _write(sink, work(index, slots[0]))
            return
        with ThreadPoolExecutor(threads) as pool:
            busy: deque[Future[memoryview]] = deque()
            for index in range(chunks.count):
                if len(busy) == len(slots):
                    _write(sink, busy.popleft().result())
                slot = slots[index % len(slots)]
                take(index, slot)
                busy.append(pool.submit(work, index, slot))
            while busy:
                _write(sink, busy.popleft().result())


@contextmanager
def _slots(size: int, *, threads: int) -> Iterator[list[_Slot]]:
    """One chunk for each thread and one to read or write meanwhile; the plaintext in them is zeroed at the end."""
    if threads < 1:
        raise ValueError("threads must be at least 1")
    slots = [_Slot(size) for _ in range(1 if threads == 1 else threads + 1)]
    try:
        yield slots
    finally:
        for slot in slots:
            zero(slot.plain)


class _Feed:
    """A file object or an iterable, as one run of bytes."""

    def __init__(self, source: BinaryIO | Iterable[Bytes]) -> None:
        self._readinto: Callable[[memoryview], int | None] | None = getattr(source, "readinto", None)
        self._pieces, self._rest = iter(()) if self._readinto else _pieces(source), memoryview(b"")

    def fill(self, target: memoryview) -> int:
        """Bytes into `target`, as many as it holds or the source still has; how many."""
        filled = 0
        while filled < len(target):
            count = self._read(target[filled:])
            if not count:
                break
            filled += count
        return filled

    def is_at_end(self) -> bool:
        """Whether nothing is left; takes a byte where something is, which only a refusal follows."""
        return self.fill(memoryview(bytearray(1))) == 0

    def _read(self, target: memoryview) -> int:
        if self._readinto is not None:
            count = self._readinto(target)
            if count is None:
                raise BlockingIOError("the source has nothing to read yet; give one that blocks")
            return count
        while not self._rest:
            piece = next(self._pieces, None)
            if piece is None:
                return 0
            self._rest = memoryview(piece).cast("B")
        count = min(len(self._rest), len(target))
        target[:count], self._rest = self._rest[:count], self._rest[count:]
        return count


def _pieces(source: BinaryIO | Iterable[Bytes]) -> Iterator[Bytes]:
    if hasattr(source, "read"):
        return iter(lambda: source.read(CHUNK_BYTES), b"")
    return iter(source)


def _write(sink: Sink, data: memoryview) -> None:
    """All of it: a raw file may take less at a time."""
    while data:
        count = sink.write(data)
        if not count:
            raise BlockingIOError("the sink takes nothing; give one that blocks and tells how many bytes it took")
        data = data[count:]
