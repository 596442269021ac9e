"""Numbers of a declared range as vectors that a linear layer can read more of than one slope."""

from __future__ import annotations

import math

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["hats"]

_SPREAD = 1e4
"""The range in logarithms begins at this part of the range in numbers."""


def hats(values: Tensor, low: float, high: float, bins: int) -> Tensor:
    """Numbers [n] to [n, 2 bins] of length 1: soft bins, each number between two of them, whose centres are evenly spaced over
    the range, and over the range in logarithms, for columns that are mostly near their low end."""
    share = ((values / 2 - low / 2) / (high / 2 - low / 2)).clamp(0, 1)
    logarithmic = torch.log1p(_SPREAD * share) / math.log1p(_SPREAD)
    centres = torch.arange(bins, device=values.device)
    told = [(1 - (each[:, None] * (bins - 1) - centres).abs()).clamp_min(0) for each in (share, logarithmic)]
    return functional.normalize(torch.cat(told, dim=1), dim=1)
