"""Functions of shared numbers that are no polynomials, by comparison and by series of sines: tanh, exp, GELU, roots, the largest.

Each series is fitted to its function on an interval by least squares, and what lies outside is moved to its end first; `ERRORS` says
how far it is from the function, before fixed point. Knows numbers; nothing of layers.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_privacy.mpc.computation import Computation, Shared
from cloister_privacy.mpc.ring import Ring

__all__ = [
    "SERIES",
    "Series",
    "elu",
    "gelu",
    "inverse",
    "inverse_root",
    "leaky_relu",
    "maximum",
    "relu",
    "silu",
    "softmax",
    "tanh",
    "tanh_and_truncated",
    "tanh_half",
]

Numbers = NDArray[np.float64]
_LEAST_SINGULAR = 1e-6
"""Smaller singular values, as a share of the largest, would make coefficients large and help nothing."""


def _gelu_even(x: Numbers) -> Numbers:
    return np.asarray(x * np.vectorize(math.erf)(x / 2**0.5) / 2)


@dataclass(frozen=True, slots=True)
class Series:
    """A function on [low, high] by harmonics of a period, a power of two."""

    function: Callable[[Numbers], Numbers]
    low: float
    high: float
    period: int
    harmonics: int
    error: float
    """The most that it is off on the interval; outside, see the functions."""

    def fit(self) -> tuple[float, dict[str, Numbers]]:
        """The mean, and the coefficients of cosines and sines."""
        return _fit(self)

    def __call__(self, x: Numbers) -> Numbers:
        """In the clear."""
        mean, found = self.fit()
        angles = 2 * np.pi / self.period * np.multiply.outer(x, np.arange(1, self.harmonics + 1))
        return np.asarray(mean + np.cos(angles) @ found["cos"] + np.sin(angles) @ found["sin"])


@cache
def _fit(series: Series) -> tuple[float, dict[str, Numbers]]:
    nodes = np.cos(np.pi * (np.arange(4000) + 0.5) / 4000)
    x = (series.low + series.high) / 2 + (series.high - series.low) / 2 * nodes
    angles = 2 * np.pi / series.period * np.outer(x, np.arange(1, series.harmonics + 1))
    columns = np.hstack([np.ones((len(x), 1)), np.cos(angles), np.sin(angles)])
    left, values, right = np.linalg.svd(columns, full_matrices=False)
    kept = values > values[0] * _LEAST_SINGULAR
    found = right[kept].T @ ((left[:, kept].T @ series.function(x)) / values[kept])
    return float(found[0]), {"cos": found[1 : series.harmonics + 1], "sin": found[series.harmonics + 1 :]}


SERIES = {
    "tanh": Series(np.tanh, -6.0, 6.0, 16, 20, 1e-5),
    "tanh_half": Series(lambda x: np.tanh(x / 2), -12.0, 12.0, 32, 20, 1e-5),
    "exp": Series(np.exp, -16.0, 0.0, 32, 24, 2e-6),
    "gelu": Series(_gelu_even, -6.0, 6.0, 16, 16, 1e-6),
    "silu": Series(lambda x: x * np.tanh(x / 2) / 2, -14.0, 14.0, 32, 24, 1e-5),
    "inverse": Series(lambda x: 1 / x, 1.0, 2.0, 2, 10, 1e-6),
    "inverse_root": Series(lambda x: x**-0.5, 1.0, 2.0, 2, 10, 1e-6),
}
"""Past the ends: tanh is off by 1.3e-5 at most, exp by 1.2e-7, GELU by 6e-9 and SiLU by 1.2e-5."""


def _series(c: Computation, name: str, value: Shared, gain: Any = 1.0, offset: Any = 0.0) -> Shared:
    series = SERIES[name]
    mean, coefficients = series.fit()
    found = c.waves(value, period=series.period, coefficients=coefficients, gain=gain)
    return c.plus(found, np.asarray(offset) + mean * np.asarray(gain))


@dataclass(frozen=True, slots=True)
class _Products:
    """What a comparison with multiplication gave, in the shape of its numbers."""

    value: Ring
    below: list[Ring]
    products: list[Ring]


def _compared(c: Computation, value: Shared, thresholds: tuple[float, ...], *, to_bits: int) -> _Products:
    found = c.below(value, thresholds, to_bits=to_bits)
    assert found.products is not None  # noqa: S101 (it was asked for)
    shape = (-1, *value.shape)
    return _Products(
        found.value.reshape(value.shape), list(found.is_below.reshape(shape)), list(found.products.reshape(shape))
    )


def _units(number: float, bits: int) -> np.uint64:
    return np.uint64(round(number * 2**bits) % 2**64)


def _between(c: Computation, found: _Products, low: float, high: float) -> Ring:
    """x, or the end that it lies beyond."""
    bits = c.fraction_bits
    (below_low, below_high), (times_low, times_high) = found.below, found.products
    top = c.constant(high, bits) - _units(high, bits) * below_high
    return times_high - times_low + _units(low, bits) * below_low + top


def _clamped(c: Computation, value: Shared, name: str) -> tuple[Shared, Shared]:
    """The numbers moved into the series' interval, and the numbers themselves, at the network's bits."""
    series = SERIES[name]
    found = _compared(c, value, (series.low, series.high), to_bits=c.fraction_bits)
    return Shared(_between(c, found, series.low, series.high), c.fraction_bits), Shared(found.value, c.fraction_bits)


def tanh(c: Computation, value: Shared) -> Shared:
    return tanh_and_truncated(c, value)[0]


def tanh_and_truncated(c: Computation, value: Shared) -> tuple[Shared, Shared]:
    """tanh(x), and x at the network's bits, which come out of the same exchanges."""
    inside, truncated = _clamped(c, value, "tanh")
    return _series(c, "tanh", inside), truncated


