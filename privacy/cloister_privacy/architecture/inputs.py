"""What a network lets in to predict: one array per column, of the declared kind. Refuses by column; never clamps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn, InputColumn, NumberColumn, TensorColumn
from cloister_privacy.errors import InputRefused

__all__ = ["validate_inputs"]


def validate_inputs(
    architecture: Architecture, columns: Mapping[str, NDArray[Any]]
) -> dict[str, NDArray[np.float32] | NDArray[np.int64]]:
    """The inputs as float32, or int64 for categories, or InputRefused with the column and the problem.

    Every column of `architecture.inputs` must be there with the same number of rows, at least one. Values outside a column's
    bounds are let in: bounds are a promise about the training data.
    """
    for name in columns:
        if name not in architecture.inputs:
            raise InputRefused(name, f"is not read by this model; it reads {', '.join(architecture.inputs)}")
    valid: dict[str, NDArray[np.float32] | NDArray[np.int64]] = {}
    rows = None
    for name, column in architecture.inputs.items():
        if name not in columns:
            raise InputRefused(name, "is missing; the model reads it")
        valid[name] = _validate(name, np.asarray(columns[name]), column)
        rows = len(valid[name]) if rows is None else rows
        if len(valid[name]) != rows:
            raise InputRefused(name, f"has {len(valid[name])} rows where other inputs have {rows}")
    return valid


def _validate(name: str, array: NDArray[Any], column: InputColumn) -> NDArray[np.float32] | NDArray[np.int64]:
    shape: tuple[int, ...] = ()
    allowed: tuple[str, ...]
    match column:
        case TensorColumn():
            shape, allowed = tuple(column.shape), ("float32", "uint8") if column.dtype == "uint8" else ("float32",)
        case NumberColumn():
            allowed = ("float32",)
        case CategoryColumn():
            allowed = ("int64", "int32", "uint8")
        case _:
            assert_never(column)
    if array.dtype.name not in allowed:
        raise InputRefused(name, f"is {array.dtype.name}; send {' or '.join(allowed)}")
    if array.ndim == 0 or array.shape[1:] != shape:
        expected = ", ".join(["rows", *map(str, shape)])
        raise InputRefused(name, f"has shape {array.shape} where [{expected}] is expected")
    if len(array) == 0:
        raise InputRefused(name, "has no rows; send at least one")
    if isinstance(column, CategoryColumn):
        indices = array.astype(np.int64)
        if indices.min() < 0 or indices.max() >= len(column.values):
            raise InputRefused(name, f"has an index outside 0..{len(column.values) - 1}")
        return indices
    numbers = array.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise InputRefused(name, "has a value that is not finite")
    return numbers
