"""Texts as fixed, hashed features. Knows bytes; keeps no vocabulary, which would be counted on rows."""

from __future__ import annotations

from functools import lru_cache

import torch
from torch import Tensor, nn
from torch.nn import functional

__all__ = ["TOKENS", "HashedText", "SparseLinear", "places_and_values"]

TOKENS = 256
"""The most features of one text that are read, words first, then pairs, then runs; the others of a longer one are left out."""

_MOST_WORDS = 64
_PAIR = _RUN = 0.5
"""What a pair of words, or a run of letters, weighs beside a word."""

_RUNS = (3, 4, 5)
_BASE = 6364136223846793005  # odd, so that it has an inverse modulo 2^64 (Knuth's multiplier)
_INVERSE = pow(_BASE, -1, 2**64)


class HashedText(nn.Module):
    """Tokens [n, length], 1 more than each byte and 0 past the end, to a sparse vector of length 1, as `places_and_values` reads it.

    Features are the first 64 words, pairs of neighbours among them, and runs of 3, 4 and 5 bytes within words, all lower-cased. A
    word is a longest run of letters, digits, apostrophes and bytes above 127; any other byte that is no blank is a word of its own. A
    feature met c times has sqrt(c) of its weight. Hashes are polynomials in 64-bit arithmetic that wraps.
    """

    def __init__(self, features: int) -> None:
        super().__init__()
        self._features = features

    def forward(self, tokens: Tensor) -> Tensor:
        letters, is_letter, is_mark = _classes(tokens)
        sums, powers = _prefix_sums(letters)
        starts, ends = _spans(is_letter, is_mark)
        words = (sums.gather(1, ends) - sums.gather(1, starts)) * powers[starts]
        is_word = ends > starts
        parts = [(words, is_word, 1.0), (_mixed(words[:, :-1]) * 3 + words[:, 1:], is_word[:, 1:], _PAIR)]
        parts += [(*_runs(sums, powers, is_letter, size), _RUN) for size in _RUNS]
        hashes = torch.cat([_mixed(hashed + 7919 * kind) for kind, (hashed, _, _) in enumerate(parts)], dim=1)
        weights = torch.cat([is_there * weight for _, is_there, weight in parts], dim=1)
        return _merged(*_first(hashes.remainder(self._features), weights, self._features), self._features)


class SparseLinear(nn.Module):
    """y = x W^T + b, initialised as torch.nn.Linear is, of vectors as HashedText gives them: [n, 2, tokens] to [n, p]."""

    def __init__(self, in_features: int, out_features: int, *, bias: bool) -> None:
        super().__init__()
        like = nn.Linear(in_features, out_features, bias=bias)
        self.weight, self.bias = like.weight, like.bias

    def forward(self, sparse: Tensor) -> Tensor:
        return self.apply_to(*places_and_values(sparse), self.weight, self.bias)

    @staticmethod
    def apply_to(places: Tensor, values: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        outputs = functional.embedding_bag(places, weight.T.contiguous(), per_sample_weights=values, mode="sum")
        return outputs if bias is None else outputs + bias


def places_and_values(sparse: Tensor) -> tuple[Tensor, Tensor]:
    """Where a sparse vector is not 0, int32 [n, tokens], and what it is there, float32. It crosses layers as one tensor, int32
    [n, 2, tokens]: the places, and the values by their bits. No place comes twice, but with a value of 0."""
    return sparse[:, 0].contiguous(), sparse[:, 1].contiguous().view(torch.float32)


def _classes(tokens: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Lower-cased bytes, which of them belong to words, and which stand alone; [n, length] each."""
    letters, is_there = tokens - 1, tokens > 0
    letters = torch.where((letters >= 65) & (letters <= 90), letters + 32, letters)
    is_plain = ((letters >= 97) & (letters <= 122)) | ((letters >= 48) & (letters <= 57))
    is_letter = is_plain | (letters == ord("'")) | (letters > 127)
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


def _prefix_sums(letters: Tensor) -> tuple[Tensor, Tensor]:
    """The hash of the first k bytes, [n, length + 1], and the powers that make the hash of a span free of its place."""
    length = letters.shape[1]
    terms = (letters + 1) * _powers(_BASE, length, letters.device)
    return functional.pad(terms.cumsum(1), (1, 0)), _powers(_INVERSE, length + 1, letters.device)


def _runs(sums: Tensor, powers: Tensor, is_letter: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """Hashes of all runs of `size` bytes, [n, runs], and which of them lie within a word."""
    length = is_letter.shape[1]
    if length < size:
        return sums[:, :0], is_letter[:, :0]
    starts = torch.arange(length - size + 1, device=is_letter.device)
    counts = functional.pad(is_letter.long().cumsum(1), (1, 0))
    is_within = counts[:, starts + size] - counts[:, starts] == size
    return (sums[:, starts + size] - sums[:, starts]) * powers[starts], is_within


def _first(places: Tensor, weights: Tensor, nowhere: int) -> tuple[Tensor, Tensor]:
    """The first 256 that are there, side by side; what is missing lies `nowhere`, with a weight of 0."""
    rank = (weights > 0).cumsum(1) - 1
    slots = torch.where((weights > 0) & (rank < TOKENS), rank, TOKENS)
    first = places.new_full((len(places), TOKENS + 1), nowhere).scatter_(1, slots, places)[:, :TOKENS]
    weights = weights.new_zeros(len(places), TOKENS + 1).scatter_(1, slots, weights)[:, :TOKENS]
    return torch.where(weights > 0, first, nowhere), weights


def _merged(places: Tensor, weights: Tensor, nowhere: int) -> Tensor:
    """Each place once, with the root of its squared weights' sum, as a vector of length 1."""
    places, order = places.sort(dim=1)
    energy = weights.gather(1, order).square().cumsum(1)
    is_last = functional.pad(places[:, 1:] != places[:, :-1], (0, 1), value=True)
    at = torch.arange(TOKENS, device=places.device)
    before = functional.pad(torch.where(is_last, at, -1)[:, :-1], (1, 0), value=-1).cummax(1).values
    earlier = torch.where(before >= 0, energy.gather(1, before.clamp_min(0)), 0)
    values = torch.where(is_last & (places < nowhere), energy - earlier, 0).clamp_min(0).sqrt()
    values = functional.normalize(values, dim=1)
    return torch.stack([(places * (values > 0)).int(), values.view(torch.int32)], dim=1)


def _powers(base: int, count: int, device: torch.device) -> Tensor:
    return _powers_of(base, count).to(device)


@lru_cache(maxsize=16)
def _powers_of(base: int, count: int) -> Tensor:
    power, powers = 1, []
    for _ in range(count):
        powers.append(_wrapped(power))
        power = power * base % 2**64
    return torch.tensor(powers, device="cpu")


def _mixed(hashed: Tensor) -> Tensor:
    """Every bit reaches the low ones (the finalizer of SplitMix64); in [0, 2^62)."""
    for factor in (_wrapped(0xBF58476D1CE4E5B9), _wrapped(0x94D049BB133111EB)):
        hashed = (hashed ^ ((hashed >> 29) & (2**35 - 1))) * factor
    return (hashed ^ ((hashed >> 32) & (2**32 - 1))) & (2**62 - 1)


def _wrapped(number: int) -> int:
    return (number + 2**63) % 2**64 - 2**63
