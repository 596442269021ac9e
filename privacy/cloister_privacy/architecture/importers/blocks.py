"""Layers with weights, and pools, as sources have them: arrays in torch's layout in, a step of the draft out."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cloister.wire import layers as wire
from cloister_privacy.architecture.importers.draft import Draft, NotMapped, Shape, Value, Weights

__all__ = [
    "attention",
    "convolution",
    "global_pool",
    "group_norm",
    "last_norm",
    "last_state",
    "linear",
    "pool",
    "recurrent",
    "transformer_layer",
]

_Array = NDArray[np.float32]

_RECURRENT = {"lstm": wire.LSTM, "gru": wire.GRU, "rnn": wire.RNN}


def linear(draft: Draft, value: Value, weight: _Array, bias: _Array | None, *, is_frozen: bool = False) -> Value:
    """y = x W^T + b over the last dimension; `weight` is (out, in)."""
    if not value.shape:
        value = draft.reshape(value, (1,))
    out_features, in_features = weight.shape
    lead = value.shape[:-1]
    rows = value if len(lead) <= 1 else draft.reshape(value, (math.prod(lead), value.shape[-1]))
    made = draft.emit(
        wire.Linear,
        rows,
        weights=_named(weight=weight, bias=bias),
        in_features=in_features,
        out_features=out_features,
        bias=bias is not None,
        frozen=is_frozen,
    )
    return draft.reshape(made, (*lead, out_features))


def convolution(
    draft: Draft,
    value: Value,
    weight: _Array,
    bias: _Array | None,
    *,
    stride: Sequence[int],
    padding: Sequence[tuple[int, int]],
    dilation: Sequence[int],
    groups: int = 1,
    is_frozen: bool = False,
) -> Value:
    """On (channels, ...); `weight` is (out, in / groups, ...). `padding` is in zeros before and after each dimension."""
    rank = weight.ndim - 2
    if rank not in (1, 2):
        raise NotMapped(f"has {rank} dimensions; the language has Conv1d and Conv2d")
    if len(value.shape) != rank + 1:
        raise NotMapped(f"gets {value.shape}; a convolution of {rank} dimensions reads channels and {rank} dimensions")
    outer = value.pad or ((0, 0),) * (rank + 1)
    amounts = [(low + a, high + b) for (low, high), (a, b) in zip(padding, outer[1:], strict=True)]
    if sum(outer[0]) or any(low != high for low, high in amounts):
        raise NotMapped(
            f"pads {amounts}, not as much before as after; take an odd kernel and pad half of it on each side"
        )
    value = replace(value, pad=())
    fields = {
        "kernel_size": weight.shape[2:],
        "stride": tuple(stride),
        "padding": tuple(low for low, _ in amounts),
        "dilation": tuple(dilation),
    }
    return draft.emit(
        wire.Conv1d if rank == 1 else wire.Conv2d,
        value,
        weights=_named(weight=weight, bias=bias),
        in_channels=weight.shape[1] * groups,
        out_channels=weight.shape[0],
        groups=groups,
        bias=bias is not None,
        frozen=is_frozen,
        **({name: each[0] for name, each in fields.items()} if rank == 1 else fields),
    )


def pool(
    draft: Draft,
    value: Value,
    how: Literal["max", "average"],
    *,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
) -> Value:
    """On (channels, ...), over as many dimensions as the kernel has."""
    if len(value.shape) != len(kernel) + 1:
        raise NotMapped(f"gets {value.shape}; a pool of {len(kernel)} dimensions reads channels and as many dimensions")
    return draft.emit(
        wire.MaxPool if how == "max" else wire.AveragePool,
        value,
        kernel_size=tuple(kernel),
        stride=None if tuple(stride) == tuple(kernel) else tuple(stride),
        padding=tuple(padding) if any(padding) else None,
    )


def global_pool(draft: Draft, value: Value, how: Literal["max", "average"], *, sizes: Sequence[int | None]) -> Value:
    """On (channels, ...) to (channels, *sizes): pieces of equal length, and None leaves a dimension as it is."""
    given = value.shape[1:]
    if len(given) != len(sizes):
        raise NotMapped(f"gets {value.shape}; a pool of {len(sizes)} dimensions reads channels and as many dimensions")
    wanted = [size if size is not None else whole for size, whole in zip(sizes, given, strict=True)]
    if any(whole % size for size, whole in zip(wanted, given, strict=True)):
        raise NotMapped(f"pools {given} to {tuple(wanted)}, in pieces of unequal length; pool to 1, or to a divisor")
    kernel = [whole // size for size, whole in zip(wanted, given, strict=True)]
    if all(each == 1 for each in kernel):
        return value
    if how == "average" and set(wanted) == {1}:
        return draft.reshape(draft.emit(wire.AveragePool, value), (value.shape[0], *wanted))
    return pool(draft, value, how, kernel=kernel, stride=kernel, padding=[0] * len(kernel))


def group_norm(
    draft: Draft,
    value: Value,
    groups: int,
    weight: _Array | None,
    bias: _Array | None,
    *,
    eps: float,
    is_frozen: bool = False,
) -> Value:
    """On (channels, ...)."""
    return draft.emit(
        wire.GroupNorm,
        value,
        weights=_scaled(weight, bias),
        num_groups=groups,
        num_channels=value.shape[0],
        eps=eps,
        affine=weight is not None or bias is not None,
        frozen=is_frozen,
    )


def last_norm(
    draft: Draft,
    value: Value,
    kind: type[wire.LayerNorm] | type[wire.RMSNorm],
    shape: Shape,
    weight: _Array | None,
    bias: _Array | None,
    *,
    eps: float,
    is_frozen: bool = False,
) -> Value:
    """Over the last dimensions, of this shape."""
    return draft.emit(
        kind,
        value,
        weights=_scaled(weight, bias),
        normalized_shape=shape,
        eps=eps,
        affine=weight is not None or bias is not None,
        frozen=is_frozen,
    )


def recurrent(
    draft: Draft,
    value: Value,
    kind: Literal["lstm", "gru", "rnn"],
    weights: Weights,
    *,
    input_size: int,
    hidden_size: int,
    num_layers: int = 1,
    has_bias: bool = True,
    is_bidirectional: bool = False,
    is_frozen: bool = False,
    nonlinearity: str | None = None,
) -> Value:
    """On (length, input_size), to (length, width); the weights by the names that torch's module has for them."""
    options: dict[str, Any] = {} if nonlinearity is None else {"nonlinearity": nonlinearity}
    return draft.emit(
        _RECURRENT[kind],
        value,
        weights={f"recurrent.{name}": each for name, each in weights.items()},
        input_size=input_size,
        hidden_size=hidden_size,
        num_layers=num_layers,
        bias=has_bias,
        bidirectional=is_bidirectional,
        frozen=is_frozen,
        **options,
    )