def tanh_half(c: Computation, value: Shared, *, gain: Any = 1.0, offset: Any = 0.0) -> Shared:
    """gain * tanh(x / 2) + offset: with a half and a half, the sigmoid."""
    return _series(c, "tanh_half", _clamped(c, value, "tanh_half")[0], gain, offset)


def gelu(c: Computation, value: Shared) -> Shared:
    return _with_even_part(c, value, "gelu")


def silu(c: Computation, value: Shared) -> Shared:
    return _with_even_part(c, value, "silu")


def _with_even_part(c: Computation, value: Shared, name: str) -> Shared:
    """x / 2 and an even part, which past the interval's ends goes on as |x| / 2 does."""
    series, bits = SERIES[name], c.fraction_bits
    found = _compared(c, value, (series.low, series.high), to_bits=bits)
    inside = _between(c, found, series.low, series.high)
    # |x - inside| is x - inside above the interval and inside - x below: there x - inside is what both its products tell.
    under = found.products[0] - _units(series.low, bits) * found.below[0]
    past = found.value - inside - (under << np.uint64(1))
    even = _series(c, name, Shared(inside, bits))
    return even.with_share(even.share + ((found.value + past) << np.uint64(bits - 1)))


def elu(c: Computation, value: Shared, alpha: float) -> Shared:
    """x, or alpha (exp(x) - 1) below zero."""
    low = SERIES["exp"].low
    found = _compared(c, value, (low, 0.0), to_bits=c.fraction_bits)
    inside = found.products[1] - found.products[0] + _units(low, c.fraction_bits) * found.below[0]
    curved = _series(c, "exp", Shared(inside, c.fraction_bits), alpha, -alpha)
    positive = Shared(found.value - found.products[1], c.fraction_bits)
    return curved.with_share(curved.share + c.widened(positive, curved.bits).share)


def relu(c: Computation, value: Shared) -> Shared:
    """Truncates in the same exchanges."""
    found = _compared(c, value, (0.0,), to_bits=c.fraction_bits)
    return Shared(found.value - found.products[0], c.fraction_bits)


