"""From arrays, memory-mapped files and CSV to parts: windows of rows in the schema's own types, a part at a time in memory."""

from __future__ import annotations

import csv
import gzip
import itertools
import os
import zlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any, Union

import numpy as np

from cloister._convert import convert
from cloister._errors import InvalidArgument, RowsNotFit
from cloister.wire.columns import AudioColumn, CategoryColumn, Column, TensorColumn, TextColumn
from cloister.wire.rows import Rows, RowsRefused, check_rows, part_rows

__all__ = ["RowData", "checked", "windows"]

RowData = Union[Mapping[str, Any], str, "os.PathLike[str]"]
"""Column name -> array or path of a `.npy` file; or the path of a `.csv` or `.csv.gz` with a header line."""

_DELIMITERS = {";": "semicolons", "\t": "tabs", "|": "bars"}


def windows(columns: Mapping[str, Column], data: RowData, *, ignore_undeclared: bool = False) -> Iterator[Rows]:
    """The rows, `part_rows` at a time, as `encode_rows` wants them. Raises RowsNotFit, naming the column and the row."""
    size = part_rows(columns)
    start = 0
    if isinstance(data, Mapping):
        arrays = _arrays(columns, data, ignore_undeclared=ignore_undeclared)
        for start in range(0, _length(arrays), size):
            yield _window(columns, {name: array[start : start + size] for name, array in arrays.items()}, start)
        return
    if not isinstance(data, str | os.PathLike):
        raise InvalidArgument(
            f"data is a {type(data).__name__}; give a dict with an array for each column (of a data frame: dict(frame)), "
            "or the path of a .csv or .csv.gz file, which is opened here"
        )
    as_read = {name: _without_blanks(name, column) for name, column in columns.items()}
    for table in _csv_tables(as_read, Path(data), size, ignore_undeclared=ignore_undeclared):
        yield _window(as_read, table, start)
        start += size


def checked(
    columns: Mapping[str, Column], data: RowData, *, most_rows: int, ignore_undeclared: bool = False
) -> Iterator[None]:
    """Go through all rows once, a window at a step, with the checks that the server will make. Raises RowsNotFit.

    What is refused here never reaches the server, so that no dataset of the name is left behind.
    """
    if isinstance(data, Mapping):
        _check_room(_length(_arrays(columns, data, ignore_undeclared=ignore_undeclared)), most_rows)
    start = 0
    for rows in windows(columns, data, ignore_undeclared=ignore_undeclared):
        count = len(next(iter(rows.values())))
        _check_room(start + count, most_rows)
        try:
            check_rows(columns, rows)
        except RowsRefused as refusal:
            row = start + (refusal.row or 0)
            raise RowsNotFit(f"column {refusal.column!r} row {row}: {refusal.problem}") from None
        start += count
        yield


def _check_room(count: int, most_rows: int) -> None:
    if count > most_rows:
        raise RowsNotFit(f"there are more rows than the declared capacity ({most_rows}); declare more")


def _length(arrays: Mapping[str, Any]) -> int:
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise RowsNotFit(f"the columns have different lengths: {lengths}; every row needs all of them")
    return next(iter(lengths.values()))


def _arrays(columns: Mapping[str, Column], data: Mapping[str, Any], *, ignore_undeclared: bool) -> dict[str, Any]:
    _check_names(columns, list(data), ignore_undeclared=ignore_undeclared)
    return {name: _open(name, data[name]) for name in columns}


def _check_names(columns: Mapping[str, Column], names: list[str], *, ignore_undeclared: bool) -> None:
    missing, unknown = [name for name in columns if name not in names], [name for name in names if name not in columns]
    twice = any(names.count(name) > 1 for name in columns)
    if missing or twice or (unknown and not ignore_undeclared):
        hint = "; ignore_undeclared=True leaves those out" if unknown and not missing else ""
        raise RowsNotFit(
            "the data must hold each declared column once, and no other; "
            f"declared: {', '.join(columns)}; missing: {', '.join(missing) or 'none'}; "
            f"not declared: {', '.join(map(str, unknown)) or 'none'}{hint}"
        )


