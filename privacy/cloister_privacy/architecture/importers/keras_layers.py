"""Keras' layers, in the layers of the language: images are (height, width, channels) to it, and gates in another order.

Each option that changes what is computed is mapped or refused.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cloister.wire import layers as wire
from cloister_privacy.architecture.importers import blocks, operations
from cloister_privacy.architecture.importers.draft import NotMapped, Value, dimension, value_of
from cloister_privacy.architecture.importers.keras_graph import Handler, Node
from cloister_privacy.architecture.importers.keras_operations import activated

__all__ = ["LAYERS", "tokens_of"]

_Array = NDArray[np.float32]


def _required(array: _Array | None, name: str) -> _Array:
    if array is None:
        raise NotMapped(f"has no {name}; call the model once, so that it is built")
    return array


def _channels_first(node: Node, value: Value, rank: int) -> Value:
    """(..., channels) as (channels, ...), where the layer has its channels last."""
    if len(value.shape) != rank + 1:
        raise NotMapped(f"reads {value.shape}, which is not {rank} dimensions and channels")
    if getattr(node.operation, "data_format", "channels_last") == "channels_first":
        return value
    return node.draft.permute(value, (rank, *range(rank)))


def _channels_back(node: Node, value: Value) -> Value:
    """The reverse."""
    rank = len(value.shape) - 1
    if getattr(node.operation, "data_format", "channels_last") == "channels_first":
        return value
    return node.draft.permute(value, (*range(1, rank + 1), 0))


def _dense(node: Node, inputs: Any, **kwargs: Any) -> Value:
    layer = node.operation
    kernel = _required(node.take("kernel"), "kernel")
    made = blocks.linear(node.draft, value_of(inputs), kernel.T, node.take("bias"), is_frozen=node.is_frozen)
    return activated(node, made, layer.activation)


def _convolution(node: Node, inputs: Any) -> Value:
    layer, rank = node.operation, node.operation.rank
    kernel = _required(node.take("kernel"), "kernel")
    weight = np.transpose(kernel, (rank + 1, rank, *range(rank)))
    made = _convolved(
        node, _channels_first(node, value_of(inputs), rank), weight, node.take("bias"), groups=layer.groups
    )
    return activated(node, _channels_back(node, made), layer.activation)


def _convolved(node: Node, value: Value, weight: _Array, bias: _Array | None, *, groups: int) -> Value:
    layer = node.operation
    strides, dilation = _numbers(layer.strides, weight.ndim - 2), _numbers(layer.dilation_rate, weight.ndim - 2)
    padding = [(0, 0)] * len(strides)
    if layer.padding == "same":
        if any(stride > 1 for stride in strides):
            raise NotMapped("has padding 'same' with strides; pad by ZeroPadding, and take padding 'valid'")
        reach = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
        padding = [(each // 2, each - each // 2) for each in reach]
    elif layer.padding != "valid":
        raise NotMapped(f"has padding {layer.padding!r}; take 'valid', or 'same' with an odd kernel")
    return blocks.convolution(
        node.draft,
        value,
        weight,
        bias,
        stride=strides,
        padding=padding,
        dilation=dilation,
        groups=groups,
        is_frozen=node.is_frozen,
    )


def _numbers(given: Any, rank: int) -> list[int]:
    return [int(given)] * rank if isinstance(given, int) else [int(each) for each in given]


def _depthwise_kernel(kernel: _Array) -> _Array:
    """(..., channels, multiplier) as torch's (channels * multiplier, 1, ...)."""
    rank = kernel.ndim - 2
    moved = np.transpose(kernel, (rank, rank + 1, *range(rank)))
    return moved.reshape(-1, 1, *kernel.shape[:rank])


def _depthwise(node: Node, inputs: Any) -> Value:
    layer = node.operation
    kernel = _required(node.take("kernel"), "kernel")
    value = _channels_first(node, value_of(inputs), layer.rank)
    made = _convolved(node, value, _depthwise_kernel(kernel), node.take("bias"), groups=value.shape[0])
    return activated(node, _channels_back(node, made), layer.activation)


