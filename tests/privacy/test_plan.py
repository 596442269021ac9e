"""Plans: from public numbers only, refused by name, calibrated from above."""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import stats

from cloister.wire.plans import Guarantee, TrainingSpec
from cloister_privacy import DPPlan
from cloister_privacy.errors import BatchLargerThanNominal, PlanError, PlanImpossible, UnitNotSupported
from cloister_privacy.overflow import log_overflow

PLAN = DPPlan(
    nominal_size=60000, capacity=60000, batch_size=256, steps=2344, noise_multiplier=1.1425, clip=1.0, delta=1e-6
)


def test_rate_divisor_and_noise_follow_from_the_declared_numbers() -> None:
    plan = replace(PLAN, clip=0.5)
    assert plan.sampling_rate == 256 / 60000
    assert plan.divisor == 256
    assert plan.noise_std == pytest.approx(1.1425 * 0.5 * (1 + 1e-5), rel=1e-12)
    assert plan.epsilon() == pytest.approx(1.2085, abs=1e-4)
    assert plan.epsilon_by_pld() < plan.epsilon()


def test_the_event_is_the_plan() -> None:
    event = PLAN.event()
    assert (event.noise_multiplier, event.sampling_rate, event.steps) == (1.1425, 256 / 60000, 2344)
    assert (event.mechanism, event.unit, event.adjacency) == ("poisson_subsampled_gaussian", "row", "add_remove")


@pytest.mark.parametrize(
    ("change", "error"),
    [
        ({"batch_size": 60001}, BatchLargerThanNominal),
        ({"batch_size": 0}, PlanImpossible),
        ({"steps": 0}, PlanImpossible),
        ({"noise_multiplier": 0.0}, PlanImpossible),
        ({"noise_multiplier": float("nan")}, PlanImpossible),
        ({"clip": 0.0}, PlanImpossible),
        ({"clip": 1e30}, PlanImpossible),
        ({"delta": 1.0}, PlanImpossible),
        ({"capacity": 59999}, PlanImpossible),
        ({"capacity": 0}, PlanImpossible),
        ({"rows_per_unit": 0, "unit": "user"}, PlanImpossible),
        ({"rows_per_unit": 2}, PlanImpossible),
        ({"rows_per_unit": 1000, "unit": "user", "clip": 1e-4}, PlanImpossible),
        ({"guarantee": (0.0, 1e-6)}, PlanImpossible),
        ({"guarantee": (float("inf"), 1e-6)}, PlanImpossible),
        ({"guarantee": (1.0, 1.0)}, PlanImpossible),
        ({"unit": "household"}, UnitNotSupported),
        ({"unit": "user", "adjacency": "replace_one"}, UnitNotSupported),
        ({"adjacency": "replace_one"}, UnitNotSupported),
    ],
)
def test_an_impossible_plan_is_refused_by_name(change: dict[str, Any], error: type[PlanError]) -> None:
    with pytest.raises(error):
        replace(PLAN, **change)


def test_the_batch_error_names_the_two_public_numbers_and_the_cure() -> None:
    with pytest.raises(BatchLargerThanNominal, match="batch larger than nominal_size: 70000 > 60000; lower batch_size"):
        replace(PLAN, batch_size=70000)


@given(
    epsilon=st.floats(0.05, 20),
    nominal_size=st.integers(1, 10**6),
    share=st.floats(0, 1),
    steps=st.integers(1, 3000),
    exponent=st.floats(-9, -3),
)
@settings(max_examples=25, deadline=None)
def test_calibration_never_exceeds_its_target_and_wastes_little(
    epsilon: float, nominal_size: int, share: float, steps: int, exponent: float
) -> None:
    numbers = {
        "nominal_size": nominal_size,
        "capacity": nominal_size,
        "batch_size": max(1, int(share * nominal_size)),
        "steps": steps,
    }
    try:
        plan = DPPlan.calibrated(epsilon=epsilon, **numbers, delta=10**exponent)
    except PlanImpossible:
        assert DPPlan(**numbers, noise_multiplier=1000.0, clip=1.0, delta=10**exponent).epsilon() > epsilon
        return
    assert plan.epsilon() <= epsilon
    if plan.noise_multiplier > 0.3:
        assert replace(plan, noise_multiplier=plan.noise_multiplier * (1 - 1e-5)).epsilon() > epsilon


def test_a_target_that_is_no_number_is_refused() -> None:
    for epsilon in (0.0, -1.0, float("nan"), float("inf")):
        with pytest.raises(PlanImpossible, match="must be a number above 0"):
            PLAN.calibrated_to(epsilon)


def test_a_spec_and_its_plan_carry_the_same_numbers(spec_of: Callable[..., TrainingSpec]) -> None:
    spec = spec_of(clip=0.7)
    plan = DPPlan.of(spec)
    for field in ("nominal_size", "capacity", "batch_size", "steps", "noise_multiplier", "clip", "delta"):
        assert getattr(plan, field) == getattr(spec, field)
    by_user = spec_of(rows_per_unit=3, guarantee=Guarantee(epsilon=4.0, delta=1e-7))
    assert DPPlan.of(by_user, unit="user").rows_per_unit == 3
    assert DPPlan.of(by_user, unit="user").guarantee == (4.0, 1e-7)
    with pytest.raises(PlanImpossible, match="a row is the unit"):
        DPPlan.of(by_user)


