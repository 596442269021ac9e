"""Wavelet scattering of images: Bruna and Mallat, Invariant scattering convolution networks, TPAMI 2013; filters as in Kymatio."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["Scattering"]


class Scattering(nn.Module):
    """Images [n, h, w] or [n, c, h, w] to [n, c features, h / 2^scales, w / 2^scales] (rounded up), of orders 0 to 2.

    Features of a channel: 1 of order 0, scales * directions of order 1, directions^2 * scales (scales - 1) / 2 of order 2.
    """

    def __init__(self, shape: tuple[int, ...], *, scales: int, directions: int) -> None:
        super().__init__()
        with torch.device(
            "cpu"
        ):  # they are no weights, so a network that is made without memory needs them all the same
            self._make_filters(shape, scales, directions)

    def _make_filters(self, shape: tuple[int, ...], scales: int, directions: int) -> None:
        self._scales = scales
        cell = 2**scales
        self._size = tuple(shape[-2:])
        self._padded = tuple(-(-size // cell) * cell + 2 * cell for size in self._size)
        low = _morlet(self._padded, sigma=0.8 * 2 ** (scales - 1), angle=0.0, frequency=0.0, slant=1.0)
        self.register_buffer("low", low, persistent=False)
        for scale in range(scales):
            waves = [
                _morlet(
                    self._padded,
                    sigma=0.8 * 2**scale,
                    angle=math.pi * direction / directions,
                    frequency=0.75 * math.pi / 2**scale,
                    slant=4 / directions,
                )
                for direction in range(directions)
            ]
            self.register_buffer(f"waves_{scale}", torch.stack(waves), persistent=False)

    def forward(self, images: Tensor) -> Tensor:
        if images.ndim == 4:
            n, channels = images.shape[:2]
            each: Tensor = self(images.flatten(0, 1))
            return each.reshape(n, channels * each.shape[1], *each.shape[2:])
        spectrum = torch.fft.fft2(self._with_border(images)).unsqueeze(1)
        first, second = [], []
        for scale in range(self._scales):
            edges = self._modulus(spectrum * self._waves(scale, 0), 2**scale)
            first.append(self._averaged(edges, scale))
            for coarser in range(scale + 1, self._scales):
                waved = edges.unsqueeze(2) * self._waves(coarser, scale)
                among = self._modulus(waved, 2 ** (coarser - scale))
                second.append(self._averaged(among, coarser).flatten(1, 2))
        return torch.cat([self._averaged(spectrum, 0), *first, *second], dim=1)

    def _with_border(self, images: Tensor) -> Tensor:
        """Mirrored at the edges up to the padded size, as far as a mirror reaches, and repeated beyond."""
        (h, w), (high, wide) = self._size, self._padded
        top, left = (high - h) // 2, (wide - w) // 2
        around = (left, wide - w - left, top, high - h - top)
        mode = "reflect" if max(around[:2]) < w and max(around[2:]) < h else "replicate"
        padded: Tensor = functional.pad(images.unsqueeze(1), around, mode=mode).squeeze(1)
        return padded

    def _waves(self, scale: int, subsampled: int) -> Tensor:
        """[directions, ...] in frequency, for a grid that was subsampled so many times by two."""
        return _folded(self.get_buffer(f"waves_{scale}"), 2**subsampled).sum((-4, -2))

    def _modulus(self, spectrum: Tensor, step: int) -> Tensor:
        """The spectrum of the modulus, subsampled in space: its aliases are averaged in frequency."""
        modulus = torch.fft.ifft2(_folded(spectrum, step).mean((-4, -2))).abs()
        again: Tensor = torch.fft.fft2(modulus)
        return again

    def _averaged(self, spectrum: Tensor, scale: int) -> Tensor:
        low = _folded(self.get_buffer("low"), 2**scale).sum((-4, -2))
        folded = _folded(spectrum * low, 2 ** (self._scales - scale)).mean((-4, -2))
        mean: Tensor = torch.fft.ifft2(folded).real
        return mean[..., 1:-1, 1:-1]


def _folded(spectrum: Tensor, step: int) -> Tensor:
    """[..., h, w] as [..., step, h / step, step, w / step]: what a grid with every step-th point cannot tell apart."""
    high, wide = spectrum.shape[-2:]
    return spectrum.reshape(*spectrum.shape[:-2], step, high // step, step, wide // step)


def _morlet(size: tuple[int, ...], *, sigma: float, angle: float, frequency: float, slant: float) -> Tensor:
    """A Morlet wavelet's spectrum, float32 [h, w] and real: a Gabor function less as much of its envelope as makes its mean 0. Without
    a frequency, the Gaussian itself."""
    envelope = _gabor(size, sigma, angle, 0.0, slant)
    if frequency:
        wave = _gabor(size, sigma, angle, frequency, slant)
        envelope = wave - wave.sum() / envelope.sum() * envelope
    spectrum: Tensor = torch.fft.fft2(envelope)
    return spectrum.real.float()


def _gabor(size: tuple[int, ...], sigma: float, angle: float, frequency: float, slant: float) -> Tensor:
    """On a grid that repeats itself, with what reaches over from two repetitions on each side."""
    high, wide = size
    total = torch.zeros(size, dtype=torch.complex128)
    for down in range(-2, 3):
        for right in range(-2, 3):
            y = (torch.arange(high, dtype=torch.float64) + down * high).unsqueeze(1)
            x = (torch.arange(wide, dtype=torch.float64) + right * wide).unsqueeze(0)
            along, across = x * math.cos(angle) + y * math.sin(angle), y * math.cos(angle) - x * math.sin(angle)
            envelope = torch.exp(-(along.square() + (slant * across).square()) / (2 * sigma**2))
            total += envelope * torch.exp(1j * frequency * along)
    return total * slant / (2 * math.pi * sigma**2)
