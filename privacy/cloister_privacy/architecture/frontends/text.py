"""Texts as fixed, hashed features. Knows bytes; keeps no vocabulary, which would be counted on rows."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["HashedText"]

_MOST_WORDS = 64
_BASE = 6364136223846793005  # odd, so that it has an inverse modulo 2^64 (Knuth's multiplier)
_INVERSE = pow(_BASE, -1, 2**64)


class HashedText(nn.Module):
    """Tokens [n, length], 1 more than each byte and 0 past the end, to [n, features] of length 1.

    The first 64 words and all pairs of neighbours among them, lower-cased, are each hashed to a feature, which is the square root of
    how often it was met. A word is a longest run of letters, digits, apostrophes and bytes above 127; any other byte that is
    no blank is a word of its own. Hashes are polynomials in 64-bit arithmetic that wraps.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self._features = features

    def forward(self, tokens: Tensor) -> Tensor:
        letters, is_letter, is_mark = _classes(tokens)
        starts, ends = _spans(is_letter, is_mark)
        is_word = ends > starts
        words = _hashes(letters, starts, ends)
        pairs = _mixed(words[:, :-1]) * 3 + words[:, 1:]
        hashed = torch.cat([_mixed(words), _mixed(pairs + 7919)], dim=1)
        counts = torch.zeros(len(tokens), self._features, device=tokens.device)
        there = torch.cat([is_word, is_word[:, 1:]], dim=1).to(counts.dtype)
        counts.scatter_add_(1, hashed.remainder(self._features), there)
        return functional.normalize(counts.sqrt(), dim=1)


def _classes(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lower-cased bytes, which of them belong to words, and which stand alone; [n, length] each."""
    letters, is_there = tokens - 1, tokens > 0
    letters = torch.where((letters >= 65) & (letters <= 90), letters + 32, letters)
    is_letter = (
        ((letters >= 97) & (letters <= 122)) | ((letters >= 48) & (letters <= 57)) | (letters == 39) | (letters > 127)
    )
    return letters, is_letter & is_there, ~is_letter & (letters > 32) & is_there


def _spans(is_letter: Tensor, is_mark: Tensor) -> tuple[Tensor, Tensor]:
    """Where the first words start and end, [n, words]; empty where there are fewer."""
    before = functional.pad(is_letter[:, :-1], (1, 0))
    after = functional.pad(is_letter[:, 1:], (0, 1))
    opens, closes = is_mark | (is_letter & ~before), is_mark | (is_letter & ~after)
    places = torch.arange(is_letter.shape[1], device=is_letter.device).expand_as(is_letter)
    found = torch.arange(_MOST_WORDS, device=is_letter.device) < opens.sum(1, keepdim=True)

    def placed(flags: Tensor, offset: int) -> Tensor:
        rank = flags.cumsum(1) - 1
        slots = torch.where(flags & (rank < _MOST_WORDS), rank, _MOST_WORDS)
        spans = places.new_zeros(len(places), _MOST_WORDS + 1).scatter_(1, slots, places + offset)
        return spans[:, :_MOST_WORDS] * found

    return placed(opens, 0), placed(closes, 1)


def _hashes(letters: Tensor, starts: Tensor, ends: Tensor) -> Tensor:
    """The hash of each span, whatever its place: sums of letter * base^place up to its ends, less the power of its start."""
    length = letters.shape[1]
    sums = functional.pad(((letters + 1) * _powers(_BASE, length, letters.device)).cumsum(1), (1, 0))
    return (sums.gather(1, ends) - sums.gather(1, starts)) * _powers(_INVERSE, length + 1, letters.device)[starts]


def _powers(base: int, count: int, device: torch.device) -> Tensor:
    power, powers = 1, []
    for _ in range(count):
        powers.append(_wrapped(power))
        power = power * base % 2**64
    return torch.tensor(powers, device=device)


def _mixed(hashed: Tensor) -> Tensor:
    """Every bit reaches the low ones (the finalizer of SplitMix64); in [0, 2^62)."""
    for factor in (_wrapped(0xBF58476D1CE4E5B9), _wrapped(0x94D049BB133111EB)):
        hashed = (hashed ^ ((hashed >> 29) & (2**35 - 1))) * factor
    return (hashed ^ ((hashed >> 32) & (2**32 - 1))) & (2**62 - 1)


def _wrapped(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63
