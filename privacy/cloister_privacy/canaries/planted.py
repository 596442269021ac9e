"""Synthetic networks and rows for audits, some of them with clipped gradients that are known in advance. Knows no engine."""

from __future__ import annotations

from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from cloister.wire.architecture import Architecture
from cloister.wire.columns import AudioColumn, CategoryColumn, InputColumn, NumberColumn, TensorColumn, TextColumn
from cloister.wire.layers import Linear

__all__ = ["contribution", "deep_network", "dirac_network", "dirac_rows", "extreme_rows"]

_SCALE = 1e6
"""The one input of a Dirac row. A weight would have to be within 1e-12 of 0 for the row's gradient not to reach a clip of 1."""

_STEEP = 1000.0


def dirac_network(width: int) -> Architecture:
    """A linear model without bias: a row with one input gets a gradient on one coordinate, far above any usual clip."""
    return Architecture(
        inputs={"canary": TensorColumn(low=0.0, high=_SCALE, shape=(width,))},
        layers=(Linear(in_features=width, out_features=1, bias=False),),
        target="target",
        output=NumberColumn(low=-0.5, high=0.5),
        loss="mean_squared_error",
    )


def dirac_rows(width: int, coordinates: NDArray[np.intp]) -> dict[str, NDArray[np.float32]]:
    """For each of `coordinates` a row of `dirac_network` that has only that input."""
    rows = np.zeros((len(coordinates), width), dtype=np.float32)
    rows[np.arange(len(coordinates)), coordinates] = _SCALE
    return {"canary": rows, "target": np.zeros(len(coordinates), dtype=np.float32)}


def contribution(weights: NDArray[np.float64], *, clip: float) -> NDArray[np.float64]:
    """What one row on each coordinate of `dirac_network` adds there at these weights: a clip, with the weight's sign."""
    return np.copysign(clip, weights)


def deep_network() -> Architecture:
    """Two layers with biases, so that noise and clip have several tensors to go wrong between; steep, and never saturated."""
    return Architecture(
        inputs={"canary": TensorColumn(low=0.0, high=_STEEP, shape=(24,))},
        layers=(Linear(in_features=24, out_features=32), Linear(in_features=32, out_features=1)),
        target="target",
        output=NumberColumn(low=-0.5, high=0.5),
        loss="mean_squared_error",
    )


def extreme_rows(architecture: Architecture, count: int) -> dict[str, NDArray[Any]]:
    """The same row `count` times: everything it has at the end of its declared range."""
    columns: dict[str, InputColumn] = {**architecture.inputs, architecture.target: architecture.output}
    return {key: array for name, column in columns.items() for key, array in _extreme(name, column, count).items()}


def _extreme(name: str, column: InputColumn, count: int) -> dict[str, NDArray[Any]]:
    match column:
        case CategoryColumn():
            return {name: np.full(count, len(column.values) - 1, dtype=np.int32)}
        case TensorColumn():
            return {name: np.full((count, *column.shape), column.high, dtype=column.dtype)}
        case NumberColumn():
            return {name: np.full(count, column.high, dtype=np.float32)}
        case TextColumn():
            texts = np.full((count, column.max_length), ord("~"), dtype=np.uint8)
            return {name: texts, f"{name}.length": np.full(count, column.max_length, dtype=np.int32)}
        case AudioColumn():
            samples = np.full((count, column.max_samples), 2**15 - 1, dtype=np.int16)
            return {name: samples, f"{name}.length": np.full(count, column.max_samples, dtype=np.int32)}
        case _:
            assert_never(column)
