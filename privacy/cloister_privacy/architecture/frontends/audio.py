"""Recordings as small pictures of their sound."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from cloister_privacy.architecture.frontends.geometry import hop_of

__all__ = ["LogMel"]

_WINDOW_S = 0.032
_LOWEST_HZ = 60.0
_FLOOR_DB = 60.0
"""Below the loudest; what is softer counts as that soft."""

_QUIET_DB = 25.0


class LogMel(nn.Module):
    """Samples [n, samples] from -1 to 1 to log-mel spectrograms [n, bands, frames], each of mean 0 and length 1.

    Frames at either end that are over 25 decibels below the loudest are left out, and what is between is stretched to `frames`, so
    that recordings are aligned by their sound.
    """

    def __init__(self, *, rate: int, samples: int, bands: int, frames: int) -> None:
        super().__init__()
        self._window, self._hop = max(4, round(rate * _WINDOW_S)), hop_of(rate)
        self._missing, self._frames = max(0, self._window - samples), frames
        with torch.device(
            "cpu"
        ):  # they are no weights, so a network that is made without memory needs them all the same
            self.register_buffer("hann", torch.hann_window(self._window), persistent=False)
            self.register_buffer("filters", _mel_filters(rate, self._window, bands), persistent=False)

    def forward(self, samples: Tensor) -> Tensor:
        pieces = functional.pad(samples, (0, self._missing)).unfold(1, self._window, self._hop)
        power = torch.fft.rfft(pieces * self.get_buffer("hann")).abs().square() @ self.get_buffer("filters")
        levels, loudness = _decibels(power), _decibels(power.sum(2))
        levels = (levels - levels.amax((1, 2), keepdim=True)).clamp_min(-_FLOOR_DB)
        pictures = self._aligned(levels, loudness > loudness.amax(1, keepdim=True) - _QUIET_DB).mT
        centred = pictures - pictures.mean((1, 2), keepdim=True)
        return functional.normalize(centred.flatten(1), dim=1).view_as(centred)

    def _aligned(self, levels: Tensor, is_heard: Tensor) -> Tensor:
        """[n, frames, bands]: between the first and the last frame that is heard, interpolated."""
        places = torch.arange(levels.shape[1], device=levels.device)
        first = torch.where(is_heard, places, levels.shape[1]).amin(1, keepdim=True)
        last = torch.where(is_heard, places, -1).amax(1, keepdim=True)
        at = first + (last - first) * torch.linspace(0, 1, self._frames, device=levels.device)
        below = at.floor().long()
        part = (at - below).unsqueeze(2)
        return (1 - part) * _taken(levels, below) + part * _taken(levels, (below + 1).clamp_max(levels.shape[1] - 1))


def _decibels(power: Tensor) -> Tensor:
    return 10 * torch.log10(power.clamp_min(1e-12))


def _taken(levels: Tensor, at: Tensor) -> Tensor:
    return levels.gather(1, at.unsqueeze(2).expand(-1, -1, levels.shape[2]))


def _mel_filters(rate: int, window: int, bands: int) -> Tensor:
    """[frequencies, bands]: triangles evenly spaced in mel up to half the rate (O'Shaughnessy's formula, 2595 log10(1 + f / 700))."""
    low, high = (2595 * math.log10(1 + hertz / 700) for hertz in (min(_LOWEST_HZ, rate / 8), rate / 2))
    edges = 700 * (10 ** (torch.linspace(low, high, bands + 2, dtype=torch.float64) / 2595) - 1)
    frequencies = (torch.arange(window // 2 + 1) * rate / window).unsqueeze(1)
    rising = (frequencies - edges[:-2]) / (edges[1:-1] - edges[:-2])
    falling = (edges[2:] - frequencies) / (edges[2:] - edges[1:-1])
    return torch.minimum(rising, falling).clamp_min(0).float()
