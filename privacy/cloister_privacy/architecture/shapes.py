"""Whether the parts of a network fit together, and how large it is. Knows the spec; allocates nothing and loads no torch."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, assert_never

from cloister.wire import layers as wire
from cloister.wire.architecture import Architecture
from cloister.wire.columns import AudioColumn, CategoryColumn, InputColumn, NumberColumn, TensorColumn, TextColumn
from cloister_privacy.architecture.frontends.geometry import LEAST_IMAGE, MOST_CELLS, MOST_CHANNELS, geometry_of, hop_of
from cloister_privacy.architecture.graph import MASKED, Node, nodes_of
from cloister_privacy.errors import ArchitectureRefused

__all__ = [
    "PARAMETER_LIMIT",
    "TEXT_INDICES",
    "Measured",
    "Value",
    "check",
    "column_value",
    "encoded_width",
    "measure",
    "through",
]

PARAMETER_LIMIT = 100_000_000
_ELEMENT_LIMIT = 2**24
"""The most numbers that a layer gives of one example, and that all layers give together times sixteen."""

TEXT_INDICES = 257
"""Of a text: its bytes, each plus 1, and 0 past its end."""

_GATES = {"lstm": 4, "gru": 3, "rnn": 1}
_WIDTH_LIMIT = 2**20
_SCATTERING_LIMIT = 8
_RANGE_LIMIT = 1e30  # a target's range must square within float32's reach of its gradient

Shape = tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Value:
    """What a layer gives, or a column, of one example."""

    shape: Shape
    indices: int = 0
    """Where it holds indices: how many there are. 0 where it holds numbers."""
    is_sparse: bool = False
    """Whether it is told by the places and values of the few numbers that are not 0."""
    audio_rate: int = 0
    """Where it is a recording: its samples a second."""


@dataclass(frozen=True, slots=True)
class Measured:
    """A layer in its place, with what it gives."""

    node: Node
    gives: Value
    parameters: int
    numbers: int
    """About how many numbers it makes of one example, on the way to what it gives too."""


def check(architecture: Architecture) -> int:
    """Refuse, by name, a network whose parts do not fit together; answer how many parameters it has."""
    return sum(each.parameters for each in measure(architecture))


def measure(architecture: Architecture) -> tuple[Measured, ...]:
    """Every layer with what it gives, in order. Raises ArchitectureRefused."""
    if architecture.target in architecture.inputs:
        raise ArchitectureRefused(
            f"{architecture.target!r} is both an input and the target; leave it out of the inputs"
        )
    known = {name: column_value(column) for name, column in architecture.inputs.items()}
    measured: list[Measured] = []
    parameters = elements = 0
    for node in nodes_of(architecture):
        gives, more = through(node, [known[name] for name in node.reads], architecture.inputs)
        parameters += more
        numbers = math.prod(gives.shape) + _inside(node.layer, known[node.reads[0]])
        elements += numbers
        if parameters > PARAMETER_LIMIT:
            raise ArchitectureRefused(
                f"the network has over {PARAMETER_LIMIT} parameters by {node.where}; narrow its layers"
            )
        if math.prod(gives.shape) > _ELEMENT_LIMIT or elements > 16 * _ELEMENT_LIMIT:
            raise ArchitectureRefused(
                f"the layers up to {node.where} give {elements} numbers of one example; narrow them, or pool"
            )
        known[node.key] = gives
        measured.append(Measured(node, gives, more, numbers))
    if sum(isinstance(each.node.layer, wire.Scattering) for each in measured) > _SCATTERING_LIMIT:
        raise ArchitectureRefused(
            f"the network has over {_SCATTERING_LIMIT} scatterings, each costly; join the images before it"
        )
    if not any(each.parameters for each in measured):
        raise ArchitectureRefused("the network has nothing to learn; add a linear layer")
    _check_output(architecture, measured[-1].gives)
    return tuple(measured)


def encoded_width(inputs: Mapping[str, InputColumn], bins: int = 0) -> int:
    """The length of the vector that Encode makes of these columns of a row. Raises ArchitectureRefused."""
    width = sum(_encoded(name, column, bins) for name, column in inputs.items())
    if width > _WIDTH_LIMIT:
        raise ArchitectureRefused(f"the inputs make a vector of {width}, over {_WIDTH_LIMIT}; leave inputs out")
    return width


def _encoded(name: str, column: InputColumn, bins: int) -> int:
    match column:
        case TensorColumn():
            return math.prod(column.shape)
        case NumberColumn():
            return 2 * bins or 1
        case CategoryColumn():
            return len(column.values)
        case TextColumn() | AudioColumn():
            raise ArchitectureRefused(
                f"encode joins tensors, numbers and categories, and {name!r} is {column.type}; read it by a layer of its own"
            )
        case _:
            assert_never(column)


def column_value(column: InputColumn) -> Value:
    """What a layer that reads the column gets."""
    match column:
        case TensorColumn():
            return Value(tuple(column.shape))
        case NumberColumn():
            return Value((1,))
        case CategoryColumn():
            return Value((), indices=len(column.values))
        case TextColumn():
            return Value((column.max_length,), indices=TEXT_INDICES)
        case AudioColumn():
            return Value((column.max_samples,), audio_rate=column.rate)
        case _:
            assert_never(column)


def through(node: Node, reads: list[Value], columns: Mapping[str, InputColumn]) -> tuple[Value, int]:
    """What a layer gives of what it reads, and how many parameters it has. Raises ArchitectureRefused."""
    layer, first = node.layer, reads[0]
    if isinstance(layer, wire.Encode):
        return Value((encoded_width({name: columns[name] for name in node.reads}, layer.bins),)), 0
    if isinstance(layer, wire.Embedding | wire.HashedText):
        return _of_indices(node, layer, first)
    if any(each.indices for each in (reads[:1] if isinstance(layer, MASKED) else reads)):
        raise _refused(node, "numbers", "indices", "read them by an embedding, or encode")
    if any(each.is_sparse for each in reads) and not isinstance(layer, wire.Linear):
        raise _refused(node, "numbers", "hashed text", "read it by a linear layer first")
    shape, parameters = _SHAPES[type(layer)](node, layer, reads)
    return Value(shape), parameters


def _refused(node: Node, wants: str, gets: str, cure: str) -> ArchitectureRefused:
    return ArchitectureRefused(f"{node.where} reads {wants} but gets {gets}; {cure}")


def _require_rank(node: Node, shape: Shape, rank: int, wants: str, cure: str = "put reshape before it") -> None:
    if len(shape) != rank:
        raise _refused(node, wants, f"shape {shape}", cure)


def _require_width(node: Node, given: int, field: str, declared: int) -> None:
    if given != declared:
        raise ArchitectureRefused(f"{node.where} has {field} {declared} but gets {given}; set {field}={given}")


def _of_indices(node: Node, layer: wire.Embedding | wire.HashedText, value: Value) -> tuple[Value, int]:
    if not value.indices:
        raise _refused(node, "indices", "numbers", "let it read a text or a category")
    if isinstance(layer, wire.HashedText):
        if value.indices != TEXT_INDICES or len(value.shape) != 1:
            raise _refused(node, "a text", "something else", "let it read a column of text")
        return Value((layer.features,), is_sparse=True), 0
    if layer.num_embeddings < value.indices:
        raise ArchitectureRefused(
            f"{node.where} has num_embeddings {layer.num_embeddings} and reads {value.indices} indices; set "
            f"num_embeddings={value.indices}"
        )
    if layer.padding_idx is not None and layer.padding_idx >= layer.num_embeddings:
        raise ArchitectureRefused(f"{node.where} has a padding_idx beyond its num_embeddings; lower it")
    return Value((*value.shape, layer.embedding_dim)), layer.num_embeddings * layer.embedding_dim


def _same(node: Node, layer: Any, reads: list[Value]) -> tuple[Shape, int]:
    return reads[0].shape, 0


def _rescale(node: Node, layer: wire.Rescale, reads: list[Value]) -> tuple[Shape, int]:
    if not abs((layer.to_high - layer.to_low) / (layer.high - layer.low)) <= 3.4e38:
        raise ArchitectureRefused(f"{node.where} has a slope that is not finite; use nearer bounds")
    return reads[0].shape, 0


def _flatten(node: Node, layer: wire.Flatten, reads: list[Value]) -> tuple[Shape, int]:
    return (math.prod(reads[0].shape),), 0


def _reshape(node: Node, layer: wire.Reshape, reads: list[Value]) -> tuple[Shape, int]:
    if math.prod(layer.shape) != math.prod(reads[0].shape):
        raise ArchitectureRefused(f"{node.where} cannot make {layer.shape} of {reads[0].shape}: they differ in size")
    return layer.shape, 0


def _permute(node: Node, layer: wire.Permute, reads: list[Value]) -> tuple[Shape, int]:
    shape = reads[0].shape
    _require_rank(node, shape, len(layer.dims), f"{len(layer.dims)} dimensions", "name all its dims")
    return tuple(shape[dim] for dim in layer.dims), 0


def _linear(node: Node, layer: wire.Linear, reads: list[Value]) -> tuple[Shape, int]:
    shape = reads[0].shape
    if len(shape) > 2:
        raise _refused(node, "vectors, or a sequence of them,", f"shape {shape}", "put flatten before it")
    if shape[-1] != layer.in_features and math.prod(shape) == layer.in_features:
        raise _refused(node, "vectors", f"shape {shape}", "put flatten before it")
    _require_width(node, shape[-1], "in_features", layer.in_features)
    return (*shape[:-1], layer.out_features), (layer.in_features + layer.bias) * layer.out_features


def _convolution(node: Node, layer: wire.Conv1d | wire.Conv2d, reads: list[Value]) -> tuple[Shape, int]:
    shape = reads[0].shape
    one = isinstance(layer, wire.Conv1d)
    _require_rank(node, shape, 2 if one else 3, "(channels, length)" if one else "(channels, height, width)")
    _require_width(node, shape[0], "in_channels", layer.in_channels)
    if layer.in_channels % layer.groups or layer.out_channels % layer.groups:
        raise ArchitectureRefused(f"{node.where}: groups must divide in_channels and out_channels")
    fields = (layer.kernel_size, layer.stride, layer.padding, layer.dilation)
    kernel, stride, padding, dilation = ((each,) if isinstance(each, int) else each for each in fields)
    positions = _positions(node, shape[1:], kernel, stride, padding, dilation)
    weights = layer.out_channels * (layer.in_channels // layer.groups) * math.prod(kernel)
    return (layer.out_channels, *positions), weights + layer.bias * layer.out_channels


def _positions(node: Node, size: Shape, kernel: Shape, stride: Shape, padding: Shape, dilation: Shape) -> Shape:
    found = tuple(
        (s + 2 * p - d * (k - 1) - 1) // t + 1
        for s, k, t, p, d in zip(size, kernel, stride, padding, dilation, strict=True)
    )
    if any(each < 1 for each in found):
        raise ArchitectureRefused(
            f"{node.where} has a kernel larger than the {size} that it gets; make it smaller, or pad"
        )
    return found


def _pool(node: Node, layer: wire.MaxPool | wire.AveragePool, reads: list[Value]) -> tuple[Shape, int]:
    shape, rank = reads[0].shape, len(layer.kernel_size)
    if not rank:
        if len(shape) < 2:
            raise _refused(node, "channels with positions", f"shape {shape}", "leave it out")
        return shape[:1], 0
    _require_rank(node, shape, rank + 1, f"channels with {rank} dimensions")
    stride, padding = layer.stride or layer.kernel_size, layer.padding or (0,) * rank
    return (shape[0], *_positions(node, shape[1:], layer.kernel_size, stride, padding, (1,) * rank)), 0


def _group_norm(node: Node, layer: wire.GroupNorm, reads: list[Value]) -> tuple[Shape, int]:
    shape = reads[0].shape
    _require_width(node, shape[0], "num_channels", layer.num_channels)
    if layer.num_channels % layer.num_groups:
        raise ArchitectureRefused(f"{node.where}: num_groups must divide num_channels")
    if math.prod(shape) == layer.num_groups:
        raise ArchitectureRefused(f"{node.where} would normalise single numbers; take fewer groups")
    return shape, 2 * layer.num_channels * layer.affine


def _last_norm(node: Node, layer: wire.LayerNorm | wire.RMSNorm, reads: list[Value]) -> tuple[Shape, int]:
    shape, over = reads[0].shape, layer.normalized_shape
    if shape[-len(over) :] != over:
        raise ArchitectureRefused(f"{node.where} has normalized_shape {over} but gets {shape}; end as that does")
    return shape, math.prod(over) * layer.affine * (2 if isinstance(layer, wire.LayerNorm) else 1)


def _positional(node: Node, layer: wire.PositionalEmbedding, reads: list[Value]) -> tuple[Shape, int]:
    shape = _sequence(node, reads[0], "embedding_dim", layer.embedding_dim)
    if shape[0] > layer.length:
        raise ArchitectureRefused(f"{node.where} has length {layer.length} but gets {shape[0]}; set length={shape[0]}")
    return shape, layer.length * layer.embedding_dim


def _sequence(node: Node, value: Value, field: str, declared: int) -> Shape:
    _require_rank(node, value.shape, 2, "a sequence, (length, width),")
    _require_width(node, value.shape[1], field, declared)
    return value.shape


def _recurrent(node: Node, layer: wire.LSTM | wire.GRU | wire.RNN, reads: list[Value]) -> tuple[Shape, int]:
    length, width = _sequence(node, reads[0], "input_size", layer.input_size)
    gates = _GATES[layer.type] * layer.hidden_size
    directions = 2 if layer.bidirectional else 1
    parameters = 0
    for depth in range(layer.num_layers):
        entering = width if not depth else directions * layer.hidden_size
        parameters += directions * gates * (entering + layer.hidden_size + 2 * layer.bias)
    out = directions * layer.hidden_size
    return ((length, out) if layer.output == "sequence" else (out,)), parameters


def _require_mask(node: Node, reads: list[Value]) -> None:
    if len(reads) > 1 and not (reads[1].indices and reads[1].shape == reads[0].shape[:1]):
        raise ArchitectureRefused(
            f"{node.where} reads shape {reads[1].shape} to tell which positions are there; let it be the tokens of that sequence"
        )


def _attention(node: Node, layer: wire.MultiheadAttention, reads: list[Value]) -> tuple[Shape, int]:
    shape, width = _sequence(node, reads[0], "embed_dim", layer.embed_dim), layer.embed_dim
    _require_mask(node, reads)
    if width % layer.num_heads:
        raise ArchitectureRefused(f"{node.where}: num_heads must divide embed_dim")
    return shape, 4 * width * (width + layer.bias)


def _transformer(node: Node, layer: wire.TransformerLayer, reads: list[Value]) -> tuple[Shape, int]:
    shape, width, inner = _sequence(node, reads[0], "d_model", layer.d_model), layer.d_model, layer.dim_feedforward
    _require_mask(node, reads)
    if width % layer.nhead:
        raise ArchitectureRefused(f"{node.where}: nhead must divide d_model")
    return shape, 4 * width * (width + 1) + inner * (width + 1) + width * (inner + 1) + 4 * width


def _sequence_pool(node: Node, layer: wire.SequencePool, reads: list[Value]) -> tuple[Shape, int]:
    _require_rank(node, reads[0].shape, 2, "a sequence, (length, width),")
    _require_mask(node, reads)
    return reads[0].shape[1:], 0


def _together(node: Node, layer: wire.Add | wire.Multiply, reads: list[Value]) -> tuple[Shape, int]:
    if len({each.shape for each in reads}) > 1:
        told = ", ".join(str(each.shape) for each in reads)
        raise ArchitectureRefused(f"{node.where} reads layers of one shape but gets {told}; bring them to one")
    return reads[0].shape, 0


def _concatenate(node: Node, layer: wire.Concatenate, reads: list[Value]) -> tuple[Shape, int]:
    shapes, dim = [each.shape for each in reads], layer.dim
    if any(len(shape) <= dim for shape in shapes) or len({(*s[:dim], *s[dim + 1 :]) for s in shapes}) > 1:
        told = ", ".join(map(str, shapes))
        raise ArchitectureRefused(f"{node.where} joins along dimension {dim} and gets {told}; the others must be equal")
    return (*shapes[0][:dim], sum(shape[dim] for shape in shapes), *shapes[0][dim + 1 :]), 0


def _inside(layer: wire.Layer, first: Value) -> int:
    """The numbers of one example that a layer makes on the way to what it gives."""
    match layer:
        case wire.MultiheadAttention():
            return layer.num_heads * first.shape[0] ** 2
        case wire.TransformerLayer():
            return first.shape[0] * (layer.nhead * first.shape[0] + layer.dim_feedforward)
        case wire.LSTM() | wire.GRU() | wire.RNN():
            gates = _GATES[layer.type] * (2 if layer.bidirectional else 1)
            return first.shape[0] * gates * layer.hidden_size * layer.num_layers
        case wire.Embedding() | wire.PositionalEmbedding():
            return first.shape[0] ** 2 if first.shape else 0  # which positions are alike, for clipping
        case wire.Linear() if len(first.shape) == 2:
            return min(2 * first.shape[0] ** 2, layer.in_features * layer.out_features)  # for clipping
        case wire.HashedText():
            return 32 * first.shape[0]
        case wire.Scattering():
            return 16 * math.prod(first.shape)
        case wire.LogMel():
            return first.shape[0] * 8 + first.shape[0] // hop_of(first.audio_rate) * layer.bands
        case _:
            return 0


def _scattering(node: Node, layer: wire.Scattering, reads: list[Value]) -> tuple[Shape, int]:
    shape = reads[0].shape
    if len(shape) not in (2, 3) or min(shape[-2:]) < LEAST_IMAGE:
        raise _refused(
            node,
            f"an image of at least {LEAST_IMAGE} x {LEAST_IMAGE}",
            f"shape {shape}",
            "flatten it, and read it as numbers",
        )
    geometry = geometry_of(shape)
    if geometry.channels > MOST_CHANNELS or math.prod(geometry.grid) > MOST_CELLS:
        raise _refused(
            node,
            f"an image of at most {MOST_CHANNELS} channels, whose sides are not too unequal",
            f"shape {shape}",
            "crop it, or pad",
        )
    return (geometry.features,), 0


def _log_mel(node: Node, layer: wire.LogMel, reads: list[Value]) -> tuple[Shape, int]:
    if not reads[0].audio_rate:
        raise _refused(node, "a recording", "something else", "let it read a column of audio")
    return (layer.bands, layer.frames), 0


_SHAPES: Mapping[type[Any], Callable[[Node, Any, list[Value]], tuple[Shape, int]]] = {
    **dict.fromkeys(
        (
            wire.ReLU,
            wire.LeakyReLU,
            wire.ELU,
            wire.GELU,
            wire.SiLU,
            wire.Sigmoid,
            wire.Tanh,
            wire.Softmax,
            wire.Dropout,
        ),
        _same,
    ),
    wire.Rescale: _rescale,
    wire.Flatten: _flatten,
    wire.Reshape: _reshape,
    wire.Permute: _permute,
    wire.Linear: _linear,
    wire.Conv1d: _convolution,
    wire.Conv2d: _convolution,
    wire.MaxPool: _pool,
    wire.AveragePool: _pool,
    wire.GroupNorm: _group_norm,
    wire.LayerNorm: _last_norm,
    wire.RMSNorm: _last_norm,
    wire.PositionalEmbedding: _positional,
    wire.LSTM: _recurrent,
    wire.GRU: _recurrent,
    wire.RNN: _recurrent,
    wire.MultiheadAttention: _attention,
    wire.TransformerLayer: _transformer,
    wire.SequencePool: _sequence_pool,
    wire.Add: _together,
    wire.Multiply: _together,
    wire.Concatenate: _concatenate,
    wire.Scattering: _scattering,
    wire.LogMel: _log_mel,
}


def _check_output(architecture: Architecture, value: Value) -> None:
    match architecture.output, architecture.loss:
        case CategoryColumn() as output, "cross_entropy":
            width = len(output.values)
        case CategoryColumn() as output, "binary_cross_entropy":
            width = 1
            if len(output.values) != 2:
                raise ArchitectureRefused(
                    f"binary_cross_entropy tells two values apart, and {architecture.target!r} has {len(output.values)}; take "
                    "cross_entropy"
                )
        case NumberColumn() as output, "mean_squared_error" | "huber":
            width = 1
            if output.high - output.low > _RANGE_LIMIT:
                raise ArchitectureRefused(
                    f"the range of {architecture.target!r} is over {_RANGE_LIMIT:g}; declare a narrower one"
                )
        case output, loss:
            raise ArchitectureRefused(
                f"a {output.type} cannot be learnt by {loss}; categories take cross_entropy or binary_cross_entropy, numbers "
                "take mean_squared_error or huber"
            )
    if value.shape != (width,) or value.indices:
        cure = f"end with a linear layer of out_features={width}"
        if len(value.shape) > 1 and value.shape[-1] == width:
            cure = "put sequence_pool, average_pool or flatten before the last linear layer"
        raise ArchitectureRefused(
            f"the last layer gives shape {value.shape}, but {architecture.target!r} needs ({width},); {cure}"
        )
    last = architecture.layers[-1]
    if isinstance(last, wire.Softmax | wire.Sigmoid) and isinstance(architecture.output, CategoryColumn):
        raise ArchitectureRefused(
            f"the last layer is a {last.type}, and {architecture.loss} applies its own to what it gets; leave it out"
        )
