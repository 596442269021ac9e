"""The plan of a release, from public numbers only: what is counted, its sensitivity, its noise, and what it costs.

It refuses to know a single row, and how many there are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from fractions import Fraction
from itertools import pairwise
from typing import Any

from cloister.wire.columns import CategoryColumn, Column, NumberColumn
from cloister.wire.jobs import ModelSchema
from cloister.wire.queries import (
    MOST_BINS,
    Count,
    Evaluation,
    Histogram,
    LabelBalance,
    Mean,
    Noise,
    Query,
    QueryEvent,
    QueryRequest,
    Sum,
)
from cloister_privacy.errors import (
    AccountingError,
    BinsRefused,
    ColumnNotQueryable,
    PlanImpossible,
    QueryRefused,
    UnitNotSupported,
)
from cloister_privacy.queries.figures import noise_within
from cloister_privacy.queries.vectors import (
    GRID,
    Bins,
    CategoryBins,
    ConfusionBins,
    ErrorBins,
    NumberBins,
    OneBin,
    ScoreBins,
    Steps,
    Version,
)

__all__ = ["Part", "PlannedQuery", "QueryPlan"]

_LARGEST_SCALE = 2.0**50
"""Far below 2^63, where the integers of a release end."""

_ERROR_BINS = 64

Schemas = Mapping[Version, ModelSchema]


@dataclass(frozen=True, slots=True)
class Part:
    """One vector of whole numbers that is released at once, with noise of one scale on each of them.

    A unit adds at most `rows_per_unit` rows, and a row changes one count by 1, or the sum by at most GRID steps.
    """

    name: str
    vector: Bins | Steps
    epsilon: float
    rows_per_unit: int

    @property
    def sensitivity(self) -> int:
        """How far one unit more or fewer moves the vector at most, in L1."""
        return self.rows_per_unit * (GRID if isinstance(self.vector, Steps) else 1)

    @property
    def scale(self) -> float:
        """Of the noise: sensitivity / epsilon, rounded up."""
        scale = self.sensitivity / self.epsilon
        while math.isfinite(scale) and Fraction(scale) * Fraction(self.epsilon) < self.sensitivity:
            scale = math.nextafter(scale, math.inf)
        return scale

    @property
    def noise(self) -> Noise:
        """What the noise will be, as the answer tells it: public, so it may be quoted before anything is spent."""
        return Noise(epsilon=self.epsilon, scale=self.scale, within=noise_within(self.scale))


@dataclass(frozen=True, slots=True)
class PlannedQuery:
    """A question and the vectors that answer it; `classes` are the values that its bins stand for."""

    query: Query
    parts: tuple[Part, ...]
    classes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class QueryPlan:
    """Noisy answers to some questions, `epsilon`-DP together: by unit (rows, or users of whom at most `rows_per_unit` rows are
    read), under add/remove adjacency, and with no parallel composition. A prediction must follow from its own row alone.
    """

    queries: tuple[PlannedQuery, ...]
    epsilon: float
    rows_per_unit: int = 1
    unit: str = "row"
    adjacency: str = "add_remove"

    def __post_init__(self) -> None:
        if self.unit not in ("row", "user") or self.adjacency != "add_remove":
            raise UnitNotSupported(
                "queries protect rows or users under add/remove adjacency; this source's unit is "
                f"{self.unit!r} under {self.adjacency!r}, which they cannot be asked of"
            )
        _check_epsilon(self.epsilon)
        _check_rows(self.rows_per_unit, self.unit)
        parts = [part for planned in self.queries for part in planned.parts]
        for part in parts:
            if part.rows_per_unit != self.rows_per_unit:
                raise PlanImpossible(f"rows_per_unit of {part.name!r} is not that of the plan; make it by QueryPlan.of")
            if not part.scale <= _LARGEST_SCALE:
                raise PlanImpossible(
                    f"epsilon {part.epsilon:g} for {part.name!r} needs noise of scale {part.scale:g}, above {_LARGEST_SCALE:g}; "
                    "raise epsilon, or ask fewer questions"
                )
        if sum(Fraction(part.epsilon) for part in parts) > Fraction(self.epsilon):
            raise AccountingError(
                f"the parts of this plan cost more than its epsilon {self.epsilon}; make it by QueryPlan.of"
            )

    @classmethod
    def of(
        cls,
        request: QueryRequest,
        *,
        schema: Mapping[str, Column],
        unit: str = "row",
        adjacency: str = "add_remove",
        models: Schemas | None = None,
    ) -> QueryPlan:
        """The plan of a request on a dataset of this schema; unit and adjacency are the source's.

        `models` tells what each evaluated (model, version) reads and predicts. Raises a PlanError that says what to change.
        """
        _check_epsilon(request.epsilon)
        _check_rows(request.rows_per_unit, unit)
        weights = [Fraction(query.share or 1.0) for query in request.queries]
        planned = tuple(
            _planned(
                query,
                epsilon=_down(Fraction(request.epsilon) * weight / sum(weights)),
                rows_per_unit=request.rows_per_unit,
                schema=schema,
                models=models or {},
            )
            for query, weight in zip(request.queries, weights, strict=True)
        )
        return cls(
            queries=planned,
            epsilon=request.epsilon,
            rows_per_unit=request.rows_per_unit,
            unit=unit,
            adjacency=adjacency,
        )

    def event(self) -> QueryEvent:
        """What the ledger charges, before the release reads a row."""
        return QueryEvent(
            mechanism="discrete_laplace",
            epsilon=self.epsilon,
            unit=self.unit,
            adjacency=self.adjacency,
            rows_per_unit=self.rows_per_unit,
        )


def _planned(
    query: Query, *, epsilon: float, rows_per_unit: int, schema: Mapping[str, Column], models: Schemas
) -> PlannedQuery:
    vectors, classes = _vectors(query, schema, models)
    for name, vector in vectors.items():
        if not isinstance(vector, Steps) and vector.size > MOST_BINS:
            raise BinsRefused(f"{name} of {vector.size} bins exceed the {MOST_BINS} of one question; ask for fewer")
    if not epsilon / len(vectors) > 0:
        raise PlanImpossible(f"the share of a {query.type} query leaves it no epsilon; give it a larger one")
    parts = (Part(name, vector, epsilon / len(vectors), rows_per_unit) for name, vector in vectors.items())
    return PlannedQuery(query, tuple(parts), classes)


def _vectors(
    query: Query, schema: Mapping[str, Column], models: Schemas
) -> tuple[dict[str, Bins | Steps], tuple[str, ...]]:
    match query:
        case Count():
            return {"count": OneBin()}, ()
        case Sum():
            column = _number(query.column, schema, query)
            step = max(abs(column.low), abs(column.high)) / GRID
            return {"sum": _steps(query.column, column, middle=0.0, step=step)}, ()
        case Mean():
            column = _number(query.column, schema, query)
            middle, step = column.low / 2 + column.high / 2, (column.high - column.low) / (2 * GRID)
            return {"sum": _steps(query.column, column, middle=middle, step=step), "count": OneBin()}, ()
        case LabelBalance():
            values = _category(query.column, schema, query).values
            return {"counts": CategoryBins(query.column, len(values))}, values
        case Histogram():
            return _histogram(query, schema)
        case Evaluation():
            return _evaluation(query, schema, models)


def _histogram(query: Histogram, schema: Mapping[str, Column]) -> tuple[dict[str, Bins | Steps], tuple[str, ...]]:
    column = _column(query.column, schema)
    if isinstance(column, CategoryColumn):
        if query.edges is not None:
            raise BinsRefused(f"{query.column!r} is a category: its values are the bins; leave edges out")
        return {"counts": CategoryBins(query.column, len(column.values))}, column.values
    number, edges = _number(query.column, schema, query), query.edges
    if edges is None:
        raise BinsRefused(
            f"{query.column!r} is a number: give edges, the bins between {number.low:g} and {number.high:g}"
        )
    if len(edges) < 2 or not all(low < high for low, high in pairwise(edges)):
        raise BinsRefused(
            f"the edges of {query.column!r} must ascend, two of them at least; sort them and remove repeated ones"
        )
    if not (number.low <= edges[0] and edges[-1] <= number.high):
        raise BinsRefused(
            f"the edges of {query.column!r} must lie within its bounds [{number.low:g}, {number.high:g}]; remove those outside"
        )
    return {"counts": NumberBins(query.column, number.low, number.high, edges)}, ()


def _evaluation(
    query: Evaluation, schema: Mapping[str, Column], models: Schemas
) -> tuple[dict[str, Bins | Steps], tuple[str, ...]]:
    version = (query.model, query.version)
    if version not in models:
        raise QueryRefused(
            f"version {query.version} of {query.model} is not known here; tell its schema, or ask for another"
        )
    model = models[version]
    for name, read in {**model.inputs, model.target: model.output}.items():
        if _kind(_column(name, schema)) != _kind(read):
            raise ColumnNotQueryable(
                f"column {name!r} of the dataset is not of the kind that version {query.version} of {query.model} knows; evaluate "
                "it on rows with the columns that it was trained on"
            )
    target = schema[model.target]
    if isinstance(target, CategoryColumn):
        classes = len(target.values)
        vectors: dict[str, Bins | Steps] = {"confusion": ConfusionBins(model.target, classes, version)}
        if classes == 2:
            vectors["scores"] = ScoreBins(model.target, version)
        return vectors, target.values
    number = _number(model.target, schema, query)
    # By squares: errors of a model that is any good are small beside the bounds, and there the bins are narrow.
    edges = tuple((number.high - number.low) * (index / _ERROR_BINS) ** 2 for index in range(_ERROR_BINS + 1))
    return {"errors": ErrorBins(model.target, number.low, number.high, edges, version)}, ()


def _steps(name: str, column: NumberColumn, *, middle: float, step: float) -> Steps:
    return Steps(name, column.low, column.high, middle=middle, step=step)


def _column(name: str, schema: Mapping[str, Column]) -> Column:
    if name not in schema:
        raise ColumnNotQueryable(f"there is no column {name!r}; the dataset has {', '.join(schema)}")
    return schema[name]


def _number(name: str, schema: Mapping[str, Column], query: Query) -> NumberColumn:
    column = _column(name, schema)
    if not isinstance(column, NumberColumn):
        raise ColumnNotQueryable(
            f"a {query.type} query is for number columns, and {name!r} is a {column.type} column; ask about another"
        )
    width = column.high - column.low
    # What is not finite has no sensitivity, and less than a float's least normal numbers cannot be told apart in steps.
    if not (math.isfinite(width) and width / GRID > 1e-300):
        raise ColumnNotQueryable(f"column {name!r} needs finite bounds, low below high; declare its public range")
    return column


def _category(name: str, schema: Mapping[str, Column], query: Query) -> CategoryColumn:
    column = _column(name, schema)
    if not isinstance(column, CategoryColumn):
        raise ColumnNotQueryable(
            f"a {query.type} query is for category columns, and {name!r} is a {column.type} column; ask about another"
        )
    return column


def _kind(column: Column) -> dict[str, Any]:
    """All of a column but its bounds: another dataset's may be others, and values are moved into them."""
    return column.model_dump(exclude={"low", "high"})


def _check_epsilon(epsilon: float) -> None:
    if not 0 < epsilon < math.inf:
        raise PlanImpossible(f"epsilon {epsilon} must be a number above 0")


def _check_rows(rows_per_unit: int, unit: str) -> None:
    if rows_per_unit < 1:
        raise PlanImpossible(f"rows_per_unit {rows_per_unit} must be at least 1")
    if rows_per_unit > 1 and unit == "row":
        raise PlanImpossible(
            f"rows_per_unit {rows_per_unit} needs a source whose unit is a user; here a row is the unit: leave it out"
        )


def _down(exact: Fraction) -> float:
    """The largest float that is not above."""
    nearest = float(exact)
    return math.nextafter(nearest, 0.0) if Fraction(nearest) > exact else nearest
