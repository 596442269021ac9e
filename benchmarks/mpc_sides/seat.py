"""What a process of a side is told, and how it answers; knows nothing of protocols, and needs numpy alone.

It is started with the arguments of `Seat`, tells `{}` when it is ready, and then, for each line "count\\n" on its input, answers so
many requests and tells one JSON object. Of the first process's, `times` are the seconds of each request, `bytes` those of one
request where the side counts them, and `outputs` the last answer in the clear.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

_TOLD = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)  # what libraries print is no answer


@dataclass(frozen=True)
class Seat:
    rank: int
    directory: Path
    """Of this network and side; `case` writes the network beside it."""
    addresses: tuple[tuple[str, int], ...]
    """Where each process of the side may listen."""

    @classmethod
    def taken(cls) -> Seat:
        parser = argparse.ArgumentParser()
        parser.add_argument("rank", type=int)
        parser.add_argument("directory", type=Path)
        parser.add_argument("addresses", nargs="+")
        given = parser.parse_args()
        pairs = (each.split(":") for each in given.addresses)
        return cls(given.rank, given.directory, tuple((host, int(port)) for host, port in pairs))

    def case(self) -> Case:
        layers = json.loads((self.directory.parent / "layers.json").read_text())
        arrays = np.load(self.directory.parent / "arrays.npz")
        weights: list[dict[str, Any]] = [{} for _ in layers]
        for key in arrays.files:
            if key != "x":
                number, _, name = key.partition(".")
                weights[int(number)][name] = arrays[key]
        return Case(arrays["x"], list(zip(layers, weights, strict=True)))


@dataclass(frozen=True)
class Case:
    """One input of one row, and the layers: of each its fields in the architecture language, and its arrays as torch has them."""

    x: np.ndarray[Any, Any]
    layers: list[tuple[dict[str, Any], dict[str, Any]]]


def answer(ask: Callable[[], Any], *, told: Callable[[int], dict[str, Any]]) -> None:
    """Ready; then a block of requests for each line, each `ask`, and what `told` says after so many."""
    _tell({})
    for line in sys.stdin:
        times = []
        for _ in range(int(line)):
            started = time.perf_counter()
            ask()
            times.append(time.perf_counter() - started)
        _tell({"times": times, **told(int(line))})


def stand_by() -> None:
    """Ready, for a process that works by itself while the others ask."""
    answer(lambda: None, told=lambda count: {})


def _tell(said: dict[str, Any]) -> None:
    print(json.dumps(said), file=_TOLD, flush=True)
