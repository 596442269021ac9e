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

__all__ = ["Examples"]


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

    @property
    def count(self) -> int:
        """How many there are: private, so for the sampler only."""
        return len(self._rows[self._target])

    def batch(self, indices: NDArray[np.intp]) -> tuple[dict[str, Tensor], Tensor]:
        """Inputs and target of some rows: not-a-number is 0, everything else is clamped to its column's bounds."""
        columns = {
            name: _within(torch.from_numpy(np.take(self._rows[name], indices, axis=0)).to(self._device), column)
            for name, column in self._columns.items()
        }
        return columns, columns.pop(self._target)


def _within(values: Tensor, column: InputColumn) -> Tensor:
    match column:
        case CategoryColumn():
            return values.to(torch.int64).clamp_(0, len(column.values) - 1)
        case NumberColumn() | TensorColumn():
            return values.to(torch.float32).nan_to_num_(nan=0.0).clamp_(column.low, column.high)
        case _:
            assert_never(column)
