"""Random Fourier features: Rahimi and Recht, Random features for large-scale kernel machines, NIPS 2007."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor, nn

__all__ = ["CosineFeatures"]


class CosineFeatures(nn.Module):
    """[n, d] to [n, features] of length 1, whose inner products are exp(-|x - y|^2 / (2 scale^2)), about. The waves are those of
    numpy's PCG64 under `seed`, on every machine."""

    def __init__(self, in_features: int, features: int, *, scale: float, seed: int) -> None:
        super().__init__()
        drawn = np.random.Generator(np.random.PCG64(seed)).standard_normal((in_features, features // 2))
        self.register_buffer("waves", torch.from_numpy((drawn / scale).astype(np.float32)), persistent=False)
        self._share = 1 / math.sqrt(features / 2)

    def forward(self, values: Tensor) -> Tensor:
        angles = values @ self.get_buffer("waves")
        return torch.cat([angles.cos(), angles.sin()], dim=1) * self._share
