"""One party's side of a computation on shares: additions are its own, and every product is a tuple and one exchange.

Semi-honest: what it sends is masked by fresh randomness, and it believes what it receives. An exchange with the other party is the
only thing that it waits for. Knows shares and tuples; nothing of layers, links or whose numbers they are.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_privacy.mpc.material import Source
from cloister_privacy.mpc.products import MATMUL, TIMES
from cloister_privacy.mpc.ring import Ring
from cloister_privacy.mpc.tuples import (
    FIRST_LEVEL,
    LAST_LEVEL,
    Bilinear,
    Comparison,
    Conjunctions,
    Triple,
    Truncation,
    Waves,
    WeightProduct,
    digits_of,
)

__all__ = ["Computation", "Shared", "Weight"]

Words = NDArray[Any]

_HALF = np.uint64(2**62)
"""Added before a truncation, so that what is shared is not negative."""


@dataclass(frozen=True, slots=True)
class Shared:
    """This party's share of numbers in fixed point."""

    share: Ring = field(repr=False)
    bits: int
    """Of the fraction: a network's, or twice as many after a product."""

    @property
    def shape(self) -> tuple[int, ...]:
        return self.share.shape

    def with_share(self, share: Ring) -> Shared:
        return Shared(share, self.bits)


@dataclass(frozen=True, slots=True)
class Weight:
    """A weight whose difference to its mask was opened when the generation began."""

    opened: Ring = field(repr=False)
    beside: Ring = field(repr=False)
    """The share of the mask, and at party 0 what was opened added to it."""


@dataclass(frozen=True, slots=True)
class _Compared:
    is_below: Ring
    """[thresholds, n], whole numbers 0 and 1."""
    value: Ring
    """[n], x, or x >> bits."""
    products: Ring | None
    """[thresholds, n], their products."""


