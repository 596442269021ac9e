"""What a run costs: RDP vectors, epsilon, and the filter that admits or refuses. Knows numbers; nothing of rows, SQL or torch.

The mechanism is always the Poisson-subsampled Gaussian under add/remove adjacency (arXiv 1908.10530), composed `steps` times.
RDP decides; privacy-loss distributions are a second figure that decides nothing.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, lru_cache
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

from cloister_privacy.errors import AccountantsDisagree, AccountingError

__all__ = [
    "LARGEST_NOISE_MULTIPLIER",
    "LEAST_NOISE_MULTIPLIER",
    "ORDERS",
    "Filter",
    "Fit",
    "costs_at_most",
    "epsilon_by_pld",
    "epsilon_by_rdp",
    "largest",
    "least_noise_multiplier",
    "rdp_per_step",
]

Orders = tuple[float, ...]

ORDERS: Orders = tuple([1 + tenth / 10 for tenth in range(1, 100)] + [float(order) for order in range(12, 64)])
"""Opacus' default orders; a plan's own epsilon is the least over these."""

_MAIN_ORDERS: Orders = tuple(half / 2 for half in range(3, 129))  # 1.5, 2, 2.5, ..., 64
_OTHER_ORDERS: Orders = (2.0, 3.0, 4.0, 5.0, 6.0, 8.0, 10.0, 12.0, 16.0, 20.0, 24.0, 32.0, 48.0, 64.0)
_MAIN_WEIGHT = 0.899
_OTHER_WEIGHT = 0.1  # shared equally; 0.001 of delta is kept for overflowing steps

_LARGEST_PLD = 300.0
_MOST_PLD_STEPS = 200_000
"""Beyond, composing takes tens of seconds, for a figure that is only displayed."""

# The noise multipliers that the wire's plans allow.
LEAST_NOISE_MULTIPLIER = 0.3
LARGEST_NOISE_MULTIPLIER = 1000.0


def rdp_per_step(sampling_rate: float, noise_multiplier: float, *, orders: Sequence[float] = ORDERS) -> Orders:
    """The RDP of one step at each order, by Opacus; infinite where it cannot be computed, so that such an order admits nothing."""
    if not 0 < sampling_rate <= 1 or not 0 < noise_multiplier < math.inf:
        raise AccountingError(
            f"sampling rate {sampling_rate} must lie in (0, 1] and noise multiplier {noise_multiplier} above 0"
        )
    return tuple(_rdp_of_step(float(sampling_rate), float(noise_multiplier), float(order)) for order in orders)


def epsilon_by_rdp(
    sampling_rate: float, noise_multiplier: float, *, steps: int, delta: float, orders: Sequence[float] = ORDERS
) -> float:
    """The least epsilon over the orders (Balle et al., arXiv 1905.09982, theorem 21); infinite where no order gives one."""
    per_step = rdp_per_step(sampling_rate, noise_multiplier, orders=orders)
    return max(0.0, min(_epsilon_at(order, steps * rho, delta) for order, rho in zip(orders, per_step, strict=True)))


def costs_at_most(epsilon: float, sampling_rate: float, noise_multiplier: float, *, steps: int, delta: float) -> bool:
    """Whether `epsilon_by_rdp` is at most `epsilon`, asking no more orders than that takes: fractional ones are slow."""
    below, undecided = 0.0, []
    for order in ORDERS:
        if order.is_integer():
            (rho,) = rdp_per_step(sampling_rate, noise_multiplier, orders=(order,))
            below = steps * rho
            if _epsilon_at(order, below, delta) <= epsilon:
                return True
        # RDP never falls as the order grows, so that of the whole order below is a lower bound.
        elif _epsilon_at(order, below, delta) <= epsilon:
            undecided.append(order)
    return any(
        epsilon_by_rdp(sampling_rate, noise_multiplier, steps=steps, delta=delta, orders=(order,)) <= epsilon
        for order in undecided
    )


@lru_cache(maxsize=4096)
def epsilon_by_pld(sampling_rate: float, noise_multiplier: float, *, steps: int, delta: float) -> float:
    """The same epsilon by privacy-loss distributions, pessimistically rounded: tighter, displayed, never deciding.

    Beyond epsilon 300, where neither promises anything and its arithmetic overflows, and beyond 200,000 steps, the figure is RDP's.
    Raises AccountantsDisagree where it exceeds RDP by more than its discretisation explains (0.1 % and 1e-6).
    """
    by_rdp = epsilon_by_rdp(sampling_rate, noise_multiplier, steps=steps, delta=delta)
    if by_rdp == 0 or by_rdp > _LARGEST_PLD or steps > _MOST_PLD_STEPS:
        return by_rdp
    from dp_accounting.pld import privacy_loss_distribution  # slow to import

    # Connecting the dots errs by about steps * interval^2: keep that, and the last rounding, near 0.1 % of epsilon. The floor
    # bounds time and memory where epsilon is tiny; RDP is then larger by far more than the rounding.
    interval = max(2e-5, min(math.sqrt(2e-4 * by_rdp / steps), by_rdp / 1000))
    one_step = privacy_loss_distribution.from_gaussian_mechanism(
        noise_multiplier, sampling_prob=sampling_rate, value_discretization_interval=interval
    )
    by_pld = float(one_step.self_compose(steps).get_epsilon_for_delta(delta))
    if not by_pld <= by_rdp * 1.001 + 1e-6:
        raise AccountantsDisagree(
            f"epsilon is {by_rdp:.6g} by RDP but {by_pld:.6g} by privacy-loss distributions, which must not be larger; "
            "the plan is refused, please report these numbers"
        )
    return min(by_pld, by_rdp)


@dataclass(frozen=True, slots=True)
class Filter:
    """The budget of a source, frozen before its first event: (epsilon, delta) spread over weighted RDP orders.

    Admits while, at some order, the sum over all events stays within that order's budget. Sound for adaptive and concurrent
    events whose costs are fixed before they start: stopped at `budget(a)` the process is (epsilon, weight * delta)-DP
    (Feldman and Zrnic, arXiv 2008.11193; Haney et al., arXiv 2309.05901), and the weights sum to at most 1.
    """

    epsilon: float
    delta: float
    orders: Orders
    weights: Orders

    def __post_init__(self) -> None:
        if not (0 < self.epsilon < math.inf and 0 < self.delta < 1):
            raise AccountingError(f"a cap needs 0 < epsilon and 0 < delta < 1; got {self.epsilon} and {self.delta}")
        if len(self.orders) != len(self.weights) or len(set(self.orders)) != len(self.orders) or not self.orders:
            raise AccountingError("a filter needs distinct orders and one weight for each")
        if not all(1 < order < math.inf for order in self.orders):
            raise AccountingError("a filter's orders must be finite and above 1")
        if not (all(weight > 0 for weight in self.weights) and math.fsum(self.weights) <= 1):
            raise AccountingError("a filter's weights must be positive and sum to at most 1")

    @classmethod
    def frozen_by(
        cls, per_step: Callable[[Orders], Sequence[float]], *, steps: int, epsilon: float, delta: float
    ) -> Filter:
        """The filter that the first event of a source freezes; `per_step` gives that event's RDP per step at each order.

        The main order is the one that would admit the most repetitions of that event.
        """
        rhos = [steps * rho for rho in per_step(_MAIN_ORDERS)]
        budgets = [_budget(order, epsilon, _MAIN_WEIGHT * delta) for order in _MAIN_ORDERS]
        _, main = max(zip(map(_repetitions, budgets, rhos), _MAIN_ORDERS, strict=True))
        others = [order for order in _OTHER_ORDERS if order != main]
        weight_of = {order: _OTHER_WEIGHT / len(others) for order in others} | {main: _MAIN_WEIGHT}
        orders = tuple(sorted(weight_of))
        return cls(epsilon, delta, orders, tuple(weight_of[order] for order in orders))

    def budget(self, order: float) -> float:
        """B(a): the RDP at one order of the filter that all events together may reach."""
        if order not in self.orders:
            raise AccountingError(f"order {order} is not one of this filter's: {', '.join(map(str, self.orders))}")
        return _budget(order, self.epsilon, self.weights[self.orders.index(order)] * self.delta)

    def admits(self, used: Sequence[float], more: Sequence[float]) -> bool:
        """Whether an event of RDP `more` fits beside events that sum to `used`, both aligned with `orders`."""
        for order, before, added in zip(self.orders, self._aligned(used), self._aligned(more), strict=True):
            after, budget = before + added, self.budget(order)
            if budget > 0 and before >= 0 and added >= 0 and math.isfinite(after) and after <= budget:
                return True
        return False

    def spent(self, used: Sequence[float]) -> float:
        """How much of epsilon the events have used: 0 without events; infinite where no order is finite.

        Filter usage, not a DP statement of its own.
        """
        if not any(self._aligned(used)):
            return 0.0
        usage = [rho + self.epsilon - self.budget(order) for order, rho in zip(self.orders, used, strict=True)]
        return max(0.0, min((each for each in usage if not math.isnan(each)), default=math.inf))

    def left(self, used: Sequence[float]) -> float:
        """What `spent` leaves of epsilon, and never less than 0."""
        return max(0.0, self.epsilon - self.spent(used))

    def _aligned(self, rhos: Sequence[float]) -> Sequence[float]:
        if len(rhos) != len(self.orders):
            raise AccountingError(
                f"{len(rhos)} RDP values for {len(self.orders)} orders; compute them at filter.orders"
            )
        return rhos


@dataclass(frozen=True, slots=True)
class Fit:
    """The costliest run that still fits: its noise multiplier and its own epsilon by RDP."""

    noise_multiplier: float
    epsilon: float


def largest(
    sampling_rate: float,
    steps: int,
    *,
    delta: float,
    filter: Filter | tuple[float, float],
    used: Sequence[float] = (),
) -> Fit | None:
    """The largest run of these steps that `filter` still admits beside `used`, or None where none does.

    Before the first event give the source's (epsilon, delta) instead of a filter: each candidate then freezes its own.
    A plan calibrated to the returned epsilon at the same rate, steps and delta is admitted.
    """

    def fits(noise_multiplier: float) -> bool:
        def per_step(orders: Orders) -> Orders:
            return rdp_per_step(sampling_rate, noise_multiplier, orders=orders)

        if isinstance(filter, Filter):
            frozen, before = filter, used
        else:
            frozen = Filter.frozen_by(per_step, steps=steps, epsilon=filter[0], delta=filter[1])
            before = [0.0] * len(frozen.orders)
        return frozen.admits(before, [steps * rho for rho in per_step(frozen.orders)])

    noise_multiplier = least_noise_multiplier(fits)
    if noise_multiplier is None:
        return None
    return Fit(noise_multiplier, epsilon_by_rdp(sampling_rate, noise_multiplier, steps=steps, delta=delta))


def least_noise_multiplier(suffices: Callable[[float], bool]) -> float | None:
    """The least noise multiplier within the limits that suffices, to 1e-6 relative and from above; None where none does.

    `suffices` must be monotone: more noise never hurts.
    """
    low, high = LEAST_NOISE_MULTIPLIER, 1.0
    if suffices(low):
        return low
    while not suffices(high):
        if high >= LARGEST_NOISE_MULTIPLIER:
            return None
        low, high = high, min(high * 4, LARGEST_NOISE_MULTIPLIER)
    while high - low > 1e-6 * high:
        middle = (low + high) / 2
        low, high = (low, middle) if suffices(middle) else (middle, high)
    return high


@lru_cache(maxsize=65_536)
def _rdp_of_step(sampling_rate: float, noise_multiplier: float, order: float) -> float:
    try:
        rho = float(_compute_rdp()(q=sampling_rate, noise_multiplier=noise_multiplier, steps=1, orders=order))
    except (ValueError, ArithmeticError):  # the series at a fractional order may fail to converge
        rho = math.nan
    if order.is_integer():  # a sum of positive terms: reliable, but for rounding below zero by about 1e-16
        return math.inf if math.isnan(rho) else max(0.0, rho)
    return _between_whole_orders(sampling_rate, noise_multiplier, order, rho)


@cache
def _compute_rdp() -> Callable[..., Any]:
    """`opacus.accountants.analysis.rdp.compute_rdp`, by its file: it needs SciPy alone, and Opacus around it seconds for torch."""
    opacus = find_spec("opacus")
    if opacus is None or opacus.origin is None:
        raise ModuleNotFoundError("RDP is computed by Opacus, which is not installed: pip install 'cloister[privacy]'")
    file = Path(opacus.origin).parent / "accountants" / "analysis" / "rdp.py"
    spec = spec_from_file_location("opacus_rdp", file)
    if spec is None or spec.loader is None:
        raise ModuleNotFoundError(f"{file} cannot be loaded")
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    compute_rdp: Callable[..., Any] = module.compute_rdp
    return compute_rdp


def _between_whole_orders(sampling_rate: float, noise_multiplier: float, order: float, rho: float) -> float:
    """`rho` where it can be true, otherwise an upper bound from the whole orders around `order`.

    The alternating series for fractional orders cancels badly where order and noise are large: at order 63.5, q 0.5 and
    sigma 11.9 it comes out negative. But (a - 1) rho(a) is convex in a and vanishes at 0 and 1, so its values at whole orders
    bound it from both sides.
    """

    def moment(whole: int) -> float:
        return (whole - 1) * _rdp_of_step(sampling_rate, noise_multiplier, float(whole)) if whole > 1 else 0.0

    low = math.floor(order)
    share = order - low
    before, left, right, after = (moment(low + offset) for offset in (-1, 0, 1, 2))
    upper = (1 - share) * left + share * right
    lower = max(left + share * (left - before), right - (1 - share) * (after - right))
    is_possible = lower * (1 - 1e-9) - 1e-12 <= (order - 1) * rho <= upper
    return rho if is_possible and rho >= 0 else upper / (order - 1)


def _epsilon_at(order: float, rho: float, delta: float) -> float:
    return rho + math.log1p(-1 / order) - (math.log(delta) + math.log(order)) / (order - 1)


def _budget(order: float, epsilon: float, delta: float) -> float:
    """The RDP at `order` that (epsilon, delta) allows: `_epsilon_at`, solved for rho."""
    return epsilon - _epsilon_at(order, 0.0, delta)


def _repetitions(budget: float, rho: float) -> float:
    if budget <= 0 or not math.isfinite(rho):
        return -math.inf
    return budget / rho if rho > 0 else math.inf
