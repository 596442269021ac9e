"""The accountants and the filter: rule 1's test vector, the formulas by hand, and properties."""

from __future__ import annotations

import math
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister_privacy import accounting
from cloister_privacy.accounting import (
    ORDERS,
    Filter,
    costs_at_most,
    epsilon_by_pld,
    epsilon_by_rdp,
    largest,
    rdp_per_step,
)
from cloister_privacy.errors import AccountantsDisagree, AccountingError
from cloister_privacy.plan import DPPlan

Q, SIGMA, STEPS, EPSILON, DELTA = 256 / 60000, 1.1425, 2344, 3.0, 1e-6
OTHERS = {2, 3, 4, 5, 6, 8, 10, 12, 16, 20, 24, 32, 48, 64}


def frozen(*, sigma: float = SIGMA, epsilon: float = EPSILON, delta: float = DELTA) -> Filter:
    return Filter.frozen_by(
        lambda orders: rdp_per_step(Q, sigma, orders=orders), steps=STEPS, epsilon=epsilon, delta=delta
    )


def run_at(orders: tuple[float, ...], *, sigma: float = SIGMA, steps: int = STEPS) -> list[float]:
    return [steps * rho for rho in rdp_per_step(Q, sigma, orders=orders)]


def test_the_seed_plan_gives_order_9_and_room_for_seven_jobs() -> None:
    budget = frozen()
    assert budget.weights[budget.orders.index(9.0)] == 0.899
    (rho,) = run_at((9.0,))
    assert rho == pytest.approx(0.2325, abs=5e-5)
    assert budget.budget(9.0) == pytest.approx(1.6522, abs=5e-5)
    job, used, jobs = run_at(budget.orders), [0.0] * len(budget.orders), 0
    while budget.admits(used, job):
        used, jobs = [a + b for a, b in zip(used, job, strict=True)], jobs + 1
    assert jobs == 7
    assert budget.spent(used) <= EPSILON
    assert budget.left(used) == pytest.approx(EPSILON - budget.spent(used))


def test_a_main_order_outside_the_list_leaves_fourteen_others_and_one_inside_leaves_thirteen() -> None:
    outside = frozen()
    assert set(outside.orders) == OTHERS | {9}
    assert sorted(outside.weights)[:14] == [0.1 / 14] * 14
    inside = Filter.frozen_by(lambda orders: [abs(order - 16) + 1 for order in orders], steps=1, epsilon=3, delta=1e-6)
    assert set(inside.orders) == OTHERS
    assert inside.weights[inside.orders.index(16)] == 0.899
    assert sorted(inside.weights)[:13] == [0.1 / 13] * 13
    assert math.fsum(inside.weights) == pytest.approx(0.999)


def test_the_budget_of_an_order_is_the_formula_of_rule_1() -> None:
    budget = frozen()
    for order, weight in zip(budget.orders, budget.weights, strict=True):
        conversion = math.log(1 / (weight * DELTA)) + (order - 1) * math.log(1 - 1 / order) - math.log(order)
        assert budget.budget(order) == pytest.approx(EPSILON - conversion / (order - 1))


def test_spent_is_nothing_without_events_and_the_least_over_the_set_with_them() -> None:
    budget = frozen()
    assert budget.spent([0.0] * len(budget.orders)) == 0
    assert budget.left([0.0] * len(budget.orders)) == EPSILON
    used = run_at(budget.orders)
    by_hand = min(rho + EPSILON - budget.budget(order) for order, rho in zip(budget.orders, used, strict=True))
    assert budget.spent(used) == pytest.approx(by_hand)
    assert budget.spent([math.inf] * len(used)) == math.inf
    assert budget.left([math.inf] * len(used)) == 0


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, -1.0])
def test_a_cost_that_is_no_cost_is_never_admitted(bad: float) -> None:
    budget = frozen()
    fine, broken = [0.0] * len(budget.orders), [bad] * len(budget.orders)
    assert budget.admits(fine, fine)
    assert not budget.admits(fine, broken)
    assert not budget.admits(broken, fine)


