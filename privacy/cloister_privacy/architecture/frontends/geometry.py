"""What front ends cut images and recordings into. Pure arithmetic: loads no torch."""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["ANGLES", "LEAST_IMAGE", "MOST_CELLS", "MOST_CHANNELS", "Geometry", "geometry_of", "hop_of"]

ANGLES = 8
LEAST_IMAGE = 8
"""Points that an image has at least, in both directions."""

MOST_CHANNELS, MOST_CELLS = 4, 256
"""What makes filters costly to make."""

_LEAST_GRID = 7
"""About so many cells lie along the short side."""

_MOST_OCTAVES = 3
_LARGEST_SIDE = 2**_MOST_OCTAVES * _LEAST_GRID
"""Larger images are first averaged down to it."""


_HOP_S = 0.008
"""Between two frames of a spectrogram."""


@dataclass(frozen=True, slots=True)
class Geometry:
    channels: int
    image: tuple[int, int]
    size: tuple[int, int]
    """Of the image after it was averaged down."""
    octaves: int
    grid: tuple[int, int]

    @property
    def features(self) -> int:
        """How many numbers come out: maps of order 0, 1 and 2, times cells."""
        maps = self.channels * (1 + ANGLES * self.octaves) + ANGLES**2 * self.octaves * (self.octaves - 1) // 2
        return maps * math.prod(self.grid)


def geometry_of(shape: tuple[int, ...]) -> Geometry:
    """Of an image (h, w) or (c, h, w), at least 8 x 8."""
    channels, height, width = (1, *shape) if len(shape) == 2 else shape
    scale = min(1.0, _LARGEST_SIDE / min(height, width))
    size = (round(height * scale), round(width * scale))
    octaves = max(1, min(_MOST_OCTAVES, round(math.log2(min(size) / _LEAST_GRID))))
    cell = 2**octaves
    return Geometry(channels, (height, width), size, octaves, (-(-size[0] // cell), -(-size[1] // cell)))


def hop_of(rate: int) -> int:
    """Samples between two frames of a recording."""
    return max(1, round(rate * _HOP_S))
