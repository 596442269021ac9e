"""Uniform random bits from a cryptographic generator: AES-256 in counter mode, each call under a key that the operating system gave
and nobody keeps. There is no state and no seed: what was drawn cannot be drawn again."""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms, modes
from numpy.typing import NDArray

__all__ = ["BLOCK_BYTES", "BLOCK_WORDS", "fill", "random_below", "random_bytes", "random_words"]

BLOCK_BYTES = 2**24
"""The most bytes that one call gives."""

BLOCK_WORDS = BLOCK_BYTES // 8
"""The most words that one call gives."""

_ZEROS = bytes(BLOCK_BYTES)
"""What is encrypted to get the keystream. Never written to, so it takes no memory of its own."""


def fill(block: NDArray[np.uint8]) -> None:
    """Overwrite a block, one-dimensional and contiguous, with independent uniform bytes."""
    if len(block) > BLOCK_BYTES:
        raise ValueError(f"one call gives at most {BLOCK_BYTES} bytes, not {len(block)}; draw in blocks")
    cipher = Cipher(algorithms.AES(os.urandom(32)), modes.CTR(bytes(16))).encryptor()
    cipher.update_into(memoryview(_ZEROS)[: len(block)], block.data)


def random_bytes(count: int) -> NDArray[np.uint8]:
    """`count` independent uniform bytes, at most BLOCK_BYTES of them."""
    drawn = np.empty(count, dtype=np.uint8)
    fill(drawn)
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
