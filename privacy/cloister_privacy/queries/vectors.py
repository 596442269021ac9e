"""How each row becomes one whole number: the bin it is counted in, or the steps that it adds. Silent about what it had to mend.

Not-a-number is 0, and everything is moved into its declared bounds, as in training. A row's number follows from that row alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister.wire.queries import SCORE_BINS

__all__ = [
    "GRID",
    "Bins",
    "CategoryBins",
    "ConfusionBins",
    "ErrorBins",
    "NumberBins",
    "OneBin",
    "Read",
    "ScoreBins",
    "Steps",
    "Version",
]

Version = tuple[str, int]
"""A model's id and the number of its version."""

GRID = 2**15
"""The most steps that a row adds to a sum, up or down: exactly, so the sum's sensitivity is a whole number."""


@dataclass(frozen=True, slots=True)
class Read:
    """The rows that a release may read, and the predictions for them."""

    rows: Mapping[str, NDArray[Any]]
    picks: NDArray[np.intp]
    predictions: Mapping[Version, NDArray[Any]]

    def category(self, column: str, size: int) -> NDArray[np.int64]:
        """The picked rows' values of a category column of so many."""
        return np.clip(self.rows[column][self.picks].astype(np.int64), 0, size - 1)

    def number(self, column: str, low: float, high: float) -> NDArray[np.float64]:
        """The picked rows' values of a number column."""
        return _within(self.rows[column][self.picks], low, high)

    def prediction(self, version: Version, low: float, high: float) -> NDArray[np.float64]:
        """What a model version predicts for the picked rows."""
        return _within(self.predictions[version][self.picks], low, high)


@dataclass(frozen=True, slots=True)
class OneBin:
    """Every row in the one bin there is."""

    size: int = 1

    def of(self, read: Read) -> NDArray[np.int64]:
        """A bin for each row."""
        return np.zeros(len(read.picks), dtype=np.int64)


@dataclass(frozen=True, slots=True)
class CategoryBins:
    """A bin for each value of a category column."""

    column: str
    size: int

    def of(self, read: Read) -> NDArray[np.int64]:
        """A bin for each row."""
        return read.category(self.column, self.size)


@dataclass(frozen=True, slots=True)
class NumberBins:
    """Bins between ascending edges; each holds its lower edge, the last one its upper, too."""

    column: str
    low: float
    high: float
    edges: tuple[float, ...]

    @property
    def size(self) -> int:
        return len(self.edges) - 1

    def of(self, read: Read) -> NDArray[np.int64]:
        """A bin for each row; -1 or `size`, which are none, outside of all of them."""
        return _binned(read.number(self.column, self.low, self.high), self.edges)


@dataclass(frozen=True, slots=True)
class ConfusionBins:
    """A bin for each label and predicted class, label by label. Predictions are scores, [rows, classes]: the largest wins."""

    column: str
    classes: int
    version: Version

    @property
    def size(self) -> int:
        return self.classes**2

    def of(self, read: Read) -> NDArray[np.int64]:
        """A bin for each row."""
        predicted: NDArray[np.int64] = read.prediction(self.version, -np.inf, np.inf).argmax(axis=1)
        return read.category(self.column, self.classes) * self.classes + predicted


@dataclass(frozen=True, slots=True)
class ScoreBins:
    """A bin for each label of two and each 64th of the score of the second class, label by label."""

    column: str
    version: Version

    @property
    def size(self) -> int:
        return 2 * SCORE_BINS

    def of(self, read: Read) -> NDArray[np.int64]:
        """A bin for each row."""
        score = read.prediction(self.version, 0.0, 1.0)[:, 1]
        place = np.minimum((score * SCORE_BINS).astype(np.int64), SCORE_BINS - 1)
        return read.category(self.column, 2) * SCORE_BINS + place


@dataclass(frozen=True, slots=True)
class ErrorBins:
    """Bins of the absolute error of a predicted number, between ascending edges from 0 to the width of the target's bounds."""

    column: str
    low: float
    high: float
    edges: tuple[float, ...]
    version: Version

    @property
    def size(self) -> int:
        return len(self.edges) - 1

    def of(self, read: Read) -> NDArray[np.int64]:
        """A bin for each row."""
        predicted = read.prediction(self.version, self.low, self.high)
        error = np.abs(predicted - read.number(self.column, self.low, self.high))
        return np.clip(_binned(error, self.edges), 0, self.size - 1)


Bins = OneBin | CategoryBins | NumberBins | ConfusionBins | ScoreBins | ErrorBins


@dataclass(frozen=True, slots=True)
class Steps:
    """A number column in whole steps from `middle`, at most GRID of them up or down."""

    column: str
    low: float
    high: float
    middle: float
    step: float

    def of(self, read: Read) -> NDArray[np.int64]:
        """The steps of each row."""
        steps = np.rint((read.number(self.column, self.low, self.high) - self.middle) / self.step)
        return np.clip(steps, -GRID, GRID).astype(np.int64)


def _within(values: NDArray[Any], low: float, high: float) -> NDArray[np.float64]:
    finite: NDArray[np.float64] = np.where(np.isnan(values), 0.0, values.astype(np.float64))
    return np.clip(finite, low, high)


def _binned(values: NDArray[np.float64], edges: tuple[float, ...]) -> NDArray[np.int64]:
    places: NDArray[np.int64] = np.searchsorted(edges, values, side="right") - 1
    places[values == edges[-1]] = len(edges) - 2
    return places
