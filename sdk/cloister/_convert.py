"""One column's values in the schema's own types; what does not fit is refused by column and row. Knows nothing of files."""

from __future__ import annotations

import io
import wave
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister._errors import RowsNotFit
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
from cloister.wire.rows import Rows, pcm16

__all__ = ["category_indices", "convert", "recordings", "text"]

_MOST_NAMED = 12


def convert(name: str, column: Column, values: Any, start: int) -> Rows:
    """A window of a column as `encode_rows` wants it; `start` is the place of its first row in the data. Raises RowsNotFit."""
    match column:
        case TensorColumn():
            array = _array(name, values, start, shape=tuple(column.shape))
            return {name: _cast(name, array, column.dtype, start)}
        case NumberColumn():
            return {name: _cast(name, _array(name, values, start, shape=()), "float32", start)}
        case CategoryColumn():
            return {name: category_indices(name, column, _array(name, values, start, shape=()), start)}
        case TextColumn():
            return _byte_strings(
                name, [_bytes(name, v, start + row) for row, v in enumerate(values)], column.max_length, start
            )
        case AudioColumn():
            return recordings(name, column, values, start)
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
        told = f"{array.shape[1:]}; the schema says {shape}" if shape else f"{array.shape[1:]}; give one value per row"
        raise RowsNotFit(f"column {name!r} has rows of shape {told}")
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


def category_indices(name: str, column: CategoryColumn, values: NDArray[Any], start: int = 0) -> NDArray[np.int32]:
    """Integers are indices; everything else is looked up among the declared values. Raises RowsNotFit."""
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
        declared = f": {', '.join(column.values)}" if len(column.values) <= _MOST_NAMED else ""
        raise RowsNotFit(f"column {name!r} row {start + row}: {told!r} is not one of the declared categories{declared}")
    return indices


def _spelled(value: Any) -> str:
    return value.decode(errors="replace") if isinstance(value, bytes) else str(value)


def recordings(name: str, column: AudioColumn, values: Any, start: int = 0) -> Rows:
    """Recordings as padded int16 samples and their lengths. Each is an array of samples, int16 or from -1 to 1, or the bytes of a WAV
    file. Raises RowsNotFit."""
    samples = [_samples(name, column, value, start + row) for row, value in enumerate(values)]
    array = np.zeros((len(samples), column.max_samples), dtype=np.int16)
    for row, each in enumerate(samples):
        if len(each) > column.max_samples:
            raise RowsNotFit(
                f"column {name!r} row {start + row}: {len(each)} samples, and at most {column.max_samples} are declared"
            )
        array[row, : len(each)] = each
    return {name: array, f"{name}.length": np.array([len(each) for each in samples], dtype=np.int32)}


def _samples(name: str, column: AudioColumn, value: Any, row: int) -> NDArray[np.int16]:
    where = f"column {name!r} row {row}"
    if isinstance(value, bytes | bytearray | memoryview):
        return _wav(where, column, bytes(value))
    try:
        array = np.asarray(value)
    except ValueError:
        array = np.empty((0, 0))
    if array.ndim != 1 or array.dtype.kind not in "if":
        raise RowsNotFit(f"{where}: no recording; give its samples as a flat array, or the bytes of a WAV file")
    if array.dtype.kind == "i":
        if array.size and not (array.min() >= -(2**15) and array.max() < 2**15):
            raise RowsNotFit(f"{where}: samples beyond 16 bits; scale them down")
        return array.astype(np.int16)
    if not (np.abs(array) <= 1).all():
        raise RowsNotFit(f"{where}: samples that are not from -1 to 1; scale them, or give int16")
    return pcm16(array)


def _wav(where: str, column: AudioColumn, body: bytes) -> NDArray[np.int16]:
    try:
        with wave.open(io.BytesIO(body)) as file:
            channels, width, rate = file.getnchannels(), file.getsampwidth(), file.getframerate()
            samples = file.readframes(file.getnframes())
    except (wave.Error, EOFError):
        raise RowsNotFit(f"{where}: the bytes are no WAV file; give one, or the samples as an array") from None
    if rate != column.rate:
        raise RowsNotFit(f"{where}: recorded at {rate} samples a second, and {column.rate} are declared; resample it")
    if (channels, width) != (1, 2):
        raise RowsNotFit(f"{where}: {channels} channels of {8 * width} bits; give one channel of 16 bits")
    return np.frombuffer(samples, dtype="<i2").astype(np.int16)


def text(name: str, column: TextColumn, value: Any, row: int) -> str:
    """A text as it is sent to a model. Raises RowsNotFit."""
    encoded = _bytes(name, value, row)
    if len(encoded) > column.max_length:
        raise RowsNotFit(
            f"column {name!r} row {row}: {len(encoded)} bytes, and the model reads {column.max_length}; cut it"
        )
    try:
        return encoded.decode()
    except UnicodeDecodeError:
        raise RowsNotFit(f"column {name!r} row {row}: the text is not UTF-8; decode it first") from None


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
