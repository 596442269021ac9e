"""Torch's layers with weights, pools and dropout, as the functions that its modules call. Each option that changes what is computed is
mapped or refused."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from cloister.wire import layers as wire
from cloister_privacy.architecture.importers import blocks, operations
from cloister_privacy.architecture.importers.attention import projected_out
from cloister_privacy.architecture.importers.draft import NotMapped, Value, value_of
from cloister_privacy.architecture.importers.origins import Scores
from cloister_privacy.architecture.importers.torch_arithmetic import array_beside
from cloister_privacy.architecture.importers.torch_attention import product
from cloister_privacy.architecture.importers.torch_recording import Call, Handler
from cloister_privacy.architecture.importers.torch_weights import Learned

__all__ = ["LAYERS"]

_Array = NDArray[np.float32]


def _weights(call: Call, *given: Any) -> tuple[list[_Array | None], bool]:
    """The arrays, and whether the layer is frozen."""
    if any(isinstance(each, Value) for each in given):
        raise NotMapped("takes weights that depend on the input; the language's are its own")
    arrays = [None if each is None else call.owners.take(call.draft, each) for each in given]
    return arrays, call.owners.is_frozen(call.draft, *given)


def _required(call: Call, input: Any, weight: Any, bias: Any) -> tuple[Value, _Array, _Array | None, bool]:
    (matrix, shift), is_frozen = _weights(call, weight, bias)
    if matrix is None:
        raise NotMapped("has no weights")
    return value_of(input), matrix, shift, is_frozen


def _linear(call: Call, input: Any, weight: Any, bias: Any = None) -> Value:
    value, matrix, shift, is_frozen = _required(call, input, weight, bias)
    last = projected_out(call.draft, value, matrix, shift)
    return last or blocks.linear(call.draft, value, matrix, shift, is_frozen=is_frozen)


def _matmul(call: Call, input: Any, other: Any, *, out: None = None) -> Any:
    if isinstance(other, Value):
        return product(call, input, other)
    if (
        not isinstance(input, Value)
        or other is None
        or (other if isinstance(other, Tensor) else other.tensor).ndim != 2
    ):
        raise NotMapped("multiplies by what is no matrix of weights")
    value, matrix, _, is_frozen = _required(call, input, other, None)
    return blocks.linear(call.draft, value, np.ascontiguousarray(matrix.T), None, is_frozen=is_frozen)


def _addmm(call: Call, input: Any, mat1: Any, mat2: Any, *, beta: float = 1, alpha: float = 1) -> Value:
    if alpha != 1 or beta != 1 or not isinstance(input, Learned | Tensor):
        raise NotMapped("adds a product scaled, or to a value; use torch.nn.Linear")
    made = _matmul(call, mat1, mat2)
    if not isinstance(made, Value):
        raise NotMapped("adds to the products of attention; use torch.nn.MultiheadAttention")
    is_trained = isinstance(input, Learned) and not call.owners.is_frozen(call.draft, input)
    return operations.add_array(call.draft, made, array_beside(call, input, len(made.shape)), is_trained=is_trained)


def _convolution(
    call: Call,
    input: Any,
    weight: Any,
    bias: Any = None,
    stride: Any = 1,
    padding: Any = 0,
    dilation: Any = 1,
    groups: int = 1,
) -> Value:
    value, kernel, shift, is_frozen = _required(call, input, weight, bias)
    rank = kernel.ndim - 2
    apart = _each(dilation, rank)
    if padding == "same":
        reach = [step * (size - 1) for step, size in zip(apart, kernel.shape[2:], strict=True)]
        amounts = [(each // 2, each - each // 2) for each in reach]
    else:
        amounts = [(each, each) for each in _each(0 if padding == "valid" else padding, rank)]
    return blocks.convolution(
        call.draft,
        value,
        kernel,
        shift,
        stride=_each(stride, rank),
        padding=amounts,
        dilation=apart,
        groups=groups,
        is_frozen=is_frozen,
    )


def _each(given: Any, rank: int) -> list[int]:
    listed = [int(given)] * rank if isinstance(given, int) else [int(each) for each in given]
    return listed * rank if len(listed) == 1 else listed


def _pool(how: Literal["max", "average"], rank: int) -> Handler:
    def run(
        call: Call,
        input: Any,
        kernel_size: Any,
        stride: Any = None,
        padding: Any = 0,
        *rest: Any,
        ceil_mode: bool = False,
        count_include_pad: bool = True,
        divisor_override: int | None = None,
        dilation: Any = 1,
        return_indices: bool = False,
    ) -> Value:
        wrong = []
        names = (
            ("dilation", "ceil_mode", "return_indices")
            if how == "max"
            else ("ceil_mode", "count_include_pad", "divisor_override")
        )
        options = {
            "ceil_mode": ceil_mode,
            "count_include_pad": count_include_pad,
            "divisor_override": divisor_override,
            "dilation": dilation,
            "return_indices": return_indices,
        } | dict(zip(names, rest, strict=False))
        wrong += ["ceil_mode=True: make it False, and pad the input"] if options["ceil_mode"] else []
        wrong += ["return_indices=True: leave it out"] if options["return_indices"] else []
        wrong += ["dilation: make it 1"] if any(each != 1 for each in _each(options["dilation"], rank)) else []
        wrong += ["divisor_override: leave it out"] if options["divisor_override"] else []
        if not options["count_include_pad"] and any(_each(padding, rank)):
            wrong.append("count_include_pad=False with padding: make it True, or pad nothing")
        if wrong:
            raise NotMapped(f"has {'; '.join(wrong)}")
        kernel = _each(kernel_size, rank)
        step = _each(stride, rank) if stride not in (None, [], ()) else kernel
        return blocks.pool(call.draft, value_of(input), how, kernel=kernel, stride=step, padding=_each(padding, rank))

    return run


def _adaptive(how: Literal["max", "average"], rank: int) -> Handler:
    def run(call: Call, input: Any, output_size: Any, return_indices: bool = False) -> Value:
        if return_indices:
            raise NotMapped("has return_indices=True: leave it out")
        listed = list(output_size) if isinstance(output_size, tuple | list) else [output_size] * rank
        return blocks.global_pool(call.draft, value_of(input), how, sizes=listed)

    return run


def _dropout(call: Call, input: Any, p: float = 0.5, training: bool = True, inplace: bool = False) -> Any:
    if isinstance(input, Scores):
        if p:
            call.draft.warn("drops out attention weights; here it does not")
        return input
    if call.name != "dropout":
        call.draft.warn("drops whole channels; here single numbers are dropped, as many on average")
    return call.draft.pointwise(wire.Dropout, value_of(input), p=p) if p else input


def _layer_norm(
    call: Call, input: Value, normalized_shape: Sequence[int], weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Value:
    return _last_norm(call, input, wire.LayerNorm, normalized_shape, weight, bias, eps)


def _rms_norm(
    call: Call, input: Value, normalized_shape: Sequence[int], weight: Any = None, eps: float | None = None
) -> Value:
    tiny = float(np.finfo(np.float32).eps)
    return _last_norm(call, input, wire.RMSNorm, normalized_shape, weight, None, tiny if eps is None else eps)


def _last_norm(call: Call, input: Value, kind: Any, shape: Sequence[int], weight: Any, bias: Any, eps: float) -> Value:
    (scale, shift), is_frozen = _weights(call, weight, bias)
    if scale is not None and shift is None and kind is wire.LayerNorm:
        call.draft.warn("has no bias; here it has one, which starts from 0")
    is_frozen = is_frozen and weight is not None
    return blocks.last_norm(call.draft, input, kind, tuple(shape), scale, shift, eps=eps, is_frozen=is_frozen)


def _group_norm(
    call: Call, input: Value, num_groups: int, weight: Any = None, bias: Any = None, eps: float = 1e-5
) -> Value:
    (scale, shift), is_frozen = _weights(call, weight, bias)
    is_frozen = is_frozen and weight is not None
    return blocks.group_norm(call.draft, input, num_groups, scale, shift, eps=eps, is_frozen=is_frozen)


def _instance_norm(
    call: Call,
    input: Value,
    running_mean: Any = None,
    running_var: Any = None,
    weight: Any = None,
    bias: Any = None,
    use_input_stats: bool = True,
    momentum: float = 0.1,
    eps: float = 1e-5,
) -> Value:
    if not use_input_stats or running_mean is not None:
        raise NotMapped("keeps statistics of its batches, which mixes examples; make it with track_running_stats=False")
    return _group_norm(call, input, input.shape[0], weight, bias, eps)


def _batch_norm(call: Call, *args: Any, **kwargs: Any) -> Value:
    raise NotMapped(
        "normalises over the examples of a batch, so that none can be clipped by itself; use GroupNorm instead, or "
        "fold it into the layer before, by torch.nn.utils.fusion.fuse_conv_bn_eval"
    )


def _embedding(
    call: Call,
    input: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Value:
    if max_norm is not None or scale_grad_by_freq:
        raise NotMapped("has max_norm or scale_grad_by_freq; make it without")
    value, table, _, is_frozen = _required(call, input, weight, None)
    padding = None if padding_idx is None or padding_idx < 0 else padding_idx
    return call.draft.embedding(value, table, padding_idx=padding, is_frozen=is_frozen)


LAYERS: dict[str, Handler] = {
    "linear": _linear,
    "matmul": _matmul,
    "addmm": _addmm,
    "conv1d": _convolution,
    "conv2d": _convolution,
    "max_pool1d": _pool("max", 1),
    "max_pool2d": _pool("max", 2),
    "avg_pool1d": _pool("average", 1),
    "avg_pool2d": _pool("average", 2),
    "adaptive_avg_pool1d": _adaptive("average", 1),
    "adaptive_avg_pool2d": _adaptive("average", 2),
    "adaptive_max_pool1d": _adaptive("max", 1),
    "adaptive_max_pool2d": _adaptive("max", 2),
    **dict.fromkeys(("dropout", "feature_dropout", "dropout1d", "dropout2d"), _dropout),
    "layer_norm": _layer_norm,
    "rms_norm": _rms_norm,
    "group_norm": _group_norm,
    "instance_norm": _instance_norm,
    "batch_norm": _batch_norm,
    "embedding": _embedding,
}
