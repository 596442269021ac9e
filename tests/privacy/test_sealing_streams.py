"""Streams and ranges of sealed objects: the same bytes as in memory, in little memory, and nothing given out unproven."""

from __future__ import annotations

import hashlib
import io
import os
import threading
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any, BinaryIO

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from cloister_privacy.sealing import (
    CHUNK_BYTES,
    Context,
    InvalidSeal,
    LengthMismatch,
    SealedReader,
    UnsupportedSeal,
    new_key,
    open_into,
    open_sealed,
    open_stream,
    plaintext_length,
    seal,
    seal_stream,
)
from cloister_privacy.sealing.chunks import Chunks

KEY = hashlib.sha256(b"a key for tests").digest()
CONTEXT = Context(tenant="tn_" + "0" * 32, kind="weights", object="obj_" + "1" * 32)
HEADER = 96
TEXT = bytes(range(256)) * 2

plaintexts = st.binary(max_size=400)
cuts = st.lists(st.integers(0, 400), max_size=6)


def seal_small(plaintext: bytes, *, key: bytes = KEY) -> bytes:
    return seal(plaintext, key=key, context=CONTEXT, chunk_bytes=64)


def streamed(source: Any, length: int, *, threads: int = 1) -> bytes:
    sink = io.BytesIO()
    written = seal_stream(source, sink, length=length, key=KEY, context=CONTEXT, chunk_bytes=64, threads=threads)
    assert written == len(sink.getvalue())
    return sink.getvalue()


def opened(source: Any, *, threads: int = 1, key: bytes = KEY) -> bytes:
    sink = io.BytesIO()
    assert open_stream(source, sink, key=key, context=CONTEXT, threads=threads) == len(sink.getvalue())
    return sink.getvalue()


def pieces(content: bytes, at: list[int]) -> Iterator[bytes]:
    """The content cut at these places, empty pieces among them."""
    places = sorted(min(place, len(content)) for place in at)
    for start, stop in zip([0, *places], [*places, len(content)], strict=True):
        yield content[start:stop]


class Dribble(io.RawIOBase):
    """A raw file that gives and takes a few bytes at a time."""

    def __init__(self, content: bytes = b"") -> None:
        self.inner = io.BytesIO(content)

    def readable(self) -> bool:
        return True

    def writable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        return self.inner.readinto(memoryview(buffer)[:7])

    def write(self, data: Any) -> int:
        return self.inner.write(bytes(data)[:7])

    def seek(self, offset: int, whence: int = 0) -> int:
        return self.inner.seek(offset, whence)


class OnlyReads:
    """What has `read` and nothing else of a file, as the body of a response."""

    def __init__(self, content: bytes) -> None:
        self.read = io.BytesIO(content).read


# Streams. --------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=50)
@given(plaintext=plaintexts, at=cuts, threads=st.integers(1, 3))
@example(plaintext=b"", at=[], threads=1)
@example(plaintext=b"", at=[], threads=3)
@example(plaintext=bytes(64), at=[64, 64], threads=2)
@example(plaintext=bytes(65), at=[1, 63], threads=2)
def test_a_stream_is_sealed_and_opened_as_in_memory(plaintext: bytes, at: list[int], threads: int) -> None:
    sealed = streamed(pieces(plaintext, at), len(plaintext), threads=threads)
    assert bytes(open_sealed(sealed, key=KEY, context=CONTEXT)) == plaintext
    assert opened(pieces(sealed, at), threads=threads) == plaintext


@pytest.mark.parametrize("source", [io.BytesIO, Dribble, OnlyReads, lambda content: [bytearray(content)]])
def test_files_and_iterables_are_streams(source: Any) -> None:
    sealed = streamed(source(TEXT), len(TEXT))
    assert opened(source(sealed)) == TEXT


def test_a_sink_that_takes_a_little_at_a_time_gets_all() -> None:
    sink = Dribble()
    seal_stream([TEXT], sink, length=len(TEXT), key=KEY, context=CONTEXT)
    assert bytes(open_sealed(sink.inner.getvalue(), key=KEY, context=CONTEXT)) == TEXT


class Stuck(io.RawIOBase):
    def readinto(self, buffer: Any) -> None:
        return None

    def write(self, data: Any) -> None:
        return None


