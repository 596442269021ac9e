"""What sources do to values, in the layers of the language: arithmetic, reductions, choices, and constants beside them.

Where the language has no layer of its own, a frozen linear layer or a frozen convolution of kernel 1 stands for it: it gives the
same numbers, and trains nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cloister.wire import layers as wire
from cloister_privacy.architecture.importers.draft import Draft, NotMapped, Shape, Value
from cloister_privacy.architecture.importers.origins import States

__all__ = [
    "SELU_ALPHA",
    "SELU_SCALE",
    "add",
    "add_array",
    "affine",
    "concatenate",
    "learned_beside",
    "multiply",
    "multiply_array",
    "reduce",
    "rescale",
    "select",
    "selu",
    "softmax",
    "state_of_direction",
]

SELU_ALPHA, SELU_SCALE = 1.6732632423543772, 1.0507009873554805
"""Klambauer and others, Self-normalizing neural networks, 2017."""

_LENGTH_LIMIT = 2**20

_CHOICE_LIMIT = 2**22
"""The most numbers in the matrix of a choice or a repetition."""


def add(draft: Draft, first: Value, second: Value) -> Value:
    """Their sum; where one has a dimension of 1 it is repeated."""
    return _together(draft, wire.Add, first, second)


def multiply(draft: Draft, first: Value, second: Value) -> Value:
    """Their product, element by element; where one has a dimension of 1 it is repeated."""
    return _together(draft, wire.Multiply, first, second)


def _together(draft: Draft, kind: type[Any], first: Value, second: Value) -> Value:
    try:
        shape = np.broadcast_shapes(first.shape, second.shape)
    except ValueError:
        raise NotMapped(f"joins shapes {first.shape} and {second.shape}; bring them to one shape") from None
    first, second = (draft.unpadded(_repeated(draft, each, shape)) for each in (first, second))
    if first.dims != second.dims or first.held != second.held:
        return draft.emit(kind, first, second)
    made = draft.emit(kind, *(replace(each, dims=tuple(range(len(each.held)))) for each in (first, second)))
    return replace(made, dims=first.dims)


def _repeated(draft: Draft, value: Value, shape: Shape) -> Value:
    if math.prod(value.shape) == math.prod(shape):
        return draft.reshape(value, shape)
    before = (1,) * (len(shape) - len(value.shape)) + value.shape
    kept = [dim for dim, size in enumerate(before) if size == shape[dim]]
    more = [dim for dim, size in enumerate(before) if size != shape[dim]]
    once, times = math.prod(before[dim] for dim in kept), math.prod(shape[dim] for dim in more)
    _require_bearable(times)
    ones = np.ones((times, 1), np.float32)
    made = _frozen_linear(draft, draft.reshape(value, (once, 1)), ones)
    made = draft.reshape(made, tuple(shape[dim] for dim in (*kept, *more)))
    return draft.permute(made, _inverse((*kept, *more)))


def _frozen_linear(draft: Draft, value: Value, matrix: NDArray[np.float32]) -> Value:
    out, into = matrix.shape
    return draft.emit(
        wire.Linear,
        value,
        weights={"weight": matrix},
        in_features=into,
        out_features=out,
        bias=False,
        frozen=True,
    )


def _require_bearable(numbers: int) -> None:
    if numbers > _CHOICE_LIMIT:
        raise NotMapped(f"would take a matrix of {numbers} numbers, over {_CHOICE_LIMIT}; pool before it")


def _inverse(dims: Sequence[int]) -> Shape:
    return tuple(int(dim) for dim in np.argsort(dims))


def rescale(draft: Draft, value: Value, scale: float, shift: float = 0.0) -> Value:
    """scale x + shift with fixed numbers."""
    if not math.isfinite(scale) or not math.isfinite(shift):
        raise NotMapped(f"scales by {scale} and shifts by {shift}, which are not finite")
    if scale == 1 and shift == 0:
        return value
    if 0 < scale < 1:
        return draft.pointwise(wire.Rescale, value, low=0, high=1 / scale, to_low=shift, to_high=shift + 1)
    return draft.pointwise(wire.Rescale, value, low=0, high=1, to_low=shift, to_high=shift + scale)


def add_array(draft: Draft, value: Value, array: NDArray[np.float32], *, is_trained: bool) -> Value:
    """The value and an array beside it, (1 or more dimensions that fit): weights where it is trained, or a constant."""
    if not is_trained and array.size == 1:
        return rescale(draft, value, 1.0, float(array.reshape(-1)[0]))
    array = _beside(array, value.shape)
    joined = _as_bias(draft, value, array) if is_trained else None
    if joined is not None:
        return joined
    if array.shape == value.shape:
        rows = (math.prod(value.shape[:-1]), value.shape[-1])
        made = draft.emit(
            wire.PositionalEmbedding,
            draft.reshape(value, rows),
            weights={"table.weight": array.reshape(rows)},
            length=rows[0],
            embedding_dim=rows[1],
            frozen=not is_trained,
        )
        return draft.reshape(made, value.shape)
    if is_trained:
        raise NotMapped(
            f"adds weights of shape {array.shape} to {value.shape}; use the bias of a linear layer or a convolution, or give "
            "the weights the whole shape"
        )
    return affine(draft, value, np.ones_like(array), array, is_trained=False)


def multiply_array(draft: Draft, value: Value, array: NDArray[np.float32], *, is_trained: bool) -> Value:
    """The value times an array that fits beside it: weights where it is trained, or a constant."""
    if not is_trained and array.size == 1:
        return rescale(draft, value, float(array.reshape(-1)[0]))
    array = _beside(array, value.shape)
    scaled = _as_scale(draft, value, array) if is_trained else None
    return scaled or affine(draft, value, array, None, is_trained=is_trained)


def affine(
    draft: Draft,
    value: Value,
    scale: NDArray[np.float32],
    shift: NDArray[np.float32] | None,
    *,
    is_trained: bool,
) -> Value:
    """scale x + shift by arrays of one shape that fits beside the value: a convolution of kernel 1, each channel by itself."""
    scale = _beside(scale, value.shape)
    over = [dim for dim, size in enumerate(scale.shape) if size > 1]
    rest = [dim for dim in range(len(scale.shape)) if dim not in over]
    channels = math.prod(value.shape[dim] for dim in over)
    moved = draft.permute(value, (*over, *rest))
    weights: dict[str, NDArray[np.float32]] = {"weight": scale.reshape(channels, 1, 1)}
    if shift is not None:
        weights["bias"] = shift.reshape(channels)
    made = draft.emit(
        wire.Conv1d,
        draft.reshape(moved, (channels, math.prod(value.shape) // channels)),
        weights=weights,
        in_channels=channels,
        out_channels=channels,
        kernel_size=1,
        groups=channels,
        bias=shift is not None,
        frozen=not is_trained,
    )
    return draft.permute(draft.reshape(made, moved.shape), _inverse((*over, *rest)))


def _beside(array: NDArray[np.float32], shape: Shape) -> NDArray[np.float32]:
    """The array with as many dimensions as the shape, each of its size or 1."""
    fitted = array.reshape((1,) * (len(shape) - array.ndim) + array.shape) if array.ndim < len(shape) else array
    while fitted.ndim > len(shape) and fitted.shape[0] == 1:
        fitted = fitted[0]
    if fitted.ndim != len(shape) or any(mine not in (1, size) for mine, size in zip(fitted.shape, shape, strict=True)):
        raise NotMapped(f"joins an array of shape {array.shape} to {shape}; let it fit beside that")
    return fitted


def _as_bias(draft: Draft, value: Value, array: NDArray[np.float32]) -> Value | None:
    """What gives the value, with the array as the bias that it lacks; None where that is not so."""
    step = draft.step(value)
    bare = ("bias" not in step.weights or not step.weights["bias"].any()) if step is not None else False
    if step is None or not bare or value.pad or step.twins or not isinstance(value.key, int):
        return None
    match step.layer:
        case wire.Linear():
            channel = len(value.held) - 1
        case wire.Conv1d() | wire.Conv2d() | wire.GroupNorm():
            channel = 0
        case wire.LayerNorm(normalized_shape=(_,)):
            channel = len(value.held) - 1
        case _:
            return None
    laid = np.transpose(array, _inverse(value.dims))
    if any(size > 1 for dim, size in enumerate(laid.shape) if dim != channel):
        return None
    fields = step.layer.model_dump(exclude={"type", "name", "reads"})
    fields |= {"bias": True} if "bias" in fields else {}
    bias = np.broadcast_to(laid.reshape(-1), (value.held[channel],))
    read = draft.first_read(value)
    if read is None:
        return None
    made = draft.emit(
        type(step.layer),
        read,
        weights={**step.weights, "bias": bias},
        twins=(value.key,) if step.weights else (),
        **fields,
    )
    return replace(made, dims=value.dims)


def _as_scale(draft: Draft, value: Value, array: NDArray[np.float32]) -> Value | None:
    """A group norm that was spelt as a norm without weights over reshaped groups, times a weight for each channel."""
    reshaped = draft.first_read(value)
    step, inner = draft.step(value), None if reshaped is None else draft.step(reshaped)
    if step is None or inner is None or reshaped is None or not isinstance(step.layer, wire.Reshape):
        return None
    before = draft.first_read(reshaped)
    source = None if before is None else draft.step(before)
    if source is None or before is None or not isinstance(inner.layer, wire.GroupNorm) or inner.layer.affine:
        return None
    origin = draft.first_read(before) if isinstance(source.layer, wire.Reshape) else before
    is_by_channel = array.ndim > 0 and array.shape == (value.shape[0], *(1,) * (array.ndim - 1))
    if origin is None or origin.held != value.shape or value.dims != tuple(range(len(value.held))) or not is_by_channel:
        return None
    return draft.emit(
        wire.GroupNorm,
        origin,
        weights={"weight": array.reshape(-1)},
        num_groups=inner.layer.num_groups,
        num_channels=origin.held[0],
        eps=inner.layer.eps,
    )


def concatenate(draft: Draft, values: Sequence[Value], dim: int) -> Value:
    """The values side by side along a dimension of their source."""
    values = [draft.unpadded(each) for each in values]
    if len(values) == 1:
        return values[0]
    if len({each.dims for each in values}) > 1 or not values[0].dims:
        return draft.emit(wire.Concatenate, *values, dim=dim)
    held = [replace(each, dims=tuple(range(len(each.held)))) for each in values]
    return replace(draft.emit(wire.Concatenate, *held, dim=values[0].dims[dim]), dims=values[0].dims)


def learned_beside(draft: Draft, value: Value, array: NDArray[np.float32], *, is_trained: bool) -> Value:
    """An array that is the same for each example, as a value: what is there times 0, and a trained table added to it."""
    nothing = rescale(draft, reduce(draft, value, range(len(value.shape)), "mean"), 0.0)
    zeros = _repeated(draft, draft.reshape(nothing, (1,) * array.ndim), array.shape)
    return add_array(draft, zeros, array, is_trained=is_trained)


def reduce(
    draft: Draft, value: Value, dims: Sequence[int], how: Literal["mean", "max", "sum"], *, keeps_dims: bool = False
) -> Value:
    """The mean, the largest or the sum over some dimensions."""
    shape = value.shape
    over = sorted({dim % len(shape) for dim in dims})
    kept = [dim for dim in range(len(shape)) if dim not in over]
    gives = tuple(1 if dim in over else shape[dim] for dim in range(len(shape)) if keeps_dims or dim not in over)
    count = math.prod(shape[dim] for dim in over)
    if count == 1:
        return draft.reshape(value, gives)
    if how == "max" or (len(shape) == 2 and over == [0]):
        rows = draft.reshape(draft.permute(value, (*over, *kept)), (count, math.prod(shape) // count))
        made = draft.emit(wire.SequencePool, rows, how="max" if how == "max" else "mean")
    else:
        channels = draft.permute(value, (*kept, *over))
        if len(kept) != 1:
            channels = draft.reshape(channels, (math.prod(shape) // count, count))
        made = draft.emit(wire.AveragePool, channels)
    made = draft.reshape(made, gives)
    return rescale(draft, made, float(count)) if how == "sum" else made


def selu(draft: Draft, value: Value, *, alpha: float = SELU_ALPHA, scale: float = SELU_SCALE) -> Value:
    """An ELU, scaled."""
    return rescale(draft, draft.pointwise(wire.ELU, value, alpha=alpha), scale)


def select(draft: Draft, value: Value, dim: int, indices: Sequence[int]) -> Value:
    """Of a dimension only these indices, in this order."""
    shape = value.shape
    dim, size = dim % len(shape), shape[dim]
    if not indices or len(indices) > _LENGTH_LIMIT or not all(-size <= index < size for index in indices):
        raise NotMapped(f"takes of {size} positions what is not there, nothing, or more than {_LENGTH_LIMIT}")
    chosen = [index % size for index in indices]
    if chosen == list(range(size)):
        return value
    part = _part_of_joined(draft, value, dim, chosen)
    if part is not None:
        return part
    if len(shape) == 2 and dim == 0 and chosen == [size - 1]:
        return draft.reshape(draft.emit(wire.SequencePool, value, how="last"), (1, shape[1]))
    _require_bearable(len(chosen) * size)
    matrix = np.zeros((len(chosen), size), np.float32)
    matrix[np.arange(len(chosen)), chosen] = 1
    order = (*(each for each in range(len(shape)) if each != dim), dim)
    moved = draft.permute(value, order)
    flat = moved if len(shape) <= 2 else draft.reshape(moved, (math.prod(shape) // size, size))
    made = draft.reshape(_frozen_linear(draft, flat, matrix), (*moved.shape[:-1], len(chosen)))
    return draft.permute(made, _inverse(order))


def _part_of_joined(draft: Draft, value: Value, dim: int, chosen: list[int]) -> Value | None:
    """Where the value is several side by side: the one of them that holds all that is chosen, or a part of it."""
    step = draft.step(value)
    if step is None or not isinstance(step.layer, wire.Concatenate) or value.dims[dim] != step.layer.dim or value.pad:
        return None
    start = 0
    for read in draft.reads(step):
        length = read.held[step.layer.dim]
        if all(start <= index < start + length for index in chosen):
            return select(draft, replace(read, dims=value.dims), dim, [index - start for index in chosen])
        start += length
    return None


def state_of_direction(draft: Draft, states: States) -> Value:
    """What one of two directions gave last: forwards at the last position, backwards at the first."""
    is_forward = states.chosen == states.count - 2
    hidden = range(states.hidden) if is_forward else range(states.hidden, 2 * states.hidden)
    at = select(draft, states.sequence, 0, [-1 if is_forward else 0])
    return draft.reshape(select(draft, at, 1, hidden), (states.hidden,))


def softmax(draft: Draft, value: Value, dim: int) -> Value:
    """Over one dimension of the source."""
    rank = len(value.shape)
    order = (*(each for each in range(rank) if each != dim % rank), dim % rank)
    return draft.permute(draft.emit(wire.Softmax, draft.permute(value, order)), _inverse(order))
