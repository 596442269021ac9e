"""Numbers as additive shares in the ring of integers modulo 2^64, and shares as bytes. Knows numpy; not whose numbers they are.

A number is a fixed-point integer. All shares but the last are fresh bytes of the operating system and the last is what makes
the sum right, so any of them but all are uniform and tell nothing. `cloister.shares/1` is the format of one party's shares.
"""

from __future__ import annotations

import math
import os
import re
import struct
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister.wire._errors import CloisterError, InvalidArgument

__all__ = [
    "FRACTION_BITS",
    "NotFinite",
    "OutOfRange",
    "Shares",
    "SharesRefused",
    "decode",
    "encode",
    "join",
    "limit",
    "split",
]

Ring = NDArray[np.uint64]

FRACTION_BITS = 20
"""Numbers are multiples of 2^-20, about 1e-6; a product has twice the bits until it is truncated."""

_MAGIC = b"cloister.shares/"
_LINE = _MAGIC + b"1\n"
_HEAD = struct.Struct("<BBHH16s")
"""Party, fraction bits, how many tensors, the deployment's length, the request."""
_NAME = re.compile(r"[!-~]{1,255}")
_MOST_DIMENSIONS = 8
_MOST_ELEMENTS = 2**31


class NotFinite(InvalidArgument):
    """A number that is NaN or infinite; nothing was shared."""


class OutOfRange(InvalidArgument):
    """A number that is larger than fixed point takes; nothing was shared."""


class SharesRefused(CloisterError):
    """Bytes that are not shares of this version, or shares that do not belong together."""


def limit(fraction_bits: int = FRACTION_BITS, *, product_bits: int | None = None) -> float:
    """The largest number that may be shared: a product of two scales below it still has two bits to spare.

    `product_bits` are the fraction bits of a product, where its factors have different scales.
    """
    return 2.0 ** (61 - (2 * fraction_bits if product_bits is None else product_bits))


def encode(
    name: str, values: NDArray[Any], *, fraction_bits: int = FRACTION_BITS, product_bits: int | None = None
) -> Ring:
    """Each number times 2^fraction_bits, rounded, modulo 2^64. Raises NotFinite and OutOfRange, which name the tensor."""
    most = limit(fraction_bits, product_bits=product_bits)
    numbers = np.asarray(values, dtype=np.float64)
    if not np.isfinite(numbers).all():
        raise NotFinite(f"{name!r} holds NaN or infinity, which cannot be shared; remove those rows")
    if numbers.size and np.abs(numbers).max() > most:
        raise OutOfRange(f"{name!r} holds a number beyond {most:g}, the range of private inference; scale the column")
    return np.rint(numbers * 2.0**fraction_bits).astype(np.int64).view(np.uint64)


def decode(ring: Ring, *, fraction_bits: int = FRACTION_BITS) -> NDArray[np.float64]:
    """The numbers, float64, of what was joined."""
    return np.ascontiguousarray(ring).view(np.int64) / 2.0**fraction_bits


def split(ring: Ring, *, parties: int = 2) -> tuple[Ring, ...]:
    """Fresh shares, one for each party; each alone, and all but one together, are uniform."""
    if parties < 2:
        raise InvalidArgument("shares are for two parties at least")
    masks = [np.frombuffer(os.urandom(ring.nbytes), dtype=np.uint64).reshape(ring.shape) for _ in range(parties - 1)]
    last = ring.copy()
    for mask in masks:
        last -= mask
    return (*masks, last)


def join(shares: tuple[Ring, ...] | list[Ring]) -> Ring:
    """The sum modulo 2^64. Raises SharesRefused where shapes differ."""
    if len({share.shape for share in shares}) != 1:
        raise SharesRefused("the shares have different shapes, so they are not of one request; ask again")
    total = shares[0].copy()
    for share in shares[1:]:
        total += share
    return total


@dataclass(frozen=True, slots=True)
class Shares:
    """What one party gets of a request, or gives back: its share of each tensor."""

    deployment: str
    """Whose parties they are; shares of another deployment are refused by its parties."""
    request: bytes
    """16 fresh bytes, the same at each party."""
    party: int
    tensors: Mapping[str, Ring] = field(repr=False)
    fraction_bits: int = FRACTION_BITS

    def to_bytes(self) -> bytes:
        """In `cloister.shares/1`."""
        if not _NAME.fullmatch(self.deployment) or len(self.request) != 16 or not 0 <= self.party < 256:
            raise InvalidArgument(
                "shares need a deployment of visible ASCII, a request of 16 bytes and a party's number"
            )
        head = _HEAD.pack(self.party, self.fraction_bits, len(self.tensors), len(self.deployment), self.request)
        parts = [_LINE, head, self.deployment.encode("ascii")]
        for name, share in self.tensors.items():
            if not _NAME.fullmatch(name) or share.dtype != np.uint64 or share.ndim > _MOST_DIMENSIONS:
                raise InvalidArgument(f"{name!r} is no share: an array of uint64, named in visible ASCII")
            parts += [
                struct.pack("<BB", len(name), share.ndim),
                name.encode("ascii"),
                struct.pack(f"<{share.ndim}Q", *share.shape),
                share.astype("<u8").tobytes(),
            ]
        return b"".join(parts)

    @classmethod
    def from_bytes(cls, body: bytes | memoryview) -> Shares:
        """Raises SharesRefused for another version, and where anything is cut, left over or does not agree."""
        view = memoryview(body)
        if bytes(view[: len(_MAGIC)]) != _MAGIC:
            raise SharesRefused("these bytes are no shares")
        if bytes(view[: len(_LINE)]) != _LINE:
            raise SharesRefused(
                "these shares are of another version than 1; use the version of Cloister that wrote them"
            )
        reader = _Reader(view[len(_LINE) :])
        party, bits, count, length, request = _HEAD.unpack(reader.take(_HEAD.size))
        deployment = reader.text(length)
        tensors: dict[str, Ring] = {}
        for _ in range(count):
            named, dimensions = reader.take(2)
            name = reader.text(named)
            if name in tensors or dimensions > _MOST_DIMENSIONS:
                raise SharesRefused(f"the tensor {name!r} comes twice, or has too many dimensions")
            shape = struct.unpack(f"<{dimensions}Q", reader.take(8 * dimensions))
            size = math.prod(shape)
            if max(size, *shape, 0) > _MOST_ELEMENTS:
                raise SharesRefused(f"the tensor {name!r} is too large")
            tensors[name] = np.frombuffer(reader.take(8 * size), dtype="<u8").astype(np.uint64).reshape(shape)
        if reader.left:
            raise SharesRefused("bytes are left over behind the shares")
        return cls(deployment, request, party, tensors, bits)


class _Reader:
    def __init__(self, view: memoryview) -> None:
        self._view, self._at = view, 0

    @property
    def left(self) -> int:
        return len(self._view) - self._at

    def take(self, count: int) -> bytes:
        if count > self.left:
            raise SharesRefused("the shares are cut short")
        self._at += count
        return bytes(self._view[self._at - count : self._at])

    def text(self, count: int) -> str:
        raw = self.take(count)
        text = raw.decode("ascii", errors="replace")
        if not _NAME.fullmatch(text):
            raise SharesRefused("a name in the shares is not visible ASCII")
        return text
