"""What torch does to the shape of a tensor, in the layers of the language: the examples stay the first dimension."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor

from cloister_privacy.architecture.importers import blocks, operations
from cloister_privacy.architecture.importers.draft import Draft, NotMapped, Value, dimension
from cloister_privacy.architecture.importers.origins import MOVED, Count, Mask, Moved, States
from cloister_privacy.architecture.importers.torch_arithmetic import array_beside
from cloister_privacy.architecture.importers.torch_recording import Call, Handler
from cloister_privacy.architecture.importers.torch_weights import Learned

__all__ = ["SHAPES"]


def _reshape(call: Call, input: Any, *args: Any, **kwargs: Any) -> Any:
    if isinstance(input, States) and call.name == "squeeze" and input.count == 1:
        return _state(call.draft, input, 0)
    if isinstance(input, Mask | Count) and call.name == "unsqueeze":
        return input
    if not isinstance(input, Value):
        raise NotMapped(f"gives what is no value another shape by {call.name}")
    return call.draft.reshape(input, call.shape)


def _expand(call: Call, input: Any, *sizes: Any) -> Any:
    if isinstance(input, Mask):
        return input
    if not isinstance(input, Value) or math.prod(call.shape) != math.prod(input.shape):
        raise NotMapped("repeats a value; the language repeats where it adds or multiplies")
    return call.draft.reshape(input, call.shape)


def _permute(call: Call, input: Any, *dims: Any) -> Any:
    order = [dim % (_rank(input)) for dim in (dims[0] if isinstance(dims[0], tuple | list) else dims)]
    return _in_order(call, input, order)


def _transpose(call: Call, input: Any, dim0: int, dim1: int) -> Any:
    order = list(range(_rank(input)))
    order[dim0], order[dim1] = order[dim1], order[dim0]
    return _in_order(call, input, order)


def _movedim(call: Call, input: Any, source: Any, destination: Any) -> Any:
    rank = _rank(input)
    before, after = (
        [each % rank for each in (dim if isinstance(dim, tuple | list) else (dim,))] for dim in (source, destination)
    )
    rest = iter(dim for dim in range(rank) if dim not in before)
    return _in_order(call, input, [before[after.index(dim)] if dim in after else next(rest) for dim in range(rank)])


def _mirrored(call: Call, input: Any) -> Any:
    order = list(range(_rank(input)))
    order[-2:] = order[:-3:-1]
    return _in_order(call, input, order)


def _rank(input: Any) -> int:
    """With the examples."""
    value = input.value if isinstance(input, Moved) else input
    if not isinstance(value, Value):
        raise NotMapped("moves the dimensions of what is no value")
    return len(value.shape) + 1


def _in_order(call: Call, input: Any, order: Sequence[int]) -> Any:
    moved = input if isinstance(input, Moved) else Moved(input, 0)
    dims = tuple(dim - (dim > moved.batch) for dim in order if dim != moved.batch)
    value, batch = call.draft.permute(moved.value, dims), order.index(moved.batch)
    return Moved(value, batch) if batch else value


def _getitem(call: Call, input: Any, index: Any) -> Any:
    if isinstance(input, States):
        chosen = index[0] if isinstance(index, tuple) and all(each == slice(None) for each in index[1:]) else index
        if not isinstance(chosen, int):
            raise NotMapped("takes several last states at once; take them one by one: states[-1]")
        return _state(call.draft, input, chosen)
    if isinstance(input, Moved) and isinstance(index, int):
        return _first_taken(call, input, index)
    if not isinstance(input, Value):
        raise NotMapped(MOVED if isinstance(input, Moved) else "takes a part of what is no value")
    value, dim, chosen = input, 0, 0
    entries = list(_entries(index if isinstance(index, tuple) else (index,), len(input.shape) + 1))
    examples = next((each for each in entries if each is not None), slice(None))
    if not isinstance(examples, slice) or range(call.batch)[examples] != range(call.batch) or entries[0] is None:
        raise NotMapped("chooses among the examples of a batch; keep them apart: x[:, ...]")
    for entry in entries[1:]:
        if entry is None:
            continue
        size = value.shape[dim]
        if isinstance(entry, slice):
            value = operations.select(call.draft, value, dim, range(size)[entry])
        elif isinstance(entry, int):
            value = operations.select(call.draft, value, dim, [entry])
            chosen += 1
        else:
            listed = entry.tolist() if isinstance(entry, Tensor) else entry
            if not isinstance(listed, list) or not all(type(each) is int for each in listed) or len(entries) > dim + 2:
                raise NotMapped("is indexed by what is no number, slice or one list of numbers")
            value = operations.select(call.draft, value, dim, listed)
        dim += 1
    return call.draft.reshape(value, call.shape)


def _first_taken(call: Call, moved: Moved, index: int) -> Any:
    """One entry of the first dimension, which is before the examples."""
    part = operations.select(call.draft, moved.value, 0, [index])
    value = call.draft.reshape(part, part.shape[1:])
    return value if moved.batch == 1 else Moved(value, moved.batch - 1)


def _entries(index: tuple[Any, ...], rank: int) -> Iterator[Any]:
    named = sum(each is not None and each is not Ellipsis for each in index)
    for each in index:
        if each is Ellipsis:
            yield from [slice(None)] * (rank - named)
        else:
            yield each


def _parts(call: Call, input: Any, *args: Any, **kwargs: Any) -> list[Any]:
    """chunk, split and the like: what they gave tells where they cut."""
    if isinstance(input, Moved):
        if call.name != "unbind" or kwargs.get("dim", args[0] if args else 0) != 0:
            raise NotMapped(MOVED)
        return [_first_taken(call, input, index) for index in range(len(call.outs))]
    position = 0 if call.name == "unbind" else 1
    given = kwargs.get("dim", args[position] if len(args) > position else 0)
    dim, found, start = dimension(input, given), [], 0
    for out in call.outs:
        length = 1 if call.name == "unbind" else out.shape[dim + 1]
        part = operations.select(call.draft, input, dim, range(start, start + length))
        found.append(call.draft.reshape(part, call.shape_of(out)))
        start += length
    return found


def _select(call: Call, input: Value, dim: int, index: int) -> Value:
    part = operations.select(call.draft, input, dimension(input, dim), [index])
    return call.draft.reshape(part, call.shape)


def _narrow(call: Call, input: Value, dim: int, start: int, length: int) -> Value:
    return operations.select(call.draft, input, dimension(input, dim), range(start, start + length))


def _flip(call: Call, input: Value, *dims: Any) -> Value:
    for each in dims[0] if isinstance(dims[0], tuple | list) else dims:
        dim = dimension(input, each)
        input = operations.select(call.draft, input, dim, range(input.shape[dim])[::-1])
    return input


def _cat(call: Call, tensors: Sequence[Any], dim: int = 0, *, axis: int | None = None) -> Value:
    parts = list(tensors)
    if all(isinstance(each, States) for each in parts):
        return _joined_states(call, parts)
    values = [each for each in (_as_value(call, part) for part in parts) if isinstance(each, Value)]
    if not values:
        raise NotMapped("joins what are no values")
    at = dimension(values[0], dim if axis is None else axis)
    joined = [
        each
        if isinstance(each, Value)
        else operations.learned_beside(
            call.draft,
            values[0],
            array_beside(call, each, len(values[0].shape)),
            is_trained=isinstance(each, Learned) and not call.owners.is_frozen(call.draft, each),
        )
        for each in (_as_value(call, part) for part in parts)
    ]
    return operations.concatenate(call.draft, joined, at)


def _as_value(call: Call, part: Any) -> Any:
    if isinstance(part, States) and part.chosen is not None:
        return operations.state_of_direction(call.draft, part)
    if isinstance(part, States | Mask):
        raise NotMapped("joins masks or states; join what layers give")
    return part


def _joined_states(call: Call, parts: list[States]) -> Value:
    sequence, count = parts[0].sequence, parts[0].count
    if [each.chosen for each in parts] == [count - 2, count - 1] and {each.sequence for each in parts} == {sequence}:
        return _last(call.draft, parts[0])
    values = [_as_value(call, each) for each in parts]
    return operations.concatenate(call.draft, values, len(values[0].shape) - 1)


def _state(draft: Draft, states: States, index: int) -> Any:
    """One of the last states, of a layer and a direction: a value where the layer has one direction."""
    chosen = index % states.count
    if chosen < states.count - states.directions:
        raise NotMapped("takes the last state of a layer before the last; take that of the last one: states[-1]")
    if states.directions == 1:
        return _last(draft, states)
    return States(states.sequence, states.hidden, states.count, states.directions, chosen)


def _last(draft: Draft, states: States) -> Value:
    return blocks.last_state(draft, states.sequence)


def _stack(call: Call, tensors: Sequence[Any], dim: int = 0) -> Value:
    values = [_as_value(call, each) for each in tensors]
    if not all(isinstance(each, Value) for each in values):
        raise NotMapped("stacks what are no values")
    rank = len(values[0].shape) + 2
    if dim % rank == 0:
        raise NotMapped("stacks before the examples; keep them the first dimension")
    at = dim % rank - 1
    shape = values[0].shape
    wide = [call.draft.reshape(each, (*shape[:at], 1, *shape[at:])) for each in values]
    return operations.concatenate(call.draft, wide, at)


def _pad(call: Call, input: Value, pad: Sequence[int], mode: str = "constant", value: float | None = None) -> Value:
    if mode != "constant" or value not in (None, 0):
        raise NotMapped(
            f"pads by {mode if mode != 'constant' else value}; the language pads with zeros (padding_mode='zeros')"
        )
    rank = len(input.shape)
    pairs = list(zip(pad[::2], pad[1::2], strict=True))[::-1]
    if len(pairs) > rank or any(amount < 0 for pair in pairs for amount in pair):
        raise NotMapped(f"pads by {tuple(pad)}, which reaches the examples or cuts; pad the dimensions of an example")
    pairs = [(0, 0)] * (rank - len(pairs)) + pairs
    before = input.pad or ((0, 0),) * rank
    amounts = tuple((low + a, high + b) for (low, high), (a, b) in zip(before, pairs, strict=True))
    return Value(input.key, input.held, input.dims, amounts)


_RESHAPES = ("view", "reshape", "flatten", "unflatten", "squeeze", "unsqueeze", "view_as", "reshape_as", "ravel")

SHAPES: dict[str, Handler] = {
    **dict.fromkeys(_RESHAPES, _reshape),
    **dict.fromkeys(("expand", "expand_as", "broadcast_to"), _expand),
    "permute": _permute,
    "transpose": _transpose,
    "movedim": _movedim,
    **dict.fromkeys(("mT", "t", "T", "adjoint"), _mirrored),
    "getitem": _getitem,
    **dict.fromkeys(("chunk", "split", "split_with_sizes", "tensor_split", "unbind"), _parts),
    "select": _select,
    "narrow": _narrow,
    "flip": _flip,
    "cat": _cat,
    "stack": _stack,
    "pad": _pad,
}