def _open(name: str, given: Any) -> Any:
    if isinstance(given, str | os.PathLike):
        if Path(given).suffix != ".npy":
            raise RowsNotFit(f"column {name!r}: {given} is not a .npy file; give an array or a .npy file per column")
        try:
            opened = np.load(given, mmap_mode="r", allow_pickle=False)
        except OSError as error:
            raise RowsNotFit(f"column {name!r}: {given} cannot be opened: {error.strerror or error}") from None
        except (ValueError, EOFError) as error:
            raise RowsNotFit(f"column {name!r}: {given} cannot be read as plain numbers: {error}") from None
        given = opened if isinstance(opened, np.ndarray) else None
    try:
        sliced = given if hasattr(given, "__len__") and hasattr(given, "__getitem__") else list(given)
        len(sliced)
    except TypeError:
        raise RowsNotFit(f"column {name!r} is no array of rows; give one value, or one tensor, per row") from None
    return sliced


def _without_blanks(name: str, column: Column) -> Column:
    """A column as a CSV spells its values: blanks around a category are no part of it, in the file or as declared."""
    if not isinstance(column, CategoryColumn) or all(value == value.strip() for value in column.values):
        return column
    values = tuple(value.strip() for value in column.values)
    if len(set(values)) != len(values):
        raise RowsNotFit(
            f"column {name!r} declares categories that differ by blanks alone, which a CSV cannot tell apart; give arrays"
        )
    return column.model_copy(update={"values": values})


def _csv_tables(
    columns: Mapping[str, Column], path: Path, size: int, *, ignore_undeclared: bool
) -> Iterator[dict[str, list[str]]]:
    """Up to `size` rows at a time, as text. Blank lines are no rows; undeclared columns are not kept."""
    tensors = [name for name, column in columns.items() if isinstance(column, TensorColumn | AudioColumn)]
    if tensors:
        raise RowsNotFit(f"a CSV carries numbers, categories and text; give arrays for {', '.join(tensors)}")
    try:
        with _text(path) as stream:
            lines = csv.reader(stream, strict=True, skipinitialspace=True)
            header = [name.strip() for name in next(lines, [])]
            _check_delimiter(path, header)
            _check_names(columns, header, ignore_undeclared=ignore_undeclared)
            place = {name: header.index(name) for name in columns}
            rows = enumerate(line for line in lines if line)
            while window := list(itertools.islice(rows, size)):
                for row, line in window:
                    if len(line) != len(header):
                        raise RowsNotFit(
                            f"{path.name} row {row}: {len(line)} values, and the header names {len(header)}"
                        )
                yield {
                    name: _values(column, [line[place[name]] for _, line in window]) for name, column in columns.items()
                }
    except (csv.Error, UnicodeDecodeError, EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise RowsNotFit(f"{path.name} cannot be read as a CSV in UTF-8: {error}") from None
    except OSError as error:
        raise RowsNotFit(f"{path} cannot be opened: {error.strerror or error}") from None


def _check_delimiter(path: Path, header: list[str]) -> None:
    for delimiter, called in _DELIMITERS.items():
        if len(header) == 1 and delimiter in header[0]:
            raise RowsNotFit(f"{path.name} separates its columns by {called}; a CSV separates them by commas")


def _values(column: Column, texts: list[str]) -> list[str]:
    return texts if isinstance(column, TextColumn) else [text.strip() for text in texts]


def _text(path: Path) -> IO[str]:
    """A file's text, unpacked where it is .gz; a byte order mark is no part of it."""
    if path.suffix == ".gz":
        return gzip.open(path, "rt", newline="", encoding="utf-8-sig")
    return path.open(newline="", encoding="utf-8-sig")


def _window(columns: Mapping[str, Column], table: Mapping[str, Any], start: int) -> Rows:
    rows: Rows = {}
    for name, column in columns.items():
        rows |= convert(name, column, table[name], start)
    return rows
