"""What a network lets in to predict: one array per column, of the declared kind. Refuses by column; never clamps."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, assert_never

import numpy as np
from numpy.typing import NDArray

from cloister.wire.architecture import Architecture
from cloister.wire.columns import AudioColumn, CategoryColumn, InputColumn, NumberColumn, TensorColumn, TextColumn
from cloister.wire.rows import pcm16
from cloister_privacy.errors import InputRefused

__all__ = ["validate_inputs"]


_PADDED_LIMIT = 2**28
"""The most bytes of texts, or samples of recordings, that one request may be padded to."""


def validate_inputs(architecture: Architecture, columns: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The inputs as rows (`cloister.wire.rows`), or InputRefused with the column and the problem.

    Every column of `architecture.inputs` must be there with the same number of rows, at least one. A text is an array of str or
    bytes [n]; a recording int16 samples, or float32 from -1 to 1, [n, at most max_samples]. Values outside a column's bounds are let
    in: bounds are a promise about the training data.
    """
    for name in columns:
        if name not in architecture.inputs:
            raise InputRefused(name, f"is not read by this model; it reads {', '.join(architecture.inputs)}")
    valid: dict[str, NDArray[Any]] = {}
    rows = None
    for name, column in architecture.inputs.items():
        if name not in columns:
            raise InputRefused(name, "is missing; the model reads it")
        valid |= _validate(name, np.asarray(columns[name]), column)
        rows = len(valid[name]) if rows is None else rows
        if len(valid[name]) != rows:
            raise InputRefused(name, f"has {len(valid[name])} rows where other inputs have {rows}")
    return valid


def _validate(name: str, array: NDArray[Any], column: InputColumn) -> dict[str, NDArray[Any]]:
    match column:
        case TextColumn():
            return _text(name, array, column)
        case AudioColumn():
            return _audio(name, array, column)
        case TensorColumn():
            allowed = ("float32", "uint8") if column.dtype == "uint8" else ("float32",)
            _require(name, array, allowed, tuple(column.shape))
        case NumberColumn():
            _require(name, array, ("float32",), ())
        case CategoryColumn():
            _require(name, array, ("int64", "int32", "uint8"), ())
            indices = array.astype(np.int64)
            if indices.min() < 0 or indices.max() >= len(column.values):
                raise InputRefused(name, f"has an index outside 0..{len(column.values) - 1}")
            return {name: indices}
        case _:
            assert_never(column)
    numbers = array.astype(np.float32)
    if not np.isfinite(numbers).all():
        raise InputRefused(name, "has a value that is not finite")
    return {name: numbers}


def _require(name: str, array: NDArray[Any], allowed: tuple[str, ...], shape: tuple[int, ...]) -> None:
    if array.dtype.name not in allowed:
        raise InputRefused(name, f"is {array.dtype.name}; send {' or '.join(allowed)}")
    if array.ndim == 0 or array.shape[1:] != shape:
        expected = ", ".join(["rows", *map(str, shape)])
        raise InputRefused(name, f"has shape {array.shape} where [{expected}] is expected")
    if len(array) == 0:
        raise InputRefused(name, "has no rows; send at least one")


def _text(name: str, array: NDArray[Any], column: TextColumn) -> dict[str, NDArray[Any]]:
    if array.ndim != 1 or array.dtype.kind not in "OUS":
        raise InputRefused(name, f"is {array.dtype.name} of shape {array.shape}; send a text for each row")
    if len(array) == 0:
        raise InputRefused(name, "has no rows; send at least one")
    if len(array) * column.max_length > _PADDED_LIMIT:
        raise InputRefused(name, f"has too many rows at once for texts of up to {column.max_length} bytes; send fewer")
    texts = [each.encode() if isinstance(each, str) else each for each in array.tolist()]
    if not all(isinstance(each, bytes) for each in texts):
        raise InputRefused(name, "holds what is no text")
    if max(map(len, texts)) > column.max_length:
        raise InputRefused(name, f"has a text longer than the {column.max_length} bytes of its column; cut it")
    rows = np.zeros((len(texts), column.max_length), dtype=np.uint8)
    for row, text in enumerate(texts):
        rows[row, : len(text)] = np.frombuffer(text, dtype=np.uint8)
    return {name: rows, f"{name}.length": np.array([len(text) for text in texts], dtype=np.int32)}


def _audio(name: str, array: NDArray[Any], column: AudioColumn) -> dict[str, NDArray[Any]]:
    if array.ndim != 2 or array.dtype.name not in ("int16", "float32"):
        raise InputRefused(
            name, f"is {array.dtype.name} of shape {array.shape}; send int16 or float32 samples, [rows, samples]"
        )
    if len(array) == 0:
        raise InputRefused(name, "has no rows; send at least one")
    if not array.shape[1] or len(array) * column.max_samples > _PADDED_LIMIT:
        raise InputRefused(name, "has no samples, or too many rows at once; send fewer rows, of at least one sample")
    if array.shape[1] > column.max_samples:
        raise InputRefused(name, f"is longer than the {column.max_samples} samples of its column; cut it")
    if array.dtype.name == "float32":
        if not (np.abs(array) <= 1).all():
            raise InputRefused(name, "has a sample that is not from -1 to 1")
        array = pcm16(array)
    rows = np.zeros((len(array), column.max_samples), dtype=np.int16)
    rows[:, : array.shape[1]] = array
    return {name: rows, f"{name}.length": np.full(len(array), array.shape[1], dtype=np.int32)}
