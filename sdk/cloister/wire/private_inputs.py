"""What a client shares of its rows, and what it makes of the answer: the only places where either is in the clear. Knows numpy."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister.wire._errors import InvalidArgument
from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn, InputColumn, NumberColumn, TensorColumn, TextColumn
from cloister.wire.layers import Encode

__all__ = ["PrivateLayer", "prediction_of", "private_inputs"]

Numbers = NDArray[np.float64]


class PrivateLayer(InvalidArgument):
    """A layer or a column that a client cannot prepare for private inference."""


def private_inputs(architecture: Architecture, rows: Mapping[str, NDArray[Any]]) -> dict[str, Numbers]:
    """The numbers to share, the examples first, of rows as `cloister.wire.rows` has them.

    A tensor as it is; a number [n, 1]; a category one-hot [n, k]; a text one-hot [n, max_length, 257], of each byte plus 1 and 0 past
    its end. What `encode` joins comes joined, under the layer's name or `#` and its position, for its arithmetic is public.
    Raises PrivateLayer.
    """
    found: dict[str, Numbers] = {}
    for position, layer in enumerate(architecture.layers):
        default = tuple(architecture.inputs) if isinstance(layer, Encode) or position == 0 else ()
        reads = [name for name in (layer.reads or default) if name in architecture.inputs]
        if isinstance(layer, Encode):
            parts = [_encoded(layer, architecture.inputs[name], name, rows) for name in reads]
            found[layer.name or f"#{position}"] = np.concatenate(parts, axis=1) / (
                len(parts) ** 0.5 if layer.normalized else 1.0
            )
        else:
            found |= {name: _raw(architecture.inputs[name], name, rows) for name in reads}
    return found


def prediction_of(architecture: Architecture, outputs: Numbers) -> dict[str, NDArray[Any]]:
    """Of the network's outputs [n, k], as in the clear: `probabilities` and `index` of a category, or `value` of a number."""
    output = architecture.output
    if isinstance(output, NumberColumn):
        middle, span = output.low / 2 + output.high / 2, output.high - output.low
        return {"value": (middle + span * outputs[:, 0]).astype(np.float32)}
    if architecture.loss == "binary_cross_entropy":
        outputs = np.concatenate([np.zeros_like(outputs), outputs], axis=1)
    powers = np.exp(outputs - outputs.max(axis=1, keepdims=True))
    probabilities = (powers / powers.sum(axis=1, keepdims=True)).astype(np.float32)
    return {"probabilities": probabilities, "index": probabilities.argmax(axis=1).astype(np.int64)}


def _raw(column: InputColumn, name: str, rows: Mapping[str, NDArray[Any]]) -> Numbers:
    values = rows[name]
    match column:
        case TensorColumn():
            return values.astype(np.float64)
        case NumberColumn():
            return values.astype(np.float64)[:, None]
        case CategoryColumn():
            return _one_hot(values, len(column.values))
        case TextColumn():
            is_there = np.arange(values.shape[1]) < rows[f"{name}.length"][:, None]
            return _one_hot(np.where(is_there, values.astype(np.int64) + 1, 0), 257)
        case _:
            raise PrivateLayer(
                f"{name!r} is {column.type}, which private inference does not read; compute its features and declare a tensor"
            )


def _one_hot(indices: NDArray[Any], count: int) -> Numbers:
    found: Numbers = np.eye(count)[indices]
    return found


def _encoded(layer: Encode, column: InputColumn, name: str, rows: Mapping[str, NDArray[Any]]) -> Numbers:
    values = _raw(column, name, rows).reshape(len(rows[name]), -1)
    if isinstance(column, NumberColumn) and layer.bins:
        raise PrivateLayer(
            "encode with bins is not shared yet; make the network without bins, or with a tensor of features"
        )
    if isinstance(column, NumberColumn | TensorColumn):
        values = (values - (column.low / 2 + column.high / 2)) / (column.high / 2 - column.low / 2)
    if layer.normalized:
        values = values / np.maximum(np.linalg.norm(values, axis=1, keepdims=True), 1e-12)
    return values