class Computation:
    """Runs at both parties in step, with the same calls; `exchange` sends bytes and gives as many of the other's."""

    def __init__(
        self,
        party: int,
        source: Source,
        exchange: Callable[[bytes], bytes],
        *,
        weights: Mapping[str, Weight],
        shares: Mapping[str, Ring],
        fraction_bits: int,
    ) -> None:
        self.party, self._shares = party, shares
        self.fraction_bits = self.weight_bits = fraction_bits
        self._source, self._exchange, self._weights = source, exchange, weights

    # What needs no exchange.

    def constant(self, numbers: NDArray[Any] | float, bits: int) -> Ring:
        """A share of public numbers."""
        encoded = np.rint(np.asarray(numbers, np.float64) * 2.0**bits).astype(np.int64).view(np.uint64)
        return encoded if self.party == 0 else np.zeros_like(encoded)

    def plus(self, value: Shared, numbers: NDArray[Any] | float) -> Shared:
        """Public numbers added."""
        return value.with_share(value.share + self.constant(numbers, value.bits))

    def times(self, value: Shared, numbers: NDArray[Any] | float) -> Shared:
        """By public numbers; has the fraction bits of both."""
        value = self.truncated(value)
        factor = np.rint(np.asarray(numbers, np.float64) * 2.0**self.weight_bits).astype(np.int64).view(np.uint64)
        return Shared(value.share * factor, value.bits + self.weight_bits)

    def weight(self, name: str) -> Shared:
        """A weight that is only added."""
        return Shared(self._shares[name], self.weight_bits)

    def sum(self, first: Shared, *others: Shared) -> Shared:
        """Of arrays that broadcast; has the most fraction bits among them."""
        bits = max(each.bits for each in (first, *others))
        share = self.widened(first, bits).share
        for other in others:
            share = share + self.widened(other, bits).share
        return Shared(share, bits)

    def difference(self, left: Shared, right: Shared) -> Shared:
        return self.sum(left, right.with_share(np.uint64(0) - right.share))

    def widened(self, value: Shared, bits: int) -> Shared:
        """The same numbers with at least as many fraction bits."""
        if value.bits >= bits:
            return value
        return Shared(value.share << np.uint64(bits - value.bits), bits)

    # What is one exchange.

    def reveal(self, *shares: Words) -> list[Words]:
        """Both parties learn the sums (of words of 64 bits) or the exclusive or (of all others): one exchange for all of them."""
        theirs, at, found = self._exchange(b"".join(each.tobytes() for each in shares)), 0, []
        for mine in shares:
            other = np.frombuffer(theirs, mine.dtype, count=mine.size, offset=at).reshape(mine.shape)
            at += mine.nbytes
            found.append(mine + other if mine.dtype == np.uint64 else mine ^ other)
        return found

    def weighed(self, value: Shared, weight: str, op: Bilinear) -> Shared:
        """op(value, weight), by what was opened of the weight once: z = D E + D [a] + [b] E + [c] with fresh b and c = b a."""
        value, held = self.truncated(value), self._weights[weight]
        mask, product = self._source.take(WeightProduct(op, weight, value.shape, held.opened.shape))
        (masked,) = self.reveal(value.share - mask)
        return Shared(op(masked, held.beside) + op(mask, held.opened) + product, value.bits + self.weight_bits)

    def product(self, left: Shared, right: Shared, op: Bilinear = TIMES) -> Shared:
        """op(left, right) of two shared arrays; has the fraction bits of both."""
        a, b, product = self._source.take(Triple(op, left.shape, right.shape))
        d, e = self.reveal(left.share - a, right.share - b)
        beside = b + e if self.party == 0 else b
        return Shared(op(d, beside) + op(a, e) + product, left.bits + right.bits)

    def matmul(self, left: Shared, right: Shared) -> Shared:
        return self.product(left, right, MATMUL)

    def truncated(self, value: Shared, *, bits: int | None = None) -> Shared:
        """To the network's fraction bits, or to `bits`: off by less than one unit of the last place where the numbers are within
        2^62 units, and never by more."""
        wanted = self.fraction_bits if bits is None else bits
        if value.bits <= wanted:
            return value
        shift = value.bits - wanted
        mask, unsigned, signed = self._source.take(Truncation(value.share.size, shift))
        flat = value.share.reshape(-1) + mask
        (masked,) = self.reveal(flat)
        public, rest = self._shifted(masked, shift, unsigned, signed)
        share = (public if self.party == 0 else np.uint64(0)) - rest
        return Shared(share.reshape(value.shape), wanted)

    def waves(
        self, value: Shared, *, period: int, coefficients: Mapping[str, NDArray[np.float64]], gain: Any
    ) -> Shared:
        """gain * sum over k of cos[k] cos(2 pi k x / period) + sin[k] sin(2 pi k x / period); `period` is a power of two.

        sin(m - r) is sin m cos r - cos m sin r: m is opened, and shares of the sine and cosine of r come with it.
        """
        harmonics = len(coefficients["cos"])
        period_bits = value.bits + period.bit_length() - 1
        kind = Waves(value.share.size, period_bits, harmonics, self.fraction_bits)
        mask, of_mask = self._source.take(kind)
        (masked,) = self.reveal(value.share.reshape(-1) + mask)
        cosines, sines = kind.waves(masked)
        c, s = coefficients["cos"][:, None], coefficients["sin"][:, None]
        public = np.stack([c * cosines + s * sines, c * sines - s * cosines]) * np.broadcast_to(
            gain, value.shape
        ).reshape(-1)
        factors = np.rint(public * 2.0**self.fraction_bits).astype(np.int64).view(np.uint64)
        share = (factors * of_mask).sum(axis=(0, 1), dtype=np.uint64)
        return Shared(share.reshape(value.shape), 2 * self.fraction_bits)

    # Four exchanges: the masked words, two levels of conjunctions, and the masked bits.

    def below(self, value: Shared, thresholds: Sequence[float], *, to_bits: int | None = None) -> _Compared:
        """Which numbers are below each threshold, and with `to_bits` their products with the numbers, at so many fraction bits."""
        is_multiplied = to_bits is not None
        shift = value.bits - to_bits if to_bits is not None else 0
        flat = value.share.reshape(-1)
        kind = Comparison(flat.size, len(thresholds), shift, is_multiplied)
        taken = self._source.take(kind)
        mask, first, last, bit, less, equal, of_first, of_last, bit_words, *multiples = taken
        (masked,) = self.reveal(flat + mask)
        levels = np.array([round(t * 2.0**value.bits) for t in thresholds], dtype=np.int64).view(np.uint64)
        digits = digits_of(masked - levels[:, None])
        looked_up = [self._packed(table, digits) for table in (less, equal)]
        lesser, same = self._conjoined(looked_up[0], looked_up[1], first, of_first, FIRST_LEVEL)
        (lesser, _) = self._conjoined(lesser, same, last, of_last, LAST_LEVEL)
        (opened,) = self.reveal(lesser[:, 0] ^ bit)
        c = np.unpackbits(opened, axis=1, count=flat.size).astype(np.uint64)
        sign = np.uint64(1) - (c << np.uint64(1))
        is_below = sign * bit_words + (c if self.party == 0 else np.uint64(0))
        if not is_multiplied:
            return _Compared(is_below, flat, None)
        if shift:
            public, rest = self._shifted(masked, shift, *multiples[:2])
            _, of_bit = self._shifted(masked, shift, *multiples[2:])
        else:
            public, rest, of_bit = masked, mask, multiples[0]
        products = is_below * public - (c * rest + sign * of_bit)
        return _Compared(is_below, (public if self.party == 0 else np.uint64(0)) - rest, products)

    def _shifted(self, masked: Ring, shift: int, unsigned: Ring, signed: Ring) -> tuple[Ring, Ring]:
        """What is public of (m - r) >> shift and what is to be taken from it, a share. Where m's highest bit is 0, r may have wrapped,
        and just where its own highest bit is 1: then it counts as negative. So no wrap is ever missed."""
        raised = masked + _HALF
        has_top = raised >> np.uint64(63) == 1
        return (raised >> np.uint64(shift)) - (_HALF >> np.uint64(shift)), np.where(has_top, unsigned, signed)

    def _packed(self, table: Words, digits: NDArray[np.uint8]) -> Words:
        """Bits of shared tables at public places: [thresholds, 16, n], packed."""
        bits = (table >> digits).astype(np.uint8) & 1
        packed: Words = np.packbits(bits.transpose(0, 2, 1), axis=2)
        return packed

    def _conjoined(
        self, less: Words, equal: Words, masks: Words, products: Words, level: Conjunctions
    ) -> tuple[Words, Words]:
        """Four digits become one: whether it is less, and whether it is equal."""
        less, equal = (each.reshape(len(each), -1, 4, each.shape[-1]) for each in (less, equal))
        shares = [*(equal[:, :, k] for k in (3, 2, 1, 0)), *(less[:, :, k] for k in (2, 1, 0))]
        (opened,) = self.reveal(np.stack(shares) ^ masks)
        held = {(k,): masks[k] for k in range(7)} | dict(zip(level.subsets, products, strict=True))
        found: list[Words] = [self._conjunction(term, opened, held) for term in level.terms]
        lesser: Words = less[:, :, 3] ^ found[0] ^ found[1] ^ found[2]
        return lesser, found[-1]

    def _conjunction(self, term: tuple[int, ...], opened: Words, held: Mapping[tuple[int, ...], Words]) -> Words:
        """The product over the term of (opened ^ mask), multiplied out."""
        total: Words = np.zeros_like(opened[0])
        for choice in range(2 ** len(term)):
            masked = tuple(bit for k, bit in enumerate(term) if choice >> k & 1)
            factors = [opened[bit] for bit in term if bit not in masked]
            if masked:
                factors.append(held[masked])
            elif self.party:
                continue
            total ^= np.bitwise_and.reduce(factors, axis=0)
        return total
