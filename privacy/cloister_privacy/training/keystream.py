"""Uniform random words from a cryptographic generator. Keeps no state: what was drawn cannot be drawn again."""

from __future__ import annotations

import os

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, algorithms
from numpy.typing import NDArray

__all__ = ["BLOCK_WORDS", "random_words"]

BLOCK_WORDS = 2**17
"""The most words that one call gives: 1 MiB."""

_ZEROS = bytes(8 * BLOCK_WORDS)


def random_words(count: int) -> NDArray[np.uint64]:
    """`count` independent uniform 64-bit words: ChaCha20 under a key that the operating system gave and nobody keeps."""
    words = bytearray(8 * count)
    encryptor = Cipher(algorithms.ChaCha20(os.urandom(32), bytes(16)), mode=None).encryptor()
    encryptor.update_into(memoryview(_ZEROS)[: len(words)], words)
    return np.frombuffer(words, dtype=np.uint64)
