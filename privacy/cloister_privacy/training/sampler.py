"""Poisson sampling: every unit enters every step independently with the public rate. Knows a count, not the rows."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from cloister_privacy.training.keystream import BLOCK_WORDS, random_words

__all__ = ["PoissonSampler"]


class PoissonSampler:
    """Draws the units of one step: never fewer or more by design, only by chance."""

    def __init__(self, count: int, *, batch_size: int, nominal_size: int) -> None:
        self._count = count
        # In whole numbers and rounded down: the probability is never above the one that is charged.
        self._threshold = (batch_size << 64) // nominal_size

    def draw(self) -> NDArray[np.intp]:
        """The indices of the units of one step, ascending; fresh randomness from the operating system each time."""
        if self._threshold >= 1 << 64:
            return np.arange(self._count)
        threshold = np.uint64(self._threshold)
        drawn = [
            start + np.flatnonzero(random_words(min(BLOCK_WORDS, self._count - start)) < threshold)
            for start in range(0, self._count, BLOCK_WORDS)
        ]
        return np.concatenate(drawn) if drawn else np.arange(0)