def test_the_slots_of_the_test_vector() -> None:
    """PRIVACY, rule 7, for rule 1's plan beside its source's guarantee; alone, its own epsilon of 1.21 needs fewer."""
    assert replace(PLAN, guarantee=(3.0, 1e-6)).slots == 401
    assert PLAN.slots == 398


NUMBERS = st.tuples(st.integers(1, 3000), st.floats(0, 1), st.floats(1, 3))


@given(numbers=NUMBERS, steps=st.integers(1, 5000), epsilon=st.floats(0.01, 200), exponent=st.floats(-9, -3))
@settings(max_examples=200, deadline=None)
def test_slots_are_the_least_whose_overflow_is_a_millionth_of_delta(
    numbers: tuple[int, float, float], steps: int, epsilon: float, exponent: float
) -> None:
    nominal, share, room = numbers
    capacity, batch, delta = int(nominal * room), max(1, int(share * nominal)), 10**exponent
    plan = DPPlan(
        nominal_size=nominal, capacity=capacity, batch_size=batch, steps=steps, noise_multiplier=1000.0, clip=1.0,
        delta=delta, guarantee=(epsilon, delta),
    )  # fmt: skip
    slots, overflow = plan.slots, plan.overflow
    log_weight = math.log(steps) + np.logaddexp(0, max(epsilon, plan.epsilon()))

    def truth(room: int) -> float:
        return float(stats.binom.logsf(room, capacity, batch / nominal)) + log_weight

    assert math.ceil(capacity * batch / nominal) - 1 <= slots <= capacity
    assert overflow <= delta / 1e6
    assert truth(slots) <= math.log(delta / 1e6) + 1e-6
    if slots == capacity:
        assert overflow == 0
    elif truth(slots) > -600:
        assert truth(slots) <= math.log(overflow) + 1e-6
    if slots > 0:  # two fewer would not do, nor one fewer but where the bound is a hair above the truth
        assert slots <= capacity * batch / nominal + 2 or truth(slots - 2) > math.log(delta / 1e6)


@given(numbers=NUMBERS, place=st.floats(0, 1))
@settings(max_examples=300, deadline=None)
def test_the_bound_on_overflow_is_above_the_truth_and_close_to_it(
    numbers: tuple[int, float, float], place: float
) -> None:
    nominal, share, room = numbers
    capacity, batch = int(nominal * room), max(1, int(share * nominal))
    rate = batch / nominal
    slots = min(capacity - 1, int(capacity * (rate + place * (1 - rate))))
    bound, truth = log_overflow(slots, capacity, batch, nominal), stats.binom.logsf(slots, capacity, rate)
    if truth > -600:  # below, scipy's own logarithm is of a number that is none
        assert truth <= bound + 1e-6
    deviation = math.sqrt(capacity * rate * (1 - rate))
    if deviation > 0 and slots - capacity * rate > 4 * deviation and truth > -600:
        assert bound <= truth + 0.06


def test_slots_are_public_and_monotone_in_what_they_follow_from() -> None:
    slots = PLAN.slots
    assert slots <= replace(PLAN, capacity=70000).slots
    assert slots <= replace(PLAN, guarantee=(8.0, 1e-6)).slots <= replace(PLAN, guarantee=(8.0, 1e-9)).slots
    assert replace(PLAN, guarantee=(0.5, 0.1)).slots == slots, "a weaker guarantee leaves the run's own"
    assert replace(PLAN, batch_size=60000).slots == 60000 and replace(PLAN, batch_size=60000).overflow == 0
    for epsilon in (700.0, 1000.0, 1e6):
        plan = replace(PLAN, guarantee=(epsilon, 1e-6))
        assert slots < plan.slots <= 60000 and 0 <= plan.overflow <= 1e-12
    huge = replace(PLAN, nominal_size=2**40, capacity=2**40, batch_size=2**39, noise_multiplier=1000.0)
    assert 2**39 < huge.slots < 2**39 + 10 * 2**20


def test_a_plan_by_user_clips_each_row_to_its_share_and_costs_no_more() -> None:
    plan = replace(PLAN, unit="user", rows_per_unit=4, clip=2.0)
    assert (plan.row_clip, plan.clip) == (0.5, 2.0)
    assert plan.noise_std == replace(PLAN, clip=2.0).noise_std
    assert plan.epsilon() == PLAN.epsilon() and plan.slots == PLAN.slots
    assert plan.event().unit == "user"
    assert plan.event().overflow == plan.overflow > 0


def test_plans_accounting_recipes_and_input_checks_load_no_torch() -> None:
    code = (
        "import sys, cloister_privacy, cloister_privacy.accounting, cloister_privacy.recipes, cloister_privacy.architecture;"
        "cloister_privacy.accounting.epsilon_by_pld(0.01, 1.0, steps=1, delta=1e-5);"
        "sys.exit('torch' in sys.modules or 'opacus' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
