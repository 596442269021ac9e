"""Keras' operations and activations, as its graph holds them, in the layers of the language."""

from __future__ import annotations

from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cloister.wire import layers as wire
from cloister_privacy.architecture.importers import blocks, operations
from cloister_privacy.architecture.importers.draft import NotMapped, Value, dimension, value_of
from cloister_privacy.architecture.importers.keras_graph import Handler, Learned, Node
from cloister_privacy.architecture.importers.origins import Mask

__all__ = ["OPERATIONS", "activated"]


def activated(node: Node, value: Value, function: Any) -> Value:
    """A value through one of Keras' activations."""
    name = getattr(function, "__name__", type(function).__name__)
    if not str(getattr(function, "__module__", "")).startswith("keras."):
        raise NotMapped(f"has the activation {name}, which is not Keras' own; use one that is")
    return _through(node, value, name)


def _through(node: Node, value: Value, name: str, **options: Any) -> Value:
    draft = node.draft
    match name.lower().replace("_", ""):
        case "linear" | "identity":
            return value
        case "relu":
            return draft.pointwise(wire.ReLU, value)
        case "leakyrelu":
            return draft.pointwise(wire.LeakyReLU, value, slope=options.get("negative_slope", 0.2))
        case "elu":
            return draft.pointwise(wire.ELU, value, alpha=options.get("alpha", 1.0))
        case "selu":
            return operations.selu(draft, value)
        case "gelu":
            return draft.pointwise(wire.GELU, value, approximate="tanh" if options.get("approximate") else "none")
        case "silu" | "swish":
            return draft.pointwise(wire.SiLU, value)
        case "sigmoid":
            return draft.pointwise(wire.Sigmoid, value)
        case "tanh":
            return draft.pointwise(wire.Tanh, value)
        case "softmax":
            return operations.softmax(draft, value, dimension(value, options.get("axis", -1)))
    raise NotMapped(
        f"has the activation {name}; the language has relu, leaky_relu, elu, selu, gelu, silu, sigmoid, tanh and softmax"
    )


def _array_beside(node: Node, given: Any, rank: int) -> tuple[NDArray[np.float32], bool]:
    """A variable or a constant beside a value of so many dimensions, and whether it is trained."""
    if isinstance(given, Learned):
        array, is_trained = node.walk.take(given.variable, node.draft), bool(given.variable.trainable)
    else:
        array, is_trained = node.walk.numbers(given), False
        variable = node.walk.variable_like(array) if array.ndim >= 2 else None
        if variable is not None:
            node.walk.take(variable, node.draft)
            is_trained = bool(variable.trainable)
    if array.ndim == rank + 1:
        if len(array) != 1:
            raise NotMapped(
                f"joins an array of shape {array.shape} to examples of {rank} dimensions; let it be one for all"
            )
        array = array[0]
    return array, is_trained


def _add(node: Node, first: Any, second: Any) -> Value:
    value, other = _ordered(first, second)
    if isinstance(other, Value):
        return operations.add(node.draft, value, other)
    array, is_trained = _array_beside(node, other, len(value.shape))
    return operations.add_array(node.draft, value, array, is_trained=is_trained)


def _subtract(node: Node, first: Any, second: Any) -> Value:
    if isinstance(second, Value):
        return _add(node, first, operations.rescale(node.draft, second, -1.0))
    if isinstance(second, Learned):
        raise NotMapped("subtracts weights; add them, or use the bias of a Dense layer")
    return _add(node, first, -node.walk.numbers(second))


def _multiply(node: Node, first: Any, second: Any) -> Value:
    value, other = _ordered(first, second)
    if isinstance(other, Value):
        return operations.multiply(node.draft, value, other)
    array, is_trained = _array_beside(node, other, len(value.shape))
    return operations.multiply_array(node.draft, value, array, is_trained=is_trained)


def _divide(node: Node, first: Any, second: Any) -> Value:
    if not isinstance(first, Value) or isinstance(second, Value | Learned | Mask):
        raise NotMapped("divides by what is not a constant; the language multiplies only")
    return _multiply(node, first, 1 / node.walk.numbers(second))


def _ordered(first: Any, second: Any) -> tuple[Value, Any]:
    if isinstance(first, Mask) or isinstance(second, Mask):
        raise NotMapped("computes with a mask; leave mask_zero to layers that read it")
    if isinstance(first, Value):
        return first, second
    if not isinstance(second, Value):
        raise NotMapped("computes with what is neither a value, weights nor a constant")
    return second, first


def _negative(node: Node, value: Value) -> Value:
    return operations.rescale(node.draft, value, -1.0)


def _square(node: Node, value: Value) -> Value:
    return operations.multiply(node.draft, value, value)


