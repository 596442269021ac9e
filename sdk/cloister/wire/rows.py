"""Rows as bytes: one part of a dataset on the wire, and the padded form that is sealed. Trusts nothing that it decodes.

A body is safetensors: per column one tensor of the schema's dtype and shape, `n` rows each. Whoever decodes checks every
value against the declared bounds, so that what lies in a dataset is what its schema says.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError
from safetensors import numpy as st

from cloister.wire.columns import (
    UNIT_ID_BYTES,
    AudioColumn,
    CategoryColumn,
    Column,
    NumberColumn,
    TensorColumn,
    TextColumn,
    UnitColumn,
)

__all__ = [
    "Rows",
    "RowsRefused",
    "arrays_of",
    "check_rows",
    "decode_rows",
    "encode_rows",
    "open_form",
    "part_rows",
    "pcm16",
    "row_bytes",
    "seal_form",
]

Rows = dict[str, NDArray[Any]]
"""Column name -> array whose first dimension is the row; `NAME.length` beside texts, recordings and user ids."""

_FORMAT = "cloister.rows/1"
_PART_BYTES = 4 * 2**20
_MOST_ROWS = 65_536
_COUNT = ".rows"


class RowsRefused(Exception):
    """Rows that their schema does not allow. For the uploader's eyes only: it speaks of rows."""

    def __init__(self, column: str | None, row: int | None, problem: str) -> None:
        where = " ".join(
            part for part in (f"column {column!r}" if column else "", f"row {row}" if row is not None else "") if part
        )
        super().__init__(f"{where}: {problem}" if where else problem)
        self.column, self.row, self.problem = column, row, problem


def arrays_of(columns: Mapping[str, Column]) -> list[tuple[str, str, tuple[int, ...]]]:
    """The arrays that carry these columns: name, dtype and shape per row."""
    return [array for name, column in columns.items() for array in _tensors(name, column)]


def pcm16(samples: NDArray[Any]) -> NDArray[np.int16]:
    """Samples from -1 to 1 as 16-bit ones."""
    scaled: NDArray[np.int16] = np.clip(np.rint(samples * 2**15), -(2**15), 2**15 - 1).astype(np.int16)
    return scaled


def row_bytes(columns: Mapping[str, Column]) -> int:
    """The bytes of one row: from the schema alone."""
    return sum(
        math.prod(shape) * np.dtype(dtype).itemsize
        for _, dtype, shape in (t for c in columns.items() for t in _tensors(*c))
    )


