"""From arrays, memory-mapped files and CSV to parts: windows of rows in the schema's own types, a part at a time in memory."""

from __future__ import annotations

import csv
import gzip
import itertools
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Union

import numpy as np
from numpy.typing import NDArray

from cloister._errors import RowsNotFit
from cloister.wire.columns import (
    UNIT_ID_BYTES,
    BytesColumn,
    CategoryColumn,
    Column,
    NumberColumn,
    TensorColumn,
    UnitColumn,
)
from cloister.wire.rows import Rows, part_rows

__all__ = ["RowData", "known_length", "windows"]

RowData = Union[Mapping[str, Any], str, Path]  # noqa: UP007 (an alias that exists at run time)
"""Column name -> array or path of a `.npy` file; or the path of a `.csv` or `.csv.gz` with a header line."""


def windows(columns: Mapping[str, Column], data: RowData) -> Iterator[Rows]:
    """The rows, `part_rows` at a time, as `encode_rows` wants them. Raises RowsNotFit, naming the column and the row."""
    size = part_rows(columns)
    if isinstance(data, Mapping):
        arrays = _arrays(columns, data)
        for start in range(0, known_length(columns, data) or 0, size):
            yield _window(columns, {name: array[start : start + size] for name, array in arrays.items()}, start)
        return
    start = 0
    for table in _csv_tables(columns, Path(data), size):
        yield _window(columns, table, start)
        start += size


def known_length(columns: Mapping[str, Column], data: RowData) -> int | None:
    """The number of rows where it is known without reading them all; all columns must agree."""
    if not isinstance(data, Mapping):
        return None
    lengths = {name: len(array) for name, array in _arrays(columns, data).items()}
    if len(set(lengths.values())) != 1:
        raise RowsNotFit(f"the columns have different lengths: {lengths}; every row needs all of them")
    return next(iter(lengths.values()))


def _arrays(columns: Mapping[str, Column], data: Mapping[str, Any]) -> dict[str, Any]:
    _check_names(columns, list(data))
    return {name: _open(name, data[name]) for name in columns}


def _check_names(columns: Mapping[str, Column], names: list[str]) -> None:
    missing, unknown = [name for name in columns if name not in names], [name for name in names if name not in columns]
    if missing or unknown or len(set(names)) != len(names):
        raise RowsNotFit(
            "the data must hold each declared column once, and no other; "
            f"declared: {', '.join(columns)}; missing: {', '.join(missing) or 'none'}; "
            f"not declared: {', '.join(map(str, unknown)) or 'none'}"
        )


def _open(name: str, given: Any) -> Any:
    if isinstance(given, str | Path):
        if Path(given).suffix != ".npy":
            raise RowsNotFit(f"column {name!r}: {given} is not a .npy file; give an array or a .npy file per column")
        try:
            return np.load(given, mmap_mode="r", allow_pickle=False)
        except ValueError as error:
            raise RowsNotFit(f"column {name!r}: {given} cannot be read as plain numbers: {error}") from None
    return given if hasattr(given, "__len__") and hasattr(given, "__getitem__") else list(given)


