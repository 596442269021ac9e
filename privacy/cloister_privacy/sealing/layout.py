"""Where the tensors of a safetensors body lie. Knows its header and trusts none of it; nothing of seals, nothing of torch."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

from cloister_privacy.errors import WeightsRefused

__all__ = ["Layout", "Place", "read_layout"]

_LENGTH_BYTES = 8
_LARGEST_HEADER = 2**24
"""Bytes of names and shapes, for a hundred thousand tensors; what safetensors allows costs gigabytes to parse."""
_LARGEST_SIZE = 2**62
_FIELDS = {"dtype", "shape", "data_offsets"}
_ITEM_BYTES = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1, "C64": 8,
    "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1, "BOOL": 1,
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Place:
    """One tensor's type by its safetensors name, its shape, and from where to where it lies in the body."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int

    def rows(self, rows: range) -> Place:
        """The place of some rows. Raises ValueError where there are no such rows, or the range skips any."""
        if not self.shape or rows.step != 1 or not 0 <= rows.start <= rows.stop <= self.shape[0]:
            raise ValueError(f"a tensor of shape {self.shape} has no rows {rows}; give a range of step 1 within it")
        row_bytes = (self.stop - self.start) // max(self.shape[0], 1)
        start, stop = self.start + rows.start * row_bytes, self.start + rows.stop * row_bytes
        return replace(self, shape=(len(rows), *self.shape[1:]), start=start, stop=stop)


@dataclass(frozen=True, slots=True)
class Layout:
    places: dict[str, Place]
    metadata: dict[str, str]


def read_layout(read: Callable[[int, int], memoryview], *, length: int) -> Layout:
    """The layout of a body of `length` bytes, any of which `read` gives.

    Raises WeightsRefused unless the tensors cover the body exactly, each once, aligned for its type.
    """
    if length < _LENGTH_BYTES:
        raise _refused("it has no header")
    data_start = _LENGTH_BYTES + int.from_bytes(read(0, _LENGTH_BYTES), "little")
    if data_start > min(length, _LARGEST_HEADER):
        raise _refused("its header is longer than it may be")
    header = _parsed(bytes(read(_LENGTH_BYTES, data_start)))
    metadata = header.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise _refused("its metadata is not text")
    places = {name: _place(entry, data_start) for name, entry in header.items()}
    reached = data_start
    for place in sorted(places.values(), key=lambda place: (place.start, place.stop)):
        if place.start != reached:
            raise _refused("its tensors overlap, or leave bytes between them")
        reached = place.stop
    if reached != length:
        raise _refused("its tensors do not end where it ends")
    return Layout(places, metadata)


def _parsed(text: bytes) -> dict[str, Any]:
    try:
        header = json.loads(text.decode("utf-8"), object_pairs_hook=_without_repeats)
    except (ValueError, RecursionError):  # no JSON, no UTF-8, a number of too many digits, a name given twice
        raise _refused("its header is not JSON, or gives a name twice") from None
    if not isinstance(header, dict):
        raise _refused("its header is not a JSON object")
    return header


def _without_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        raise ValueError("repeated name")
    return found


def _place(entry: Any, data_start: int) -> Place:
    if type(entry) is not dict or entry.keys() != _FIELDS:
        raise _refused("a tensor's entry is not of type, shape and offsets")
    dtype, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    item = _ITEM_BYTES.get(dtype) if type(dtype) is str else None
    if item is None:
        raise _refused("a tensor is of a type that is not known here")
    if not _are_sizes(shape) or not _are_sizes(offsets) or len(offsets) != 2:
        raise _refused("a tensor's shape or offsets are not sizes")
    count = math.prod(shape)
    if (count or math.prod(filter(None, shape))) > _LARGEST_SIZE:
        raise _refused("a tensor's shape is beyond all memory")
    start, stop = data_start + offsets[0], data_start + offsets[1]
    if stop - start != count * item or (start % item and count):
        raise _refused("a tensor's offsets do not fit its shape, or its type's alignment")
    return Place(dtype, tuple(shape), start, stop)


def _are_sizes(value: Any) -> bool:
    if type(value) is not list:
        return False
    for size in value:  # noqa: SIM110 (weights have thousands of these, and a generator costs more than the check)
        if type(size) is not int or not 0 <= size <= _LARGEST_SIZE:
            return False
    return True


def _refused(problem: str) -> WeightsRefused:
    return WeightsRefused(f"the sealed body is not safetensors: {problem}; seal what `safetensors` writes")
