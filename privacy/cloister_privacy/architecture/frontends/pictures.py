"""Synthetic pictures, always the same: dead leaves (Lee, Mumford and Huang, IJCV 2001). They stand in for everyone's images."""

from __future__ import annotations

import math

import torch
from torch import Tensor

__all__ = ["pictures"]

_SEED = 20
_MOST_LEAVES = 6


def pictures(count: int, channels: int, height: int, width: int, *, number: int) -> Tensor:
    """[count, channels, height, width] in [0, 1]: one to six flat or cloudy ellipses and boxes over an even ground, which is black in
    every other picture; every other picture is its own mirror image. Each `number` gives others."""
    draw = _Draw(count, channels, height, width, seed=_SEED + number)
    y = ((torch.arange(height) + 0.5) / height * 2 - 1).view(1, 1, height, 1)
    x = ((torch.arange(width) + 0.5) / width * 2 - 1).view(1, 1, 1, width)
    picture = torch.where(draw.coin(), 0.0, draw.colour()).expand(count, channels, height, width)
    leaves = 1 + torch.floor(_MOST_LEAVES * draw.uniform())
    for leaf in range(_MOST_LEAVES):
        left, top = 1.2 * (draw.uniform() - 0.5), 1.2 * (draw.uniform() - 0.5)
        long, short = 0.08 * (0.9 / 0.08) ** draw.uniform(), 0.08 * (0.9 / 0.08) ** draw.uniform()
        turn = math.pi * draw.uniform()
        turn = torch.where(draw.coin(), turn, math.pi / 2 * torch.round(turn / (math.pi / 2)))
        u = (x - left) * torch.cos(turn) + (y - top) * torch.sin(turn)
        v = (y - top) * torch.cos(turn) - (x - left) * torch.sin(turn)
        roundness = torch.where(draw.coin(), 2.0, 8.0)
        is_inside = ((u / long).abs() ** roundness + (v / short).abs() ** roundness < 1) & (leaf < leaves)
        picture = torch.where(is_inside, draw.colour() + 0.2 * draw.uniform() * draw.clouds(), picture)
    mirrored = torch.where(x < 0, picture, picture.flip(-1))
    return torch.where(draw.coin(), mirrored, picture).clamp(0, 1)


class _Draw:
    """Numbers for each picture, from a generator of fixed seed; the order of the calls is part of what the pictures are."""

    def __init__(self, count: int, channels: int, height: int, width: int, *, seed: int) -> None:
        self._generator = torch.Generator().manual_seed(seed)
        self._count, self._channels, self._size = count, channels, (height, width)
        rows, columns = torch.fft.fftfreq(height)[:, None], torch.fft.rfftfreq(width)[None]
        self._frequency = (rows.square() + columns.square()).sqrt()
        self._frequency[0, 0] = 1.0

    def uniform(self, channels: int = 1) -> Tensor:
        return torch.rand(self._count, channels, 1, 1, generator=self._generator)

    def coin(self) -> Tensor:
        return self.uniform() < 0.5

    def colour(self) -> Tensor:
        return (self.uniform() + 0.3 * (self.uniform(self._channels) - 0.5) * (self._channels > 1)).clamp(0, 1)

    def clouds(self) -> Tensor:
        """Noise whose amplitude falls as 1 / frequency."""
        noise = torch.randn(self._count, 1, *self._size, generator=self._generator)
        shaped: Tensor = torch.fft.irfft2(torch.fft.rfft2(noise) / self._frequency, s=self._size)
        return shaped / shaped.std((-2, -1), keepdim=True)
