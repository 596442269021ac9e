"""Poisson sampling: every unit enters every step independently with the public rate. Knows counts, and whose each row is; no row."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloister_privacy.errors import RowsDoNotFit, TrainingError
from cloister_privacy.plan import DPPlan
from cloister_privacy.training.keystream import BLOCK_BYTES, BLOCK_WORDS, random_below, random_bytes, random_words

__all__ = ["PoissonSampler", "UserSampler", "sampler_of"]

_BLOCK_UNITS = BLOCK_BYTES  # one byte decides on nearly every unit
_LOW_BITS = 56


def sampler_of(plan: DPPlan, count: int, units: NDArray[np.integer] | None = None) -> PoissonSampler | UserSampler:
    """The sampler of a plan over `count` rows. Where its unit is a user, `units` [rows] tells by a number whose each row is.

    Raises RowsDoNotFit where units are not one for each row, TrainingError where they are missing, or are not the plan's unit.
    """
    if (plan.unit == "user") != (units is not None):
        raise TrainingError("a plan by user needs `units`, which tell whose each row is, and a plan by row takes none")
    if units is None:
        return PoissonSampler(count, batch_size=plan.batch_size, nominal_size=plan.nominal_size)
    if units.shape != (count,):
        raise RowsDoNotFit("`units` must tell for every row whose it is, [rows]")
    return UserSampler(
        units, batch_size=plan.batch_size, nominal_size=plan.nominal_size, rows_per_unit=plan.rows_per_unit
    )


class PoissonSampler:
    """Draws the units of one step: never fewer or more by design, only by chance."""

    def __init__(self, count: int, *, batch_size: int, nominal_size: int) -> None:
        self._count = count
        # In whole numbers and rounded down: the probability is never above the one that is charged.
        self._threshold = (batch_size << 64) // nominal_size
        self._upper, self._lower = divmod(self._threshold, 1 << _LOW_BITS)

    def draw(self) -> NDArray[np.intp]:
        """The indices of the units of one step, ascending; fresh randomness from the operating system each time."""
        if self._threshold >= 1 << 64:
            return np.arange(self._count)
        if self._count <= _BLOCK_UNITS:
            return self._draw_block(self._count)
        drawn = [
            start + self._draw_block(min(_BLOCK_UNITS, self._count - start))
            for start in range(0, self._count, _BLOCK_UNITS)
        ]
        return np.concatenate(drawn)

    def _draw_block(self, count: int) -> NDArray[np.intp]:
        """The units whose 64 bits are below the threshold; the lower 56 are drawn only where the upper 8 leave it open."""
        bits = random_bytes(count)
        candidates = np.flatnonzero(bits <= self._upper)
        is_drawn = bits[candidates] < self._upper
        open_ = np.flatnonzero(~is_drawn)
        is_drawn[open_] = _low_words(len(open_)) < self._lower
        drawn: NDArray[np.intp] = candidates[is_drawn]
        return drawn


class UserSampler:
    """Draws the users of one step, and of each at most `rows_per_unit` rows: any such subset of a user's rows is as likely.

    `units` says whose each row is, by any numbers; rows of one user carry the same. The randomness and the work that a
    drawn user takes do not depend on how many rows that user has.
    """

    def __init__(
        self, units: NDArray[np.integer], *, batch_size: int, nominal_size: int, rows_per_unit: int = 1
    ) -> None:
        if units.ndim != 1 or rows_per_unit < 1:
            raise ValueError("units must be one number per row, and rows_per_unit at least 1")
        counts = np.unique_counts(units).counts
        self._rows = np.argsort(units, kind="stable")  # the rows, user by user
        self._counts = counts
        self._starts = np.cumsum(counts) - counts
        self._users = PoissonSampler(len(counts), batch_size=batch_size, nominal_size=nominal_size)
        self._rows_per_unit = rows_per_unit

    def draw(self) -> NDArray[np.intp]:
        """The row indices of one step, those of one user side by side; fresh randomness each time."""
        users = self._users.draw()
        counts = self._counts[users]
        picks = _subsets(np.maximum(counts, self._rows_per_unit), self._rows_per_unit)
        # Whoever has fewer rows gave all of them, and the picks past the last one are of no row.
        is_row = picks < counts[:, None]
        drawn: NDArray[np.intp] = self._rows[(self._starts[users][:, None] + picks)[is_row]]
        return drawn


def _subsets(counts: NDArray[np.intp], size: int) -> NDArray[np.intp]:
    """For each count (at least `size`) a uniform subset of that size of 0, ..., count - 1, as int [len(counts), size].

    Floyd's algorithm: Bentley and Floyd, A sample of brilliance, CACM 30(9), 1987.
    """
    chosen = np.empty((len(counts), size), dtype=np.intp)
    for number in range(size):
        last = counts - size + number
        pick = random_below((last + 1).astype(np.uint64)).astype(np.intp)
        is_taken = (chosen[:, :number] == pick[:, None]).any(axis=1)
        chosen[:, number] = np.where(is_taken, last, pick)
    return chosen


def _low_words(count: int) -> NDArray[np.uint64]:
    """Uniform words of 56 bits: `count` of them, however many a block leaves open."""
    words = [random_words(min(BLOCK_WORDS, count - start)) for start in range(0, count, BLOCK_WORDS)]
    return np.concatenate(words or [random_words(0)]) >> np.uint64(64 - _LOW_BITS)