def _separable(node: Node, inputs: Any) -> Value:
    layer, rank = node.operation, node.operation.rank
    value = _channels_first(node, value_of(inputs), rank)
    deep = _depthwise_kernel(_required(node.take("depthwise_kernel"), "kernel"))
    made = _convolved(node, value, deep, None, groups=value.shape[0])
    point = np.transpose(_required(node.take("pointwise_kernel"), "kernel"), (rank + 1, rank, *range(rank)))
    made = blocks.convolution(
        node.draft,
        made,
        point,
        node.take("bias"),
        stride=[1] * rank,
        padding=[(0, 0)] * rank,
        dilation=[1] * rank,
        is_frozen=node.is_frozen,
    )
    return activated(node, _channels_back(node, made), layer.activation)


def _pool(how: Literal["max", "average"], rank: int) -> Handler:
    def run(node: Node, inputs: Any) -> Value:
        layer = node.operation
        kernel = _numbers(layer.pool_size, rank)
        strides = _numbers(layer.strides if layer.strides is not None else layer.pool_size, rank)
        value = _channels_first(node, value_of(inputs), rank)
        if layer.padding == "same" and (
            strides != kernel or any(size % each for size, each in zip(value.shape[1:], kernel, strict=True))
        ):
            raise NotMapped("has padding 'same' that pads; take padding 'valid'")
        made = blocks.pool(node.draft, value, how, kernel=kernel, stride=strides, padding=[0] * rank)
        return _channels_back(node, made)

    return run


def _global_pool(how: Literal["mean", "max"], rank: int) -> Handler:
    def run(node: Node, inputs: Any, mask: Any = None) -> Value:
        value, draft, mask = value_of(inputs), node.draft, mask or node.mask
        first = 1 if getattr(node.operation, "data_format", "channels_last") == "channels_first" else 0
        if mask is not None and how == "mean":
            pooled = draft.emit(wire.SequencePool, value, tokens_of(mask), how="mean")
        else:
            pooled = operations.reduce(draft, value, range(first, first + rank), how)
        return draft.reshape(pooled, node.shape)

    return run


def tokens_of(mask: Any) -> Value:
    """The tokens whose zeros a mask hides."""
    tokens = getattr(mask, "tokens", None)
    if not isinstance(tokens, Value):
        raise NotMapped("reads a mask that is not of a column of tokens; make the embedding with mask_zero")
    return tokens


def _activation(node: Node, inputs: Any) -> Value:
    return activated(node, value_of(inputs), node.operation.activation)


def _relu(node: Node, inputs: Any) -> Value:
    layer = node.operation
    if layer.max_value is not None or layer.threshold:
        raise NotMapped("has max_value or threshold; the language has a plain ReLU or a leaky one")
    if layer.negative_slope:
        return node.draft.pointwise(wire.LeakyReLU, value_of(inputs), slope=float(layer.negative_slope))
    return node.draft.pointwise(wire.ReLU, value_of(inputs))


def _leaky_relu(node: Node, inputs: Any) -> Value:
    return node.draft.pointwise(wire.LeakyReLU, value_of(inputs), slope=float(node.operation.negative_slope))


def _elu(node: Node, inputs: Any) -> Value:
    return node.draft.pointwise(wire.ELU, value_of(inputs), alpha=float(node.operation.alpha))


def _softmax(node: Node, inputs: Any, mask: Any = None) -> Value:
    if mask is not None or node.mask is not None:
        raise NotMapped("has a mask; the language has a softmax over all")
    return operations.softmax(node.draft, value_of(inputs), dimension(value_of(inputs), node.operation.axis))


def _dropout(node: Node, inputs: Any) -> Value:
    layer = node.operation
    if getattr(layer, "noise_shape", None) is not None or type(layer).__name__ != "Dropout":
        node.draft.warn("drops whole channels; here single numbers are dropped, as many on average")
    rate = float(layer.rate)
    return node.draft.pointwise(wire.Dropout, value_of(inputs), p=rate) if rate else value_of(inputs)


