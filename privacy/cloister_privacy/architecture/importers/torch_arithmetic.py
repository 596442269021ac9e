"""Torch's arithmetic, activations and reductions, in the layers of the language."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray
from torch import Tensor, nn

from cloister.wire import layers as wire
from cloister_privacy.architecture.importers import operations
from cloister_privacy.architecture.importers.draft import NotMapped, Value, dimension
from cloister_privacy.architecture.importers.origins import Count, Mask, Masked, Scores, Unread
from cloister_privacy.architecture.importers.torch_attention import is_causal_mask, scaled
from cloister_privacy.architecture.importers.torch_recording import Call, Handler
from cloister_privacy.architecture.importers.torch_weights import Learned

__all__ = ["ARITHMETIC", "array_beside"]


def array_beside(call: Call, given: Learned | Tensor, rank: int) -> NDArray[np.float32]:
    """Weights or a constant that stand beside a value of so many dimensions, the same for each example."""
    array = call.owners.take(call.draft, given)
    if array.ndim <= rank:
        return array
    if array.ndim > rank + 1 or array.shape[0] not in (1, call.batch) or not (array == array[:1]).all():
        raise NotMapped(
            f"joins an array of shape {array.shape} to examples of {rank} dimensions; let it be one for all"
        )
    first: NDArray[np.float32] = array[0]
    return first


def _add(call: Call, input: Any, other: Any, *, alpha: float = 1, out: None = None) -> Any:
    if isinstance(input, Scores):
        return replace(input, is_causal=is_causal_mask(other, input.query.shape[1]) or input.is_causal)
    if alpha != 1:
        raise NotMapped(f"adds {alpha} times a value; multiply it first")
    first, second = _ordered(input, other)
    if isinstance(second, Value):
        return operations.add(call.draft, first, second)
    if isinstance(second, Learned | Tensor):
        array = array_beside(call, second, len(first.shape))
        return operations.add_array(call.draft, first, array, is_trained=_is_trained(call, second))
    return operations.rescale(call.draft, first, 1.0, float(second))


def _sub(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Any:
    if isinstance(other, Value):
        return _add(call, input, operations.rescale(call.draft, other, -1.0), alpha=alpha)
    if isinstance(other, int | float):
        return _add(call, input, -other, alpha=alpha)
    if isinstance(other, Tensor):
        return _add(call, input, -other.float(), alpha=alpha)
    raise NotMapped("subtracts weights; add them, or use the bias of a linear layer")


def _rsub(call: Call, input: Any, other: Any, *, alpha: float = 1) -> Any:
    return _sub(call, other, input, alpha=alpha)


def _mul(call: Call, input: Any, other: Any, *, out: None = None) -> Any:
    value, mask = (other, input) if isinstance(input, Mask) else (input, other)
    if isinstance(mask, Mask) and mask.is_there and isinstance(value, Value) and len(value.shape) == 2:
        return Masked(value, mask.tokens)
    if isinstance(input, Scores) or isinstance(other, Scores):
        return scaled(input, other) if isinstance(input, Scores) else scaled(other, input)
    first, second = _ordered(input, other)
    if isinstance(second, Value):
        return operations.multiply(call.draft, first, second)
    if isinstance(second, Learned | Tensor):
        array = array_beside(call, second, len(first.shape))
        return operations.multiply_array(call.draft, first, array, is_trained=_is_trained(call, second))
    return operations.rescale(call.draft, first, float(second))


def _div(call: Call, input: Any, other: Any, *, rounding_mode: str | None = None) -> Any:
    if isinstance(input, Masked) and input.is_summed and other == Count(input.tokens):
        return call.draft.emit(wire.SequencePool, input.value, input.tokens, how="mean")
    if isinstance(input, Scores) and isinstance(other, int | float | Tensor):
        return scaled(input, 1 / other)
    if rounding_mode is not None or not isinstance(input, Value) or not isinstance(other, Tensor | int | float):
        raise NotMapped("divides by what is not a constant, or rounds; the language multiplies only")
    return _mul(call, input, 1 / other.float() if isinstance(other, Tensor) else 1 / other)


def _ordered(first: Any, second: Any) -> tuple[Value, Any]:
    if isinstance(first, Mask | Masked | Count) or isinstance(second, Mask | Masked | Count):
        raise NotMapped(
            "computes with a mask; the language has masks in attention (key_padding_mask) and in a mean over the positions that are "
            "there: (x * mask.unsqueeze(-1)).sum(1) / mask.sum(1, keepdim=True)"
        )
    if isinstance(first, Value):
        return first, second
    if not isinstance(second, Value):
        raise NotMapped("computes with what is neither a value, weights nor a constant")
    return second, first


def _is_trained(call: Call, given: Learned | Tensor) -> bool:
    return isinstance(given, Learned) and not call.owners.is_frozen(call.draft, given)


def _pow(call: Call, input: Any, exponent: Any) -> Value:
    if not isinstance(input, Value) or exponent not in (1, 2):
        raise NotMapped(f"raises to the power {exponent}; the language has the square")
    return operations.multiply(call.draft, input, input) if exponent == 2 else input


def _square(call: Call, input: Value) -> Value:
    return operations.multiply(call.draft, input, input)


def _neg(call: Call, input: Value) -> Value:
    return operations.rescale(call.draft, input, -1.0)


def _same(call: Call, input: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(input, Value) and not call.outs[0].is_floating_point() and not isinstance(input.key, str):
        raise NotMapped(f"makes {call.outs[0].dtype} of numbers; the language has float32")
    return input


def _activation(kind: type[Any], **fields: Any) -> Handler:
    def run(call: Call, input: Value, inplace: bool = False) -> Value:
        return call.draft.pointwise(kind, input, **fields)

    return run


def _leaky_relu(call: Call, input: Value, negative_slope: float = 0.01, inplace: bool = False) -> Value:
    return call.draft.pointwise(wire.LeakyReLU, input, slope=negative_slope)


def _elu(call: Call, input: Value, alpha: float = 1.0, inplace: bool = False) -> Value:
    return call.draft.pointwise(wire.ELU, input, alpha=alpha)


def _selu(call: Call, input: Value, inplace: bool = False) -> Value:
    return operations.selu(call.draft, input)


def _gelu(call: Call, input: Value, approximate: str = "none") -> Value:
    return call.draft.pointwise(wire.GELU, input, approximate=approximate)


def _clamp(call: Call, input: Any, min: Any = None, max: Any = None) -> Any:
    if isinstance(input, Count) and max is None:
        return input  # a text has one byte at least
    if min != 0 or max is not None:
        raise NotMapped(f"clamps to {min} and {max}; the language has ReLU, which clamps at 0 from below")
    return call.draft.pointwise(wire.ReLU, input)


def _glu(call: Call, input: Value, dim: int = -1) -> Value:
    dim = dimension(input, dim)
    half = input.shape[dim] // 2
    first = operations.select(call.draft, input, dim, range(half))
    second = operations.select(call.draft, input, dim, range(half, 2 * half))
    return operations.multiply(call.draft, first, call.draft.pointwise(wire.Sigmoid, second))


def _softmax(call: Call, input: Any, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Any:
    if isinstance(input, Scores):
        if dim not in (-1, 3) or input.is_softmaxed:
            raise NotMapped(
                "takes a softmax over the queries of attention, or a second one; use torch.nn.MultiheadAttention"
            )
        return replace(input, is_softmaxed=True)
    return operations.softmax(call.draft, input, dimension(input, dim))


def _log_softmax(call: Call, input: Value, dim: int | None = None, _stacklevel: int = 3, dtype: Any = None) -> Value:
    if dimension(input, dim) != len(input.shape) - 1:
        raise NotMapped("is a log_softmax over another dimension than the last; the language has none within a network")
    return call.draft.emit(wire.Softmax, input, module=nn.LogSoftmax(-1))


def _reduction(how: Literal["mean", "max", "sum"], *, sign: float = 1.0) -> Handler:
    def run(
        call: Call, input: Any, dim: int | Sequence[int] | None = None, keepdim: bool = False, dtype: Any = None
    ) -> Any:
        if how == "sum" and dim in (1, [1], (1,)):
            if isinstance(input, Mask) and input.is_there:
                return Count(input.tokens)
            if isinstance(input, Masked):
                return replace(input, is_summed=True)
        if not isinstance(input, Value) or isinstance(dim, Value | Tensor):
            raise NotMapped(
                f"{call.name} is not of a value over some of its dimensions; the language has no such operation"
            )
        listed: list[int | None] = list(dim) if isinstance(dim, tuple | list) else [dim]  # type: ignore[list-item]  # a number or None
        dims = [dimension(input, each) for each in listed]
        value = input if sign == 1 else operations.rescale(call.draft, input, sign)
        value = operations.reduce(call.draft, value, dims, how, keeps_dims=keepdim)
        value = value if sign == 1 else operations.rescale(call.draft, value, sign)
        return [value, *(Unread("the indices of a largest or smallest") for _ in call.outs[1:])]

    return run


def _equals(is_there: bool) -> Handler:
    def run(call: Call, input: Any, other: Any) -> Any:
        if isinstance(input, Value) and isinstance(input.key, str) and not isinstance(other, Value) and other == 0:
            return Mask(input, is_there)
        raise NotMapped("compares numbers; the language compares tokens with 0 only, for a mask")

    return run


def _invert(call: Call, input: Any) -> Any:
    if not isinstance(input, Mask):
        raise NotMapped("inverts what is no mask of tokens")
    return Mask(input.tokens, not input.is_there)


_SAME = (
    "contiguous",
    "clone",
    "detach",
    "data",
    "alias",
    "to",
    "float",
    "double",
    "long",
    "int",
    "type",
    "type_as",
    "requires_grad",
    "cpu",
    "cuda",
)

ARITHMETIC: dict[str, Handler] = {
    "add": _add,
    "sub": _sub,
    "rsub": _rsub,
    "mul": _mul,
    "div": _div,
    "pow": _pow,
    "square": _square,
    "neg": _neg,
    **dict.fromkeys(_SAME, _same),
    "relu": _activation(wire.ReLU),
    "silu": _activation(wire.SiLU),
    "sigmoid": _activation(wire.Sigmoid),
    "tanh": _activation(wire.Tanh),
    "leaky_relu": _leaky_relu,
    "elu": _elu,
    "selu": _selu,
    "gelu": _gelu,
    "clamp": _clamp,
    "clip": _clamp,
    "clamp_min": _clamp,
    "glu": _glu,
    "softmax": _softmax,
    "log_softmax": _log_softmax,
    "mean": _reduction("mean"),
    "sum": _reduction("sum"),
    "amax": _reduction("max"),
    "max": _reduction("max"),
    "amin": _reduction("max", sign=-1.0),
    "min": _reduction("max", sign=-1.0),
    "eq": _equals(False),
    "ne": _equals(True),
    "gt": _equals(True),
    "invert": _invert,
}