def leaky_relu(c: Computation, value: Shared, slope: float) -> Shared:
    """x, or slope times x below zero."""
    found = _compared(c, value, (0.0,), to_bits=c.fraction_bits)
    negative = c.times(Shared(found.products[0], c.fraction_bits), slope)
    positive = c.widened(Shared(found.value - found.products[0], c.fraction_bits), negative.bits)
    return negative.with_share(negative.share + positive.share)


def maximum(c: Computation, value: Shared, axis: int) -> Shared:
    """The largest along an axis, in rounds of a tournament of four exchanges each; keeps the fraction bits."""
    share = np.moveaxis(value.share, axis, 0)
    while len(share) > 1:
        half = len(share) // 2
        first, second, odd = share[:half], share[half : 2 * half], share[2 * half :]
        found = _compared(c, Shared(first - second, value.bits), (0.0,), to_bits=value.bits)
        share = np.concatenate([first - found.products[0], odd])
    return value.with_share(share[0])


def _normalized(
    c: Computation, value: Shared, least: int, most: int, *, power: float, scale: float = 1.0
) -> tuple[Shared, Shared]:
    """Numbers in [2^least, 2^(most + 1)) as z 2^k: z in [1, 2), and scale * 2^(k power)."""
    exponents = range(least + 1, most + 1)
    bits = c.fraction_bits
    is_below = c.below(value, [2.0**k for k in exponents]).is_below

    def steps(exponent: float, scale: float) -> Shared:
        """scale * 2^(k exponent), by the steps that lie between one power and the next."""
        total = c.constant(np.full(value.share.size, scale * 2.0 ** (least * exponent)), bits)
        for below, k in zip(is_below, exponents, strict=True):
            step = scale * (2.0 ** (k * exponent) - 2.0 ** ((k - 1) * exponent))
            unit = np.uint64(round(step * 2**bits) % 2**64)
            total += (unit if c.party == 0 else np.uint64(0)) - unit * below
        return Shared(total.reshape(value.shape), bits)

    return c.truncated(c.product(value, steps(-1.0, 1.0))), steps(power, scale)


def inverse(c: Computation, value: Shared, *, least: int, most: int) -> Shared:
    """1 / x of numbers from 2^least to 2^(most + 1)."""
    z, power = _normalized(c, value, least, most, power=-1.0)
    return c.product(c.truncated(_series(c, "inverse", z)), power)


def inverse_root(c: Computation, value: Shared, *, least: int, most: int, scale: float = 1.0) -> Shared:
    """scale / sqrt(x) of numbers from 2^least to 2^(most + 1)."""
    z, power = _normalized(c, value, least, most, power=-0.5, scale=scale)
    return c.product(c.truncated(_series(c, "inverse_root", z)), power)


def softmax(c: Computation, value: Shared, *, allowed: NDArray[np.bool_] | None = None) -> Shared:
    """Over the last axis; `allowed` says what of it counts at all, publicly."""
    if allowed is not None:
        value = c.plus(value, np.where(allowed, 0.0, -1024.0))
    largest = maximum(c, value, -1)
    below = value.with_share(value.share - largest.share[..., None])
    low = SERIES["exp"].low
    found = _compared(c, below, (low,), to_bits=c.fraction_bits)
    inside = found.value - found.products[0] + _units(low, c.fraction_bits) * found.below[0]
    # exp tells on which side of its end 0 a number lies, and truncation may move it there by one unit: the period forgives it.
    powers = c.truncated(_series(c, "exp", Shared(inside, c.fraction_bits)))
    if allowed is not None:
        powers = powers.with_share(powers.share * allowed)
    total = powers.with_share(powers.share.sum(axis=-1, dtype=np.uint64)[..., None])
    most = max(1, math.ceil(math.log2(value.shape[-1] + 1)))
    share = c.truncated(inverse(c, total, least=-1, most=most))
    return c.product(powers, share)