def _same(node: Node, inputs: Any, **kwargs: Any) -> Any:
    return inputs


def _reshape(node: Node, inputs: Any) -> Value:
    value = value_of(inputs)
    if (
        type(node.operation).__name__ == "Flatten"
        and node.operation.data_format == "channels_first"
        and len(value.shape) > 1
    ):
        value = node.draft.permute(value, (*range(1, len(value.shape)), 0))
    return node.draft.reshape(value, node.shape)


def _permute(node: Node, inputs: Any) -> Value:
    return node.draft.permute(value_of(inputs), tuple(dim - 1 for dim in node.operation.dims))


def _rescaling(node: Node, inputs: Any) -> Value:
    layer, value = node.operation, value_of(inputs)
    scale, offset = node.walk.numbers(layer.scale), node.walk.numbers(layer.offset)
    if scale.size == 1 and offset.size == 1:
        return operations.rescale(node.draft, value, float(np.ravel(layer.scale)[0]), float(np.ravel(layer.offset)[0]))
    scale, offset = np.broadcast_arrays(scale, offset)
    return operations.affine(node.draft, value, scale, offset, is_trained=False)


def _normalization(node: Node, inputs: Any) -> Value:
    layer, value = node.operation, value_of(inputs)
    if layer.invert:
        raise NotMapped("inverts a normalisation; use Rescaling")
    mean, deviation = (node.walk.numbers(each) for each in (layer.mean, layer.variance))
    scale = 1 / np.maximum(
        np.sqrt(deviation), np.float32(1e-7)
    )  # keras.backend.epsilon(), so that it never divides by 0
    scale, shift = np.broadcast_arrays(scale, -mean * scale)
    return operations.affine(node.draft, value, scale[0], shift[0], is_trained=False)


def _merge(fold: Any, *, share: bool = False) -> Handler:
    def run(node: Node, inputs: Any, mask: Any = None) -> Value:
        values = [value_of(each) for each in inputs]
        merged = values[0]
        for each in values[1:]:
            merged = fold(node.draft, merged, each)
        return operations.rescale(node.draft, merged, 1 / len(values)) if share else merged

    return run


def _subtract(draft: Any, first: Value, second: Value) -> Value:
    return operations.add(draft, first, operations.rescale(draft, second, -1.0))


def _concatenate(node: Node, inputs: Any, mask: Any = None) -> Value:
    values = [value_of(each) for each in inputs]
    return operations.concatenate(node.draft, values, dimension(values[0], node.operation.axis))


def _layer_norm(node: Node, inputs: Any, **kwargs: Any) -> Value:
    layer, value = node.operation, value_of(inputs)
    axes = layer.axis if isinstance(layer.axis, list | tuple) else [layer.axis]
    dims = sorted(dimension(value, axis) for axis in axes)
    if dims != list(range(len(value.shape) - len(dims), len(value.shape))):
        raise NotMapped(f"normalises over axis {layer.axis}; the language normalises over the last ones: axis=-1")
    is_rms = type(layer).__name__ == "RMSNormalization"
    if not is_rms and getattr(layer, "rms_scaling", False):
        raise NotMapped("has rms_scaling; use RMSNormalization")
    scale = node.take("scale") if is_rms else node.take("gamma") if layer.scale else None
    shift = None if is_rms or not layer.center else node.take("beta")
    if not is_rms and layer.scale != layer.center:
        node.draft.warn("has only one of scale and center; here it has both, and the other starts from 1 or 0")
    kind: Any = wire.RMSNorm if is_rms else wire.LayerNorm
    shape = value.shape[dims[0] :]
    return blocks.last_norm(
        node.draft,
        value,
        kind,
        shape,
        scale,
        shift,
        eps=float(layer.epsilon),
        is_frozen=node.is_frozen and (scale is not None or shift is not None),
    )


