"""Queries: what they cost, that their sensitivity is what was charged, that their noise is as planned, and what they refuse.

Each statistical bound fails by chance less than once in a million runs.
"""

from __future__ import annotations

import math
import subprocess
import sys
from collections.abc import Callable
from decimal import MAX_EMAX, MIN_EMIN, Decimal, localcontext
from fractions import Fraction
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from pydantic import TypeAdapter
from scipy import stats
from sklearn.metrics import roc_auc_score

from cloister.wire._errors import InvalidArgument
from cloister.wire.columns import (
    AudioColumn,
    CategoryColumn,
    Column,
    NumberColumn,
    TensorColumn,
    TextColumn,
    UnitColumn,
)
from cloister.wire.jobs import ModelSchema
from cloister.wire.queries import (
    ClassEvaluationResult,
    Count,
    CountResult,
    Evaluation,
    Histogram,
    HistogramResult,
    LabelBalance,
    LabelBalanceResult,
    Mean,
    MeanResult,
    NumberEvaluationResult,
    Query,
    QueryEvent,
    QueryRequest,
    QueryResult,
    Sum,
    SumResult,
)
from cloister_privacy.accounting import ORDERS, Filter
from cloister_privacy.errors import (
    AccountantsDisagree,
    AccountingError,
    BinsRefused,
    ColumnNotQueryable,
    PlanError,
    PlanImpossible,
    QueryRefused,
    RowsDoNotFit,
    UnitNotSupported,
)
from cloister_privacy.queries import QueryPlan, cost_of, figures, mechanism, rdp_of_pure, rdp_of_zcdp, release
from cloister_privacy.queries.plan import Part, PlannedQuery
from cloister_privacy.queries.vectors import GRID, OneBin, Read, Steps

CHANCE = 1e-7
DATASET = "ds_" + "0" * 32
BINARY, KINDS, AGES = ("mdl_" + digit * 32 for digit in "123")
SCHEMA: dict[str, Column] = {
    "age": NumberColumn(low=-20, high=100),
    "sick": CategoryColumn(values=("no", "yes")),
    "kind": CategoryColumn(values=("a", "b", "c")),
    "note": TextColumn(max_length=8),
    "voice": AudioColumn(rate=8000, max_samples=8),
    "picture": TensorColumn(shape=(2,), low=0, high=1),
    "user": UnitColumn(),
}
MODELS = {
    (model, 1): ModelSchema(inputs={"kind": SCHEMA["kind"]}, target=target, output=SCHEMA[target])
    for model, target in ((BINARY, "sick"), (KINDS, "kind"), (AGES, "age"))
}
EVERY: tuple[Query, ...] = (
    Count(),
    Sum(column="age"),
    Mean(column="age"),
    Histogram(column="age", edges=(-20.0, 0.0, 18.0, 65.0)),
    Histogram(column="kind"),
    LabelBalance(column="sick"),
    Evaluation(model=BINARY, version=1),
    Evaluation(model=KINDS, version=1),
    Evaluation(model=AGES, version=1),
)

Rows = dict[str, NDArray[Any]]
Predictions = dict[tuple[str, int], NDArray[Any]]


def plan_of(*queries: Query, epsilon: float = 1.0, rows_per_unit: int = 1, unit: str | None = None) -> QueryPlan:
    request = QueryRequest(dataset=DATASET, queries=queries, epsilon=epsilon, rows_per_unit=rows_per_unit)
    unit = unit or ("row" if rows_per_unit == 1 else "user")
    return QueryPlan.of(request, schema=SCHEMA, unit=unit, models=MODELS)


def rows_of(count: int, *, seed: int = 0, wild: bool = False) -> tuple[Rows, Predictions]:
    """Rows and predictions for them; `wild` ones hold what no upload would let pass."""
    random = np.random.default_rng(seed)
    rows: Rows = {
        "age": random.uniform(-20, 100, count).astype(np.float32),
        "sick": random.integers(0, 2, count).astype(np.int32),
        "kind": random.integers(0, 3, count).astype(np.int32),
    }
    second = random.random(count).astype(np.float32)
    predictions: Predictions = {
        (BINARY, 1): np.stack([1 - second, second], axis=1),
        (KINDS, 1): random.random((count, 3)).astype(np.float32),
        (AGES, 1): random.uniform(-20, 100, count).astype(np.float32),
    }
    if wild:
        for array in (rows["age"], *predictions.values()):
            array[random.random(array.shape) < 0.3] = random.choice([np.nan, np.inf, -np.inf, 3e38, -3e38])
        for name in ("sick", "kind"):
            rows[name][random.random(count) < 0.3] = random.choice([-1, 99, 2**31 - 1])
    return rows, predictions


