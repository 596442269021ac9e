"""Users as the unit: what one user may change, and that nothing public follows from who is there."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from cloister.wire.plans import TrainingSpec
from cloister_privacy import DPPlan
from cloister_privacy.training import sampler as sampler_module
from cloister_privacy.training.sampler import UserSampler

PLAN = DPPlan(
    nominal_size=100, capacity=200, batch_size=40, steps=10, noise_multiplier=1.0, clip=0.7, delta=1e-5,
    unit="user", rows_per_unit=3,
)  # fmt: skip


def clipped_sum(gradients: NDArray[np.float64], rows: NDArray[np.intp], clip: float) -> NDArray[np.float64]:
    """The naive sum of the drawn rows' gradients, each at most `clip` long."""
    drawn = gradients[rows]
    norms = np.linalg.norm(drawn, axis=1, keepdims=True)
    total: NDArray[np.float64] = (drawn * np.minimum(1, clip / np.maximum(norms, 1e-30))).sum(axis=0)
    return total


@given(
    sizes=st.lists(st.integers(1, 12), min_size=1, max_size=8),
    rows_per_unit=st.integers(1, 5),
    clip=st.floats(0.01, 10),
    seed=st.integers(0, 2**32 - 1),
)
@settings(max_examples=100, deadline=None)
def test_one_user_fewer_changes_the_clipped_sum_by_at_most_the_clip(
    sizes: list[int], rows_per_unit: int, clip: float, seed: int
) -> None:
    """Whatever is drawn, a user's part of the sum is at most C long; and the others' parts know nothing of that user."""
    random = np.random.default_rng(seed)
    units = random.permutation(np.repeat(np.arange(len(sizes)), sizes))
    # The worst case: all gradients long, and of one direction.
    gradients = np.abs(random.normal(size=(len(units), 3))) * 100
    plan = DPPlan(
        nominal_size=10, capacity=20, batch_size=10, steps=1, noise_multiplier=1.0, clip=clip, delta=1e-5,
        unit="user", rows_per_unit=rows_per_unit,
    )  # fmt: skip
    drawn = UserSampler(units, batch_size=1, nominal_size=1, rows_per_unit=plan.rows_per_unit).draw()
    whole = clipped_sum(gradients, drawn, plan.row_clip)
    for user in range(len(sizes)):
        without = clipped_sum(gradients, drawn[units[drawn] != user], plan.row_clip)
        assert np.linalg.norm(whole - without) <= clip * (1 + 1e-9)


def test_the_others_are_drawn_alike_whether_a_user_is_there_or_not(monkeypatch: pytest.MonkeyPatch) -> None:
    """With the same randomness for everyone else, the draw differs in the rows of the one user alone."""
    sizes = np.array([4, 1, 7, 2, 9])
    units = np.repeat(np.arange(5), sizes)
    bits = np.random.default_rng(5).integers(0, 2**8, 5).astype(np.uint8)

    def coupled(there: NDArray[np.bool_]) -> set[int]:
        """The rows drawn, numbered as in the whole dataset."""
        rows = np.flatnonzero(there[units])
        monkeypatch.setattr(sampler_module, "random_bytes", lambda _: bits[there])
        monkeypatch.setattr(sampler_module, "random_below", lambda bounds: np.uint64(0) * bounds)
        sampler = UserSampler(units[rows], batch_size=2, nominal_size=3, rows_per_unit=2)
        return set(rows[sampler.draw()].tolist())

    everyone = coupled(np.ones(5, dtype=bool))
    for user in range(5):
        there = np.arange(5) != user
        assert coupled(there) == {row for row in everyone if units[row] != user}


@pytest.mark.parametrize("unit", ["row", "user"])
def test_adjacent_datasets_have_identical_public_plans(unit: str, spec_of: Callable[..., TrainingSpec]) -> None:
    """A plan is made of declared numbers: no row, user or count of them is among its inputs, so neither may be its results."""
    spec = spec_of(rows_per_unit=1 if unit == "row" else 2)
    plans = [DPPlan.of(spec, unit=unit) for _ in range(2)]
    public = ("slots", "overflow", "row_clip", "sampling_rate", "divisor", "noise_std")
    assert [getattr(plans[0], name) for name in public] == [getattr(plans[1], name) for name in public]
    assert plans[0].event() == plans[1].event()


def test_a_sampler_of_one_user_fewer_has_the_same_threshold() -> None:
    units = np.repeat(np.arange(50), 2)
    samplers = [
        UserSampler(given, batch_size=PLAN.batch_size, nominal_size=PLAN.nominal_size, rows_per_unit=3)
        for given in (units, units[2:], units[:0])
    ]
    assert len({sampler._users._threshold for sampler in samplers}) == 1


def test_accounting_by_user_is_that_of_a_plain_subsampled_gaussian() -> None:
    by_row = DPPlan(nominal_size=100, capacity=200, batch_size=40, steps=10, noise_multiplier=1.0, clip=0.7, delta=1e-5)
    assert PLAN.epsilon() == by_row.epsilon()
    assert PLAN.event() == by_row.event().model_copy(update={"unit": "user"})
    assert PLAN.row_clip * PLAN.rows_per_unit == pytest.approx(PLAN.clip)