def test_a_source_or_a_sink_that_would_block_is_a_mistake_told_at_once() -> None:
    with pytest.raises(BlockingIOError, match="source"):
        seal_stream(Stuck(), io.BytesIO(), length=1, key=KEY, context=CONTEXT)  # type: ignore[arg-type]  # reads nothing
    with pytest.raises(BlockingIOError, match="sink"):
        seal_stream([b"x"], Stuck(), length=1, key=KEY, context=CONTEXT)  # type: ignore[arg-type]  # takes nothing


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("declared", [0, 1, 63, 64, 65, 127, 129, 192, 1000])
def test_a_stream_of_another_length_than_declared_leaves_no_object(declared: int, threads: int) -> None:
    sink = io.BytesIO()
    with pytest.raises(LengthMismatch, match=f"the {declared} bytes"):
        seal_stream([bytes(128)], sink, length=declared, key=KEY, context=CONTEXT, chunk_bytes=64, threads=threads)
    with pytest.raises(InvalidSeal):
        open_sealed(sink.getvalue(), key=KEY, context=CONTEXT)


def test_a_source_that_fails_leaves_no_object() -> None:
    def failing() -> Iterator[bytes]:
        yield bytes(100)
        raise ConnectionError("gone")

    sink = io.BytesIO()
    with pytest.raises(ConnectionError):
        seal_stream(failing(), sink, length=128, key=KEY, context=CONTEXT, chunk_bytes=64, threads=2)
    with pytest.raises(InvalidSeal):
        open_sealed(sink.getvalue(), key=KEY, context=CONTEXT)


@pytest.mark.parametrize("length", [-1, 2**48 + 1])
def test_a_length_out_of_bounds_is_a_mistake_told_at_once(length: int) -> None:
    with pytest.raises(ValueError, match="0 to"):
        seal_stream([], io.BytesIO(), length=length, key=KEY, context=CONTEXT)


def test_no_threads_at_all_is_a_mistake_told_at_once() -> None:
    sealed = seal_small(TEXT)
    for call in (
        lambda: seal_stream([], io.BytesIO(), length=0, key=KEY, context=CONTEXT, threads=0),
        lambda: open_stream([sealed], io.BytesIO(), key=KEY, context=CONTEXT, threads=0),
        lambda: SealedReader(sealed, key=KEY, context=CONTEXT, threads=0),
    ):
        with pytest.raises(ValueError, match="threads"):
            call()


class Counting:
    """A sink that keeps nothing."""

    def __init__(self) -> None:
        self.count = 0

    def write(self, data: memoryview) -> int:
        self.count += len(data)
        return len(data)