def _power(node: Node, value: Any, exponent: Any) -> Value:
    if not isinstance(value, Value) or isinstance(exponent, Value | Learned) or float(exponent) != 2:
        raise NotMapped("raises to a power that is not 2; the language has the square")
    return _square(node, value)


def _activation(node: Node, value: Any) -> Value:
    operation = node.operation
    names = ("negative_slope", "alpha", "approximate", "axis")
    options = {name: getattr(operation, name) for name in names if hasattr(operation, name)}
    return _through(node, value_of(value), type(operation).__name__, **options)


def _same(node: Node, value: Any, *args: Any) -> Any:
    return value


def _reshape(node: Node, value: Any, *args: Any) -> Value:
    return node.draft.reshape(value_of(value), node.shape)


def _transpose(node: Node, value: Any) -> Value:
    rank = len(value_of(value).shape) + 1
    axes = node.operation.axes
    order = [axis % rank for axis in axes] if axes is not None else list(range(rank))[::-1]
    if order[0] != 0:
        raise NotMapped("moves the examples from the first dimension; keep them there")
    permuted: Value = node.draft.permute(value, tuple(axis - 1 for axis in order[1:]))
    return permuted


def _concatenate(node: Node, values: Any) -> Value:
    listed = [value_of(each) for each in values]
    return operations.concatenate(node.draft, listed, dimension(listed[0], node.operation.axis))


def _reduction(how: Literal["mean", "max", "sum"]) -> Handler:
    def run(node: Node, value: Any) -> Value:
        axes = node.operation.axis
        listed = list(axes) if isinstance(axes, list | tuple) else [axes]
        dims = [dimension(value_of(value), axis) for axis in listed]
        return operations.reduce(node.draft, value, dims, how, keeps_dims=bool(node.operation.keepdims))

    return run


def _get_item(node: Node, value: Any, key: Any) -> Value:
    read, dim = value_of(value), 0
    listed = list(key) if isinstance(key, tuple | list) else [key]
    if Ellipsis in listed:
        at = listed.index(Ellipsis)
        named = sum(each is not None for each in listed) - 1
        listed[at : at + 1] = [slice(None)] * (len(read.shape) + 1 - named)
    if listed[0] != slice(None):
        raise NotMapped("chooses among the examples of a batch; keep them apart: x[:, ...]")
    for entry in listed[1:]:
        if entry is None:
            continue
        if not isinstance(entry, slice | int):
            raise NotMapped("is indexed by what is no number and no slice")
        size = read.shape[dim]
        chosen = range(size)[entry] if isinstance(entry, slice) else [entry]
        read, dim = operations.select(node.draft, read, dim, chosen), dim + 1
    return node.draft.reshape(read, node.shape)


def _matmul(node: Node, value: Any, other: Any) -> Value:
    if not isinstance(other, Learned) or len(other.variable.shape) != 2:
        raise NotMapped("multiplies matrices that are not a value and weights; for attention use MultiHeadAttention")
    weight = node.walk.take(other.variable, node.draft)
    return blocks.linear(node.draft, value_of(value), weight.T, None, is_frozen=not other.variable.trainable)


def _not_equal(node: Node, value: Any, other: Any) -> Any:
    if isinstance(value, Value) and isinstance(value.key, str) and not isinstance(other, Value) and other == 0:
        return Mask(value, is_there=True)
    raise NotMapped("compares numbers; the language compares tokens with 0 only, for a mask")


def _joined_masks(node: Node, first: Any, second: Any) -> Any:
    if isinstance(first, Mask) and first == second:
        return first
    raise NotMapped("joins masks of different tokens; the language has the mask of one column")


_ACTIVATIONS = ("Relu", "LeakyRelu", "Elu", "Selu", "Gelu", "Silu", "Sigmoid", "Tanh", "Softmax", "Identity")

OPERATIONS: dict[str, Handler] = {
    "Add": _add,
    "Subtract": _subtract,
    "Multiply": _multiply,
    "TrueDivide": _divide,
    "Divide": _divide,
    "Negative": _negative,
    "Square": _square,
    "Power": _power,
    **dict.fromkeys(_ACTIVATIONS, _activation),
    **dict.fromkeys(("Cast", "StopGradient", "Copy", "ConvertToTensor"), _same),
    **dict.fromkeys(("Reshape", "Squeeze", "ExpandDims", "Ravel"), _reshape),
    "Transpose": _transpose,
    "Concatenate": _concatenate,
    "Mean": _reduction("mean"),
    "Max": _reduction("max"),
    "Amax": _reduction("max"),
    "Sum": _reduction("sum"),
    "GetItem": _get_item,
    "Matmul": _matmul,
    "NotEqual": _not_equal,
    "LogicalAnd": _joined_masks,
    "LogicalOr": _joined_masks,
}
