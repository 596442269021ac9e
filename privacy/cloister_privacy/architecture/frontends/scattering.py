"""A front end for images: wavelet scattering, its logarithm, and a whitening that follows from synthetic pictures alone.

Two orders of oriented Morlet moduli (Mallat, CPAM 2012; Bruna and Mallat, PAMI 2013; the wavelets of Kymatio, Andreux et al., JMLR
2020), after Tramer and Boneh (ICLR 2021), who put a private linear layer on them. The wavelets of every octave are the same small
filters, run on a picture halved that often. Nothing here is trained, and nothing is fitted to anyone's rows.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from math import cos, pi, sin
from threading import Lock

import torch
from torch import Tensor, nn
from torch.nn import functional

from cloister_privacy.architecture.frontends.geometry import ANGLES, Geometry, geometry_of
from cloister_privacy.architecture.frontends.pictures import pictures

__all__ = ["Scattering"]

_OFFSET = 0.002
"""Of energies before their logarithm; images lie in [0, 1]."""

_FLOOR = 0.01
"""Of the mean eigenvalue, added before the root: what synthetic pictures hardly show is not blown up."""

_NORM = 10.0
"""The length of what it gives, so that the bias of a linear layer weighs a tenth of it."""

_SYNTHETIC, _DRAWN_AT_ONCE = 4096, 512
_BUILDING = Lock()
"""Filters are made by one thread at a time: it takes seconds, and the others want the same ones."""

_AT_ONCE = 64
"""Images: what they need stays in the processor's caches."""


class Scattering(nn.Module):
    """Images [n, h, w] or [n, c, h, w] in [0, 1] to [n, features], each of length 10."""

    def __init__(self, shape: tuple[int, ...]) -> None:
        super().__init__()
        self._geometry = geometry_of(shape)

    @torch.no_grad()
    def forward(self, images: Tensor) -> Tensor:
        with _BUILDING:
            fixed = _fixed(self._geometry)  # at the first image: a network that is only looked at needs none
        return torch.cat([_features(each, self._geometry, fixed) for each in torch.split(images, _AT_ONCE)])


@dataclass(frozen=True)
class _Fixed:
    """What synthetic pictures tell: the mean of log energies [maps, cells], and whitening matrices for both."""

    mean: Tensor
    whiten_maps: Tensor
    whiten_cells: Tensor


def _features(images: Tensor, geometry: Geometry, fixed: _Fixed) -> Tensor:
    energies = _energies(images, geometry) - fixed.mean.to(images)
    whitened = fixed.whiten_maps.to(images) @ energies @ fixed.whiten_cells.to(images)
    return _NORM * functional.normalize(whitened.flatten(1), dim=1, eps=1e-6)


