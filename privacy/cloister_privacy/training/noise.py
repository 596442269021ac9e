"""Gaussian noise from the cryptographic generator. Floating point: exactness is an assumption, and the attacks known are met."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from cloister_privacy.training.keystream import BLOCK_WORDS, random_words

__all__ = ["gaussian_noise"]

_SUMMED = 4
"""Gaussians added into each coordinate, so that its floating-point residues cannot be enumerated (arXiv 2107.10138, section 5.1)."""

_BLOCK = BLOCK_WORDS // _SUMMED


def gaussian_noise(count: int, *, std: float) -> Tensor:
    """`count` independent draws of N(0, std^2), as float32 on the CPU."""
    noise = torch.empty(count)
    for start in range(0, count, _BLOCK):
        block = noise[start : start + _BLOCK]
        block.copy_(_standard_normal(len(block)) * std)
    return noise


def _standard_normal(count: int) -> Tensor:
    """Box-Muller in float64, tails to 8.6 standard deviations. The two halves of a pair land in different coordinates."""
    pairs = (count + 1) // 2
    words = (random_words(_SUMMED * 2 * pairs) >> np.uint64(11)).astype(np.float64)  # the upper 53 bits: exact
    uniform = torch.from_numpy(words).add_(0.5).mul_(2.0**-53).view(2, _SUMMED, pairs)
    radius, angle = uniform[0].log().mul_(-2).sqrt_(), uniform[1].mul_(2 * math.pi)
    summed = torch.cat([(radius * angle.cos()).sum(0), (radius * angle.sin()).sum(0)])
    return summed[:count] / math.sqrt(_SUMMED)
