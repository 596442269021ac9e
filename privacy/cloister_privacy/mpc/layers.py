"""Each layer of the model language on shares. Knows layers one by one; nothing of the graph that they stand in, and no link.

A value has the network's fraction bits, or twice as many after a product: whoever multiplies it truncates it first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from cloister.wire import layers as wire
from cloister_privacy.mpc import functions
from cloister_privacy.mpc.computation import Computation, Shared
from cloister_privacy.mpc.products import Along, Convolution, Lookup, Transposed
from cloister_privacy.mpc.recurrent import recurrent
from cloister_privacy.mpc.ring import windows

__all__ = ["RUNS", "is_added"]

_BEYOND = 1024.0
"""Taken from what must not be the largest."""

_FLOOR = 2**59
"""What a padded place of max pooling is below nothing by, in units of the last place."""

_VARIANCE_BITS = 12
"""A norm takes variances up to 2^12."""

Run = Callable[[Computation, Any, str, Sequence[Shared]], Shared]


def is_added(layer: wire.Layer, name: str) -> bool:
    """Whether a weight, named as in its module, is only ever added: it needs no mask."""
    return isinstance(layer, wire.PositionalEmbedding) or name.rpartition(".")[2].startswith("bias")


def _linear(c: Computation, layer: wire.Linear, prefix: str, reads: Sequence[Shared]) -> Shared:
    return _affine(c, reads[0], prefix, has_bias=layer.bias)


def _affine(c: Computation, value: Shared, prefix: str, *, has_bias: bool = True) -> Shared:
    product = c.weighed(value, prefix + "weight", Transposed())
    return c.sum(product, c.weight(prefix + "bias")) if has_bias else product


def _convolution(c: Computation, layer: wire.Conv1d | wire.Conv2d, prefix: str, reads: Sequence[Shared]) -> Shared:
    numbers = (layer.stride, layer.padding, layer.dilation)
    stride, padding, dilation = (each if isinstance(each, tuple) else (1, each) for each in numbers)
    if isinstance(layer, wire.Conv1d):
        padding = (0, padding[1])
    product = c.weighed(reads[0], prefix + "weight", Convolution(stride, padding, dilation, layer.groups))
    if not layer.bias:
        return product
    bias = c.weight(prefix + "bias")
    return c.sum(product, bias.with_share(bias.share.reshape(-1, *(1,) * (len(product.shape) - 2))))


def _windows(c: Computation, layer: wire.MaxPool | wire.AveragePool, value: Shared, fill: int) -> Shared:
    """[n, c, rows, columns, places of a window]; one row for what has one dimension."""
    kernel, stride = layer.kernel_size, layer.stride or layer.kernel_size
    padding = layer.padding or (0,) * len(kernel)
    share = value.share
    if len(kernel) == 1:
        share, kernel, stride, padding = share[:, :, None], (1, *kernel), (1, *stride), (0, *padding)
    found = windows(
        share,
        kernel=(kernel[0], kernel[-1]),
        stride=(stride[0], stride[-1]),
        padding=(padding[0], padding[-1]),
        fill=fill if c.party == 0 else 0,
    )
    return value.with_share(found.reshape(*found.shape[:4], -1))


def _max_pool(c: Computation, layer: wire.MaxPool, prefix: str, reads: Sequence[Shared]) -> Shared:
    found = functions.maximum(c, _windows(c, layer, reads[0], 2**64 - _FLOOR), -1)
    return found.with_share(found.share[:, :, 0]) if len(layer.kernel_size) == 1 else found


def _average_pool(c: Computation, layer: wire.AveragePool, prefix: str, reads: Sequence[Shared]) -> Shared:
    if not layer.kernel_size:
        flat = reads[0].share.reshape(*reads[0].shape[:2], -1)
        return c.times(reads[0].with_share(flat.sum(axis=2, dtype=np.uint64)), 1 / flat.shape[2])
    found = _windows(c, layer, reads[0], 0)
    summed = found.share.sum(axis=-1, dtype=np.uint64)
    if len(layer.kernel_size) == 1:
        summed = summed[:, :, 0]
    return c.times(found.with_share(summed), 1 / found.shape[-1])


def _normalized(c: Computation, value: Shared, eps: float, *, is_centred: bool) -> Shared:
    """Over the last axis: (x - mean) / sqrt(variance + eps). With S the sum of squares over `count` it is sqrt(count) / sqrt(S + count
    eps), so that nothing small is divided."""
    count = value.shape[-1]
    if is_centred:
        total = value.with_share(value.share.sum(axis=-1, dtype=np.uint64)[..., None])
        value = c.difference(value, c.times(total, 1 / count))
    value = c.truncated(value)
    squares = c.product(value, value)
    total = squares.with_share(squares.share.sum(axis=-1, dtype=np.uint64)[..., None])
    root = functions.inverse_root(
        c,
        c.plus(total, count * eps),
        least=math.floor(math.log2(count * eps)),
        most=math.ceil(math.log2(count)) + _VARIANCE_BITS,
        scale=math.sqrt(count),
    )
    return c.product(value, c.truncated(root))


def _scaled(c: Computation, value: Shared, prefix: str, *, shape: tuple[int, ...], has_bias: bool) -> Shared:
    """Times a weight and plus a bias, each laid along the dimensions that `shape` has."""
    product = c.weighed(value, prefix + "weight", Along(len(shape) - 1))
    if not has_bias:
        return product
    bias = c.weight(prefix + "bias")
    return c.sum(product, bias.with_share(bias.share.reshape(shape) if len(shape) > 1 else bias.share))


def _layer_norm(c: Computation, layer: wire.LayerNorm | wire.RMSNorm, prefix: str, reads: Sequence[Shared]) -> Shared:
    value, dims = reads[0], len(layer.normalized_shape)
    flat = value.with_share(value.share.reshape(*value.shape[:-dims], -1))
    found = _normalized(c, flat, layer.eps, is_centred=isinstance(layer, wire.LayerNorm))
    found = found.with_share(found.share.reshape(value.shape))
    if not layer.affine:
        return found
    return _scaled(c, found, prefix, shape=(-1,), has_bias=isinstance(layer, wire.LayerNorm))


def _group_norm(c: Computation, layer: wire.GroupNorm, prefix: str, reads: Sequence[Shared]) -> Shared:
    value = reads[0]
    flat = value.with_share(value.share.reshape(len(value.share), layer.num_groups, -1))
    found = _normalized(c, flat, layer.eps, is_centred=True)
    found = found.with_share(found.share.reshape(value.shape))
    if not layer.affine:
        return found
    return _scaled(c, found, prefix, shape=(-1, *(1,) * (len(value.shape) - 2)), has_bias=True)


def _embedding(c: Computation, layer: wire.Embedding, prefix: str, reads: Sequence[Shared]) -> Shared:
    one_hot = reads[0]
    if len(one_hot.shape) == 2:
        found = c.weighed(one_hot.with_share(one_hot.share[:, None]), prefix + "weight", Lookup())
        return found.with_share(found.share[:, 0])
    return c.weighed(one_hot, prefix + "weight", Lookup())


def _positional(c: Computation, layer: wire.PositionalEmbedding, prefix: str, reads: Sequence[Shared]) -> Shared:
    table = c.weight(prefix + "table.weight")
    return c.sum(reads[0], table.with_share(table.share[: reads[0].shape[1]]))


def _absent(c: Computation, tokens: Shared) -> Shared:
    """[n, T], 1 where a position is not there, of one-hot tokens; the first always is."""
    share = tokens.share[..., 0].copy()
    share[:, 0] = 0
    return tokens.with_share(share)


def _attention(c: Computation, layer: Any, prefix: str, reads: Sequence[Shared]) -> Shared:
    is_whole = isinstance(layer, wire.MultiheadAttention)
    heads, has_bias = (layer.num_heads, layer.bias) if is_whole else (layer.nhead, True)
    value = reads[0]
    n, length, width = value.shape
    # The queries' weights were divided by the root of a head's width before they were shared.
    projected = c.truncated(_affine(c, value, prefix + "in_proj.", has_bias=has_bias))
    parts = projected.share.reshape(n, length, 3, heads, width // heads).transpose(2, 0, 3, 1, 4)
    query, key, inner = (projected.with_share(np.ascontiguousarray(part)) for part in parts)
    scores = c.matmul(query, key.with_share(np.ascontiguousarray(key.share.swapaxes(-1, -2))))
    if len(reads) > 1:
        absent = c.widened(_absent(c, reads[1]), scores.bits).share[:, None, None]
        scores = scores.with_share(scores.share - absent * np.uint64(_BEYOND))
    allowed = np.tril(np.ones((length, length), dtype=np.bool_)) if layer.causal else None
    attended = c.matmul(c.truncated(functions.softmax(c, scores, allowed=allowed)), inner)
    joined = attended.with_share(attended.share.transpose(0, 2, 1, 3).reshape(n, length, width))
    return _affine(c, joined, prefix + "out_proj.", has_bias=has_bias)


def _transformer(c: Computation, layer: wire.TransformerLayer, prefix: str, reads: Sequence[Shared]) -> Shared:
    value = reads[0]

    def normed(x: Shared, which: str) -> Shared:
        found = _normalized(c, x, layer.eps, is_centred=True)
        return _scaled(c, found, f"{prefix}{which}.", shape=(-1,), has_bias=True)

    def attended(x: Shared) -> Shared:
        return _attention(c, layer, prefix + "attention.", [x, *reads[1:]])

    def fed(x: Shared) -> Shared:
        hidden = _affine(c, x, prefix + "linear1.")
        active = functions.relu(c, hidden) if layer.activation == "relu" else functions.gelu(c, hidden)
        return _affine(c, active, prefix + "linear2.")

    if layer.norm_first:
        value = c.truncated(c.sum(value, attended(normed(value, "norm1"))))
        return c.sum(value, fed(normed(value, "norm2")))
    value = c.truncated(normed(c.sum(value, attended(c.truncated(value))), "norm1"))
    return normed(c.sum(value, fed(value)), "norm2")


def _sequence_pool(c: Computation, layer: wire.SequencePool, prefix: str, reads: Sequence[Shared]) -> Shared:
    value, length = reads[0], reads[0].shape[1]
    if len(reads) == 1:
        if layer.how == "max":
            return functions.maximum(c, value, 1)
        if layer.how == "last":
            return value.with_share(value.share[:, -1])
        return c.times(value.with_share(value.share.sum(axis=1, dtype=np.uint64)), 1 / length)
    absent = _absent(c, reads[1])
    if layer.how == "max":
        lowered = c.widened(absent, value.bits).share[..., None] * np.uint64(_BEYOND)
        return functions.maximum(c, c.difference(value, Shared(lowered, max(value.bits, absent.bits))), 1)
    there = c.plus(absent.with_share(np.uint64(0) - absent.share), 1.0)
    value = c.truncated(value)
    if layer.how == "last":
        # Positions that are there come first: the last is there, and the one behind it is not.
        after = np.concatenate([there.share[:, 1:], np.zeros_like(there.share[:, :1])], axis=1)
        chosen = c.product(value, there.with_share((there.share - after)[..., None]))
        return chosen.with_share(chosen.share.sum(axis=1, dtype=np.uint64))
    kept = c.product(value, there.with_share(there.share[..., None]))
    summed = c.truncated(kept.with_share(kept.share.sum(axis=1, dtype=np.uint64)))
    count = there.with_share(there.share.sum(axis=1, dtype=np.uint64)[:, None])
    share = functions.inverse(c, count, least=-1, most=math.ceil(math.log2(length + 1)))
    return c.product(summed, c.truncated(share))


def _multiply(c: Computation, layer: wire.Multiply, prefix: str, reads: Sequence[Shared]) -> Shared:
    found = reads[0]
    for other in reads[1:]:
        found = c.product(c.truncated(found), c.truncated(other))
    return found


def _concatenate(c: Computation, layer: wire.Concatenate, prefix: str, reads: Sequence[Shared]) -> Shared:
    bits = max(each.bits for each in reads)
    return Shared(np.concatenate([c.widened(each, bits).share for each in reads], axis=layer.dim + 1), bits)


def _rescale(c: Computation, layer: wire.Rescale, prefix: str, reads: Sequence[Shared]) -> Shared:
    slope = (layer.to_high - layer.to_low) / (layer.high - layer.low)
    return c.plus(c.times(c.plus(reads[0], -layer.low), slope), layer.to_low)


def _reshaped(shape: Callable[[Any, Shared], tuple[int, ...]]) -> Run:
    return lambda c, layer, prefix, reads: reads[0].with_share(reads[0].share.reshape(shape(layer, reads[0])))


RUNS: Mapping[type[Any], Run] = {
    wire.Rescale: _rescale,
    wire.Flatten: _reshaped(lambda layer, value: (value.shape[0], -1)),
    wire.Reshape: _reshaped(lambda layer, value: (value.shape[0], *layer.shape)),
    wire.Permute: lambda c, layer, prefix, reads: reads[0].with_share(
        np.ascontiguousarray(reads[0].share.transpose(0, *(dim + 1 for dim in layer.dims)))
    ),
    wire.Linear: _linear,
    wire.Conv1d: _convolution,
    wire.Conv2d: _convolution,
    wire.MaxPool: _max_pool,
    wire.AveragePool: _average_pool,
    wire.ReLU: lambda c, layer, prefix, reads: functions.relu(c, reads[0]),
    wire.LeakyReLU: lambda c, layer, prefix, reads: functions.leaky_relu(c, reads[0], layer.slope),
    wire.ELU: lambda c, layer, prefix, reads: functions.elu(c, reads[0], layer.alpha),
    wire.GELU: lambda c, layer, prefix, reads: functions.gelu(c, reads[0]),
    wire.SiLU: lambda c, layer, prefix, reads: functions.silu(c, reads[0]),
    wire.Sigmoid: lambda c, layer, prefix, reads: functions.tanh_half(c, reads[0], gain=0.5, offset=0.5),
    wire.Tanh: lambda c, layer, prefix, reads: functions.tanh(c, reads[0]),
    wire.Softmax: lambda c, layer, prefix, reads: functions.softmax(c, reads[0]),
    wire.Dropout: lambda c, layer, prefix, reads: reads[0],
    wire.GroupNorm: _group_norm,
    wire.LayerNorm: _layer_norm,
    wire.RMSNorm: _layer_norm,
    wire.Embedding: _embedding,
    wire.PositionalEmbedding: _positional,
    wire.LSTM: recurrent,
    wire.GRU: recurrent,
    wire.RNN: recurrent,
    wire.MultiheadAttention: _attention,
    wire.TransformerLayer: _transformer,
    wire.SequencePool: _sequence_pool,
    wire.Add: lambda c, layer, prefix, reads: c.sum(*reads),
    wire.Multiply: _multiply,
    wire.Concatenate: _concatenate,
}
