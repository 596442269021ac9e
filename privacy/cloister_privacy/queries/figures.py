"""What released integers say: shares, a mean, accuracy, AUC, errors, and how large the noise may be. Knows no row.

All of it is post-processing, so none of it costs anything; each figure is defined whatever the noise made of the counts.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

__all__ = ["accuracy", "area_under_curve", "clipped", "mean_error", "noise_within", "ratio_interval", "shares"]


def noise_within(scale: float, *, confidence: float = 0.95) -> int:
    """The least m for which discrete Laplace noise of this scale lies from -m to m with at least this probability."""
    # P[|x| > m] = 2 q^(m + 1) / (1 + q) where q = e^(-1 / scale).
    outside = 2 / ((1 + math.exp(-1 / scale)) * (1 - confidence))
    return max(0, math.ceil(scale * math.log(outside)) - 1)


def clipped(counts: Sequence[int]) -> tuple[int, ...]:
    """Counts as people look at them: negative ones as 0."""
    return tuple(max(0, count) for count in counts)


def shares(counts: Sequence[int]) -> tuple[float, ...]:
    """Negative counts as 0, by their sum; all 0 where no count is positive."""
    shown = clipped(counts)
    total = sum(shown)
    return tuple(count / total if total else 0.0 for count in shown)


def accuracy(confusion: Sequence[Sequence[int]]) -> float | None:
    """The share of the diagonal, from 0 to 1; None where the counts do not sum to more than 0.

    Of the counts as released: to take negative ones as 0 would add noise to one side only, wherever classes are many.
    """
    total = sum(map(sum, confusion))
    right = sum(row[index] for index, row in enumerate(confusion))
    return min(max(right / total, 0.0), 1.0) if total > 0 else None


def area_under_curve(negative: Sequence[int], positive: Sequence[int]) -> float:
    """The area under the ROC curve through bins of ascending score, by trapezoids; 0.5 where a class has no positive count."""
    below, above = _floats(negative), _floats(positive)
    if below.sum() <= 0 or above.sum() <= 0:
        return 0.5
    # A positive row is above the negative ones of lower bins, and level with half of those in its own.
    wins = above @ (np.cumsum(below) - below / 2)
    return float(np.clip(wins / (below.sum() * above.sum()), 0, 1))


def mean_error(counts: Sequence[int], edges: Sequence[float]) -> float | None:
    """The mean by the middles of the bins, within their ends; None where the counts do not sum to more than 0."""
    total = sum(counts)
    if total <= 0:
        return None
    ends = _floats(edges)
    mean = _floats(counts) @ (ends[:-1] / 2 + ends[1:] / 2) / total
    return float(np.clip(mean, ends[0], ends[-1]))


def ratio_interval(total: int, count: int, *, total_within: int, count_within: int) -> tuple[float, float] | None:
    """Where the ratio lies if each of the two is off by no more than its noise; None where the count may then be 0."""
    if count - count_within <= 0:
        return None
    ends = [(total + first * total_within) / (count + second * count_within) for first in (-1, 1) for second in (-1, 1)]
    return min(ends), max(ends)


def _floats(numbers: Sequence[float]) -> NDArray[np.float64]:
    return np.array(numbers, dtype=np.float64)