@pytest.mark.parametrize("threads", [1, 2])
def test_streaming_takes_memory_that_does_not_grow_with_the_stream(threads: int) -> None:
    length = 48 * CHUNK_BYTES
    source = (bytes(CHUNK_BYTES // 4) for _ in range(4 * 48))
    sink, sealed = Counting(), io.BytesIO(seal(bytes(length), key=KEY, context=CONTEXT))
    tracemalloc.start()
    try:
        seal_stream(source, sink, length=length, key=KEY, context=CONTEXT, threads=threads)
        open_stream(sealed, Counting(), key=KEY, context=CONTEXT, threads=threads)
        assert tracemalloc.get_traced_memory()[1] < (2 * (threads + 1) + 2) * CHUNK_BYTES
    finally:
        tracemalloc.stop()
    assert sink.count == HEADER + length + 48 * 16


def test_a_hostile_length_in_a_stream_takes_the_memory_of_one_chunk() -> None:
    forged = bytearray(seal(bytes(1000), key=KEY, context=CONTEXT))
    forged[24:32] = (2**48).to_bytes(8)
    tracemalloc.start()
    try:
        with pytest.raises(InvalidSeal):
            open_stream([bytes(forged)], io.BytesIO(), key=KEY, context=CONTEXT)
        assert tracemalloc.get_traced_memory()[1] < 3 * CHUNK_BYTES
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chunk", range(4))
def test_a_stream_gives_out_the_chunks_before_the_changed_one_and_no_more(chunk: int, threads: int) -> None:
    plaintext = TEXT[:250]
    sealed = bytearray(seal_small(plaintext))
    sealed[HEADER + chunk * 80] ^= 1
    sink = io.BytesIO()
    with pytest.raises(InvalidSeal):
        open_stream(io.BytesIO(sealed), sink, key=KEY, context=CONTEXT, threads=threads)
    assert sink.getvalue() == plaintext[: len(sink.getvalue())]
    assert len(sink.getvalue()) <= chunk * 64 and len(sink.getvalue()) % 64 == 0


def test_an_extended_stream_is_refused_before_its_last_chunk_is_given_out() -> None:
    sink = io.BytesIO()
    with pytest.raises(InvalidSeal):
        open_stream([seal_small(TEXT), b"x"], sink, key=KEY, context=CONTEXT)
    assert sink.getvalue() == TEXT[:-64]


def test_memory_of_a_stream_is_zeroed_whether_it_fails_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[memoryview] = []
    genuine = Chunks.open_into

    def watched(self: Chunks, index: int, sealed: memoryview, plaintext: memoryview) -> None:
        seen.append(plaintext)
        genuine(self, index, sealed, plaintext)

    monkeypatch.setattr(Chunks, "open_into", watched)
    sealed = seal_small(TEXT)
    opened([sealed])
    with pytest.raises(InvalidSeal):
        opened([sealed[:-1] + b"\0"])
    assert len(seen) == 16 and not any(any(view) for view in seen)


# Ranges. ---------------------------------------------------------------------------------------------------------------


@settings(deadline=None, max_examples=100)
@given(plaintext=plaintexts, start=st.integers(0, 400), stop=st.integers(0, 400), threads=st.integers(1, 3))
@example(plaintext=b"", start=0, stop=0, threads=1)
@example(plaintext=TEXT, start=64, stop=128, threads=1)
@example(plaintext=TEXT, start=63, stop=129, threads=1)
@example(plaintext=TEXT, start=0, stop=512, threads=3)
@example(plaintext=TEXT, start=1, stop=511, threads=3)
@example(plaintext=TEXT[:300], start=299, stop=300, threads=1)
def test_a_range_is_what_lies_there(plaintext: bytes, start: int, stop: int, threads: int) -> None:
    reader = SealedReader(seal_small(plaintext), key=KEY, context=CONTEXT, threads=threads)
    assert reader.length == len(plaintext)
    start, stop = sorted((min(start, len(plaintext)), min(stop, len(plaintext))))
    assert bytes(reader.read(start, stop)) == plaintext[start:stop]
    assert reader.read(start, stop).readonly
    buffer = bytearray(stop - start)
    assert reader.read_into(buffer, start=start) == stop - start
    assert buffer == plaintext[start:stop]


@pytest.mark.parametrize(("start", "stop"), [(-1, 1), (2, 1), (0, 513), (513, 513)])
def test_a_range_that_is_not_there_is_a_mistake_told_at_once(start: int, stop: int) -> None:
    with pytest.raises(ValueError, match="512 bytes"):
        SealedReader(seal_small(TEXT), key=KEY, context=CONTEXT).read(start, stop)


def test_a_buffer_that_cannot_be_written_is_a_mistake_told_at_once() -> None:
    with pytest.raises(ValueError, match="writable"):
        SealedReader(seal_small(TEXT), key=KEY, context=CONTEXT).read_into(memoryview(bytes(4)))


@pytest.mark.parametrize(
    ("start", "stop", "chunks"), [(0, 1, {0}), (63, 65, {0, 1}), (64, 128, {1}), (100, 200, {1, 2, 3}), (70, 70, set())]
)
def test_a_range_opens_the_chunks_that_cover_it_and_no_other(
    start: int, stop: int, chunks: set[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    indices: set[int] = set()
    genuine = Chunks.open_into

    def watched(self: Chunks, index: int, sealed: memoryview, plaintext: memoryview) -> None:
        indices.add(index)
        genuine(self, index, sealed, plaintext)

    monkeypatch.setattr(Chunks, "open_into", watched)
    SealedReader(seal_small(TEXT), key=KEY, context=CONTEXT).read(start, stop)
    assert indices == chunks


@pytest.mark.parametrize("threads", [1, 3])
@pytest.mark.parametrize("chunk", range(8))
def test_a_range_over_a_changed_chunk_is_refused_and_its_buffer_zeroed(chunk: int, threads: int) -> None:
    sealed = bytearray(seal_small(TEXT))
    sealed[HEADER + chunk * 80 + 79] ^= 0x80
    reader = SealedReader(sealed, key=KEY, context=CONTEXT, threads=threads)
    for start, stop in ((0, 512), (chunk * 64, chunk * 64 + 64), (chunk * 64 + 1, chunk * 64 + 2)):
        buffer = bytearray(b"\x55" * (stop - start))
        with pytest.raises(InvalidSeal):
            reader.read_into(buffer, start=start)
        assert not any(buffer)
    before, after = chunk * 64, chunk * 64 + 64
    assert bytes(reader.read(0, before)) == TEXT[:before]
    assert bytes(reader.read(after, 512)) == TEXT[after:]


def test_memory_of_chunks_at_a_ranges_edges_is_zeroed(monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[memoryview] = []
    genuine = Chunks.open_into

    def watched(self: Chunks, index: int, sealed: memoryview, plaintext: memoryview) -> None:
        seen.append(plaintext)
        genuine(self, index, sealed, plaintext)

    monkeypatch.setattr(Chunks, "open_into", watched)
    SealedReader(seal_small(TEXT), key=KEY, context=CONTEXT).read(10, 70)
    assert len(seen) == 2 and not any(any(view) for view in seen)


def test_an_object_of_another_key_context_or_length_has_no_reader() -> None:
    sealed = seal_small(TEXT)
    for forged, key in ((sealed, new_key()), (sealed[:-1], KEY), (sealed + b"x", KEY), (b"", KEY)):
        with pytest.raises(InvalidSeal):
            SealedReader(forged, key=key, context=CONTEXT)


def test_threads_may_share_a_reader(tmp_path: Path) -> None:
    sealed = tmp_path / "object"
    sealed.write_bytes(seal_small(TEXT * 20))
    wrong: list[int] = []
    with sealed.open("rb") as file:
        for reader in (
            SealedReader(sealed, key=KEY, context=CONTEXT),
            SealedReader(file, key=KEY, context=CONTEXT),
        ):

            def read_some(reader: SealedReader = reader) -> None:
                for start in range(0, 10_000, 97):
                    if bytes(reader.read(start, start + 100)) != (TEXT * 20)[start : start + 100]:
                        wrong.append(start)

            threads = [threading.Thread(target=read_some) for _ in range(4)]
            for thread in threads:
                thread.start()
            for thread in threads:
                thread.join()
    assert not wrong


# Files. ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("length", [0, 1, CHUNK_BYTES, 3 * CHUNK_BYTES + 5])
def test_an_object_opens_out_of_a_path_and_a_file(length: int, threads: int, tmp_path: Path) -> None:
    plaintext, path = os.urandom(length), tmp_path / "object"
    path.write_bytes(seal(plaintext, key=KEY, context=CONTEXT))
    with path.open("rb") as buffered, path.open("rb", buffering=0) as raw:
        sources: list[Path | BinaryIO] = [path, buffered, raw, Dribble(path.read_bytes())]  # type: ignore[list-item]  # raw
        for source in sources[: 4 if length < 2 else 3]:
            assert plaintext_length(source) == length
            assert open_sealed(source, key=KEY, context=CONTEXT, threads=threads) == plaintext
            buffer = bytearray(length + 3)
            assert open_into(source, buffer, key=KEY, context=CONTEXT, threads=threads) == length
            assert buffer == plaintext + bytes(3)


def test_an_empty_file_is_no_object(tmp_path: Path) -> None:
    path = tmp_path / "object"
    path.touch()
    with pytest.raises(InvalidSeal):
        open_sealed(path, key=KEY, context=CONTEXT)
    with pytest.raises(FileNotFoundError):
        open_sealed(tmp_path / "another", key=KEY, context=CONTEXT)


def test_a_file_that_is_cut_after_its_reader_was_made_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "object"
    path.write_bytes(seal_small(TEXT))
    with path.open("rb", buffering=0) as file:
        reader = SealedReader(file, key=KEY, context=CONTEXT)
        os.truncate(path, 200)
        buffer = bytearray(512)
        with pytest.raises(InvalidSeal):
            reader.read_into(buffer)
    assert not any(buffer)


def test_a_stream_of_a_newer_format_is_refused_by_its_number() -> None:
    with pytest.raises(UnsupportedSeal, match="format 7"):
        opened([seal_small(TEXT).replace(b"sealed/1\n", b"sealed/7\n", 1)])
