"""Rows on their way into a step: gathered by index, put within their declared bounds. Silent about what it had to mend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cloister.wire.architecture import Architecture
from cloister.wire.columns import CategoryColumn, InputColumn, NumberColumn, TensorColumn
from cloister_privacy.errors import RowsDoNotFit

__all__ = ["Batch", "Examples", "synthetic"]

Batch = tuple[dict[str, Tensor], Tensor]
"""The inputs of some rows by column, and their target."""

_NEAR_ZERO = 3.0


class Examples:
    """The columns that a network reads and predicts. Raises RowsDoNotFit where their shapes are not the spec's."""

    def __init__(self, architecture: Architecture, rows: Mapping[str, NDArray[Any]], *, device: str) -> None:
        self._target = architecture.target
        self._columns: dict[str, InputColumn] = {**architecture.inputs, architecture.target: architecture.output}
        self._device = device
        missing = [name for name in self._columns if name not in rows]
        if missing:
            raise RowsDoNotFit(f"the rows lack {', '.join(missing)}; train on the dataset that the spec was made for")
        self._rows = {name: rows[name] for name in self._columns}
        for name, column in self._columns.items():
            shape = tuple(column.shape) if isinstance(column, TensorColumn) else ()
            if self._rows[name].shape[1:] != shape or self._rows[name].ndim == 0:
                raise RowsDoNotFit(f"column {name!r} is not of shape {shape} per row, as the spec declares it")
        if len({len(array) for array in self._rows.values()}) != 1:
            raise RowsDoNotFit("the columns are not of one length; they come from different datasets")
        self.count = len(self._rows[self._target])
        """How many there are: private, so for the sampler only."""
        if self.count == 0:  # padding needs a row to read
            self._rows = {name: np.zeros((1, *array.shape[1:]), array.dtype) for name, array in self._rows.items()}

    def batch(self, indices: NDArray[np.intp]) -> Batch:
        """Inputs and target of some rows: not-a-number is 0, everything else is clamped to its column's bounds."""
        taken = {name: np.take(self._rows[name], indices, axis=0) for name in self._columns}
        return _batch(self._columns, self._target, taken, self._device)


def synthetic(architecture: Architecture, count: int, *, device: str) -> Batch:
    """Examples that no row had a part in: drawn from the declared bounds, near zero where those are wide."""
    random = np.random.default_rng()

    def drawn(column: InputColumn) -> NDArray[Any]:
        if isinstance(column, CategoryColumn):
            return random.integers(0, len(column.values), count)
        low, high = max(column.low, -_NEAR_ZERO), min(column.high, _NEAR_ZERO)
        if not low < high:
            low, high = column.low, column.high
        shape = tuple(column.shape) if isinstance(column, TensorColumn) else ()
        return low + (high - low) * random.random((count, *shape))

    columns = {**architecture.inputs, architecture.target: architecture.output}
    return _batch(columns, architecture.target, {name: drawn(column) for name, column in columns.items()}, device)


def _batch(columns: Mapping[str, InputColumn], target: str, rows: Mapping[str, NDArray[Any]], device: str) -> Batch:
    tensors = {name: _within(torch.from_numpy(rows[name]).to(device), column) for name, column in columns.items()}
    return tensors, tensors.pop(target)


def _within(values: Tensor, column: InputColumn) -> Tensor:
    match column:
        case CategoryColumn():
            return values.to(torch.int64).clamp_(0, len(column.values) - 1)
        case NumberColumn() | TensorColumn():
            return values.to(torch.float32).nan_to_num_(nan=0.0).clamp_(column.low, column.high)
        case _:
            assert_never(column)
