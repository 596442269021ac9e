"""Whether bytes look uniform, by chi-square."""

from __future__ import annotations

import numpy as np

__all__ = ["deviation_of", "require_uniform"]

_FEWEST = 256 * 20
"""Chi-square wants some of each."""


def deviation_of(body: bytes) -> float:
    """By how many standard deviations chi-square of the bytes, of 255 degrees of freedom, is off its mean."""
    counts = np.bincount(np.frombuffer(body, np.uint8), minlength=256)
    expected = counts.sum() / 256
    return float((((counts - expected) ** 2 / expected).sum() - 255) / (2 * 255) ** 0.5)


def require_uniform(body: bytes) -> None:
    assert len(body) >= _FEWEST, f"{len(body)} bytes tell nothing"
    assert abs(deviation_of(body)) < 12
