"""Two parties and a dealer's work in one process, for tests of the arithmetic."""

from __future__ import annotations

import os
import queue
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from numpy.typing import NDArray

from cloister.wire.shares import decode, join, split
from cloister_privacy.mpc.computation import Computation, Shared
from cloister_privacy.mpc.keystream import Index, Keystream
from cloister_privacy.mpc.material import Material, Recorder, corrections
from cloister_privacy.mpc.tuples import Tuple

__all__ = ["compute", "program_of"]

Function = Callable[..., Shared]


def program_of(function: Function, *shapes: tuple[int, ...], bits: int = 20) -> list[Tuple]:
    """The tuples that a function takes."""
    recorder = Recorder()
    c = Computation(0, recorder, lambda sent: bytes(len(sent)), weights={}, shares={}, fraction_bits=20)
    function(c, *(Shared(np.zeros(shape, np.uint64), bits) for shape in shapes))
    return recorder.program


def compute(
    function: Function, *numbers: NDArray[np.float64], bits: int = 20, record: list[bytes] | None = None
) -> NDArray[np.float64]:
    """The function's numbers, of shared ones with so many fraction bits; `record` takes what party 0 sends."""
    program = program_of(function, *(each.shape for each in numbers), bits=bits)
    keys, index = (os.urandom(32), os.urandom(32)), Index(1, 1)
    body = corrections(program, index=index, keys=keys, masks={})
    shares = [split(np.rint(each * 2.0**bits).astype(np.int64).view(np.uint64)) for each in numbers]
    ways: tuple[queue.Queue[bytes], queue.Queue[bytes]] = (queue.Queue(), queue.Queue())

    def run(party: int) -> Shared:
        def exchange(sent: bytes) -> bytes:
            if party == 0 and record is not None:
                record.append(sent)
            ways[1 - party].put(sent)
            return ways[party].get(timeout=60)

        material = Material(Keystream.of(keys[party], index), corrections=body if party == 0 else None)
        c = Computation(party, material, exchange, weights={}, shares={}, fraction_bits=20)
        return function(c, *(Shared(each[party], bits) for each in shares))

    with ThreadPoolExecutor(2) as pool:
        found = list(pool.map(run, (0, 1)))
    return decode(join([each.share for each in found]), fraction_bits=found[0].bits)