def exact_of(part: Part, rows: Rows, predictions: Predictions) -> NDArray[np.int64]:
    read = Read(rows, np.arange(len(rows["age"])), predictions)
    return np.atleast_1d(np.array(mechanism._transformation(part)(part.vector.of(read))))


# What it costs


def randomized_response(epsilon: float, order: float) -> Decimal:
    """Its Renyi divergence, by its two answers and to 80 digits."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 80, MAX_EMAX, MIN_EMIN
        e, a = Decimal(epsilon), Decimal(order)
        right = e.exp() / (1 + e.exp())
        # Where the truth is the other, one answer is likelier by e^epsilon, and one less likely.
        moment = right * (e * (a - 1)).exp() + (1 - right) * (e * (1 - a)).exp()
        return moment.ln() / (a - 1) * (1 - Decimal("1e-40"))  # so that its own rounding does not count


def discrete_laplace(epsilon: float, order: float, shift: int) -> Decimal:
    """The Renyi divergence between discrete Laplace noise of scale shift / epsilon and the same, shifted."""
    with localcontext() as context:
        context.prec, context.Emax, context.Emin = 60, MAX_EMAX, MIN_EMIN
        a, q = Decimal(order), (-Decimal(epsilon) / shift).exp()
        between = sum(((a * x + (1 - a) * (shift - x)) * q.ln()).exp() for x in range(1, shift))
        tails = (((1 - a) * shift * q.ln()).exp() + (a * shift * q.ln()).exp()) / (1 - q)
        return ((tails + between) * (1 - q) / (1 + q)).ln() / (a - 1) * (1 - Decimal("1e-30"))


EPSILONS = st.floats(math.log(1e-9), math.log(1000)).map(math.exp)
SOME_ORDERS = st.one_of(st.sampled_from(ORDERS), st.floats(1.0000001, 10_000), st.sampled_from([1.5, 2.0, 64.0, 1e6]))


@given(epsilon=EPSILONS, order=SOME_ORDERS)
@settings(max_examples=400, deadline=None)
def test_the_cost_is_that_of_randomized_response_and_never_below(epsilon: float, order: float) -> None:
    (cost,) = rdp_of_pure(epsilon, orders=(order,))
    exact = randomized_response(epsilon, order)
    assert cost <= epsilon
    assert Decimal(cost) >= exact
    assert cost == pytest.approx(float(exact), rel=1e-12)


@pytest.mark.parametrize("epsilon", [1e-9, 1e-3, 1.0, 39.9999, 40.0, 700.0, 1000.0])
@pytest.mark.parametrize("order", [1 + 2**-52, 1 + 1e-9, 1.1, 2.0, 64.0, 1e9, 1e300])
def test_the_cost_is_finite_at_the_ends_and_never_below(epsilon: float, order: float) -> None:
    (cost,) = rdp_of_pure(epsilon, orders=(order,))
    assert 0 < cost <= epsilon
    if order <= 1e9 and epsilon * order < 1e6:
        assert Decimal(cost) >= randomized_response(epsilon, order)


@given(epsilon=EPSILONS, order=st.floats(1.01, 200), shift=st.integers(1, 12))
@settings(max_examples=200, deadline=None)
def test_the_cost_bounds_that_of_the_discrete_laplace_at_any_distance(epsilon: float, order: float, shift: int) -> None:
    (cost,) = rdp_of_pure(epsilon, orders=(order,))
    assert Decimal(cost) >= discrete_laplace(epsilon, order, shift)


@given(epsilon=EPSILONS)
def test_the_cost_never_falls_as_the_order_grows_nor_as_epsilon_does(epsilon: float) -> None:
    orders = sorted({*ORDERS, 64.0, 1e3, 1e6})
    costs = rdp_of_pure(epsilon, orders=orders)
    assert all(left <= right * (1 + 1e-12) for left, right in pairwise(costs))
    more = rdp_of_pure(epsilon * 1.5, orders=orders)
    assert all(left <= right for left, right in zip(costs, more, strict=True))


def test_the_cost_of_zcdp_grows_with_the_order() -> None:
    costs = rdp_of_zcdp(0.1, orders=(1.5, 2.0, 64.0))
    assert costs == pytest.approx((0.15, 0.2, 6.4))
    assert all(
        Fraction(cost) >= Fraction(0.1) * Fraction(order) for cost, order in zip(costs, (1.5, 2, 64), strict=True)
    )


@pytest.mark.parametrize("cost_at", [rdp_of_pure, rdp_of_zcdp])
@pytest.mark.parametrize("cost", [0.0, -1.0, math.nan, math.inf])
def test_a_cost_that_is_no_number_above_zero_is_refused(cost_at: Callable[..., Any], cost: float) -> None:
    with pytest.raises(AccountingError):
        cost_at(cost, orders=(2.0,))


@pytest.mark.parametrize("order", [1.0, 0.5, math.inf, math.nan])
def test_an_order_that_is_none_is_refused(order: float) -> None:
    for cost_at in (rdp_of_pure, rdp_of_zcdp):
        with pytest.raises(AccountingError):
            cost_at(1.0, orders=(2.0, order))


def test_a_query_freezes_and_enters_a_filter() -> None:
    event = plan_of(Count(), epsilon=0.1).event()
    frozen = Filter.frozen_by(lambda orders: rdp_of_pure(event.epsilon, orders=orders), steps=1, epsilon=3, delta=1e-6)
    cost = rdp_of_pure(event.epsilon, orders=frozen.orders)
    times = 0
    while frozen.admits([times * each for each in cost], cost):
        times += 1
    assert times > 30, "more than adding up epsilons would admit"


def test_any_pure_or_zero_concentrated_measurement_of_opendp_is_charged_and_no_approximate_one() -> None:
    dp = mechanism._opendp()
    space = dp.vector_domain(dp.atom_domain(T="i64")), dp.l2_distance(T="i64")
    gaussian = space >> dp.m.then_gaussian(scale=2.0)
    assert cost_of(gaussian, 1, orders=(2.0, 8.0)) == rdp_of_zcdp(0.125, orders=(2.0, 8.0))
    pure = (dp.vector_domain(dp.atom_domain(T="i64")), dp.l1_distance(T="i64")) >> dp.m.then_laplace(scale=2.0)
    assert cost_of(pure, 3, orders=(2.0,)) == rdp_of_pure(1.5, orders=(2.0,))
    approximate = dp.c.make_fix_delta(dp.c.make_zCDP_to_approxDP(gaussian), 1e-6)
    with pytest.raises(AccountingError, match="no finite RDP"):
        cost_of(approximate, 1, orders=(2.0,))


# The plan


def test_a_plan_charges_all_its_epsilon_as_one_event() -> None:
    plan = plan_of(*EVERY, epsilon=0.7, rows_per_unit=3)
    event = plan.event()
    assert (event.mechanism, event.epsilon, event.steps, event.overflow) == ("discrete_laplace", 0.7, 1, 0.0)
    assert (event.unit, event.adjacency, event.rows_per_unit) == ("user", "add_remove", 3)


@given(
    epsilon=st.floats(0.01, 1000),
    rows=st.integers(1, 1000),
    shares=st.lists(st.floats(0.01, 10), min_size=9, max_size=9),
)
@settings(max_examples=60, deadline=None)
def test_the_parts_never_cost_more_than_the_whole(epsilon: float, rows: int, shares: list[float]) -> None:
    queries = [query.model_copy(update={"share": share}) for query, share in zip(EVERY, shares, strict=True)]
    parts = [
        part
        for each in plan_of(*queries, epsilon=epsilon, rows_per_unit=rows, unit="user").queries
        for part in each.parts
    ]
    total = sum(Fraction(part.epsilon) for part in parts)
    assert Fraction(epsilon) * (1 - Fraction(1, 10**12)) < total <= Fraction(epsilon)
    for part in parts:
        assert Fraction(part.scale) * Fraction(part.epsilon) >= part.sensitivity
        assert part.scale == pytest.approx(part.sensitivity / part.epsilon, rel=1e-15)
        mechanism.mechanism_of(part)  # OpenDP agrees


def test_epsilon_is_shared_equally_or_as_the_queries_say() -> None:
    first, second = plan_of(Count(), Sum(column="age"), epsilon=1.0).queries
    assert first.parts[0].epsilon == second.parts[0].epsilon == 0.5
    first, second = plan_of(Count(share=1), Mean(column="age", share=3), epsilon=1.0).queries
    assert [part.epsilon for part in (*first.parts, *second.parts)] == [0.25, 0.375, 0.375]
    with pytest.raises(ValueError, match="to every query, or to none"):
        QueryRequest(dataset=DATASET, queries=(Count(share=1), Count()), epsilon=1)
    with pytest.raises(InvalidArgument):
        Count(share=0)


def test_sensitivity_follows_from_the_rows_of_a_unit() -> None:
    parts = [part for each in plan_of(*EVERY, rows_per_unit=7).queries for part in each.parts]
    assert {part.sensitivity for part in parts if not isinstance(part.vector, Steps)} == {7}
    assert [part.sensitivity for part in parts if isinstance(part.vector, Steps)] == [7 * GRID] * 2


def test_the_noise_is_known_before_anything_is_spent() -> None:
    (count,) = plan_of(Count(), epsilon=0.5).queries
    noise = count.parts[0].noise
    assert (noise.epsilon, noise.scale) == (0.5, 2.0)
    q = math.exp(-1 / 2)
    outside = [2 * q ** (most + 1) / (1 + q) for most in (noise.within - 1, noise.within)]
    assert outside[1] <= 0.05 < outside[0]
    assert figures.noise_within(1e-3) == 0


@pytest.mark.parametrize(
    ("query", "error"),
    [
        (Sum(column="nothing"), ColumnNotQueryable),
        (Mean(column="kind"), ColumnNotQueryable),
        *((Sum(column=name), ColumnNotQueryable) for name in ("note", "voice", "picture", "user")),
        *((Histogram(column=name, edges=(0.0, 1.0)), ColumnNotQueryable) for name in ("note", "voice", "picture", "user")),
        (LabelBalance(column="age"), ColumnNotQueryable),
        (LabelBalance(column="nothing"), ColumnNotQueryable),
        (Histogram(column="age"), BinsRefused),
        (Histogram(column="kind", edges=(0.0, 1.0)), BinsRefused),
        (Histogram(column="age", edges=(0.0, 0.0)), BinsRefused),
        (Histogram(column="age", edges=(0.0, 5.0, 3.0)), BinsRefused),
        (Histogram(column="age", edges=(-20.5, 5.0)), BinsRefused),
        (Histogram(column="age", edges=(0.0, 100.5)), BinsRefused),
        (Evaluation(model=BINARY, version=2), QueryRefused),
    ],
)  # fmt: skip
def test_a_query_that_the_schema_does_not_allow_is_refused_by_name(query: Query, error: type[PlanError]) -> None:
    with pytest.raises(error) as refused:
        plan_of(query)
    assert type(refused.value) is error


def test_numbers_without_finite_bounds_are_refused() -> None:
    for low, high in ((0.0, math.inf), (-math.inf, math.inf), (math.nan, 1.0), (2.0, 1.0), (0.0, 1e-310)):
        schema: dict[str, Column] = {"age": NumberColumn.model_construct(low=low, high=high)}
        for query in (Sum(column="age"), Mean(column="age"), Histogram(column="age", edges=(0.0, 1.0))):
            with pytest.raises(ColumnNotQueryable, match="finite bounds"):
                QueryPlan.of(QueryRequest(dataset=DATASET, queries=(query,), epsilon=1), schema=schema)


def test_bins_are_limited() -> None:
    classes = CategoryColumn(values=tuple(map(str, range(257))))
    models = {(KINDS, 1): ModelSchema(inputs={"kind": classes}, target="kind", output=classes)}
    request = QueryRequest(dataset=DATASET, queries=(Evaluation(model=KINDS, version=1),), epsilon=1)
    with pytest.raises(BinsRefused, match="66049"):
        QueryPlan.of(request, schema={"kind": classes}, models=models)
    with pytest.raises(InvalidArgument):
        Histogram(column="age", edges=tuple(map(float, range(2**16 + 2))))


def test_a_model_of_other_columns_is_refused_and_one_of_other_bounds_is_not() -> None:
    request = QueryRequest(dataset=DATASET, queries=(Evaluation(model=KINDS, version=1),), epsilon=1)
    others: list[dict[str, Column]] = [
        {"kind": CategoryColumn(values=("c", "b", "a"))},
        {"kind": SCHEMA["kind"], "age": TextColumn(max_length=3)},
        {"kind": SCHEMA["kind"]},
    ]
    model = ModelSchema(inputs={"age": NumberColumn(low=0, high=1)}, target="kind", output=SCHEMA["kind"])
    for schema in others:
        with pytest.raises(ColumnNotQueryable):
            QueryPlan.of(request, schema=schema, models={(KINDS, 1): model})
    QueryPlan.of(request, schema=SCHEMA, models={(KINDS, 1): model})


@pytest.mark.parametrize("epsilon", [0.0, -1.0, math.nan, math.inf, 1e-300, 5e-324])
def test_an_epsilon_that_is_none_or_drowns_all_in_noise_is_refused(epsilon: float) -> None:
    request = QueryRequest.model_construct(
        dataset=DATASET, queries=(Mean(column="age"),), epsilon=epsilon, rows_per_unit=1
    )
    with pytest.raises(PlanImpossible):
        QueryPlan.of(request, schema=SCHEMA)


def test_rows_per_unit_and_unit_must_agree() -> None:
    with pytest.raises(PlanImpossible, match="rows_per_unit"):
        plan_of(Count(), rows_per_unit=2, unit="row")
    with pytest.raises(UnitNotSupported):
        plan_of(Count(), unit="household")
    request = QueryRequest(dataset=DATASET, queries=(Count(),), epsilon=1)
    with pytest.raises(UnitNotSupported):
        QueryPlan.of(request, schema=SCHEMA, adjacency="replace")


def test_a_plan_made_by_hand_cannot_cost_more_than_it_says() -> None:
    def made(part: Part) -> QueryPlan:
        return QueryPlan(queries=(PlannedQuery(Count(), (part,)),), epsilon=1.0)

    made(Part("count", OneBin(), 1.0, 1))
    with pytest.raises(AccountingError, match="cost more"):
        made(Part("count", OneBin(), math.nextafter(1.0, 2.0), 1))
    with pytest.raises(PlanImpossible, match="rows_per_unit"):
        made(Part("count", OneBin(), 1.0, 2))


# The sensitivity


@given(
    count=st.integers(0, 12),
    added=st.integers(0, 5),
    seed=st.integers(0, 2**32 - 1),
    wild=st.booleans(),
    low=st.floats(-1e30, 1e30),
    width=st.floats(1e-3, 1e30),
)
@settings(max_examples=60, deadline=None)
def test_a_unit_moves_every_vector_by_no_more_than_is_charged(
    count: int, added: int, seed: int, wild: bool, low: float, width: float
) -> None:
    schema = SCHEMA | {"age": NumberColumn(low=low, high=low + width + abs(low) * 1e-9)}
    age = schema["age"]
    assert isinstance(age, NumberColumn)
    edges = tuple(np.unique(np.linspace(age.low, age.high, 5).clip(age.low, age.high)).tolist())
    queries = [Histogram(column="age", edges=edges) if query is EVERY[3] else query for query in EVERY]
    request = QueryRequest(dataset=DATASET, queries=queries, epsilon=1, rows_per_unit=max(added, 1))
    plan = QueryPlan.of(request, schema=schema, unit="user", models=MODELS)
    rows, predictions = rows_of(count + added, seed=seed, wild=wild)
    with np.errstate(over="ignore", invalid="ignore"):  # of the wild ones
        rows["age"] = (age.low + (age.high - age.low) * (rows["age"].astype(float) + 20) / 120).astype(np.float32)
    for planned in plan.queries:
        for part in planned.parts:
            after = exact_of(part, rows, predictions)
            before = exact_of(
                part, {name: each[:count] for name, each in rows.items()}, {key: each[:count] for key, each in predictions.items()}
            )  # fmt: skip
            moved = int(np.abs(after - before).sum())
            assert moved <= added * (GRID if isinstance(part.vector, Steps) else 1) <= part.sensitivity or not added
            if added == 0:
                assert moved == 0


@pytest.mark.parametrize("query", [Sum(column="age"), Mean(column="age")])
def test_the_sensitivity_of_a_sum_is_reached_and_not_exceeded(query: Query) -> None:
    part = plan_of(query).queries[0].parts[0]
    for age in (100.0, 1e30, np.inf):
        rows = {"age": np.array([age], dtype=np.float32)}
        assert exact_of(part, rows, {}).tolist() == [GRID]


def test_steps_are_fine_enough_that_sums_and_means_are_right() -> None:
    rows, predictions = rows_of(500)
    for query, expected in ((Sum(column="age"), rows["age"].sum()), (Mean(column="age"), rows["age"].sum() - 500 * 40)):
        part = plan_of(query).queries[0].parts[0]
        assert isinstance(part.vector, Steps)
        steps = int(exact_of(part, rows, predictions)[0])
        assert steps * part.vector.step == pytest.approx(expected, abs=500 * part.vector.step / 2)


# The release


def test_with_a_huge_epsilon_every_figure_is_that_of_the_rows() -> None:
    rows, predictions = rows_of(4000, seed=3)
    results = [release(plan_of(query, epsilon=1000), rows, predictions=predictions)[0] for query in EVERY]
    count, total, mean, ages, kinds, balance, binary, classes, errors = results
    age, sick, kind = rows["age"].astype(float), rows["sick"], rows["kind"]

    assert isinstance(count, CountResult) and count.count == 4000
    assert isinstance(total, SumResult)
    assert total.sum == total.steps * total.step == pytest.approx(age.sum(), abs=4000 * total.step + 20 * total.within)
    assert total.within == total.noise.within * total.step
    assert isinstance(mean, MeanResult) and mean.count == 4000 and mean.mean is not None
    assert mean.mean == pytest.approx(age.mean(), abs=1e-3)
    assert mean.interval[0] < mean.mean < mean.interval[1] < mean.interval[0] + 1e-2

    assert isinstance(ages, HistogramResult) and ages.edges == (-20.0, 0.0, 18.0, 65.0) and ages.values is None
    assert ages.counts == tuple(np.histogram(age, ages.edges)[0].tolist())
    assert isinstance(kinds, HistogramResult) and kinds.values == ("a", "b", "c") and kinds.edges is None
    assert kinds.counts == tuple(np.bincount(kind, minlength=3).tolist())
    assert kinds.shares == tuple((np.bincount(kind, minlength=3) / 4000).tolist())
    assert isinstance(balance, LabelBalanceResult) and balance.values == ("no", "yes")
    assert balance.counts == tuple(np.bincount(sick, minlength=2).tolist())

    scores, guesses = predictions[BINARY, 1], predictions[KINDS, 1].argmax(axis=1)
    assert isinstance(binary, ClassEvaluationResult) and binary.values == ("no", "yes")
    assert binary.accuracy == (scores.argmax(axis=1) == sick).mean()
    assert binary.score_counts is not None and binary.auc is not None
    assert binary.score_counts == tuple(
        tuple(np.histogram(scores[sick == label, 1], 64, (0, 1))[0].tolist()) for label in (0, 1)
    )
    assert isinstance(classes, ClassEvaluationResult) and classes.auc is None and classes.score_counts is None
    expected = tuple(tuple(int(((kind == k) & (guesses == g)).sum()) for g in range(3)) for k in range(3))
    assert classes.counts == classes.confusion == expected
    assert classes.accuracy == (guesses == kind).mean()

    assert isinstance(errors, NumberEvaluationResult) and errors.mean_absolute_error is not None
    absolute = np.abs(predictions[AGES, 1].astype(float) - age)
    assert errors.counts == tuple(np.histogram(absolute, errors.edges)[0].tolist())
    assert errors.edges[0] == 0 and errors.edges[-1] == 120 and len(errors.edges) == 65
    assert errors.mean_absolute_error == pytest.approx(absolute.mean(), abs=2)


def test_bad_values_are_mended_in_silence_and_unbinned_ones_dropped() -> None:
    rows: Rows = {
        "age": np.array([np.nan, np.inf, -np.inf, 65.0, 70.0], dtype=np.float32),
        "sick": np.array([-1, 5, 0, 1, 1], dtype=np.int32),
    }
    results = release(plan_of(EVERY[3], LabelBalance(column="sick"), epsilon=1000), rows)
    assert isinstance(results[0], HistogramResult) and isinstance(results[1], LabelBalanceResult)
    assert results[0].counts == (
        1,
        1,
        1,
    )  # -inf is -20; NaN is 0; 65 is the last bin's upper edge; inf and 70 are in none
    assert results[1].counts == (2, 3)


def test_rows_of_a_user_beyond_the_limit_never_enter() -> None:
    units = np.repeat([11, 22, 33], [1, 2, 60])
    rows: Rows = {"kind": np.repeat([0, 1, 2], [1, 2, 60]).astype(np.int32)}
    for limit, counts in ((1, (1, 1, 1)), (2, (1, 2, 2)), (40, (1, 2, 40))):
        plan = plan_of(Count(), Histogram(column="kind"), epsilon=1000, rows_per_unit=limit, unit="user")
        count, kinds = release(plan, rows, units=units)
        assert isinstance(count, CountResult) and isinstance(kinds, HistogramResult)
        assert kinds.counts == counts
        assert count.count == sum(counts)


def test_which_rows_of_a_user_enter_is_drawn_afresh() -> None:
    rows: Rows = {"kind": np.repeat([0, 1, 2], 100).astype(np.int32)}
    plan = plan_of(Histogram(column="kind"), epsilon=1000, unit="user")
    seen = np.zeros(3, dtype=np.intp)
    for _ in range(300):
        (result,) = release(plan, rows, units=np.zeros(300, dtype=np.int64))
        assert isinstance(result, HistogramResult) and sum(result.counts) == 1
        seen += result.counts
    assert stats.chisquare(seen).pvalue > CHANCE


@pytest.mark.parametrize("epsilon", [0.2, 1.0, 3.0])
def test_the_noise_of_counts_is_discrete_laplace_of_the_planned_scale(epsilon: float) -> None:
    edges = tuple(np.linspace(0, 100, 20_001).tolist())
    plan = plan_of(Histogram(column="age", edges=edges), epsilon=epsilon)
    (result,) = release(plan, {"age": np.zeros(0, dtype=np.float32)})
    assert isinstance(result, HistogramResult) and result.noise.scale == pytest.approx(1 / epsilon)
    noise = np.array(result.counts)
    law = stats.dlaplace(epsilon)
    most = int(law.ppf(1 - 20 / len(noise)))  # at least some twenty are expected in each class
    observed = np.bincount(np.clip(noise, -most, most) + most, minlength=2 * most + 1)
    expected = law.pmf(np.arange(-most, most + 1))
    expected[0] = expected[-1] = law.sf(most - 1)
    assert stats.chisquare(observed, expected / expected.sum() * len(noise)).pvalue > CHANCE
    inside = int((np.abs(noise) <= result.noise.within).sum())
    assert stats.binomtest(inside, len(noise), 0.95, alternative="less").pvalue > CHANCE
    # Independent of its neighbour.
    assert abs(np.corrcoef(noise[:-1], noise[1:])[0, 1]) < stats.norm.isf(CHANCE) / math.sqrt(len(noise)) * 1.1


def test_the_noise_of_sums_is_discrete_laplace_of_the_planned_scale() -> None:
    plan = plan_of(*[Sum(column="age") for _ in range(32)], epsilon=32.0, rows_per_unit=2)
    rows: Rows = {"age": np.array([25.0, 50.0], dtype=np.float32)}
    sums = [result for _ in range(60) for result in release(plan, rows, units=np.zeros(2, dtype=np.int64))]
    noise = []
    for result in sums:
        assert isinstance(result, SumResult) and result.noise.scale == pytest.approx(2 * GRID)
        noise.append(result.steps - GRID * 3 / 4)
    # The scale is so large that steps of 1 do not show.
    assert stats.kstest(noise, stats.laplace(scale=2 * GRID).cdf).pvalue > CHANCE


def shape(value: Any) -> Any:
    """What anybody sees of an answer beside its numbers; a figure may be there or not, as the noise has it."""
    if isinstance(value, dict):
        return {name: shape(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [shape(each) for each in value]
    return value if isinstance(value, str) else "number"


@pytest.mark.parametrize("unit", ["row", "user"])
def test_the_shape_of_the_answers_is_the_same_for_any_rows(unit: str) -> None:
    plan = plan_of(*EVERY, unit=unit, rows_per_unit=1 if unit == "row" else 3)
    worlds = [rows_of(0), rows_of(1), rows_of(300), rows_of(299, wild=True)]
    shapes = []
    for rows, predictions in worlds:
        units = None if unit == "row" else np.arange(len(rows["age"])) // 5
        results = release(plan, rows, units=units, predictions=predictions)
        shapes.append(shape([result.model_dump() for result in results]))
    assert all(each == shapes[0] for each in shapes)


def test_questions_and_answers_survive_the_wire() -> None:
    request = QueryRequest(dataset=DATASET, queries=EVERY, epsilon=1.0)
    assert QueryRequest.model_validate_json(request.model_dump_json()) == request
    plan = QueryPlan.of(request, schema=SCHEMA, models=MODELS)
    assert QueryEvent.model_validate_json(plan.event().model_dump_json()) == plan.event()
    rows, predictions = rows_of(50)
    answers = TypeAdapter(tuple[QueryResult, ...])
    results = release(plan, rows, predictions=predictions)
    assert answers.validate_json(answers.dump_json(results)) == results


def test_what_is_not_of_the_plans_shape_is_refused_before_anything_is_read() -> None:
    rows, predictions = rows_of(5)
    by_row, by_user = plan_of(*EVERY), plan_of(Count(), rows_per_unit=2)
    wrong: list[tuple[QueryPlan, Rows, Any, Any]] = [
        (by_row, rows, np.arange(5), predictions),
        (by_user, rows, None, None),
        (by_user, rows, np.arange(4), None),
        (by_row, {"age": rows["age"]}, None, predictions),
        (by_row, rows | {"age": rows["age"][:4]}, None, predictions),
        (by_row, rows, None, None),
        (by_row, rows, None, predictions | {(KINDS, 1): predictions[KINDS, 1][:, :2]}),
        (by_row, rows, None, predictions | {(AGES, 1): predictions[AGES, 1][:4]}),
    ]
    for plan, some, units, guesses in wrong:
        with pytest.raises(RowsDoNotFit):
            release(plan, some, units=units, predictions=guesses)


def test_nothing_is_released_where_opendp_would_charge_more(monkeypatch: pytest.MonkeyPatch) -> None:
    plan = plan_of(Count(), Mean(column="age"))
    read: list[object] = []
    monkeypatch.setattr(OneBin, "of", lambda *_: read.append(None))
    monkeypatch.setattr(Part, "scale", property(lambda part: part.sensitivity / part.epsilon * (1 - 1e-15)))
    with pytest.raises(AccountantsDisagree, match="nothing was released"):
        release(plan, rows_of(5)[0])
    assert read == []


def test_importing_the_package_loads_neither_opendp_nor_torch() -> None:
    script = "import sys, cloister_privacy.queries; print('torch' in sys.modules or 'opendp' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


# The figures


@given(seed=st.integers(0, 2**32 - 1), spread=st.floats(0.05, 2))
@settings(max_examples=60, deadline=None)
def test_the_area_under_the_curve_is_that_of_scikit_learn_within_the_bins(seed: int, spread: float) -> None:
    random = np.random.default_rng(seed)
    labels = np.concatenate([[0, 1], random.integers(0, 2, 300)])
    scores = 1 / (1 + np.exp(-random.normal(labels, spread)))
    negative, positive = (np.histogram(scores[labels == label], 64, (0, 1))[0].tolist() for label in (0, 1))
    area = figures.area_under_curve(negative, positive)
    # Pairs in one bin count half; at worst all of them should have counted 0, or 1.
    error = np.dot(negative, positive) / 2 / (sum(negative) * sum(positive))
    assert abs(area - roc_auc_score(labels, scores)) <= error + 1e-12


@given(counts=st.lists(st.integers(-50, 50), min_size=4, max_size=4))
def test_figures_are_defined_whatever_the_noise_made_of_the_counts(counts: list[int]) -> None:
    a, b, c, d = counts
    area = figures.area_under_curve([a, b], [c, d])
    assert 0 <= area <= 1
    assert area == 0.5 or (a + b > 0 and c + d > 0)
    right = figures.accuracy([[a, b], [c, d]])
    assert (right is None) == (sum(counts) <= 0)
    assert right is None or 0 <= right <= 1
    error = figures.mean_error(counts, [0.0, 1.0, 4.0, 9.0, 16.0])
    assert (error is None) == (sum(counts) <= 0)
    assert error is None or 0 <= error <= 16
    parts = figures.shares(counts)
    assert sum(parts) == pytest.approx(1 if max(counts) > 0 else 0)
    assert min(parts) >= 0 == min(0, *figures.clipped(counts))


def test_a_mean_without_a_positive_count_is_none_and_lies_anywhere() -> None:
    plan = plan_of(Mean(column="age"), epsilon=0.01)
    found = set()
    for _ in range(60):
        (result,) = release(plan, {"age": np.zeros(0, dtype=np.float32)})
        assert isinstance(result, MeanResult)
        assert (result.mean is None) == (result.count <= 0)
        assert -20 <= result.interval[0] <= result.interval[1] <= 100
        found.add(result.mean is None)
    assert found == {False, True}


def test_the_interval_of_a_mean_holds_it_nearly_always() -> None:
    rows: Rows = {"age": np.linspace(0, 60, 200, dtype=np.float32)}
    plan = plan_of(Mean(column="age"), epsilon=0.5)
    inside, times = 0, 300
    for _ in range(times):
        (result,) = release(plan, rows)
        assert isinstance(result, MeanResult)
        inside += result.interval[0] <= 30 <= result.interval[1]
    assert stats.binomtest(inside, times, 0.95, alternative="less").pvalue > CHANCE


@pytest.mark.parametrize("count", [0, 1, 5, 12])
def test_an_evaluation_runs_the_same_rows_through_the_network_however_many_there_are(count: int) -> None:
    from cloister.wire.architecture import Architecture
    from cloister.wire.layers import Encode, Linear
    from cloister_privacy.architecture import build
    from cloister_privacy.queries.predictions import predictions

    network = build(
        Architecture(
            inputs={"x": NumberColumn(low=0, high=1)},
            layers=(Encode(), Linear(in_features=1, out_features=2)),
            target="y",
            output=CategoryColumn(values=("a", "b")),
            loss="cross_entropy",
        )
    )
    network.rows_at_once = 5
    sizes: list[int] = []
    network.register_forward_hook(lambda _, __, outputs: sizes.append(len(outputs)))
    rows = {"x": np.linspace(0, 1, 12, dtype=np.float32)[:count]}
    predicted = predictions(network, rows, count=count, slots=12, device="cpu")
    assert sizes == [5, 5, 5]
    assert predicted.shape == (count, 2)
    if count:
        assert predicted == pytest.approx(network.predict(rows)["probabilities"], abs=1e-6)
