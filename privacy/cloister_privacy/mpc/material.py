"""Correlated randomness for one request: the dealer works out the corrections, a party takes tuples in the program's order.

A party's material is refused unless it was sealed by the dealer of this very generation for this index and program, and it ends with
the request. Knows keys and tuples; nothing of links, disks or networks.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from cloister_privacy.mpc.errors import MaterialRefused
from cloister_privacy.mpc.keystream import WEIGHTS, Index, Keystream, derive
from cloister_privacy.mpc.ring import Ring
from cloister_privacy.mpc.tuples import Part, Tuple
from cloister_privacy.sealing import Context, InvalidSeal, open_sealed, seal

__all__ = [
    "Generation",
    "Material",
    "Recorder",
    "Source",
    "corrections",
    "deal",
    "masks_of",
    "material_bytes",
    "open_material",
    "program_digest",
]

Words = NDArray[Any]


@dataclass(frozen=True, slots=True)
class Generation:
    """One life of the group: its id, and the key by which this party, or the dealer for it, draws."""

    id: str
    key: bytes = field(repr=False)


class Source(Protocol):
    """Where a computation takes its tuples from."""

    def take(self, kind: Tuple, /) -> list[Words]:
        """This party's shares of the tuple's parts, the random ones first."""
        ...


def program_digest(program: Sequence[Tuple]) -> str:
    """SHA-256 of the tuples that a network takes for so many rows, in order."""
    return hashlib.sha256("\n".join(map(repr, program)).encode()).hexdigest()


def material_bytes(program: Sequence[Tuple]) -> int:
    """What party 0 is dealt for it, before it is sealed."""
    return sum(part.nbytes for kind in program for part in kind.derived)


class Recorder:
    """Gives zeros and writes down what was asked for: so a network tells its program."""

    def __init__(self) -> None:
        self.program: list[Tuple] = []

    def take(self, kind: Tuple, /) -> list[Words]:
        self.program.append(kind)
        return [np.zeros(part.shape, part.dtype) for part in (*kind.random, *kind.derived)]


class Material:
    """What one party has for one request: its stream, and for party 0 the corrections."""

    def __init__(self, stream: Keystream, *, corrections: bytes | memoryview | None) -> None:
        self._stream, self._corrections = stream, None if corrections is None else memoryview(corrections)
        self._tuples = self._at = 0

    def take(self, kind: Tuple, /) -> list[Words]:
        stream = self._stream.tuple_stream(self._tuples)
        self._tuples += 1
        parts = [stream.draw(part.shape, part.dtype) for part in kind.random]
        if self._corrections is None:
            return parts + [stream.draw(part.shape, part.dtype) for part in kind.derived]
        return parts + [self._corrected(part) for part in kind.derived]

    def _corrected(self, part: Part) -> Words:
        assert self._corrections is not None  # noqa: S101 (the caller looked)
        found = self._corrections[self._at : self._at + part.nbytes]
        if len(found) != part.nbytes:
            raise MaterialRefused("the material ends before the program does; it is for another network or batch")
        self._at += part.nbytes
        return np.frombuffer(found, part.dtype).reshape(part.shape)


def masks_of(keys: Sequence[bytes], weights: Mapping[str, tuple[int, ...]]) -> dict[str, Ring]:
    """The sum of the masks that holders of these generation keys draw for each weight: of one key a share, of both the mask."""
    streams = [Keystream.of(key, WEIGHTS) for key in keys]
    masks = {}
    for number, (name, shape) in enumerate(sorted(weights.items())):
        drawn = [stream.tuple_stream(number).draw(shape, np.dtype(np.uint64)) for stream in streams]
        masks[name] = sum(drawn[1:], start=drawn[0]).view(np.uint64)
    return masks


def corrections(
    program: Sequence[Tuple], *, index: Index, keys: tuple[bytes, bytes], masks: Mapping[str, Ring]
) -> bytes:
    """Party 0's shares of all derived parts, one behind the other."""
    first, second = (Keystream.of(key, index) for key in keys)
    found: list[bytes] = []
    for number, kind in enumerate(program):
        streams = first.tuple_stream(number), second.tuple_stream(number)
        if not kind.derived:
            continue
        drawn = [part.join(*(each.draw(part.shape, part.dtype) for each in streams)) for part in kind.random]
        secrets = kind.derive(drawn, masks)
        for part, secret in zip(kind.derived, secrets, strict=True):
            found.append(part.correction(secret, streams[1].draw(part.shape, part.dtype)).tobytes())
    return b"".join(found)


def _context(generation: str, index: Index, digest: str) -> Context:
    return Context(generation, "mpc.material", f"{index.rows}.{index.count}.{digest}")


def deal(
    program: Sequence[Tuple], *, generation: str, index: Index, keys: tuple[bytes, bytes], masks: Mapping[str, Ring]
) -> bytes:
    """The corrections sealed for party 0, this generation, index and program: the key seals nothing else."""
    body = corrections(program, index=index, keys=keys, masks=masks)
    key = derive(keys[0], b"cloister.mpc.seal/1", index)
    return seal(body, key=key, context=_context(generation, index, program_digest(program)), chunk_bytes=2**20)


def open_material(sealed: bytes, program: Sequence[Tuple], *, generation: Generation, index: Index) -> Material:
    """Party 0's material. Raises MaterialRefused unless the dealer sealed these bytes for this generation, index and program."""
    key = derive(generation.key, b"cloister.mpc.seal/1", index)
    try:
        body = open_sealed(sealed, key=key, context=_context(generation.id, index, program_digest(program)))
    except InvalidSeal:
        raise MaterialRefused(
            "the material was changed, or is of another generation, index or network; it was not used. Try again"
        ) from None
    expected = material_bytes(program)
    if len(body) != expected:
        raise MaterialRefused(f"the material has {len(body)} bytes where the program takes {expected}; it was not used")
    return Material(Keystream.of(generation.key, index), corrections=body)
