"""Rows on their way into a step: gathered by index, put within their declared bounds. Silent about what it had to mend."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_never

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cloister.wire.architecture import Architecture
from cloister.wire.columns import AudioColumn, CategoryColumn, InputColumn, NumberColumn, TensorColumn, TextColumn
from cloister.wire.rows import arrays_of
from cloister_privacy.architecture.network import Network
from cloister_privacy.architecture.values import values_of
from cloister_privacy.errors import RowsDoNotFit

__all__ = ["Batch", "Examples", "keeps_stem", "synthetic", "values_within"]

Batch = tuple[dict[str, Tensor], Tensor]
"""What a network reads of some rows, by name, and their target."""

_NEAR_ZERO = 3.0

_STEM_BYTES = 2**32
"""The most memory that what the stem gives of all rows may take; where it would be more, each step computes it anew."""


class Examples:
    """The columns that a network reads and predicts. Raises RowsDoNotFit where their shapes are not the spec's.

    What the network's stem makes of them is computed once, here, for `slots` rows however many there are, if it bears keeping.
    """

    def __init__(self, network: Network, rows: Mapping[str, NDArray[Any]], *, slots: int, device: str) -> None:
        architecture = network.architecture
        self._target, self._device, self._stem = architecture.target, device, None
        self._columns: dict[str, InputColumn] = {**architecture.inputs, architecture.target: architecture.output}
        arrays = arrays_of(self._columns)
        missing = [name for name, _, _ in arrays if name not in rows]
        if missing:
            raise RowsDoNotFit(f"the rows lack {', '.join(missing)}; train on the dataset that the spec was made for")
        self._rows = {name: rows[name] for name, _, _ in arrays}
        for name, _, shape in arrays:
            if self._rows[name].shape[1:] != shape or self._rows[name].ndim == 0:
                raise RowsDoNotFit(f"column {name!r} is not of shape {shape} per row, as the spec declares it")
        if len({len(array) for array in self._rows.values()}) != 1:
            raise RowsDoNotFit("the columns are not of one length; they come from different datasets")
        self.count = len(self._rows[self._target])
        """How many there are: private, so for the sampler only."""
        if self.count == 0:  # padding needs a row to read
            self._rows = {name: np.zeros((1, *array.shape[1:]), array.dtype) for name, array in self._rows.items()}
        if keeps_stem(network, slots=slots):
            if self.count > slots:
                raise RowsDoNotFit("there are more rows than slots; train on the dataset that the plan was made for")
            self._stem = self._through_stem(network, slots)

    def batch(self, indices: NDArray[np.intp]) -> Batch:
        """Inputs and target of some rows: not-a-number is 0, everything else is clamped to its column's bounds."""
        if self._stem is None:
            return _batch(self._columns, self._target, self._taken(indices), self._device)
        places = torch.from_numpy(indices).to(self._device)
        values = {name: each[places] for name, each in self._stem.items()}
        return values, values.pop(self._target)

    def _taken(self, indices: NDArray[np.intp]) -> dict[str, NDArray[Any]]:
        return {name: np.take(array, indices, axis=0) for name, array in self._rows.items()}

    def _through_stem(self, network: Network, slots: int) -> dict[str, Tensor]:
        """What the layers after the stem read of every row, and the target. Past the rows the first is run again, for nothing."""
        kept: dict[str, Tensor] = {}
        for start in range(0, slots, network.rows_at_once):
            indices = np.arange(start, min(start + network.rows_at_once, slots))
            values, target = _batch(
                self._columns, self._target, self._taken(indices * (indices < self.count)), self._device
            )
            for name, each in {**network.stem(values), self._target: target}.items():
                if not start:
                    kept[name] = torch.empty((slots, *each.shape[1:]), dtype=each.dtype, device=self._device)
                kept[name][start : start + len(each)] = each
        return kept


def keeps_stem(network: Network, *, slots: int) -> bool:
    """Whether a run over so many rows computes what the stem makes of them once: the network has one, and it bears keeping."""
    return 0 < network.stem_numbers * 4 * slots <= _STEM_BYTES


def synthetic(architecture: Architecture, count: int, *, device: str) -> Batch:
    """Examples that no row had a part in: drawn from the declared bounds, near zero where those are wide."""
    random = np.random.default_rng()

    def drawn(name: str, column: InputColumn) -> dict[str, NDArray[Any]]:
        match column:
            case CategoryColumn():
                return {name: random.integers(0, len(column.values), count)}
            case TextColumn():
                texts = random.integers(32, 127, (count, column.max_length), dtype=np.uint8)
                return {name: texts, f"{name}.length": random.integers(1, column.max_length + 1, count)}
            case AudioColumn():
                samples = random.integers(-(2**12), 2**12, (count, column.max_samples), dtype=np.int16)
                return {name: samples, f"{name}.length": random.integers(1, column.max_samples + 1, count)}
            case NumberColumn() | TensorColumn():
                low, high = max(column.low, -_NEAR_ZERO), min(column.high, _NEAR_ZERO)
                if not low < high:
                    low, high = column.low, column.high
                shape = tuple(column.shape) if isinstance(column, TensorColumn) else ()
                return {name: low + (high - low) * random.random((count, *shape))}
            case _:
                assert_never(column)

    columns: dict[str, InputColumn] = {**architecture.inputs, architecture.target: architecture.output}
    rows = {key: array for name, column in columns.items() for key, array in drawn(name, column).items()}
    return _batch(columns, architecture.target, rows, device)


def values_within(
    columns: Mapping[str, InputColumn], rows: Mapping[str, NDArray[Any]], *, device: str
) -> dict[str, Tensor]:
    """As `values_of`, with not-a-number as 0 and everything else clamped to its column's bounds."""
    return {name: _within(each, columns[name]) for name, each in values_of(columns, rows, device=device).items()}


def _batch(columns: Mapping[str, InputColumn], target: str, rows: Mapping[str, NDArray[Any]], device: str) -> Batch:
    values = values_within(columns, rows, device=device)
    goal = values.pop(target)
    return values, goal.squeeze(1) if goal.ndim == 2 else goal


def _within(values: Tensor, column: InputColumn) -> Tensor:
    match column:
        case CategoryColumn():
            return values.clamp(0, len(column.values) - 1)
        case NumberColumn() | TensorColumn():
            return values.nan_to_num(nan=0.0).clamp_(column.low, column.high)
        case TextColumn() | AudioColumn():
            return values
        case _:
            assert_never(column)
