"""ONNX's arithmetic, activations and changes of shape, in the layers of the language."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import numpy as np
from torch import nn

from cloister.wire import layers as wire
from cloister_privacy.architecture.importers import operations
from cloister_privacy.architecture.importers.draft import NotMapped, Value
from cloister_privacy.architecture.importers.onnx_constants import Constant, sliced
from cloister_privacy.architecture.importers.onnx_graph import Handler, Held, Node

__all__ = ["OPERATORS", "held", "numbers"]


@dataclass(frozen=True, slots=True)
class _Gaussian:
    """On the way to GELU, as older exports spell it: x * 0.5 * (1 + erf(x / sqrt 2))."""

    x: Held
    scale: float = 1.0
    has_one: bool = False
    has_x: bool = False


def held(given: Any) -> Held:
    """Raises NotMapped for what is no value of the network."""
    if not isinstance(given, Held):
        raise NotMapped("reads a constant, or an unfinished GELU, where a value of the network belongs")
    return given


def numbers(given: Any) -> list[int]:
    """Fixed whole numbers, as shapes are. Raises NotMapped where they depend on an input."""
    if not isinstance(given, Constant):
        raise NotMapped("has a shape that depends on what its input holds; let it be fixed")
    return [int(each) for each in np.ravel(given.array)]


def _pointwise(kind: type[Any], **defaults: Any) -> Handler:
    """`defaults` are the layer's fields: the ONNX attribute's name and its default."""

    def run(node: Node, x: Any) -> Held:
        fields = {field: node.attributes.get(name, default) for field, (name, default) in defaults.items()}
        return replace(held(x), value=node.draft.pointwise(kind, held(x).value, **fields))

    return run


def _gelu(node: Node, x: Any) -> Held:
    kind = node.attributes.get("approximate", b"none").decode()
    return replace(held(x), value=node.draft.pointwise(wire.GELU, held(x).value, approximate=kind))


def _selu(node: Node, x: Any) -> Held:
    alpha, scale = (
        node.attributes.get("alpha", operations.SELU_ALPHA),
        node.attributes.get("gamma", operations.SELU_SCALE),
    )
    return replace(held(x), value=operations.selu(node.draft, held(x).value, alpha=alpha, scale=scale))


def _clip(node: Node, x: Any, low: Any = None, high: Any = None) -> Held:
    bounds = [each.array.item() if isinstance(each, Constant) else None for each in (low, high)]
    low, high = node.attributes.get("min", bounds[0]), node.attributes.get("max", bounds[1])
    if low != 0 or (high is not None and high < 3e38):
        raise NotMapped(f"clips to {low} and {high}; the language has ReLU, which clips at 0 from below")
    return replace(held(x), value=node.draft.pointwise(wire.ReLU, held(x).value))


def _softmax(node: Node, x: Any) -> Held:
    read = held(x)
    axis = node.attributes.get("axis", -1 if node.opset >= 13 else 1)
    if node.opset < 13 and axis % read.rank != read.rank - 1:
        raise NotMapped("is a softmax over several dimensions; export with opset 13 or later")
    if node.operator == "LogSoftmax":
        if read.dimension(axis) != read.rank - 2:
            raise NotMapped(
                "is a log_softmax over another dimension than the last; the language has none within a network"
            )
        return Held(node.draft.emit(wire.Softmax, read.value, module=nn.LogSoftmax(-1)), read.batch)
    return replace(read, value=operations.softmax(node.draft, read.value, read.dimension(axis)))


def _add(node: Node, first: Any, second: Any) -> Any:
    if isinstance(first, _Gaussian) or isinstance(second, _Gaussian):
        gaussian, other = (first, second) if isinstance(first, _Gaussian) else (second, first)
        if _number(other) != gaussian.scale or gaussian.has_one or gaussian.has_x:
            raise NotMapped("adds to an erf; the language has GELU")
        return replace(gaussian, has_one=True)
    read, other = _ordered(first, second)
    if isinstance(other, Held):
        value, against = _aligned(read, other)
        return replace(read if read.rank >= other.rank else other, value=operations.add(node.draft, value, against))
    array, is_trained = _array_beside(node, read, other)
    return replace(read, value=operations.add_array(node.draft, read.value, array, is_trained=is_trained))


def _multiply(node: Node, first: Any, second: Any) -> Any:
    if isinstance(first, _Gaussian) or isinstance(second, _Gaussian):
        gaussian, other = (first, second) if isinstance(first, _Gaussian) else (second, first)
        return _of_gaussian(node, gaussian, other)
    read, other = _ordered(first, second)
    if isinstance(other, Held):
        value, against = _aligned(read, other)
        return replace(
            read if read.rank >= other.rank else other, value=operations.multiply(node.draft, value, against)
        )
    array, is_trained = _array_beside(node, read, other)
    return replace(read, value=operations.multiply_array(node.draft, read.value, array, is_trained=is_trained))


def _of_gaussian(node: Node, gaussian: _Gaussian, other: Any) -> Any:
    if isinstance(other, Constant) and other.array.size == 1:
        found = replace(gaussian, scale=gaussian.scale * float(_number(other) or 0.0))
    elif isinstance(other, Held) and gaussian.has_one and not gaussian.has_x:
        scale = _scale_from(node, other.value, gaussian.x.value)
        found = replace(gaussian, scale=gaussian.scale * scale, has_x=True)
    else:
        raise NotMapped("multiplies an erf; the language has GELU")
    if found.has_x and found.has_one and math.isclose(found.scale, 0.5, rel_tol=1e-5):
        return replace(found.x, value=node.draft.pointwise(wire.GELU, found.x.value))
    return found


def _scale_from(node: Node, value: Value, source: Value) -> float:
    """By how much a value is its source rescaled. Raises NotMapped where it is not."""
    if value == source:
        return 1.0
    step, read = node.draft.step(value), node.draft.first_read(value)
    layer = None if step is None else step.layer
    if isinstance(layer, wire.Rescale) and read is not None and read.key == source.key and value.dims == source.dims:
        slope = (layer.to_high - layer.to_low) / (layer.high - layer.low)
        if abs(layer.to_low - layer.low * slope) < 1e-12:
            return slope
    raise NotMapped("is an erf of something else than its factor; the language has GELU")


def _erf(node: Node, x: Any) -> _Gaussian:
    read = held(x).value
    step, source = node.draft.step(read), node.draft.first_read(read)
    if step is None or source is None or not isinstance(step.layer, wire.Rescale):
        raise NotMapped("is an erf that is no part of a GELU; the language has GELU")
    source = replace(read, key=source.key)
    if not math.isclose(_scale_from(node, read, source), math.sqrt(0.5), rel_tol=1e-5):
        raise NotMapped("is an erf that is no part of a GELU; the language has GELU")
    return _Gaussian(replace(held(x), value=source))


def _number(given: Any) -> float | None:
    return float(given.array.reshape(-1)[0]) if isinstance(given, Constant) and given.array.size == 1 else None


def _ordered(first: Any, second: Any) -> tuple[Held, Any]:
    if isinstance(first, Held):
        return first, second
    return held(second), first


def _aligned(first: Held, second: Held) -> tuple[Value, Value]:
    if first.rank - first.batch != second.rank - second.batch:
        raise NotMapped("joins tensors whose examples are in different dimensions; keep them the first")
    return first.value, second.value


def _array_beside(node: Node, read: Held, given: Any) -> tuple[Any, bool]:
    """A constant without the dimension of the examples, and whether it is weights."""
    if not isinstance(given, Constant):
        raise NotMapped("computes with what is neither a value nor a constant")
    array = given.array
    if array.size == 1 or node.walk.is_raw(read.value):
        array, is_trained = array.astype(np.float32), False
    else:
        array, is_trained = node.walk.take(given), bool(given.names)
    at = array.ndim - (read.rank - read.batch)
    if array.ndim > read.rank or (at >= 0 and array.shape[at] not in (1, node.examples)):
        raise NotMapped(
            f"joins an array of shape {array.shape} to one of {read.rank} dimensions; let it fit beside that"
        )
    return (np.take(array, 0, axis=at) if at >= 0 else array), is_trained


def _subtract(node: Node, first: Any, second: Any) -> Any:
    if isinstance(second, Held):
        return _add(node, first, replace(second, value=operations.rescale(node.draft, second.value, -1.0)))
    if (
        isinstance(second, Constant)
        and second.names
        and second.array.size > 1
        and not node.walk.is_raw(held(first).value)
    ):
        raise NotMapped("subtracts weights; add them, or use the bias of a linear layer")
    return _add(node, first, Constant(-second.array))


def _divide(node: Node, first: Any, second: Any) -> Any:
    if not isinstance(second, Constant) or not isinstance(first, Held):
        raise NotMapped("divides by what is not a constant; the language multiplies only")
    if second.names and second.array.size > 1 and not node.walk.is_raw(first.value):
        raise NotMapped("divides by weights; multiply by them")
    return _multiply(node, first, Constant(1 / second.array.astype(np.float32)))


def _negative(node: Node, x: Any) -> Held:
    return replace(held(x), value=operations.rescale(node.draft, held(x).value, -1.0))


def _power(node: Node, x: Any, exponent: Any) -> Held:
    if _number(exponent) != 2:
        raise NotMapped(
            "raises to a power that is not 2; a norm that is spelt so exports as one with opset 17 or later"
        )
    return replace(held(x), value=operations.multiply(node.draft, held(x).value, held(x).value))


def _same(node: Node, x: Any, *others: Any) -> Any:
    return x


def _dropout(node: Node, x: Any, ratio: Any = None, training: Any = None) -> list[Any]:
    rate = _number(ratio) if ratio is not None else node.attributes.get("ratio", 0.5)
    value = node.draft.pointwise(wire.Dropout, held(x).value, p=float(rate or 0.0)) if rate else held(x).value
    return [replace(held(x), value=value)]


def _reshape(node: Node, x: Any, shape: Any = None) -> Held:
    read = held(x)
    listed = numbers(shape) if shape is not None else [int(each) for each in node.attributes.get("shape", [])]
    full = read.full(node.examples)
    if not node.attributes.get("allowzero", 0):
        listed = [full[axis] if size == 0 and axis < len(full) else size for axis, size in enumerate(listed)]
    if listed.count(-1) == 1:
        rest = -math.prod(listed)
        if rest <= 0 or math.prod(full) % rest:
            raise NotMapped(f"puts {full} into {tuple(listed)}, which has another size")
        listed[listed.index(-1)] = math.prod(full) // rest
    return node.reshaped(read, listed)


def _flatten(node: Node, x: Any) -> Held:
    full = held(x).full(node.examples)
    axis = node.attributes.get("axis", 1) % (len(full) + 1)
    return node.reshaped(held(x), (math.prod(full[:axis]), math.prod(full[axis:])))


def _axes(node: Node, given: Any, rank: int) -> list[int] | None:
    listed = numbers(given) if given is not None else node.attributes.get("axes")
    return None if listed is None else [int(axis) % rank for axis in listed]


def _squeeze(node: Node, x: Any, axes: Any = None) -> Held:
    read = held(x)
    full, listed = read.full(node.examples), _axes(node, axes, read.rank)
    gone = [axis for axis, size in enumerate(full) if size == 1 and axis != read.batch] if listed is None else listed
    if read.batch in gone:
        raise NotMapped("drops the dimension of the examples; keep it")
    return node.reshaped(read, [size for axis, size in enumerate(full) if axis not in gone])


def _unsqueeze(node: Node, x: Any, axes: Any = None) -> Held:
    read = held(x)
    listed = numbers(axes) if axes is not None else list(node.attributes.get("axes", []))
    rank = read.rank + len(listed)
    new = {axis % rank for axis in listed}
    rest = iter(read.full(node.examples))
    return node.reshaped(read, [1 if axis in new else next(rest) for axis in range(rank)])


def _expand(node: Node, x: Any, shape: Any) -> Held:
    wanted = np.broadcast_shapes(held(x).full(node.examples), tuple(numbers(shape)))
    if math.prod(wanted) != math.prod(held(x).full(node.examples)):
        raise NotMapped("repeats a value; the language repeats where it adds or multiplies")
    return node.reshaped(held(x), wanted)


def _transpose(node: Node, x: Any) -> Held:
    read = held(x)
    order = list(node.attributes.get("perm", range(read.rank)[::-1]))
    dims = tuple(read.dimension(axis) for axis in order if axis != read.batch)
    return Held(node.draft.permute(read.value, dims), order.index(read.batch))


def _concatenate(node: Node, *given: Any) -> Held:
    first = next(held(each) for each in given if isinstance(each, Held))
    dim, parts = first.dimension(node.attributes["axis"]), []
    for each in given:
        if isinstance(each, Held):
            if (each.rank, each.batch) != (first.rank, first.batch):
                raise NotMapped("joins tensors whose examples are in different dimensions; keep them the first")
            parts.append(each.value)
        else:
            array, is_trained = _array_beside(node, first, each)
            parts.append(operations.learned_beside(node.draft, first.value, array, is_trained=is_trained))
    return replace(first, value=operations.concatenate(node.draft, parts, dim))


def _slice(node: Node, x: Any, *given: Any) -> Held:
    read = held(x)
    arrays = [None if each is None else np.asarray(numbers(each)) for each in given]
    value = read.value
    for axis, taken in sliced(read.rank, node.attributes, *arrays).items():
        if axis == read.batch and range(node.examples)[taken] == range(node.examples):
            continue
        dim = read.dimension(axis)
        value = operations.select(node.draft, value, dim, range(value.shape[dim])[taken])
    return replace(read, value=value)


def _split(node: Node, x: Any, lengths: Any = None) -> list[Held]:
    read = held(x)
    dim = read.dimension(node.attributes.get("axis", 0))
    size = read.value.shape[dim]
    each = -(-size // max(1, node.outputs))
    listed = numbers(lengths) if lengths is not None else node.attributes.get("split")
    listed = listed or [min(each, size - start) for start in range(0, size, each)]
    starts = [sum(listed[:position]) for position in range(len(listed))]
    parts = [
        operations.select(node.draft, read.value, dim, range(start, start + length))
        for start, length in zip(starts, listed, strict=True)
    ]
    return [replace(read, value=part) for part in parts]


def _pad(node: Node, x: Any, pads: Any = None, fill: Any = None, axes: Any = None) -> Held:
    read, mode = held(x), node.attributes.get("mode", b"constant")
    listed = numbers(pads) if pads is not None else [int(each) for each in node.attributes.get("pads", [])]
    over = _axes(node, axes, read.rank) or list(range(read.rank))
    amounts = dict(zip(over, zip(listed[: len(over)], listed[len(over) :], strict=True), strict=True))
    by = _number(fill) if fill is not None else node.attributes.get("value", 0.0)
    if mode != b"constant" or by or any(amount < 0 for pair in amounts.values() for amount in pair):
        raise NotMapped("pads by what is not zeros; the language pads a convolution with zeros")
    if any(amounts.pop(read.batch, (0, 0))):
        raise NotMapped("pads the examples of a batch; keep them as they are")
    before = read.value.pad or ((0, 0),) * (read.rank - 1)
    extra = {read.dimension(axis): pair for axis, pair in amounts.items()}
    whole = tuple(
        (low + extra.get(dim, (0, 0))[0], high + extra.get(dim, (0, 0))[1]) for dim, (low, high) in enumerate(before)
    )
    return replace(read, value=replace(read.value, pad=whole))


def _reduction(how: Literal["mean", "max", "sum"]) -> Handler:
    def run(node: Node, x: Any, axes: Any = None) -> Held:
        read, keeps = held(x), bool(node.attributes.get("keepdims", 1))
        listed = _axes(node, axes, read.rank)
        if not listed and node.attributes.get("noop_with_empty_axes", 0):
            return read
        over = listed if listed is not None else list(range(read.rank))
        value = operations.reduce(
            node.draft, read.value, [read.dimension(axis) for axis in over], how, keeps_dims=keeps
        )
        before = sum(axis < read.batch for axis in over)
        return Held(value, read.batch if keeps else read.batch - before)

    return run


def _sum(node: Node, *given: Any) -> Any:
    return reduce(lambda found, each: _add(node, found, each), given)


OPERATORS: dict[str, Handler] = {
    "Relu": _pointwise(wire.ReLU),
    "LeakyRelu": _pointwise(wire.LeakyReLU, slope=("alpha", 0.01)),
    "Elu": _pointwise(wire.ELU, alpha=("alpha", 1.0)),
    "Sigmoid": _pointwise(wire.Sigmoid),
    "Tanh": _pointwise(wire.Tanh),
    "Selu": _selu,
    "Gelu": _gelu,
    "Erf": _erf,
    "Clip": _clip,
    "Softmax": _softmax,
    "LogSoftmax": _softmax,
    "Add": _add,
    "Sum": _sum,
    "Sub": _subtract,
    "Mul": _multiply,
    "Div": _divide,
    "Neg": _negative,
    "Pow": _power,
    "Identity": _same,
    "Cast": _same,
    "Dropout": _dropout,
    "Reshape": _reshape,
    "Flatten": _flatten,
    "Squeeze": _squeeze,
    "Unsqueeze": _unsqueeze,
    "Expand": _expand,
    "Transpose": _transpose,
    "Concat": _concatenate,
    "Slice": _slice,
    "Split": _split,
    "Pad": _pad,
    "ReduceMean": _reduction("mean"),
    "ReduceMax": _reduction("max"),
    "ReduceSum": _reduction("sum"),
}
