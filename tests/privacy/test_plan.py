"""Plans: from public numbers only, refused by name, calibrated from above."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cloister.wire.plans import TrainingSpec
from cloister_privacy import DPPlan
from cloister_privacy.errors import BatchLargerThanNominal, PlanError, PlanImpossible, UnitNotSupported

PLAN = DPPlan(nominal_size=60000, batch_size=256, steps=2344, noise_multiplier=1.1425, clip=1.0, delta=1e-6)


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
        ({"unit": "user"}, UnitNotSupported),
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
    numbers = {"nominal_size": nominal_size, "batch_size": max(1, int(share * nominal_size)), "steps": steps}
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
    for field in ("nominal_size", "batch_size", "steps", "noise_multiplier", "clip", "delta"):
        assert getattr(plan, field) == getattr(spec, field)


def test_importing_plans_accounting_recipes_and_input_checks_loads_no_torch() -> None:
    code = (
        "import sys, cloister_privacy, cloister_privacy.accounting, cloister_privacy.recipes, cloister_privacy.architecture;"
        "sys.exit('torch' in sys.modules or 'opacus' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
