"""The sealed format, byte for byte: header, keys, chunks. Knows the layout and the cipher; nothing of files, streams or memory.

`docs/spec/sealed.md` is the format's law, and this module one reading of it.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import secrets
import struct
from dataclasses import dataclass, field

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM

from cloister_privacy.sealing.context import Context
from cloister_privacy.sealing.derivation import COMMITMENT_BYTES, SALT_BYTES, derive
from cloister_privacy.sealing.errors import InvalidSeal, UnsupportedSeal

__all__ = ["CHUNK_BYTES", "HEADER_BYTES", "TAG_BYTES", "Chunks", "Header"]

CHUNK_BYTES = 2**20
"""The writer's default; a reader takes what the header says."""

# Version lines and suites are never reused; an old one opens for ever or is refused by name.
_LINE = b"cloister.sealed/1\n"
_SUITE = 1  # AES-256-GCM, HKDF-SHA512, 32-byte commitment

_FIXED = struct.Struct(">18sHIQ32s")  # version line, suite, chunk size, plaintext length, salt
HEADER_BYTES = _FIXED.size + COMMITMENT_BYTES
TAG_BYTES = 16
_LEAST_CHUNK, _LARGEST_CHUNK = 2**6, 2**24
_LARGEST_LENGTH = 2**48
_ANY_VERSION = re.compile(rb"cloister\.sealed/([1-9][0-9]{0,8})\n")


@dataclass(frozen=True, slots=True)
class Header:
    """A header's fields, in bounds; authenticated only by the commitment and the chunks' tags."""

    fixed: bytes
    chunk_bytes: int = field(kw_only=True)
    length: int = field(kw_only=True)

    @classmethod
    def fresh(cls, length: int, *, chunk_bytes: int) -> Header:
        """The header of a new object, with a salt of its own. Raises ValueError where a size is out of bounds."""
        if not _is_chunk_size(chunk_bytes):
            raise ValueError(f"chunk_bytes must be a power of two from {_LEAST_CHUNK} to {_LARGEST_CHUNK}")
        if not 0 <= length <= _LARGEST_LENGTH:
            raise ValueError(f"a sealed object holds 0 to {_LARGEST_LENGTH} bytes")
        fixed = _FIXED.pack(_LINE, _SUITE, chunk_bytes, length, secrets.token_bytes(SALT_BYTES))
        return cls(fixed, chunk_bytes=chunk_bytes, length=length)

    @classmethod
    def read(cls, start: bytes, *, sealed_length: int | None) -> Header:
        """The header out of an object's first bytes; `sealed_length` is None where only the stream's end will tell it."""
        fixed = start[: _FIXED.size]
        version = _ANY_VERSION.match(fixed)
        if version is not None and version[1] != b"1":
            raise UnsupportedSeal(
                f"the sealed object has format {int(version[1])} and this release reads format 1; "
                "open it with the release that wrote it, or a later one"
            )
        if version is None or len(start) < HEADER_BYTES:
            raise InvalidSeal()
        if sealed_length is not None and sealed_length < HEADER_BYTES + TAG_BYTES:
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
        if sealed_length is not None and sealed_length != header.sealed_length:
            raise InvalidSeal()
        return header

    @property
    def chunk_count(self) -> int:
        """The empty plaintext is one chunk of no bytes, so every object has a tag."""
        return max(1, -(-self.length // self.chunk_bytes))

    @property
    def sealed_length(self) -> int:
        return HEADER_BYTES + self.length + self.chunk_count * TAG_BYTES


class Chunks:
    """One object's chunks: where each lies, and its encryption under the object's own key.

    Every chunk is bound to the whole header, to its own place, and to whether it is the last. Threads may share this.
    """

    __slots__ = ("_cipher", "_digest", "_length", "count", "header", "header_bytes")

    def __init__(self, header: Header, *, enc_key: bytes, commitment: bytes) -> None:
        self.header, self.count = header, header.chunk_count
        self.header_bytes = header.fixed + commitment
        self._cipher = AESGCM(enc_key)
        self._digest = hashlib.sha256(self.header_bytes).digest()
        self._length = header.length.to_bytes(8)

    @classmethod
    def to_seal(cls, length: int, *, key: bytes, context: Context, chunk_bytes: int) -> Chunks:
        """The chunks of a new object, under a key that has sealed nothing else."""
        header = Header.fresh(length, chunk_bytes=chunk_bytes)
        enc_key, commitment = _keys(header, key, context)
        return cls(header, enc_key=enc_key, commitment=commitment)

    @classmethod
    def to_open(cls, start: bytes, *, sealed_length: int | None, key: bytes, context: Context) -> Chunks:
        """The chunks of an object that begins with these bytes. Raises InvalidSeal unless key and context are committed to."""
        header = Header.read(start, sealed_length=sealed_length)
        enc_key, expected = _keys(header, key, context)
        commitment = start[_FIXED.size : HEADER_BYTES]
        if not hmac.compare_digest(commitment, expected):
            raise InvalidSeal()
        return cls(header, enc_key=enc_key, commitment=commitment)

    def plain(self, index: int) -> tuple[int, int]:
        """From where to where this chunk lies in the plaintext."""
        start = index * self.header.chunk_bytes
        return start, min(start + self.header.chunk_bytes, self.header.length)

    def sealed(self, index: int) -> tuple[int, int]:
        """From where to where this chunk and its tag lie in the object."""
        start, stop = self.plain(index)
        offset = HEADER_BYTES + index * TAG_BYTES
        return offset + start, offset + stop + TAG_BYTES

    def seal_into(self, index: int, plaintext: memoryview, sealed: memoryview) -> None:
        """Encrypt this chunk, and its tag, into memory of exactly their size."""
        self._cipher.encrypt_into(self._nonce(index), plaintext, self._associated(index), sealed)

    def open_into(self, index: int, sealed: memoryview, plaintext: memoryview) -> None:
        """Decrypt this chunk into memory of exactly its size. Raises InvalidSeal: what lies there then is not to be seen."""
        try:
            self._cipher.decrypt_into(self._nonce(index), sealed, self._associated(index), plaintext)
        except InvalidTag:
            raise InvalidSeal() from None

    def _nonce(self, index: int) -> bytes:
        return (index << 8 | (index == self.count - 1)).to_bytes(12)

    def _associated(self, index: int) -> bytes:
        return self._digest + index.to_bytes(8) + self._length


def _keys(header: Header, key: bytes, context: Context) -> tuple[bytes, bytes]:
    """The encryption key and the commitment of this salt and context."""
    return derive(key, salt=header.fixed[-SALT_BYTES:], info=_LINE + _SUITE.to_bytes(2) + context.to_bytes())


def _is_chunk_size(size: int) -> bool:
    return _LEAST_CHUNK <= size <= _LARGEST_CHUNK and size & (size - 1) == 0
