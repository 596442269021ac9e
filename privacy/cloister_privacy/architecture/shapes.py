"""Whether the parts of a network fit together, and how large it is. Knows the spec; allocates nothing and loads no torch."""

from __future__ import annotations

import math
from typing import assert_never

from cloister.wire.architecture import Architecture, Encode, Flatten, Layer, Linear, ReLU, Rescale, Tanh
from cloister.wire.columns import CategoryColumn, InputColumn, NumberColumn, TensorColumn
from cloister_privacy.errors import ArchitectureRefused

__all__ = ["PARAMETER_LIMIT", "check", "encoded_width"]

PARAMETER_LIMIT = 100_000_000
_WIDTH_LIMIT = 2**20
_RANGE_LIMIT = 1e30  # a target's range must square within float32's reach of its gradient

Shape = tuple[int, ...]


def check(architecture: Architecture) -> int:
    """Refuse, by name, a network whose parts do not fit together; answer how many parameters it has."""
    if architecture.target in architecture.inputs:
        raise ArchitectureRefused(
            f"{architecture.target!r} is both an input and the target; leave it out of the inputs"
        )
    shape, parameters = _entry(architecture), 0
    for position, layer in enumerate(architecture.layers):
        shape, more = _through(layer, shape, where=f"layer {position} ({layer.type})", is_first=position == 0)
        parameters += more
    if not parameters:
        raise ArchitectureRefused("the network has nothing to learn; add a linear layer")
    if parameters > PARAMETER_LIMIT:
        raise ArchitectureRefused(f"the network has {parameters} parameters, over {PARAMETER_LIMIT}; narrow its layers")
    _check_output(architecture, shape)
    return parameters


def encoded_width(inputs: dict[str, InputColumn]) -> int:
    """The length of the vector that Encode makes of a row."""
    return sum(map(_encoded, inputs.values()))


def _encoded(column: InputColumn) -> int:
    match column:
        case TensorColumn():
            return math.prod(column.shape)
        case NumberColumn():
            return 1
        case CategoryColumn():
            return len(column.values)
        case _:
            assert_never(column)


def _entry(architecture: Architecture) -> Shape:
    """The shape that the first layer sees: Encode joins all columns, any other layer reads the only one as it is."""
    if isinstance(architecture.layers[0], Encode):
        width = encoded_width(architecture.inputs)
        if width > _WIDTH_LIMIT:
            raise ArchitectureRefused(f"encode makes a vector of {width}, over {_WIDTH_LIMIT}; leave inputs out")
        return (width,)
    if len(architecture.inputs) > 1:
        raise ArchitectureRefused(
            f"{len(architecture.inputs)} inputs and no encode to join them; put encode first, or name one input"
        )
    ((name, column),) = architecture.inputs.items()
    match column:
        case TensorColumn():
            return tuple(column.shape)
        case NumberColumn():
            return (1,)
        case CategoryColumn():
            raise ArchitectureRefused(f"{name!r} is a category, which only encode can read; put encode first")
        case _:
            assert_never(column)


def _through(layer: Layer, shape: Shape, *, where: str, is_first: bool) -> tuple[Shape, int]:
    match layer:
        case Encode():
            if not is_first:
                raise ArchitectureRefused(f"{where} joins the inputs, so it can only be the first layer; move it there")
            return shape, 0
        case Rescale():
            if not math.isfinite((layer.to_high - layer.to_low) / (layer.high - layer.low)):
                raise ArchitectureRefused(f"{where} has a slope that is not finite; use nearer bounds")
            return shape, 0
        case Flatten():
            return (math.prod(shape),), 0
        case Linear():
            if len(shape) != 1:
                raise ArchitectureRefused(f"{where} reads vectors but gets shape {shape}; put flatten before it")
            if shape[0] != layer.in_features:
                raise ArchitectureRefused(
                    f"{where} has in_features {layer.in_features} but gets {shape[0]}; set in_features={shape[0]}"
                )
            return (layer.out_features,), (layer.in_features + layer.bias) * layer.out_features
        case ReLU() | Tanh():
            return shape, 0
        case _:
            assert_never(layer)


def _check_output(architecture: Architecture, shape: Shape) -> None:
    match architecture.output, architecture.loss:
        case CategoryColumn() as output, "cross_entropy":
            width = len(output.values)
        case NumberColumn() as output, "mean_squared_error":
            width = 1
            if output.high - output.low > _RANGE_LIMIT:
                raise ArchitectureRefused(
                    f"the range of {architecture.target!r} is over {_RANGE_LIMIT:g}; declare a narrower one"
                )
        case output, loss:
            raise ArchitectureRefused(
                f"a {output.type} cannot be learnt by {loss}; "
                "categories take cross_entropy, numbers take mean_squared_error"
            )
    if shape != (width,):
        raise ArchitectureRefused(
            f"the last layer gives shape {shape}, but {architecture.target!r} needs ({width},); "
            f"end with a linear layer of out_features={width}"
        )