def part_rows(columns: Mapping[str, Column]) -> int:
    """How many rows a part may carry: about 4 MiB of them, from the schema alone."""
    return max(1, min(_MOST_ROWS, _PART_BYTES // row_bytes(columns)))


def encode_rows(columns: Mapping[str, Column], rows: Mapping[str, NDArray[Any]]) -> bytes:
    """One part's body. `rows` are in the schema's dtypes and shapes, as `decode_rows` gives them back."""
    ordered = {name: np.ascontiguousarray(rows[name]) for name, _, _ in arrays_of(columns)}
    return st.save(ordered, metadata={"format": _FORMAT})


def decode_rows(columns: Mapping[str, Column], body: bytes | memoryview) -> Rows:
    """The rows of a part, every value checked. Raises RowsRefused, naming column and row."""
    rows = _load(columns, bytes(body))
    count = len(next(iter(rows.values())))
    if not 1 <= count <= part_rows(columns):
        raise RowsRefused(None, None, f"a part carries 1 to {part_rows(columns)} rows of this schema, not {count}")
    check_rows(columns, rows)
    return rows


def check_rows(columns: Mapping[str, Column], rows: Rows) -> None:
    """Check every value against its column. `rows` are in the schema's dtypes and shapes. Raises RowsRefused."""
    for name, column in columns.items():
        _check(name, column, rows)


def seal_form(columns: Mapping[str, Column], rows: Mapping[str, NDArray[Any]], slots: int) -> bytes:
    """The rows padded to `slots`, their count inside: the same length for any count, none included."""
    count = len(next(iter(rows.values()))) if rows else 0
    padded: Rows = {_COUNT: np.array([count], dtype=np.int64)}
    for name, dtype, shape in arrays_of(columns):
        padded[name] = np.zeros((slots, *shape), dtype=dtype)
        if count:
            padded[name][:count] = rows[name]
    return st.save(padded, metadata={"format": _FORMAT})


def open_form(columns: Mapping[str, Column], body: bytes | memoryview) -> Rows:
    """The rows that `seal_form` padded."""
    padded = st.load(bytes(body))
    count = int(padded[_COUNT][0])
    return {name: padded[name][:count] for name, _, _ in arrays_of(columns)}


def _tensors(name: str, column: Column) -> Iterator[tuple[str, str, tuple[int, ...]]]:
    """The tensors that carry a column: name, dtype and shape per row."""
    match column:
        case TensorColumn():
            yield name, column.dtype, tuple(column.shape)
        case NumberColumn():
            yield name, "float32", ()
        case CategoryColumn():
            yield name, "int32", ()
        case TextColumn():
            yield name, "uint8", (column.max_length,)
            yield f"{name}.length", "int32", ()
        case AudioColumn():
            yield name, "int16", (column.max_samples,)
            yield f"{name}.length", "int32", ()
        case UnitColumn():
            yield name, "uint8", (UNIT_ID_BYTES,)
            yield f"{name}.length", "int32", ()


def _load(columns: Mapping[str, Column], body: bytes) -> Rows:
    try:
        header_bytes = int.from_bytes(body[:8], "little")
        metadata = json.loads(body[8 : 8 + header_bytes]).get("__metadata__", {}) if header_bytes < 2**20 else {}
        found = st.load(body)
    except (SafetensorError, ValueError, AttributeError, KeyError, TypeError, RecursionError):
        raise RowsRefused(
            None, None, "the body is not a part of rows (safetensors, cloister.rows/1); send it again"
        ) from None
    if metadata.get("format") != _FORMAT:
        raise RowsRefused(None, None, f"the body's format is not {_FORMAT}; upgrade the SDK")
    expected = arrays_of(columns)
    if found.keys() != {name for name, _, _ in expected}:
        raise RowsRefused(None, None, "the body's columns are not those of the schema; send all of them and no others")
    counts = {len(array) if array.ndim else -1 for array in found.values()}
    if len(counts) != 1 or -1 in counts:
        raise RowsRefused(None, None, "the columns have different numbers of rows; send as many of each")
    for name, dtype, shape in expected:
        if found[name].dtype != np.dtype(dtype) or found[name].shape[1:] != shape:
            raise RowsRefused(
                name,
                None,
                f"is {found[name].dtype} of shape {found[name].shape[1:]} per row; the schema says {dtype} of {shape}",
            )
    return {name: found[name] for name, _, _ in expected}


def _check(name: str, column: Column, rows: Rows) -> None:
    match column:
        case TensorColumn() | NumberColumn():
            _refuse_first(name, ~np.isfinite(rows[name]), "holds a value that is not finite (NaN or infinity)")
            outside = (rows[name] < np.float32(column.low)) | (rows[name] > np.float32(column.high))
            _refuse_first(name, outside, f"holds a value outside the declared bounds [{column.low:g}, {column.high:g}]")
        case CategoryColumn():
            outside = (rows[name] < 0) | (rows[name] >= len(column.values))
            _refuse_first(name, outside, f"holds an index outside the {len(column.values)} declared categories")
        case TextColumn():
            _check_lengths(name, rows, 0, column.max_length, "bytes")
        case AudioColumn():
            _check_lengths(name, rows, 0, column.max_samples, "samples")
        case UnitColumn():
            _check_lengths(name, rows, 1, UNIT_ID_BYTES, "bytes")


def _check_lengths(name: str, rows: Rows, least: int, most: int, of: str) -> None:
    lengths = rows[f"{name}.length"]
    _refuse_first(name, (lengths < least) | (lengths > most), f"must be {least} to {most} {of} long")
    beyond = np.arange(most) >= lengths[:, None]
    _refuse_first(name, beyond & (rows[name] != 0), f"holds {of} past its own length")


def _refuse_first(name: str, wrong: NDArray[np.bool_], problem: str) -> None:
    rows = wrong.reshape(len(wrong), -1).any(axis=1)
    if rows.any():
        raise RowsRefused(name, int(rows.argmax()), problem)
