"""What an ONNX graph computes from its weights and shapes alone, computed here: small things, and rearranged weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cloister_privacy.architecture.importers.draft import NotMapped
from cloister_privacy.architecture.importers.onnx_file import array_of, onnx

__all__ = ["Constant", "computed", "constant_of", "sliced"]

_SIZE_LIMIT = 2**24
"""The most numbers that a constant is computed to have."""

_REARRANGES = frozenset(
    ("Gather", "Unsqueeze", "Squeeze", "Slice", "Expand", "Reshape", "Transpose", "Identity", "Flatten")
)


@dataclass(frozen=True, slots=True, eq=False)
class Constant:
    """Numbers that depend on no input."""

    array: NDArray[Any]
    names: frozenset[str] = frozenset()
    """The weights that they are, each number one of them; none where they are fixed."""


def constant_of(attributes: Mapping[str, Any]) -> Constant:
    """What a Constant node holds."""
    for name, value in attributes.items():
        match name:
            case "value":
                return Constant(array_of(value))
            case "value_float" | "value_floats":
                return Constant(np.asarray(value, np.float32))
            case "value_int" | "value_ints":
                return Constant(np.asarray(value, np.int64))
    raise NotMapped("holds a constant of a kind that no network needs")


_SPREADS = frozenset(
    {"Add", "Sub", "Mul", "Div", "Equal", "Where", "Pow", "Greater", "Less", "Mod", "Max", "Min", "And", "Or"}
)
"""Operators whose inputs are spread to one shape."""


def computed(operator: str, inputs: Sequence[Constant | None], attributes: Mapping[str, Any]) -> Constant:
    """What an operator gives of constants. Raises NotMapped for one that is not among those that shapes are computed by."""
    run = _OPERATORS.get(operator)
    if run is None:
        raise NotMapped(f"computes with weights alone by {operator}; let the weights be what they are used as")
    arrays = [None if each is None else each.array for each in inputs]
    names = frozenset().union(*(each.names for each in inputs if each is not None))
    try:
        # Whatever is made of them, joined or spread over each other, is bounded by both.
        given = [each.shape for each in arrays if each is not None]
        _bearable([sum(math.prod(shape) for shape in given)])
        if operator in _SPREADS:
            _bearable(np.broadcast_shapes(*given))
        array = np.asarray(run(attributes, *arrays))
    except (MemoryError, ValueError, TypeError, IndexError, KeyError, OverflowError) as exc:
        raise NotMapped(f"does not fit its constants ({str(exc).splitlines()[0]})") from None
    if names and operator not in _REARRANGES:
        raise NotMapped(f"computes with weights alone by {operator}; let the weights be what they are used as")
    return Constant(array, names)


def _bearable(shape: Sequence[int]) -> tuple[int, ...]:
    wanted = tuple(int(size) for size in shape)
    if any(size < 0 for size in wanted) or math.prod(wanted) > _SIZE_LIMIT:
        raise NotMapped(f"makes a constant of shape {wanted}, over {_SIZE_LIMIT} numbers")
    return wanted


def _full(attributes: Mapping[str, Any], shape: NDArray[Any]) -> NDArray[Any]:
    value = array_of(attributes["value"]) if "value" in attributes else np.zeros(1, np.float32)
    return np.full(_bearable(shape.tolist()), value.reshape(-1)[0])


def _expanded(attributes: Mapping[str, Any], array: NDArray[Any], shape: NDArray[Any]) -> NDArray[Any]:
    return np.broadcast_to(array, _bearable(np.broadcast_shapes(array.shape, tuple(shape.tolist()))))


def _range(
    attributes: Mapping[str, Any], start: NDArray[Any], limit: NDArray[Any], delta: NDArray[Any]
) -> NDArray[Any]:
    _bearable([max(0, math.ceil((float(limit) - float(start)) / float(delta)))])
    return np.arange(start.item(), limit.item(), delta.item(), dtype=start.dtype)


def _cast(attributes: Mapping[str, Any], array: NDArray[Any]) -> NDArray[Any]:
    cast: NDArray[Any] = array.astype(onnx().helper.tensor_dtype_to_np_dtype(attributes["to"]))
    return cast


def _unsqueezed(attributes: Mapping[str, Any], array: NDArray[Any], axes: NDArray[Any] | None = None) -> NDArray[Any]:
    wanted = attributes.get("axes", []) if axes is None else np.ravel(axes).tolist()
    return np.expand_dims(array, tuple(wanted))


def _squeezed(attributes: Mapping[str, Any], array: NDArray[Any], axes: NDArray[Any] | None = None) -> NDArray[Any]:
    wanted = attributes.get("axes") if axes is None else np.ravel(axes).tolist()
    return np.squeeze(array, None if wanted is None else tuple(wanted))


def sliced(rank: int, attributes: Mapping[str, Any], *given: NDArray[Any] | None) -> dict[int, slice]:
    """By dimension, what a Slice takes; `given` are its inputs after the first."""
    if "starts" in attributes:
        starts, ends = attributes["starts"], attributes["ends"]
        axes, steps = attributes.get("axes"), None
    else:
        listed = [None if each is None else np.ravel(each).tolist() for each in (*given, None, None)[:4]]
        starts, ends, axes, steps = listed[0] or [], listed[1] or [], listed[2], listed[3]
    axes = list(range(len(starts))) if axes is None else axes
    steps = [1] * len(starts) if steps is None else steps
    return {
        axis % rank: slice(start, None if step < 0 and end < -(2**31) else end, step)
        for axis, start, end, step in zip(axes, starts, ends, steps, strict=True)
    }


def _slice(attributes: Mapping[str, Any], array: NDArray[Any], *given: NDArray[Any] | None) -> NDArray[Any]:
    taken = sliced(array.ndim, attributes, *given)
    return array[tuple(taken.get(axis, slice(None)) for axis in range(array.ndim))]


def _reshaped(attributes: Mapping[str, Any], array: NDArray[Any], shape: NDArray[Any]) -> NDArray[Any]:
    wanted = [array.shape[axis] if size == 0 else size for axis, size in enumerate(shape.tolist())]
    return array.reshape(wanted)


def _divided(attributes: Mapping[str, Any], first: NDArray[Any], second: NDArray[Any]) -> NDArray[Any]:
    quotient: NDArray[Any] = first // second if np.issubdtype(first.dtype, np.integer) else first / second
    return quotient


_OPERATORS: dict[str, Callable[..., Any]] = {
    "Gather": lambda attributes, array, indices: np.take(array, indices, axis=attributes.get("axis", 0)),
    "Concat": lambda attributes, *arrays: np.concatenate(arrays, axis=attributes["axis"]),
    "Unsqueeze": _unsqueezed,
    "Squeeze": _squeezed,
    "Slice": _slice,
    "Cast": _cast,
    "ConstantOfShape": _full,
    "Expand": _expanded,
    "Range": _range,
    "Reshape": _reshaped,
    "Transpose": lambda attributes, array: np.transpose(array, attributes.get("perm")),
    "Identity": lambda attributes, array: array,
    "Shape": lambda attributes, array: np.asarray(
        array.shape[attributes.get("start", 0) : attributes.get("end")], np.int64
    ),
    "Size": lambda attributes, array: np.asarray(array.size, np.int64),
    "Add": lambda attributes, first, second: first + second,
    "Sub": lambda attributes, first, second: first - second,
    "Mul": lambda attributes, first, second: first * second,
    "Div": _divided,
    "Mod": lambda attributes, first, second: np.mod(first, second),
    "Neg": lambda attributes, array: -array,
    "Min": lambda attributes, *arrays: np.minimum.reduce(arrays),
    "Max": lambda attributes, *arrays: np.maximum.reduce(arrays),
    "Sqrt": lambda attributes, array: np.sqrt(array),
    "Reciprocal": lambda attributes, array: 1 / array,
    "Equal": lambda attributes, first, second: first == second,
    "Not": lambda attributes, array: ~array,
    "Where": lambda attributes, condition, first, second: np.where(condition, first, second),
    "ReduceProd": lambda attributes, array, axes=None: np.prod(array, keepdims=bool(attributes.get("keepdims", 1))),
}