def _group_norm(node: Node, inputs: Any) -> Value:
    layer, value = node.operation, value_of(inputs)
    axis, rank = dimension(value, layer.axis), len(value.shape)
    rest = [dim for dim in range(rank) if dim != axis]
    first = node.draft.permute(value, (axis, *rest))
    groups = first.shape[0] if layer.groups == -1 else int(layer.groups)
    scale = node.take("gamma") if layer.scale else None
    shift = node.take("beta") if layer.center else None
    made = blocks.group_norm(
        node.draft, first, groups, scale, shift, eps=float(layer.epsilon), is_frozen=node.is_frozen
    )
    return node.draft.permute(made, tuple(int(dim) for dim in np.argsort((axis, *rest))))


def _batch_norm(node: Node, inputs: Any, **kwargs: Any) -> Value:
    raise NotMapped(
        "normalises over the examples of a batch, so that none can be clipped by itself; use GroupNormalization instead"
    )


def _embedding(node: Node, inputs: Any) -> Value:
    table = _required(node.take("embeddings"), "embeddings")
    return node.draft.embedding(value_of(inputs), table, padding_idx=None, is_frozen=node.is_frozen)


def _padding(rank: int) -> Handler:
    def run(node: Node, inputs: Any) -> Value:
        value, amounts = _channels_first(node, value_of(inputs), rank), node.operation.padding
        pairs: Sequence[Any] = [amounts] if rank == 1 else amounts
        pad = ((0, 0), *((int(low), int(high)) for low, high in pairs))
        return _channels_back(node, Value(value.key, value.held, value.dims, pad))

    return run


def _time_distributed(node: Node, inputs: Any, mask: Any = None) -> Value:
    inner = node.operation.layer
    if type(inner).__name__ != "Dense":
        raise NotMapped(f"runs {type(inner).__name__} at each step; the language runs Dense so, by itself")
    kernel, bias = _required(node.take("kernel", of=inner), "kernel"), node.take("bias", of=inner)
    made = blocks.linear(node.draft, value_of(inputs), kernel.T, bias, is_frozen=not inner.trainable)
    return activated(node, made, inner.activation)


def _noise(node: Node, inputs: Any) -> Value:
    node.draft.warn("adds noise while it trains; here it does not")
    return value_of(inputs)


LAYERS: dict[str, Handler] = {
    "Dense": _dense,
    "Conv1D": _convolution,
    "Conv2D": _convolution,
    "DepthwiseConv1D": _depthwise,
    "DepthwiseConv2D": _depthwise,
    "SeparableConv1D": _separable,
    "SeparableConv2D": _separable,
    "MaxPooling1D": _pool("max", 1),
    "MaxPooling2D": _pool("max", 2),
    "AveragePooling1D": _pool("average", 1),
    "AveragePooling2D": _pool("average", 2),
    "GlobalAveragePooling1D": _global_pool("mean", 1),
    "GlobalAveragePooling2D": _global_pool("mean", 2),
    "GlobalMaxPooling1D": _global_pool("max", 1),
    "GlobalMaxPooling2D": _global_pool("max", 2),
    "Activation": _activation,
    "ReLU": _relu,
    "LeakyReLU": _leaky_relu,
    "ELU": _elu,
    "Softmax": _softmax,
    **dict.fromkeys(("Dropout", "SpatialDropout1D", "SpatialDropout2D"), _dropout),
    **dict.fromkeys(("GaussianNoise", "GaussianDropout", "AlphaDropout"), _noise),
    **dict.fromkeys(("Identity", "ActivityRegularization"), _same),
    **dict.fromkeys(("Flatten", "Reshape"), _reshape),
    "Permute": _permute,
    "Rescaling": _rescaling,
    "Normalization": _normalization,
    "Add": _merge(operations.add),
    "Subtract": _merge(_subtract),
    "Multiply": _merge(operations.multiply),
    "Average": _merge(operations.add, share=True),
    "Concatenate": _concatenate,
    "LayerNormalization": _layer_norm,
    "RMSNormalization": _layer_norm,
    "GroupNormalization": _group_norm,
    "BatchNormalization": _batch_norm,
    "Embedding": _embedding,
    "ZeroPadding1D": _padding(1),
    "ZeroPadding2D": _padding(2),
    "TimeDistributed": _time_distributed,
}
