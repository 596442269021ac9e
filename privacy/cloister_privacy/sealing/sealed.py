"""The sealed format, version 1: one byte stream under one single-use key. Knows bytes; nothing of files or of who holds keys.

`docs/spec/sealed.md` is the format's law, and this module one reading of it.
"""

from __future__ import annotations

import hashlib
import hmac
import io
import re
import secrets
import struct
from collections.abc import Iterator
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister_privacy.sealing.context import Context
from cloister_privacy.sealing.derivation import COMMITMENT_BYTES, KEY_BYTES, SALT_BYTES, derive
from cloister_privacy.sealing.errors import InvalidSeal, UnsupportedSeal

__all__ = ["CHUNK_BYTES", "new_key", "open_into", "open_sealed", "plaintext_length", "seal"]

CHUNK_BYTES = 2**20
"""The writer's default; a reader takes what the header says."""

# Version lines and suites are never reused; an old one opens for ever or is refused by name.
_LINE = b"cloister.sealed/1\n"
_SUITE = 1  # AES-256-GCM, HKDF-SHA512, 32-byte commitment

_FIXED = struct.Struct(">18sHIQ32s")  # version line, suite, chunk size, plaintext length, salt
_HEADER_BYTES = _FIXED.size + COMMITMENT_BYTES
_TAG_BYTES = 16
_LEAST_CHUNK, _LARGEST_CHUNK = 2**6, 2**24
_LARGEST_LENGTH = 2**48
_ANY_VERSION = re.compile(rb"cloister\.sealed/([1-9][0-9]{0,8})\n")
_ZEROS = bytes(2**16)

_Bytes = bytes | bytearray | memoryview


def new_key() -> bytes:
    """A fresh data key. It seals one byte stream, in one process, once."""
    return secrets.token_bytes(KEY_BYTES)


def seal(plaintext: _Bytes, *, key: bytes, context: Context, chunk_bytes: int = CHUNK_BYTES) -> bytes:
    """Seal one byte stream under a key that has sealed nothing else, bound to its context.

    `chunk_bytes` is a power of two from 64 to 16 MiB. The sealed length tells the plaintext's, and nothing else of it.
    """
    if not _is_chunk_size(chunk_bytes):
        raise ValueError(f"chunk_bytes must be a power of two from {_LEAST_CHUNK} to {_LARGEST_CHUNK}")
    view = memoryview(plaintext).cast("B")
    if len(view) > _LARGEST_LENGTH:
        raise ValueError(f"a sealed object holds at most {_LARGEST_LENGTH} bytes")
    fixed = _FIXED.pack(_LINE, _SUITE, chunk_bytes, len(view), secrets.token_bytes(SALT_BYTES))
    header = _Header(fixed, chunk_bytes=chunk_bytes, length=len(view))
    enc_key, commitment = header.keys(key, context)
    cipher, sealed = AESGCM(enc_key), io.BytesIO()
    sealed.write(fixed + commitment)
    for chunk in header.chunks(commitment):
        sealed.write(cipher.encrypt(chunk.nonce, view[chunk.plain], chunk.associated))
    return sealed.getvalue()


def open_sealed(sealed: _Bytes, *, key: bytes, context: Context) -> memoryview:
    """The plaintext, read-only, in memory. Raises InvalidSeal where anything at all is not as it was sealed.

    No memory is taken for a plaintext before its declared length agrees with the bytes that are there.
    """
    plaintext = bytearray(plaintext_length(sealed))
    open_into(sealed, plaintext, key=key, context=context)
    return memoryview(plaintext).toreadonly()


