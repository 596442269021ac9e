"""Uniform random bits from a cryptographic generator. Keeps no state: what was drawn cannot be drawn again."""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

__all__ = ["BLOCK_BYTES", "BLOCK_WORDS", "random_below", "random_bytes", "random_words"]

BLOCK_WORDS = 2**17
"""The most words that one call gives: 1 MiB."""

BLOCK_BYTES = 8 * BLOCK_WORDS
"""The most bytes that one call gives."""

_ZEROS = bytes(BLOCK_BYTES)


def random_bytes(count: int) -> NDArray[np.uint8]:
    """`count` independent uniform bytes: ChaCha20 under a key that the operating system gave and nobody keeps."""
    if not 0 <= count <= BLOCK_BYTES:
        raise ValueError(f"one call gives 0 to {BLOCK_BYTES} bytes, not {count}; draw in blocks")
    drawn = np.empty(count, dtype=np.uint8)
    encryptor = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
    encryptor.update_into(memoryview(_ZEROS)[:count], drawn.data)
    return drawn


def random_words(count: int) -> NDArray[np.uint64]:
    """`count` independent uniform 64-bit words, at most BLOCK_WORDS of them."""
    return random_bytes(8 * count).view(np.uint64)


def random_below(bounds: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """One independent integer for each bound (at least 1), uniform over 0, ..., bound - 1: exactly, by rejection."""
    drawn = np.empty(len(bounds), dtype=np.uint64)
    for start in range(0, len(bounds), BLOCK_WORDS):
        drawn[start : start + BLOCK_WORDS] = _block_below(bounds[start : start + BLOCK_WORDS])
    return drawn


def _block_below(bounds: NDArray[np.uint64]) -> NDArray[np.uint64]:
    words = random_words(len(bounds))
    # Words below 2^64 mod bound would make their remainders likelier than the rest. In uint64, -bound is 2^64 - bound.
    surplus = np.negative(bounds) % bounds
    while (again := np.flatnonzero(words < surplus)).size:
        words[again] = random_words(len(again))
    return words % bounds
