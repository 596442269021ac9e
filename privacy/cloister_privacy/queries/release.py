"""The release of a plan: reads rows, adds noise, and says what the noisy integers mean. Its caller charges first.

Everything it returns is computed from noisy integers and the plan, and its shape from the plan alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister.wire.queries import (
    SCORE_BINS,
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
    QueryResult,
    Sum,
    SumResult,
)
from cloister_privacy.errors import RowsDoNotFit
from cloister_privacy.queries.figures import (
    accuracy,
    area_under_curve,
    clipped,
    mean_error,
    noise_within,
    ratio_interval,
    shares,
)
from cloister_privacy.queries.mechanism import mechanism_of
from cloister_privacy.queries.plan import Part, PlannedQuery, QueryPlan
from cloister_privacy.queries.vectors import ErrorBins, NumberBins, OneBin, Read, Steps, Version

__all__ = ["release"]

_Integers = tuple[int, ...]


def release(
    plan: QueryPlan,
    rows: Mapping[str, NDArray[Any]],
    *,
    units: NDArray[np.integer] | None = None,
    predictions: Mapping[Version, NDArray[Any]] | None = None,
) -> tuple[QueryResult, ...]:
    """One result for each query of the plan, `plan.epsilon`-DP together. The caller has charged `plan.event()`.

    `rows` are as `cloister.wire.rows` has them. Where the plan's unit is a user, `units` [rows] tells by a number whose each row
    is, and at most `rows_per_unit` rows of each are read: the same for all queries, drawn afresh. `predictions` hold for each
    evaluated (model, version) its scores [rows, classes], or its numbers [rows]. Raises, before any value is read, RowsDoNotFit
    where shapes are not the plan's and AccountantsDisagree where OpenDP would charge more than the plan does.
    """
    count = _count(rows, units)
    if (plan.unit == "user") != (units is not None):
        raise RowsDoNotFit("a plan by user needs `units`, which tell whose each row is, and a plan by row takes none")
    read = Read(rows, _picks(count, units, plan.rows_per_unit), predictions or {})
    _check(plan, read, count)
    # All of them, and so OpenDP's accounting of each, before the first one runs.
    mechanisms = [[mechanism_of(part) for part in planned.parts] for planned in plan.queries]
    return tuple(
        _result(planned, [released(read) for released in parts])
        for planned, parts in zip(plan.queries, mechanisms, strict=True)
    )


def _count(rows: Mapping[str, NDArray[Any]], units: NDArray[np.integer] | None) -> int:
    lengths = {len(array) for array in rows.values()} | ({len(units)} if units is not None else set())
    if len(lengths) > 1:
        raise RowsDoNotFit("the columns and `units` are not of one length; they come from different datasets")
    return lengths.pop() if lengths else 0


def _picks(count: int, units: NDArray[np.integer] | None, rows_per_unit: int) -> NDArray[np.intp]:
    if units is None:
        return np.arange(count)
    from cloister_privacy.training.sampler import UserSampler  # loads torch

    # Everybody, at a rate of 1.
    return UserSampler(units, batch_size=1, nominal_size=1, rows_per_unit=rows_per_unit).draw()


def _check(plan: QueryPlan, read: Read, count: int) -> None:
    """That every column and prediction is there and of its shape: public facts, so told."""
    for planned in plan.queries:
        for part in planned.parts:
            if isinstance(part.vector, OneBin):
                continue
            column = part.vector.column
            if column not in read.rows or read.rows[column].ndim != 1:
                raise RowsDoNotFit(
                    f"the rows lack {column!r}, one value a row; release from the dataset that the plan was made for"
                )
        if isinstance(planned.query, Evaluation):
            version = (planned.query.model, planned.query.version)
            shape = (count, len(planned.classes)) if planned.classes else (count,)
            if version not in read.predictions or read.predictions[version].shape != shape:
                raise RowsDoNotFit(
                    f"the predictions of version {version[1]} of {version[0]} must be there for every row, "
                    f"[rows{', classes' if planned.classes else ''}]"
                )


def _result(planned: PlannedQuery, released: list[_Integers]) -> QueryResult:
    query, part, first = planned.query, planned.parts[0], released[0]
    match query:
        case Count():
            return CountResult(count=first[0], noise=part.noise)
        case Sum():
            return _sum(part, first[0])
        case Mean():
            return _mean(planned.parts, first[0], released[1][0])
        case LabelBalance():
            return LabelBalanceResult(values=planned.classes, counts=first, shares=shares(first), noise=part.noise)
        case Histogram():
            return HistogramResult(
                values=planned.classes or None,
                edges=part.vector.edges if isinstance(part.vector, NumberBins) else None,
                counts=first,
                shares=shares(first),
                noise=part.noise,
            )
        case Evaluation():
            return _evaluation(planned, released)


def _sum(part: Part, steps: int) -> SumResult:
    step, noise = _grid(part).step, part.noise
    return SumResult(steps=steps, step=step, noise=noise, sum=steps * step, within=noise.within * step)


def _mean(parts: tuple[Part, ...], steps: int, count: int) -> MeanResult:
    of_sum, of_count = parts
    grid = _grid(of_sum)

    def placed(ratio: float) -> float:
        return min(max(grid.middle + grid.step * ratio, grid.low), grid.high)

    ends = ratio_interval(
        steps,
        count,
        total_within=noise_within(of_sum.scale, confidence=0.975),
        count_within=noise_within(of_count.scale, confidence=0.975),
    )
    return MeanResult(
        steps=steps,
        step=grid.step,
        middle=grid.middle,
        steps_noise=of_sum.noise,
        count=count,
        count_noise=of_count.noise,
        mean=placed(steps / count) if count > 0 else None,
        interval=(placed(ends[0]), placed(ends[1])) if ends else (grid.low, grid.high),
    )


def _evaluation(planned: PlannedQuery, released: list[_Integers]) -> QueryResult:
    part, first = planned.parts[0], released[0]
    if isinstance(part.vector, ErrorBins):
        edges = part.vector.edges
        return NumberEvaluationResult(
            edges=edges, counts=first, noise=part.noise, mean_absolute_error=mean_error(first, edges)
        )
    size = len(planned.classes)
    counts = tuple(first[start : start + size] for start in range(0, size**2, size))
    scores = (released[1][:SCORE_BINS], released[1][SCORE_BINS:]) if len(released) > 1 else None
    return ClassEvaluationResult(
        values=planned.classes,
        counts=counts,
        counts_noise=part.noise,
        confusion=tuple(map(clipped, counts)),
        accuracy=accuracy(counts),
        score_counts=scores,
        score_noise=planned.parts[1].noise if scores else None,
        auc=area_under_curve(*scores) if scores else None,
    )


def _grid(part: Part) -> Steps:
    if not isinstance(part.vector, Steps):
        raise TypeError(f"{part.name!r} is no sum")
    return part.vector
