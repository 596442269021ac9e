"""Whole objects: one byte stream under one single-use key, sealed and opened in memory. Knows bytes; not who holds keys."""

from __future__ import annotations

import io
import secrets

from cloister_privacy.sealing.chunks import CHUNK_BYTES, HEADER_BYTES, TAG_BYTES, Chunks, Header
from cloister_privacy.sealing.context import Context
from cloister_privacy.sealing.derivation import KEY_BYTES
from cloister_privacy.sealing.reader import SealedReader
from cloister_privacy.sealing.sources import Bytes, Sealed, source_of

__all__ = ["new_key", "open_into", "open_sealed", "plaintext_length", "seal"]


def new_key() -> bytes:
    """A fresh data key. It seals one byte stream, in one process, once."""
    return secrets.token_bytes(KEY_BYTES)


def seal(plaintext: Bytes, *, key: bytes, context: Context, chunk_bytes: int = CHUNK_BYTES) -> bytes:
    """Seal one byte stream under a key that has sealed nothing else, bound to its context.

    `chunk_bytes` is a power of two from 64 to 16 MiB. The sealed length tells the plaintext's, and nothing else of it.
    """
    view = memoryview(plaintext).cast("B")
    chunks = Chunks.to_seal(len(view), key=key, context=context, chunk_bytes=chunk_bytes)
    sealed, chunk = io.BytesIO(), memoryview(bytearray(min(chunk_bytes, len(view)) + TAG_BYTES))
    sealed.write(chunks.header_bytes)
    for index in range(chunks.count):
        start, stop = chunks.plain(index)
        part = chunk[: stop - start + TAG_BYTES]
        chunks.seal_into(index, view[start:stop], part)
        sealed.write(part)
    return sealed.getvalue()


def open_sealed(sealed: Sealed, *, key: bytes, context: Context, threads: int = 1) -> memoryview:
    """The plaintext, read-only, in memory. Raises InvalidSeal where anything at all is not as it was sealed.

    No memory is taken for a plaintext before its declared length agrees with the bytes that are there.
    """
    reader = SealedReader(sealed, key=key, context=context, threads=threads)
    plaintext = memoryview(bytearray(reader.length))
    reader.read_into(plaintext)
    return plaintext.toreadonly()


def open_into(sealed: Sealed, buffer: bytearray | memoryview, *, key: bytes, context: Context, threads: int = 1) -> int:
    """Open into the caller's writable memory; the number of bytes that now are plaintext, from its start on.

    While this runs the buffer holds bytes that nobody has vouched for: let no one else see it before the return.
    On failure what was written is zeroed and InvalidSeal is raised. Raises ValueError where the buffer is too small.
    """
    reader = SealedReader(sealed, key=key, context=context, threads=threads)
    target = memoryview(buffer).cast("B")
    if target.readonly or len(target) < reader.length:
        raise ValueError(f"the buffer must be writable and have at least {reader.length} bytes")
    return reader.read_into(target[: reader.length])


def plaintext_length(sealed: Sealed) -> int:
    """How much memory `open_into` needs, from a header that agrees with the bytes there are. Not authenticated.

    Raises InvalidSeal where they do not agree.
    """
    source = source_of(sealed)
    start = bytes(source.view(0, min(source.length, HEADER_BYTES)))
    return Header.read(start, sealed_length=source.length).length
