"""One party's randomness for one request: AES-256 in counter mode, under a key of that generation and index, a stream for each tuple.

What is drawn depends on (generation key, index, tuple) and nothing else, so the dealer draws the same; nothing is drawn twice.
"""

from __future__ import annotations

import hmac
from dataclasses import dataclass, field

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes
from numpy.typing import NDArray

__all__ = ["KEY_BYTES", "WEIGHTS", "Index", "Keystream", "derive"]

KEY_BYTES = 32
_STEP = 2**20
_ZEROS = bytes(_STEP)


@dataclass(frozen=True, slots=True, order=True)
class Index:
    """Which material: of requests of so many rows, the count-th. Indices of one size are used in ascending order, each once."""

    rows: int
    count: int

    def to_bytes(self) -> bytes:
        return self.rows.to_bytes(8, "big") + self.count.to_bytes(8, "big")


WEIGHTS = Index(0, 0)
"""Of the masks of the weights, which are drawn once in a generation."""


def derive(key: bytes, purpose: bytes, index: Index) -> bytes:
    """A key for one purpose and index."""
    return hmac.digest(key, purpose + b"\0" + index.to_bytes(), "sha256")


@dataclass(frozen=True, slots=True)
class Keystream:
    """The streams of one party for one index. `tuple_stream` opens the stream of one tuple."""

    key: bytes = field(repr=False)

    @classmethod
    def of(cls, generation_key: bytes, index: Index) -> Keystream:
        return cls(derive(generation_key, b"cloister.mpc.stream/1", index))

    def tuple_stream(self, number: int) -> TupleStream:
        """Counter blocks number * 2^64 and on."""
        nonce = number.to_bytes(8, "big") + bytes(8)
        return TupleStream(Cipher(algorithms.AES(self.key), modes.CTR(nonce)).encryptor())


class TupleStream:
    """Uniform bytes of one tuple, in order."""

    def __init__(self, cipher: CipherContext) -> None:
        self._cipher = cipher

    def draw(self, shape: tuple[int, ...], dtype: np.dtype[np.generic]) -> NDArray[np.generic]:
        drawn = np.empty(shape, dtype=dtype)
        view = drawn.reshape(-1).view(np.uint8).data
        for start in range(0, len(view), _STEP):
            part = view[start : start + _STEP]
            self._cipher.update_into(memoryview(_ZEROS)[: len(part)], part)
        return drawn
