"""What a release costs at each RDP order, from its pure epsilon or its rho of zCDP. Knows numbers and no mechanism.

A pure epsilon costs exactly what randomized response of that epsilon does, which is the costliest mechanism there is at any order.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

from cloister_privacy.accounting import Orders
from cloister_privacy.errors import AccountingError

__all__ = ["rdp_of_pure", "rdp_of_zcdp"]

_ROUNDING = 1 + 2**-44
"""Beyond what rounding does to the formulas, some units of 2^-53: figures are rounded up and never down."""

_LARGE = 40.0
"""Of order * epsilon: sinh is far from overflowing there, and e^-40 is below the last bit of 1."""


def rdp_of_pure(epsilon: float, *, orders: Sequence[float]) -> Orders:
    """The RDP at each order of any `epsilon`-DP mechanism, tight for randomized response; never above `epsilon`.

    min(eps, ln((e^(a eps) + e^((1 - a) eps)) / (1 + e^eps)) / (a - 1)), rounded up.
    """
    _check(epsilon, "epsilon", orders)
    return tuple(min(epsilon, _up(_randomized_response(epsilon, float(order)))) for order in orders)


def rdp_of_zcdp(rho: float, *, orders: Sequence[float]) -> Orders:
    """The RDP at each order of a `rho`-zCDP mechanism (Bun and Steinke, arXiv 1605.02065): order * rho, rounded up."""
    _check(rho, "rho", orders)
    return tuple(_up(float(order) * rho) for order in orders)


def _randomized_response(epsilon: float, order: float) -> float:
    if order * epsilon < _LARGE:
        # The fraction is cosh((a - 1/2) eps) / cosh(eps / 2) = 1 + 2 sinh(a eps / 2) sinh((a - 1) eps / 2) / cosh(eps / 2):
        # nothing cancels, however small epsilon is.
        excess = 2 * math.sinh(order * epsilon / 2) * math.sinh((order - 1) * epsilon / 2) / math.cosh(epsilon / 2)
        return math.log1p(excess) / (order - 1)
    # Both sums by log-sum-exp, their largest terms a eps and eps taken out: what is left is small beside epsilon.
    numerator = math.log1p(math.exp((1 - 2 * order) * epsilon))
    denominator = math.log1p(math.exp(-epsilon))
    return epsilon + (numerator - denominator) / (order - 1)


def _up(rho: float) -> float:
    return math.nextafter(rho * _ROUNDING, math.inf)


def _check(cost: float, name: str, orders: Sequence[float]) -> None:
    if not 0 < cost < math.inf:
        raise AccountingError(f"{name} {cost} must be a number above 0")
    if not all(1 < order < math.inf for order in orders):
        raise AccountingError("RDP orders must be finite and above 1")
