"""The network of a request that describes none: fixed features of each kind of column, then linear layers. Sees no rows.

Under differential privacy fixed features with a linear layer beat most that is trained end to end (Tramer and Boneh, Differentially
private learning needs better features, ICLR 2021): few weights share the noise, and each example's gradient is known to be small.
"""

from __future__ import annotations

from collections.abc import Mapping

from cloister.wire import layers as wire
from cloister.wire.columns import (
    AudioColumn,
    CategoryColumn,
    InputColumn,
    NumberColumn,
    OutputColumn,
    TensorColumn,
    TextColumn,
)
from cloister.wire.layers import Layer
from cloister_privacy.architecture import encoded_width
from cloister_privacy.architecture.frontends.geometry import LEAST_IMAGE, geometry_of

__all__ = ["columns_read", "is_linear_on_fixed_features", "network"]

_BINS = 16
_HIDDEN = 128


def network(inputs: Mapping[str, InputColumn], output: OutputColumn) -> tuple[Layer, ...]:
    """Each image, text and recording through its front end, all other columns together as a table; their linear layers are summed."""
    outputs = len(output.values) if isinstance(output, CategoryColumn) else 1
    alone = {name: column for name, column in inputs.items() if _has_front_end(column)}
    table = {name: column for name, column in inputs.items() if name not in alone}
    if isinstance(output, NumberColumn) and not alone:
        return _hidden(table)
    branches = [_front_end(name, column, outputs) for name, column in alone.items()]
    if table:
        width = encoded_width(table, _BINS)
        encode = wire.Encode(bins=_BINS, normalized=True, reads=tuple(table) if alone else None)
        branches.append((encode, _head(width, outputs)))
    if len(branches) == 1:
        return branches[0]
    ends = [f"part-{place}" for place in range(len(branches))]
    layers = [
        layer if place < len(branch) - 1 else layer.model_copy(update={"name": end})
        for branch, end in zip(branches, ends, strict=True)
        for place, layer in enumerate(branch)
    ]
    return (*layers, wire.Add(reads=tuple(ends)))


def columns_read(layers: tuple[Layer, ...]) -> tuple[str, ...] | None:
    """The columns and layers that these layers name; None where one reads whatever there is."""
    if layers[0].reads is None or any(isinstance(each, wire.Encode) and each.reads is None for each in layers):
        return None
    return tuple(name for layer in layers for name in layer.reads or ())


def is_linear_on_fixed_features(layers: tuple[Layer, ...]) -> bool:
    """Whether all that is trained is linear layers from zero: the loss is convex, and gradients are small."""
    trained = [layer for layer in layers if wire.has_weights(layer) and getattr(layer, "affine", True)]
    return all(isinstance(layer, wire.Linear) and layer.init == "zeros" for layer in trained)


def _has_front_end(column: InputColumn) -> bool:
    if isinstance(column, TensorColumn):
        return len(column.shape) in (2, 3) and min(column.shape[-2:]) >= LEAST_IMAGE
    return isinstance(column, TextColumn | AudioColumn)


def _front_end(name: str, column: InputColumn, outputs: int) -> tuple[Layer, ...]:
    match column:
        case TensorColumn():
            return _image(name, column, outputs)
        case TextColumn():
            features = wire.HashedText().features
            return (wire.HashedText(reads=(name,)), _head(features, outputs))
        case _:
            sound = wire.LogMel(reads=(name,))
            return (sound, wire.Flatten(), _head(sound.bands * sound.frames, outputs))


def _image(name: str, column: TensorColumn, outputs: int) -> tuple[Layer, ...]:
    return (
        wire.Rescale(low=column.low, high=column.high, reads=(name,)),
        wire.Scattering(),
        _head(geometry_of(column.shape).features, outputs, bias=True),
    )


def _hidden(table: Mapping[str, InputColumn]) -> tuple[Layer, ...]:
    """For a number: one bounded hidden layer (arXiv 2007.14191) over all columns, each mapped from its declared bounds."""
    width = encoded_width(table)
    return (
        wire.Encode(),
        wire.Linear(in_features=width, out_features=_HIDDEN),
        wire.Tanh(),
        wire.Linear(in_features=_HIDDEN, out_features=1),
    )


def _head(width: int, outputs: int, *, bias: bool = False) -> wire.Linear:
    """Without a bias the features' length of 1 bounds each example's gradient, and the curvature of the loss."""
    return wire.Linear(in_features=width, out_features=outputs, init="zeros", bias=bias)