@lru_cache(maxsize=16)
def _fixed(geometry: Geometry) -> _Fixed:
    """Takes seconds, and is the same for every network of this geometry; on the CPU, whatever device is the default."""
    with torch.device("cpu"), torch.inference_mode(False), torch.no_grad():
        parts = [
            _energies(part, geometry)
            for number in range(_SYNTHETIC // _DRAWN_AT_ONCE)
            for part in torch.split(
                pictures(_DRAWN_AT_ONCE, geometry.channels, *geometry.size, number=number), _AT_ONCE
            )
        ]
        energies = torch.cat(parts).double()
        mean = energies.mean(0)
        energies -= mean
        of_maps = torch.einsum("ncs,nds->cd", energies, energies) / len(energies)
        of_cells = torch.einsum("ncs,nct->st", energies, energies) / len(energies)
        return _Fixed(mean.float(), _whitening(of_maps), _whitening(of_cells))


def _whitening(covariance: Tensor) -> Tensor:
    """(covariance + floor) ^ (-1/4): the maps' and the cells' together are the power -1/2 of their product."""
    values, vectors = torch.linalg.eigh(covariance)
    values = values.clamp(min=0) + _FLOOR * values.mean()
    root: Tensor = (vectors * values**-0.25) @ vectors.T
    return root.float()


def _energies(images: Tensor, geometry: Geometry) -> Tensor:
    """Log energies [n, maps, cells]; of differences between channels the first order only."""
    wavelets, opponents = _morlets().to(images), _cosines(geometry.channels).to(images)
    x = images.unsqueeze(1) if images.ndim == 3 else images
    if x.shape[-2:] != geometry.size:
        x = functional.adaptive_avg_pool2d(x, geometry.size)
    cell = 2**geometry.octaves
    down, right = geometry.grid[0] * cell - geometry.size[0], geometry.grid[1] * cell - geometry.size[1]
    x = functional.pad(x, (right // 2, right - right // 2, down // 2, down - down // 2), mode="replicate")
    x = torch.einsum("dc,nchw->ndhw", opponents, x)
    maps = [_average(x, cell).abs()]
    for octave in range(geometry.octaves):
        first = _modulus(x, wavelets)
        maps.append(_average(first, cell >> octave))
        second = first[:, :ANGLES]  # of the mean over the channels
        for later in range(octave + 1, geometry.octaves):
            second = _average(second, 2)
            maps.append(_average(_modulus(second, wavelets), cell >> later))
        x = _average(x, 2)
    return (torch.cat(maps, 1) + _OFFSET).log().flatten(2)


def _modulus(x: Tensor, wavelets: Tensor) -> Tensor:
    n, maps, height, width = x.shape
    margin = wavelets.shape[-1] // 2
    x = functional.pad(x.reshape(n * maps, 1, height, width), (margin,) * 4, mode="replicate")
    real_and_imaginary = functional.conv2d(x, wavelets).view(n, maps * ANGLES, 2, height, width)
    return (real_and_imaginary.square().sum(2) + 1e-12).sqrt()


def _average(x: Tensor, step: int) -> Tensor:
    """Gaussian means around the centres of step x step blocks."""
    if step == 1:
        return x
    n, maps, height, width = x.shape
    offsets = torch.arange(-step, 2 * step, dtype=torch.float64) - (step - 1) / 2
    weights = torch.exp(-offsets.square() / (2 * (step / 2) ** 2))
    weights = (weights / weights.sum()).to(x)
    x = functional.pad(x.reshape(n * maps, 1, height, width), (step,) * 4, mode="replicate")
    x = functional.conv2d(x, weights.view(1, 1, -1, 1), stride=(step, 1))
    x = functional.conv2d(x, weights.view(1, 1, 1, -1), stride=(1, step))
    return x.view(n, maps, height // step, width // step)


@lru_cache(maxsize=1)
def _morlets(*, sigma: float = 0.8, frequency: float = 3 * pi / 4, radius: int = 3) -> Tensor:
    """Kymatio's finest Morlet wavelets, real and imaginary parts in turn: [2 angles, 1, 7, 7], each of mean zero."""
    with torch.device("cpu"):
        axis, slant = torch.arange(-radius, radius + 1, dtype=torch.float64), 4 / ANGLES
        y, x = torch.meshgrid(axis, axis, indexing="ij")
        filters = []
        for angle in range(ANGLES):
            right, down = cos(pi * angle / ANGLES), sin(pi * angle / ANGLES)
            along, across = x * right + y * down, y * right - x * down
            envelope = torch.exp(-(along.square() + (slant * across).square()) / (2 * sigma**2))
            real, imaginary = envelope * torch.cos(frequency * along), envelope * torch.sin(frequency * along)
            filters += [real - envelope * (real.sum() / envelope.sum()), imaginary]
        return (torch.stack(filters).unsqueeze(1) * slant / (2 * pi * sigma**2)).float()


def _cosines(channels: int) -> Tensor:
    """An orthogonal basis whose first row is the mean: of three channels, the mean and two opponent colours."""
    index = torch.arange(channels, dtype=torch.float64)
    basis = torch.cos(pi * (index + 0.5) * index[:, None] / channels)
    return (basis / basis.abs().sum(1, keepdim=True)).float()