def test_a_cap_below_every_conversion_admits_nothing_at_all() -> None:
    budget = frozen(epsilon=0.1)
    assert all(budget.budget(order) <= 0 for order in budget.orders)
    assert not budget.admits([0.0] * len(budget.orders), [0.0] * len(budget.orders))
    assert largest(Q, STEPS, delta=DELTA, filter=(0.1, DELTA)) is None


def test_costs_at_other_orders_than_the_filters_are_refused() -> None:
    budget = frozen()
    with pytest.raises(AccountingError, match="15 orders"):
        budget.admits([0.0], [0.0])
    with pytest.raises(AccountingError, match="not one of this filter's"):
        budget.budget(7.0)
    with pytest.raises(AccountingError, match="sum to at most 1"):
        Filter(1.0, 1e-6, (2.0, 3.0), (0.9, 0.2))


@given(st.lists(st.floats(0.31, 50), max_size=12))
@settings(max_examples=40, deadline=None)
def test_whatever_is_admitted_keeps_what_is_spent_within_the_cap(sigmas: list[float]) -> None:
    budget = frozen()
    used = [0.0] * len(budget.orders)
    for sigma in sigmas:
        more = run_at(budget.orders, sigma=sigma, steps=50)
        if budget.admits(used, more):
            before, used = budget.spent(used), [a + b for a, b in zip(used, more, strict=True)]
            assert before <= budget.spent(used) <= EPSILON + 1e-9


def test_the_largest_run_that_fits_fits_and_one_of_less_noise_does_not() -> None:
    budget = frozen()
    used = [3 * rho for rho in run_at(budget.orders)]
    fit = largest(Q, STEPS, delta=DELTA, filter=budget, used=used)
    assert fit is not None
    assert budget.admits(used, run_at(budget.orders, sigma=fit.noise_multiplier))
    assert not budget.admits(used, run_at(budget.orders, sigma=fit.noise_multiplier * 0.9999))


def test_a_plan_calibrated_to_the_largest_epsilon_is_admitted_as_the_first_one_too() -> None:
    fit = largest(Q, STEPS, delta=DELTA, filter=(EPSILON, DELTA))
    assert fit is not None
    assert 2.9 < fit.epsilon < EPSILON
    plan = DPPlan.calibrated(
        epsilon=fit.epsilon, nominal_size=60000, capacity=60000, batch_size=256, steps=STEPS, delta=DELTA
    )
    budget = frozen(sigma=plan.noise_multiplier)
    assert budget.admits([0.0] * len(budget.orders), run_at(budget.orders, sigma=plan.noise_multiplier))


def test_epsilon_is_what_opacus_accounts() -> None:
    from opacus.accountants import RDPAccountant

    assert list(ORDERS) == [float(order) for order in RDPAccountant.DEFAULT_ALPHAS]
    accountant = RDPAccountant()
    accountant.history = [(SIGMA, Q, STEPS)]
    assert epsilon_by_rdp(Q, SIGMA, steps=STEPS, delta=DELTA) == pytest.approx(accountant.get_epsilon(DELTA))


def test_rdp_at_whole_orders_is_what_opacus_computes() -> None:
    from opacus.accountants.analysis.rdp import compute_rdp

    orders = (2.0, 11.0, 64.0)
    assert rdp_per_step(Q, SIGMA, orders=orders) == tuple(
        compute_rdp(q=Q, noise_multiplier=SIGMA, steps=1, orders=list(orders))
    )


@given(q=st.floats(1e-6, 1), sigma=st.floats(0.3, 1000))
@settings(max_examples=15, deadline=None)
def test_rdp_is_never_negative_and_never_not_a_number(q: float, sigma: float) -> None:
    assert all(rho >= 0 for rho in rdp_per_step(q, sigma, orders=(1.5, 2.0, 9.5, 64.0)))


