"""Rows as the tensors that a network reads. Knows columns and torch; checks nothing, and moves nothing into its bounds."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_never

import torch
from numpy.typing import NDArray
from torch import Tensor

from cloister.wire.columns import AudioColumn, CategoryColumn, InputColumn, NumberColumn, TensorColumn, TextColumn

__all__ = ["values_of"]


def values_of(
    columns: Mapping[str, InputColumn], rows: Mapping[str, NDArray[Any]], *, device: str | torch.device
) -> dict[str, Tensor]:
    """Each column's tensor, the examples first, of rows as `cloister.wire.rows` has them.

    A tensor: float32 of its shape. A number: float32 [n, 1]. A category: int64 [n]. A text: int64 [n, max_length], 1 more than
    each byte, 0 past its end. A recording: float32 [n, max_samples] from -1 to 1, 0 past its end.
    """
    return {name: _value(column, name, rows, device) for name, column in columns.items()}


def _value(column: InputColumn, name: str, rows: Mapping[str, NDArray[Any]], device: str | torch.device) -> Tensor:
    values = torch.from_numpy(rows[name]).to(device)
    match column:
        case TensorColumn():
            return values.to(torch.float32)
        case NumberColumn():
            return values.to(torch.float32).unsqueeze(1)
        case CategoryColumn():
            return values.to(torch.int64)
        case TextColumn() | AudioColumn():
            length = torch.from_numpy(rows[f"{name}.length"]).to(device).unsqueeze(1)
            is_there = torch.arange(values.shape[1], device=device) < length
            if isinstance(column, TextColumn):
                return torch.where(is_there, values.to(torch.int64) + 1, 0)
            return torch.where(is_there, values.to(torch.float32) / 2**15, 0)
        case _:
            assert_never(column)
