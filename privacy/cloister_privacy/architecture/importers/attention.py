"""Self-attention that a source spells out: projections cut into heads, a softmax over their products, the heads put together again.

Which row of a projection became which number of a head is found by sending numbered positions through what lies between.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray

from cloister.wire import layers as wire
from cloister_privacy.architecture.importers.blocks import attention
from cloister_privacy.architecture.importers.draft import Draft, NotMapped, Step, Value

__all__ = ["attended", "projected_out"]

_NUMBERED = 2**24
"""Up to which whole numbers are exact in float32."""

_REFUSED = (
    "is attention that is not of one sequence to itself, by linear layers cut into heads; use torch.nn.MultiheadAttention("
    "batch_first=True)"
)


@dataclass(frozen=True, slots=True)
class _Heads:
    """What a linear layer gave, as (heads, length, width of a head)."""

    source: Value
    step: int
    weight: NDArray[np.float32]
    bias: NDArray[np.float32] | None
    is_frozen: bool


def attended(draft: Draft, query: Value, key: Value, value: Value, *, scale: float | None, is_causal: bool) -> Value:
    """softmax(scale q k^T) v of (heads, length, width); by default the scale is width^-1/2. Raises NotMapped."""
    if len(query.shape) != 3 or not query.shape == key.shape == value.shape:
        raise NotMapped(_REFUSED)
    heads, length, width = query.shape
    parts = [_heads_of(draft, each) for each in (query, key, value)]
    source, embed = parts[0].source, heads * width
    if {each.source for each in parts} != {source} or source.held != (length, embed):
        raise NotMapped(_REFUSED)
    sharper = 1.0 if scale is None else scale * math.sqrt(width)
    scales = (sharper, 1.0, 1.0)
    weights = {
        "in_proj_weight": np.concatenate([each.weight * by for each, by in zip(parts, scales, strict=True)]),
        "in_proj_bias": np.concatenate(
            [np.zeros(embed) if each.bias is None else each.bias * by for each, by in zip(parts, scales, strict=True)]
        ),
        "out_proj.weight": np.eye(embed, dtype=np.float32),
        "out_proj.bias": np.zeros(embed, np.float32),
    }
    if all(each.bias is None for each in parts):
        draft.warn("projects without a bias; here it has one, which starts from 0")
    made = attention(
        draft,
        source,
        None,
        {name: np.asarray(each, np.float32) for name, each in weights.items()},
        num_heads=heads,
        is_causal=is_causal,
        is_frozen=all(each.is_frozen for each in parts),
        twins=tuple(dict.fromkeys(each.step for each in parts)),
    )
    draft.open_ended.add(int(made.key))
    return draft.permute(draft.reshape(made, (length, heads, width)), (1, 0, 2))


def projected_out(
    draft: Draft, value: Value, weight: NDArray[np.float32], bias: NDArray[np.float32] | None
) -> Value | None:
    """The linear layer after attention, as its own last projection; None where it is not one."""
    chain, step = _chain(draft, value)
    if step is None or step not in draft.open_ended or weight.shape[0] != weight.shape[1]:
        return None
    found, by = _numbered(draft, chain, step, value)
    length, width = draft.steps[step].gives
    columns = found[0] if found.ndim == 2 else found
    if (
        by != 1
        or found.shape != (length, width)
        or not np.array_equal(found, np.arange(length)[:, None] * width + columns)
    ):
        return None
    projection = np.zeros_like(weight)
    projection[:, columns] = weight
    old = draft.steps[step]
    fields = old.layer.model_dump(exclude={"type", "name", "reads"})
    weights = {**old.weights, "out_proj.weight": projection}
    weights["out_proj.bias"] = np.zeros(len(weight), np.float32) if bias is None else bias
    return draft.emit(wire.MultiheadAttention, *draft.reads(old), weights=weights, twins=(*old.twins, step), **fields)


def _heads_of(draft: Draft, value: Value) -> _Heads:
    chain, step = _chain(draft, value)
    if step is None or not isinstance(draft.steps[step].layer, wire.Linear):
        raise NotMapped(_REFUSED)
    heads, length, width = value.shape
    given = draft.steps[step]
    found, by = _numbered(draft, chain, step, value)
    rows, out = found[:, 0], given.gives[-1]
    if len(given.gives) != 2 or not np.array_equal(found, rows[:, None] + np.arange(length)[:, None] * out):
        raise NotMapped(_REFUSED)
    listed = rows.reshape(heads * width)
    bias = given.weights.get("bias")
    return _Heads(
        source=draft.reads(given)[0],
        step=step,
        weight=given.weights["weight"][listed] * np.float32(by),
        bias=None if bias is None else bias[listed] * np.float32(by),
        is_frozen=wire.is_frozen(given.layer),
    )


def _chain(draft: Draft, value: Value) -> tuple[list[Step], int | None]:
    """The steps that only rearrange numbers, back from a value, and the step before them."""
    chain: list[Step] = []
    key = draft.unpadded(value).key
    while isinstance(key, int) and key >= 0:
        step = draft.steps[key]
        if not _rearranges(step):
            return chain[::-1], key
        chain.append(step)
        key = step.reads[0]
    return chain[::-1], None


def _rearranges(step: Step) -> bool:
    match step.layer:
        case wire.Reshape() | wire.Flatten() | wire.Permute():
            return True
        case wire.Rescale(low=low, to_low=to_low):
            return low == 0 and to_low == 0
        case wire.Linear(frozen=True, bias=False):
            matrix = step.weights["weight"]
            return bool(((matrix == 0) | (matrix == 1)).all() and (matrix.sum(axis=1) == 1).all())
        case _:
            return False


def _numbered(draft: Draft, chain: list[Step], step: int, value: Value) -> tuple[NDArray[np.int64], float]:
    """Which number of what the step gives lies where in the value, and by how much it is multiplied."""
    shape = draft.steps[step].gives
    if math.prod(shape) > _NUMBERED:
        raise NotMapped(
            f"is attention over {shape}, too large to be followed; use torch.nn.MultiheadAttention(batch_first=True)"
        )
    numbers = torch.stack([torch.ones(shape), torch.arange(math.prod(shape), dtype=torch.float32).reshape(shape)])
    for each in chain:
        each.module.load_state_dict(
            {name: torch.from_numpy(array) for name, array in each.weights.items()}, assign=True
        )
        with torch.no_grad():
            numbers = each.module(numbers)
    laid = numbers.permute(0, *(dim + 1 for dim in value.dims)).double().numpy()
    by = float(laid[0].flat[0])
    if by == 0 or not np.array_equal(laid[0], np.full_like(laid[0], by)):
        raise NotMapped(_REFUSED)
    return np.rint(laid[1] / by).astype(np.int64), by
