"""The kinds of correlated randomness: what each party draws for itself, and what the dealer works out of what both drew.

A tuple has random parts, whose shares are the parties' own streams, and derived parts: the second party draws its share of them and
the first is sent the correction. So only one party is sent anything. Knows arithmetic; nothing of keys, links or networks.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import combinations
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cloister_privacy.mpc.ring import Ring

__all__ = [
    "FIRST_LEVEL",
    "LAST_LEVEL",
    "Comparison",
    "Conjunctions",
    "Part",
    "Triple",
    "Truncation",
    "Tuple",
    "Waves",
    "WeightProduct",
    "bit_bytes",
    "digits_of",
]

Words = NDArray[Any]

_RING, _BITS, _TABLE = np.dtype(np.uint64), np.dtype(np.uint8), np.dtype(np.uint16)


@dataclass(frozen=True, slots=True)
class Part:
    """One array of a tuple. Words of 64 bits are shared by addition, all others by exclusive or."""

    shape: tuple[int, ...]
    dtype: np.dtype[Any] = _RING

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def join(self, first: Words, second: Words) -> Words:
        joined: Words = first + second if self.dtype == _RING else first ^ second
        return joined

    def correction(self, secret: Words, second: Words) -> Words:
        """The first party's share."""
        found: Words = secret - second if self.dtype == _RING else secret ^ second
        return found


class Tuple(Protocol):
    """A kind of tuple with its sizes. Its repr tells all that it depends on, and goes into the program's digest."""

    @property
    def random(self) -> tuple[Part, ...]: ...

    @property
    def derived(self) -> tuple[Part, ...]: ...

    def derive(self, drawn: Sequence[Words], masks: Mapping[str, Ring], /) -> tuple[Words, ...]:
        """The derived parts of the random ones; `masks` are those of the weights."""
        ...


class Bilinear(Protocol):
    """A product of two arrays, linear in each; its repr tells it apart."""

    def __call__(self, left: Ring, right: Ring, /) -> Ring: ...

    def shape(self, left: tuple[int, ...], right: tuple[int, ...], /) -> tuple[int, ...]: ...


@dataclass(frozen=True, slots=True)
class Triple:
    """Beaver's triple: a, b and their product."""

    op: Bilinear
    left: tuple[int, ...]
    right: tuple[int, ...]

    @property
    def random(self) -> tuple[Part, ...]:
        return Part(self.left), Part(self.right)

    @property
    def derived(self) -> tuple[Part, ...]:
        return (Part(self.op.shape(self.left, self.right)),)

    def derive(self, drawn: Sequence[Words], masks: Mapping[str, Ring], /) -> tuple[Words, ...]:
        return (self.op(drawn[0], drawn[1]),)


@dataclass(frozen=True, slots=True)
class WeightProduct:
    """A fresh b for an input, and its product with the weight's mask of this generation."""

    op: Bilinear
    weight: str
    left: tuple[int, ...]
    right: tuple[int, ...]

    @property
    def random(self) -> tuple[Part, ...]:
        return (Part(self.left),)

    @property
    def derived(self) -> tuple[Part, ...]:
        return (Part(self.op.shape(self.left, self.right)),)

    def derive(self, drawn: Sequence[Words], masks: Mapping[str, Ring], /) -> tuple[Words, ...]:
        return (self.op(drawn[0], masks[self.weight]),)


@dataclass(frozen=True, slots=True)
class Truncation:
    """A mask r with r >> bits, taken as unsigned and as signed."""

    count: int
    bits: int

    @property
    def random(self) -> tuple[Part, ...]:
        return (Part((self.count,)),)

    @property
    def derived(self) -> tuple[Part, ...]:
        return Part((self.count,)), Part((self.count,))

    def derive(self, drawn: Sequence[Words], masks: Mapping[str, Ring], /) -> tuple[Words, ...]:
        return _shifted(drawn[0], self.bits)


@dataclass(frozen=True, slots=True)
class Waves:
    """A mask r with the sine and cosine of r, 2r, ... in a period of 2^period_bits, in fixed point."""

    count: int
    period_bits: int
    harmonics: int
    fraction_bits: int

    @property
    def random(self) -> tuple[Part, ...]:
        return (Part((self.count,)),)

    @property
    def derived(self) -> tuple[Part, ...]:
        return (Part((2, self.harmonics, self.count)),)

    def derive(self, drawn: Sequence[Words], masks: Mapping[str, Ring], /) -> tuple[Words, ...]:
        waves = np.rint(self.waves(drawn[0]) * 2.0**self.fraction_bits)
        return (waves.astype(np.int64).view(np.uint64),)

    def waves(self, words: Ring) -> NDArray[np.float64]:
        """Cosines and sines, [2, harmonics, n]."""
        turns = (words & np.uint64(2**self.period_bits - 1)).astype(np.float64) / 2.0**self.period_bits
        angles = 2 * np.pi * np.arange(1, self.harmonics + 1)[:, None] * turns
        return np.stack([np.cos(angles), np.sin(angles)])