def _csv_tables(columns: Mapping[str, Column], path: Path, size: int) -> Iterator[dict[str, list[str]]]:
    """Up to `size` rows at a time, as text. Blank lines are no rows."""
    tensors = [name for name, column in columns.items() if isinstance(column, TensorColumn)]
    if tensors:
        raise RowsNotFit(f"a CSV carries numbers, categories and text; give arrays for {', '.join(tensors)}")
    try:
        with _text(path) as stream:
            lines = csv.reader(stream, strict=True)
            header = [name.strip() for name in next(lines, [])]
            _check_names(columns, header)
            rows = enumerate(line for line in lines if line)
            while window := list(itertools.islice(rows, size)):
                for row, line in window:
                    if len(line) != len(header):
                        raise RowsNotFit(
                            f"{path.name} row {row}: {len(line)} values, and the header names {len(header)}"
                        )
                yield dict(zip(header, map(list, zip(*(line for _, line in window), strict=True)), strict=True))
    except (csv.Error, UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RowsNotFit(f"{path.name} cannot be read as a CSV in UTF-8: {error}") from None


def _text(path: Path) -> IO[str]:
    """A file's text, unpacked where it is .gz; a byte order mark is no part of it."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", newline="", encoding="utf-8-sig")
    return path.open(newline="", encoding="utf-8-sig")


def _window(columns: Mapping[str, Column], table: Mapping[str, Any], start: int) -> Rows:
    rows: Rows = {}
    for name, column in columns.items():
        rows |= _convert(name, column, table[name], start)
    return rows


def _convert(name: str, column: Column, values: Any, start: int) -> Rows:
    match column:
        case TensorColumn():
            array = _array(name, values, start, shape=tuple(column.shape))
            return {name: _cast(name, array, column.dtype, start)}
        case NumberColumn():
            return {name: _cast(name, _array(name, values, start, shape=()), "float32", start)}
        case CategoryColumn():
            return {name: _indices(name, column, _array(name, values, start, shape=()), start)}
        case BytesColumn():
            return _byte_strings(
                name, [_bytes(name, v, start + row) for row, v in enumerate(values)], column.max_length, start
            )
        case UnitColumn():
            return _byte_strings(
                name, [_user_id(name, v, start + row) for row, v in enumerate(values)], UNIT_ID_BYTES, start
            )


def _array(name: str, values: Any, start: int, *, shape: tuple[int, ...]) -> NDArray[Any]:
    try:
        array = np.asarray(values)
    except ValueError:
        raise RowsNotFit(
            f"column {name!r}, from row {start}: the rows have different shapes; all must be {shape}"
        ) from None
    if array.shape[1:] != shape:
        raise RowsNotFit(f"column {name!r} has rows of shape {array.shape[1:]}; the schema says {shape}")
    return array


def _cast(name: str, array: NDArray[Any], dtype: str, start: int) -> NDArray[Any]:
    """Numbers, or text that spells them, in the schema's type; what a float32 cannot hold becomes infinite, and is refused."""
    if array.dtype.kind not in "biufUSO":
        raise RowsNotFit(f"column {name!r} holds {array.dtype}, and numbers are declared; convert it first")
    try:
        with np.errstate(over="ignore", invalid="ignore"):
            cast = array.astype(dtype) if array.dtype.kind in "biuf" else array.astype(np.float64).astype(dtype)
    except (ValueError, TypeError):
        row = next(row for row, value in enumerate(array) if not _is_numeric(value))
        raise RowsNotFit(
            f"column {name!r} row {start + row}: {array[row : row + 1].tolist()[0]!r} is not a number"
        ) from None
    if dtype == "uint8" and not np.array_equal(cast, array.astype(np.float64)):
        raise RowsNotFit(f"column {name!r} is declared uint8 and holds other numbers; declare it float32, or round it")
    return cast


def _is_numeric(value: Any) -> bool:
    try:
        np.asarray(value).astype(np.float64)
    except (ValueError, TypeError):
        return False
    return True


def _indices(name: str, column: CategoryColumn, values: NDArray[Any], start: int) -> NDArray[Any]:
    """Integers are indices; everything else is looked up among the declared values."""
    if values.dtype.kind in "iu":
        if any(value.isdecimal() and int(value) != index for index, value in enumerate(column.values)):
            raise RowsNotFit(
                f"column {name!r} holds integers, and its declared values are integers in another order: is 1 the value '1' or "
                "the second value? Give the values as text"
            )
        wrong = (values < 0) | (values >= len(column.values))
        indices = np.where(wrong, 0, values).astype(np.int32)
    else:
        position = {value: index for index, value in enumerate(column.values)}
        indices = np.array([position.get(_spelled(value), -1) for value in values.tolist()], dtype=np.int32)
        wrong = indices < 0
    if wrong.any():
        row = int(wrong.argmax())
        told = values[row : row + 1].tolist()[0]
        raise RowsNotFit(f"column {name!r} row {start + row}: {told!r} is not one of the declared categories")
    return indices


def _spelled(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def _bytes(name: str, value: Any, row: int) -> bytes:
    if isinstance(value, str):
        return value.encode()
    if isinstance(value, bytes | bytearray | memoryview):
        return bytes(value)
    raise RowsNotFit(f"column {name!r} row {row}: a {type(value).__name__} is neither text nor bytes; convert it first")


def _user_id(name: str, value: Any, row: int) -> bytes:
    """Whole numbers are ids too, by their decimal digits: as a CSV would spell them."""
    encoded = _bytes(name, str(value) if isinstance(value, int | np.integer) else value, row)
    if not encoded:
        raise RowsNotFit(f"column {name!r} row {row}: no user id; every row must say whose it is")
    return encoded


def _byte_strings(name: str, strings: list[bytes], width: int, start: int) -> Rows:
    array = np.zeros((len(strings), width), dtype=np.uint8)
    for row, string in enumerate(strings):
        if len(string) > width:
            raise RowsNotFit(
                f"column {name!r} row {start + row}: {len(string)} bytes, and at most {width} are declared"
            )
        array[row, : len(string)] = np.frombuffer(string, dtype=np.uint8)
    return {name: array, f"{name}.length": np.array([len(string) for string in strings], dtype=np.int32)}
