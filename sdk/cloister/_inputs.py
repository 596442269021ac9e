"""The caller's rows as a model's inputs: what a model reads, and how rows that it cannot read are told. Sends nothing."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister._convert import category_indices, recordings, text
from cloister._errors import RowsNotFit
from cloister.wire.columns import AudioColumn, CategoryColumn, InputColumn, TensorColumn, TextColumn

__all__ = ["model_inputs"]


def model_inputs(declared: Mapping[str, InputColumn], x: Any) -> dict[str, NDArray[Any]]:
    """The caller's array or arrays as the model reads them: float32, int64 indices, texts or int16 samples. Raises RowsNotFit."""
    if not isinstance(x, Mapping):
        if len(declared) != 1:
            raise RowsNotFit(f"this model reads {', '.join(declared)}; give a dict with an array for each")
        x = {next(iter(declared)): x}
    if x.keys() != declared.keys():
        raise RowsNotFit(f"this model reads {', '.join(declared)}, and was given {', '.join(map(str, x)) or 'nothing'}")
    inputs = {name: _input(name, column, x[name]) for name, column in declared.items()}
    if len({len(array) for array in inputs.values()}) != 1:
        raise RowsNotFit("the inputs have different numbers of rows; give as many of each")
    return inputs


def _input(name: str, column: InputColumn, values: Any) -> NDArray[Any]:
    """One input in the model's own type, read as an upload reads it. Nothing is rounded on the way."""
    if isinstance(column, TextColumn):
        _require_rows(name, values)
        return np.array([text(name, column, value, row) for row, value in enumerate(values)], dtype=object)
    if isinstance(column, AudioColumn):
        _require_rows(name, values)
        rows = recordings(name, column, values)
        return rows[name][:, : max(1, int(rows[f"{name}.length"].max(initial=0)))]
    row_shape = tuple(column.shape) if isinstance(column, TensorColumn) else ()
    try:
        given = np.asarray(values)
    except ValueError:
        raise RowsNotFit(f"input {name!r} has rows of different shapes; all must be {row_shape}") from None
    if given.shape == row_shape:
        one = "a single value" if not row_shape else f"one row of shape {row_shape}"
        raise RowsNotFit(
            f"input {name!r} is {one}, without a row axis; add one: {'[x]' if not row_shape else 'x[None]'}"
        )
    if not given.ndim or given.shape[1:] != row_shape:
        wanted = ", ".join(["rows", *map(str, row_shape)])
        raise RowsNotFit(f"input {name!r} has shape {given.shape}; the model reads [{wanted}]")
    if isinstance(column, CategoryColumn):
        return category_indices(name, column, given).astype(np.int64)
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            array = given.astype(np.float32)
    except (ValueError, TypeError):
        raise RowsNotFit(f"input {name!r} holds what is not a number; remove those rows") from None
    if (
        isinstance(column, TensorColumn)
        and column.dtype == "uint8"
        and not np.array_equal(array, array.astype(np.uint8))
    ):
        raise RowsNotFit(
            f"input {name!r} is declared uint8, as whole numbers from 0 to 255, and holds others; do not scale it"
        )
    if not np.isfinite(array).all():
        raise RowsNotFit(f"input {name!r} holds values that are no finite float32; remove those rows")
    return array


def _require_rows(name: str, values: Any) -> None:
    if isinstance(values, str | bytes) or not hasattr(values, "__len__"):
        raise RowsNotFit(f"input {name!r} is a single value, without a row axis; add one: [x]")
