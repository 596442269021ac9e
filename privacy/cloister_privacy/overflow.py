"""How many units a step draws at most, but for a chance too small to matter. Knows the binomial's tail; nothing of rows.

Every bound is from above and in logarithms, so that chances far below the least float still compare.
"""

from __future__ import annotations

import math
from functools import lru_cache

__all__ = ["least_slots", "log_overflow", "log_weight"]

_ROUNDING = 1e-9
"""Relative slack for rounding, added where a bound must hold."""


@lru_cache(maxsize=4096)
def least_slots(capacity: int, batch_size: int, nominal_size: int, *, log_bound: float) -> int:
    """The least number of slots that a step overflows with log-probability at most `log_bound`, by `log_overflow`.

    Never above `capacity`, which no step overflows.
    """
    low, high = min(capacity, capacity * batch_size // nominal_size), capacity
    while low < high:
        middle = (low + high) // 2
        if log_overflow(middle, capacity, batch_size, nominal_size) <= log_bound:
            high = middle
        else:
            low = middle + 1
    return high


def log_overflow(slots: int, capacity: int, batch_size: int, nominal_size: int) -> float:
    """An upper bound on ln P[Binomial(capacity, batch_size / nominal_size) > slots]; -inf where that is impossible.

    The terms above `slots` fall at least as fast as a geometric series, whose first is bounded by Stirling's formula
    (Robbins, American Mathematical Monthly 62(1), 1955). Close: within 6 % from four standard deviations above the mean on.
    """
    least = slots + 1  # the fewest drawn units that overflow
    if least > capacity:
        return -math.inf
    if least * nominal_size <= capacity * batch_size:
        return 0.0  # no tail: at least the mean
    first = _log_mass(least, capacity, batch_size, nominal_size)
    ratio = (capacity - least) * batch_size / ((least + 1) * (nominal_size - batch_size))
    bound = first - math.log1p(-ratio)
    return min(0.0, bound + _ROUNDING * (1 + abs(bound)))


def log_weight(epsilon: float) -> float:
    """ln(1 + e^epsilon), for any epsilon."""
    return max(0.0, epsilon) + math.log1p(math.exp(-abs(epsilon)))


def _log_mass(drawn: int, capacity: int, batch_size: int, nominal_size: int) -> float:
    """An upper bound on ln P[Binomial = drawn], for mean < drawn <= capacity. Differences are taken in whole numbers."""
    if drawn == capacity:
        return capacity * (math.log(batch_size) - math.log(nominal_size))
    rest = capacity - drawn
    above = drawn * nominal_size - capacity * batch_size  # nominal_size times the distance from the mean
    divergence = drawn * math.log1p(above / (capacity * batch_size)) + rest * math.log1p(
        -above / (capacity * (nominal_size - batch_size))
    )
    stirling = 1 / (12 * capacity) - 1 / (12 * drawn + 1) - 1 / (12 * rest + 1)
    return stirling + (math.log(capacity) - math.log(2 * math.pi * drawn) - math.log(rest)) / 2 - divergence