def open_into(sealed: _Bytes, buffer: bytearray | memoryview, *, key: bytes, context: Context) -> int:
    """Open into the caller's writable memory; the number of bytes that now are plaintext, from its start on.

    While this runs the buffer holds bytes that nobody has vouched for: let no one else see it before the return.
    On failure what was written is zeroed and InvalidSeal is raised. Raises ValueError where the buffer is too small.
    """
    source = memoryview(sealed).cast("B")
    header = _Header.read(source)
    target = memoryview(buffer).cast("B")
    if target.readonly or len(target) < header.length:
        raise ValueError(f"the buffer must be writable and have at least {header.length} bytes")
    enc_key, expected = header.keys(key, context)
    commitment = bytes(source[_FIXED.size : _HEADER_BYTES])
    if not hmac.compare_digest(commitment, expected):
        raise InvalidSeal()
    cipher = AESGCM(enc_key)
    try:
        for chunk in header.chunks(commitment):
            cipher.decrypt_into(chunk.nonce, source[chunk.sealed], chunk.associated, target[chunk.plain])
    except BaseException as error:
        # decrypt_into leaves the plaintext of a chunk whose tag failed; and chunks before it passed, but not the whole.
        _zero(target[: header.length])
        if isinstance(error, InvalidTag):
            raise InvalidSeal() from None
        raise
    return header.length


def plaintext_length(sealed: _Bytes) -> int:
    """How much memory `open_into` needs, from a header that agrees with the bytes there are. Not authenticated.

    Raises InvalidSeal where they do not agree.
    """
    return _Header.read(memoryview(sealed).cast("B")).length


@dataclass(frozen=True, slots=True)
class _Chunk:
    """Where one chunk lies, and what it is encrypted with."""

    plain: slice
    sealed: slice
    nonce: bytes
    associated: bytes


@dataclass(frozen=True, slots=True)
class _Header:
    """A header's fields, in bounds and agreeing with the object's length; authenticated only by the chunks' tags."""

    fixed: bytes
    chunk_bytes: int = field(kw_only=True)
    length: int = field(kw_only=True)

    @classmethod
    def read(cls, sealed: memoryview) -> _Header:
        fixed = bytes(sealed[: _FIXED.size])
        version = _ANY_VERSION.match(fixed)
        if version is not None and version[1] != b"1":
            raise UnsupportedSeal(
                f"the sealed object has format {int(version[1])} and this release reads format 1; "
                "open it with the release that wrote it, or a later one"
            )
        if version is None or len(sealed) < _HEADER_BYTES + _TAG_BYTES:
            raise InvalidSeal()
        _, suite, chunk_bytes, length, _ = _FIXED.unpack(fixed)
        if suite != _SUITE:
            raise UnsupportedSeal(
                f"the sealed object has suite {suite} and this release knows suite {_SUITE}; "
                "open it with the release that wrote it, or a later one"
            )
        if not _is_chunk_size(chunk_bytes) or length > _LARGEST_LENGTH:
            raise InvalidSeal()
        header = cls(fixed, chunk_bytes=chunk_bytes, length=length)
        if len(sealed) != _HEADER_BYTES + length + header.chunk_count * _TAG_BYTES:
            raise InvalidSeal()
        return header

    @property
    def chunk_count(self) -> int:
        """The empty plaintext is one chunk of no bytes, so every object has a tag."""
        return max(1, -(-self.length // self.chunk_bytes))

    def keys(self, key: bytes, context: Context) -> tuple[bytes, bytes]:
        """The encryption key and the commitment of this salt and context."""
        return derive(key, salt=self.fixed[-SALT_BYTES:], info=_LINE + _SUITE.to_bytes(2) + context.to_bytes())

    def chunks(self, commitment: bytes) -> Iterator[_Chunk]:
        """Every chunk in order; each is bound to the whole header, its own place, and whether it is the last."""
        digest = hashlib.sha256(self.fixed + commitment).digest()
        length, stride = self.length.to_bytes(8), self.chunk_bytes + _TAG_BYTES
        for index in range(self.chunk_count):
            start, is_last = index * self.chunk_bytes, index == self.chunk_count - 1
            stop = self.length if is_last else start + self.chunk_bytes
            offset = _HEADER_BYTES + index * stride
            yield _Chunk(
                plain=slice(start, stop),
                sealed=slice(offset, offset + stop - start + _TAG_BYTES),
                nonce=index.to_bytes(11) + is_last.to_bytes(1),
                associated=digest + index.to_bytes(8) + length,
            )


def _is_chunk_size(size: int) -> bool:
    return _LEAST_CHUNK <= size <= _LARGEST_CHUNK and size & (size - 1) == 0


def _zero(memory: memoryview) -> None:
    for start in range(0, len(memory), len(_ZEROS)):
        part = memory[start : start + len(_ZEROS)]
        part[:] = _ZEROS[: len(part)]