@pytest.mark.parametrize("order", [1.5, 9.0, 10.9, 63.5, 64.0])
@pytest.mark.parametrize(("q", "sigma"), [(0.01, 1.0), (0.5, 11.9), (0.5, 100.0), (0.9, 0.4)])
def test_rdp_is_the_integral_that_defines_it(q: float, sigma: float, order: float) -> None:
    x = np.linspace(-40 * sigma, order + 40 * sigma, 400_001)
    ratio = np.logaddexp(math.log1p(-q), math.log(q) + (2 * x - 1) / (2 * sigma**2))
    logs = order * ratio - x**2 / (2 * sigma**2) - math.log(sigma * math.sqrt(2 * math.pi))
    integral = (logs.max() + math.log(np.trapezoid(np.exp(logs - logs.max()), x))) / (order - 1)
    (rho,) = rdp_per_step(q, sigma, orders=(order,))
    assert integral * (1 - 1e-5) <= rho <= integral * 1.01


def test_opacus_loses_a_high_fractional_order_and_our_bound_does_not() -> None:
    from opacus.accountants.analysis.rdp import compute_rdp

    assert compute_rdp(q=0.5, noise_multiplier=11.9, steps=1, orders=63.5) < 0
    below, rho, above = rdp_per_step(0.5, 11.9, orders=(63.0, 63.5, 64.0))
    assert below < rho < above
    assert largest(0.5, 1000, delta=DELTA, filter=(0.5, DELTA)).epsilon <= 0.5  # type: ignore[union-attr]  # it fits


@pytest.mark.parametrize(("q", "sigma"), [(0.0, 1.0), (1.1, 1.0), (math.nan, 1.0), (0.5, 0.0), (0.5, math.inf)])
def test_a_mechanism_that_is_none_has_no_rdp(q: float, sigma: float) -> None:
    with pytest.raises(AccountingError, match="must lie in"):
        rdp_per_step(q, sigma)


def test_the_second_figure_is_tighter_and_quick() -> None:
    epsilon_by_pld(0.5, 3.0, steps=1, delta=DELTA)  # imports
    started = time.process_time()
    by_pld = epsilon_by_pld(Q, 1.1424, steps=STEPS, delta=DELTA)
    assert time.process_time() - started < 3  # 0.15 s on an idle core
    assert by_pld == pytest.approx(0.997, abs=0.002)
    assert by_pld < epsilon_by_rdp(Q, 1.1424, steps=STEPS, delta=DELTA) == pytest.approx(1.2086, abs=1e-3)


@given(q=st.floats(1e-4, 1), sigma=st.floats(0.5, 30), steps=st.integers(1, 500), exponent=st.floats(-8, -2))
@settings(max_examples=20, deadline=None)
def test_the_second_figure_is_never_above_the_first(q: float, sigma: float, steps: int, exponent: float) -> None:
    delta = 10**exponent
    assert epsilon_by_pld(q, sigma, steps=steps, delta=delta) <= epsilon_by_rdp(q, sigma, steps=steps, delta=delta)


def test_accountants_that_disagree_are_an_error_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(accounting, "epsilon_by_rdp", lambda *_, **__: 0.5)
    with pytest.raises(AccountantsDisagree, match="must not be larger"):
        epsilon_by_pld(Q, 1.1423, steps=STEPS, delta=DELTA)


@given(
    q=st.floats(1e-4, 1),
    sigma=st.floats(0.4, 20),
    steps=st.integers(1, 5000),
    factor=st.sampled_from([0.5, 0.999, 1.001]),
)
@settings(max_examples=25, deadline=None)
def test_asking_fewer_orders_answers_the_same(q: float, sigma: float, steps: int, factor: float) -> None:
    epsilon = epsilon_by_rdp(q, sigma, steps=steps, delta=DELTA)
    assert costs_at_most(epsilon * factor, q, sigma, steps=steps, delta=DELTA) == (factor > 1 or epsilon == 0)


def test_the_second_figure_of_a_run_of_very_many_steps_is_rdps() -> None:
    by_rdp = epsilon_by_rdp(0.01, 40.0, steps=1_000_000, delta=1e-5)
    assert epsilon_by_pld(0.01, 40.0, steps=1_000_000, delta=1e-5) == by_rdp