def last_state(draft: Draft, sequence: Value) -> Value:
    """What each direction of the recurrent layer that gave the sequence gives at its last step, side by side."""
    step, read = draft.step(sequence), draft.first_read(sequence)
    if step is None or read is None or not isinstance(step.layer, tuple(_RECURRENT.values())):
        raise NotMapped("takes the last state of what is no recurrent layer")
    fields = step.layer.model_dump(exclude={"type", "name", "reads"}) | {"output": "last"}
    twins = (sequence.key,) if isinstance(sequence.key, int) else ()
    return draft.emit(type(step.layer), read, weights=step.weights, twins=twins, **fields)


def attention(
    draft: Draft,
    value: Value,
    tokens: Value | None,
    weights: Weights,
    *,
    num_heads: int,
    is_causal: bool,
    is_frozen: bool = False,
    twins: tuple[int, ...] = (),
) -> Value:
    """Self-attention on (length, width); the weights by the names that torch's MultiheadAttention has for them."""
    return draft.emit(
        wire.MultiheadAttention,
        value,
        *([] if tokens is None else [tokens]),
        weights=_projections(weights),
        embed_dim=weights["out_proj.weight"].shape[0],
        num_heads=num_heads,
        bias="in_proj_bias" in weights,
        causal=is_causal,
        frozen=is_frozen,
        twins=twins,
    )


def transformer_layer(draft: Draft, value: Value, tokens: Value | None, weights: Weights, **fields: Any) -> Value:
    """On (length, d_model); the weights by the names that torch's TransformerEncoderLayer has for them."""
    named = _projections({name.replace("self_attn.", "attention."): each for name, each in weights.items()})
    return draft.emit(wire.TransformerLayer, value, *([] if tokens is None else [tokens]), weights=named, **fields)


def _projections(weights: Weights) -> Weights:
    """The language's attention projects its input by a linear layer."""
    return {name.replace("in_proj_", "in_proj."): each for name, each in weights.items()}


def _named(**weights: _Array | None) -> dict[str, _Array]:
    return {name: each for name, each in weights.items() if each is not None}


def _scaled(weight: _Array | None, bias: _Array | None) -> dict[str, _Array]:
    """Of a norm: one that shifts only scales by 1."""
    if weight is None and bias is not None:
        weight = np.ones_like(bias)
    return _named(weight=weight, bias=bias)
