"""Questions about the rows of a dataset and their noisy answers. Every number of a question is public; every answer was charged for.

An answer is a few released integers, each with noise of its own, and figures that are computed from these and from public numbers.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from cloister.wire._model import Body, Identifier, Name, PositiveFloat, Request, Response
from cloister.wire.plans import RowsPerUnit

__all__ = [
    "MOST_BINS",
    "SCORE_BINS",
    "ClassEvaluationResult",
    "Count",
    "CountResult",
    "Evaluation",
    "Histogram",
    "HistogramResult",
    "LabelBalance",
    "LabelBalanceResult",
    "Mean",
    "MeanResult",
    "Noise",
    "NumberEvaluationResult",
    "Query",
    "QueryEvent",
    "QueryRequest",
    "QueryResult",
    "Sum",
    "SumResult",
]

MOST_BINS = 2**16
"""The most integers that one question may release at once."""

SCORE_BINS = 64
"""Into how many bins of equal width the score of the second of two classes is put, from 0 to 1."""

_Edge = Annotated[float, Field(allow_inf_nan=False)]
_Counts = tuple[int, ...]


class _Asked(Request):
    share: PositiveFloat | None = None
    """This question's part of epsilon, relative to the other questions'; by default all have the same."""


class Count(_Asked):
    """How many rows are read: all of them, or at most `rows_per_unit` of each user. With one row each, that is how many users."""

    type: Literal["count"] = "count"


class Sum(_Asked):
    """The sum of a number column, within its declared bounds."""

    type: Literal["sum"] = "sum"
    column: Name


class Mean(_Asked):
    """The mean of a number column, within its declared bounds: a noisy sum by a noisy count, each at half of the cost."""

    type: Literal["mean"] = "mean"
    column: Name


class Histogram(_Asked):
    """How many rows have each value of a category column, or lie in each bin of a number column."""

    type: Literal["histogram"] = "histogram"
    column: Name
    edges: Annotated[tuple[_Edge, ...], Field(min_length=2, max_length=MOST_BINS + 1, fail_fast=True)] | None = None
    """For a number column: the bins, ascending and within its bounds. Each holds its lower edge; the last one its upper, too.
    What lies outside of all of them is not counted."""


class LabelBalance(_Asked):
    """How many rows have each value of a category column."""

    type: Literal["label_balance"] = "label_balance"
    column: Name


class Evaluation(_Asked):
    """How well a model version predicts the rows of the dataset. Held-out rows cost the same as any."""

    type: Literal["evaluation"] = "evaluation"
    model: Identifier
    version: Annotated[int, Field(ge=1)]


Query = Annotated[Count | Sum | Mean | Histogram | LabelBalance | Evaluation, Field(discriminator="type")]


class QueryRequest(Body):
    """Ask for noisy answers about a dataset, which cost `epsilon` of its source's budget, all of them together."""

    dataset: Identifier
    queries: Annotated[tuple[Query, ...], Field(min_length=1, max_length=32, fail_fast=True)]
    epsilon: Annotated[PositiveFloat, Field(ge=1e-6, le=1000)]
    """Of all answers together. There is a least one, so that asking is never free."""
    rows_per_unit: RowsPerUnit = 1
    """The most rows of one user that are read, drawn afresh; 1 where a row is the unit."""

    @model_validator(mode="after")
    def _shares_are_of_all_or_of_none(self) -> QueryRequest:
        if len({query.share is None for query in self.queries}) != 1:
            raise ValueError("give a share to every query, or to none of them")
        return self


class QueryEvent(Response):
    """What the ledger charges for the answers to one request: a release of pure `epsilon`, before it is made."""

    mechanism: Literal["discrete_laplace"] | str
    epsilon: float
    """Of all the answers together."""
    steps: int = 1
    unit: str
    adjacency: str
    rows_per_unit: int = 1
    overflow: float = 0.0


class Noise(Response):
    """The noise of each released integer of one vector: P[x] is in proportion to exp(-|x| / scale), x whole. Public numbers."""

    epsilon: float
    """What releasing the vector costs."""
    scale: float
    within: int
    """It lies from -within to within with a probability of at least 95 %."""


class CountResult(Response):
    type: Literal["count"] = "count"
    count: int
    noise: Noise


class SumResult(Response):
    """Values are rounded to multiples of a public `step`, and the sum is released in steps."""

    type: Literal["sum"] = "sum"
    steps: int
    step: float
    noise: Noise
    """Of `steps`."""
    sum: float
    """steps * step."""
    within: float
    """`noise.within` in units of the sum."""


class MeanResult(Response):
    """Values are told from the middle of the bounds in multiples of a public `step`; their sum is released in steps."""

    type: Literal["mean"] = "mean"
    steps: int
    step: float
    middle: float
    steps_noise: Noise
    count: int
    count_noise: Noise
    mean: float | None
    """middle + step * steps / count, moved into the bounds; none where the noisy count is not positive."""
    interval: tuple[float, float]
    """Where the mean of the rows lies if no noise is larger than it is with a probability of 97.5 %: of both together, 95 %."""


class _Counted(Response):
    counts: _Counts
    """As released: noise may make them negative."""
    shares: tuple[float, ...]
    """Negative counts as 0, by their sum; all 0 where no count is positive."""
    noise: Noise


class HistogramResult(_Counted):
    type: Literal["histogram"] = "histogram"
    values: tuple[str, ...] | None = None
    """What is counted, of a category column."""
    edges: tuple[float, ...] | None = None
    """The bins, of a number column."""


class LabelBalanceResult(_Counted):
    type: Literal["label_balance"] = "label_balance"
    values: tuple[str, ...]


class ClassEvaluationResult(Response):
    """A model that predicts one of some classes."""

    type: Literal["class_evaluation"] = "class_evaluation"
    values: tuple[str, ...]
    """The classes, in the order of all that follows."""
    counts: tuple[_Counts, ...]
    """Row by row of labels, how often each class was predicted, as released."""
    counts_noise: Noise
    confusion: tuple[_Counts, ...]
    """The same with negative counts as 0."""
    accuracy: float | None
    """The share of right predictions among the released counts; none where these do not sum to more than 0."""
    score_counts: tuple[_Counts, _Counts] | None = None
    """Of two classes: of the first's rows and of the second's, how many have the second's probability in each of 64 equal bins."""
    score_noise: Noise | None = None
    auc: float | None = None
    """Of two classes: the area under the ROC curve through these bins; 0.5 where a class has no positive noisy count."""


class NumberEvaluationResult(Response):
    """A model that predicts a number."""

    type: Literal["number_evaluation"] = "number_evaluation"
    edges: tuple[float, ...]
    """Bins of the absolute error, from 0 to the width of the target's bounds; narrow where it is small."""
    counts: _Counts
    noise: Noise
    mean_absolute_error: float | None
    """By the middles of the bins; none where the released counts do not sum to more than 0."""


QueryResult = Annotated[
    CountResult
    | SumResult
    | MeanResult
    | HistogramResult
    | LabelBalanceResult
    | ClassEvaluationResult
    | NumberEvaluationResult,
    Field(discriminator="type"),
]