@dataclass(frozen=True, slots=True)
class Conjunctions:
    """Which products of seven bits a level of the comparison takes: 0 to 3 are 'equal' of digits from the highest to the lowest, 4 to
    6 'less' of all but the highest, from the second on."""

    terms: tuple[tuple[int, ...], ...]

    @property
    def subsets(self) -> tuple[tuple[int, ...], ...]:
        """All parts of two bits or more, in order: products that the dealer works out."""
        return _subsets(self.terms)


@cache
def _subsets(terms: tuple[tuple[int, ...], ...]) -> tuple[tuple[int, ...], ...]:
    return tuple(
        sorted({part for term in terms for size in range(2, len(term) + 1) for part in combinations(term, size)})
    )


FIRST_LEVEL = Conjunctions(((0, 4), (0, 1, 5), (0, 1, 2, 6), (0, 1, 2, 3)))
LAST_LEVEL = Conjunctions(((0, 4), (0, 1, 5), (0, 1, 2, 6)))
"""Whether all are equal is of no more use."""

DIGITS = 16


def bit_bytes(count: int) -> int:
    """How many bytes so many bits take."""
    return -(-count // 8)


@dataclass(frozen=True, slots=True)
class Comparison:
    """What tells whether x - t is below 0 for each of some public t, and multiplies x, or x >> bits, by that bit.

    One mask r for all thresholds, for each of its 16 digits of 4 bits what a public digit is beside it (a table of 16 bits), masks for
    two levels of conjunctions, and a random bit with its multiples of the mask.
    """

    count: int
    thresholds: int
    bits: int
    is_multiplied: bool

    @property
    def random(self) -> tuple[Part, ...]:
        j, packed = self.thresholds, bit_bytes(self.count)
        return (
            Part((self.count,)),
            Part((7, j, 4, packed), _BITS),
            Part((7, j, 1, packed), _BITS),
            Part((j, packed), _BITS),
        )

    @property
    def derived(self) -> tuple[Part, ...]:
        j, packed = self.thresholds, bit_bytes(self.count)
        tables = (Part((self.count, DIGITS), _TABLE),) * 2
        levels = (
            Part((len(FIRST_LEVEL.subsets), j, 4, packed), _BITS),
            Part((len(LAST_LEVEL.subsets), j, 1, packed), _BITS),
        )
        shifted = (Part((self.count,)),) * (2 if self.bits else 0)
        multiples = (Part((j, self.count)),) * ((2 if self.bits else 1) if self.is_multiplied else 0)
        return (*tables, *levels, Part((j, self.count)), *shifted, *multiples)

    def derive(self, drawn: Sequence[Words], masks: Mapping[str, Ring], /) -> tuple[Words, ...]:
        mask, first, last, packed = drawn
        bits = np.unpackbits(packed, axis=1, count=self.count).astype(np.uint64)
        shifted = _shifted(mask, self.bits) if self.bits else ()
        multiplied = (shifted or (mask,)) if self.is_multiplied else ()
        return (
            *_tables(mask),
            _conjoined(first, FIRST_LEVEL),
            _conjoined(last, LAST_LEVEL),
            bits,
            *shifted,
            *(bits * each for each in multiplied),
        )


def digits_of(words: Ring) -> NDArray[np.uint8]:
    """[..., n] to [..., n, 16]: digits of 4 bits, the lowest first."""
    octets = np.ascontiguousarray(words).astype("<u8").view(np.uint8).reshape(*words.shape, 8)
    return np.stack([octets & 15, octets >> 4], axis=-1).reshape(*words.shape, DIGITS)


def _tables(mask: Ring) -> tuple[Words, Words]:
    """Bit v of a digit's table: whether v is less than the mask's digit, and whether it equals it. Of the highest digit the first bit
    counts by exclusive or, which makes the sign of v - mask out of it."""
    digits = digits_of(mask).astype(np.uint16)
    one = np.uint16(1)
    equal = one << digits
    less = equal - one
    low = digits[:, -1] & np.uint16(7)
    sign = (digits[:, -1] >> 3).astype(bool)
    equal[:, -1] = (one << low) * np.uint16(0x0101)
    less[:, -1] = ((one << low) - one) * np.uint16(0x0101) ^ np.where(sign, 0x00FF, 0xFF00).astype(np.uint16)
    return less, equal


def _conjoined(masks: Words, level: Conjunctions) -> Words:
    return np.stack([np.bitwise_and.reduce(masks[list(subset)], axis=0) for subset in level.subsets])


def _shifted(mask: Ring, bits: int) -> tuple[Words, Words]:
    return mask >> np.uint64(bits), (mask.view(np.int64) >> np.int64(bits)).view(np.uint64)
