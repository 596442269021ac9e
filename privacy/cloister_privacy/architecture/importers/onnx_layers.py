"""ONNX's operators with weights, and its pools, in the layers of the language. Each option that changes what is computed is mapped or
refused."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cloister.wire import layers as wire
from cloister_privacy.architecture.importers import blocks, operations
from cloister_privacy.architecture.importers.draft import NotMapped, Value
from cloister_privacy.architecture.importers.onnx_constants import Constant
from cloister_privacy.architecture.importers.onnx_graph import Handler, Held, Node
from cloister_privacy.architecture.importers.onnx_operators import held, numbers
from cloister_privacy.architecture.importers.origins import Unread

__all__ = ["LAYERS"]

_Array = NDArray[np.float32]

_GATES = {"LSTM": (0, 2, 3, 1), "GRU": (1, 0, 2), "RNN": (0,)}
"""ONNX has an LSTM's gates as input, output, forget, cell and a GRU's as update, reset, new; torch has them as input, forget, cell,
output and as reset, update, new."""


def _gemm(node: Node, a: Any, b: Any, c: Any = None) -> Held:
    read, attributes = held(a), node.attributes
    if attributes.get("transA", 0) or read.rank != 2:
        raise NotMapped("multiplies what is transposed, or no vector of each example; use a linear layer")
    weight = node.walk.take(b) * np.float32(attributes.get("alpha", 1.0))
    weight = weight if attributes.get("transB", 0) else weight.T
    bias = None if c is None else node.walk.take(c) * np.float32(attributes.get("beta", 1.0))
    bias = None if bias is None else np.broadcast_to(bias.reshape(-1), (weight.shape[0],))
    return replace(read, value=blocks.linear(node.draft, read.value, weight, bias))


def _matmul(node: Node, a: Any, b: Any) -> Held:
    if not isinstance(a, Held) or not isinstance(b, Constant) or b.array.ndim != 2:
        raise NotMapped(
            "multiplies matrices that are not a value and weights; attention has no form in ONNX that is mapped, so "
            "import it from torch or Keras"
        )
    if a.batch == a.rank - 1:
        raise NotMapped("multiplies over the examples of a batch; keep them the first dimension")
    return replace(a, value=blocks.linear(node.draft, a.value, node.walk.take(b).T, None))


def _leading(node: Node, x: Any) -> Value:
    read = held(x)
    if read.batch:
        raise NotMapped("reads examples that are not the first dimension; keep them there")
    return read.value


def _convolution(node: Node, x: Any, w: Any, b: Any = None) -> Held:
    value, weight = _leading(node, x), node.walk.take(w)
    rank = weight.ndim - 2
    strides, dilation = _each(node, "strides", rank), _each(node, "dilations", rank)
    reach = [step * (size - 1) for step, size in zip(dilation, weight.shape[2:], strict=True)]
    made = blocks.convolution(
        node.draft,
        value,
        weight,
        None if b is None else node.walk.take(b),
        stride=strides,
        padding=_padding(node, rank, reach, strides),
        dilation=dilation,
        groups=node.attributes.get("group", 1),
    )
    return Held(made)


def _each(node: Node, name: str, rank: int) -> list[int]:
    return [int(each) for each in node.attributes.get(name, [1] * rank)]


def _padding(node: Node, rank: int, reach: Sequence[int], strides: Sequence[int]) -> list[tuple[int, int]]:
    automatic = node.attributes.get("auto_pad", b"NOTSET").decode()
    if automatic in ("SAME_UPPER", "SAME_LOWER"):
        if any(stride > 1 for stride in strides):
            raise NotMapped(f"has auto_pad {automatic} with strides; give it pads")
        halves = [(each // 2, each - each // 2) for each in reach]
        return halves if automatic == "SAME_UPPER" else [(high, low) for low, high in halves]
    pads = [int(each) for each in node.attributes.get("pads", [0] * 2 * rank)]
    return list(zip(pads[:rank], pads[rank:], strict=True)) if automatic == "NOTSET" else [(0, 0)] * rank


def _pool(how: Literal["max", "average"]) -> Handler:
    def run(node: Node, x: Any) -> list[Any]:
        value, attributes = _leading(node, x), node.attributes
        kernel = [int(each) for each in attributes["kernel_shape"]]
        strides = _each(node, "strides", len(kernel))
        pads = _padding(node, len(kernel), [size - 1 for size in kernel], strides)
        wrong = []
        wrong += ["ceil_mode: export without it"] if attributes.get("ceil_mode", 0) else []
        wrong += ["dilations: make them 1"] if any(each != 1 for each in attributes.get("dilations", [])) else []
        wrong += [f"pads {pads}, not as much before as after"] if any(low != high for low, high in pads) else []
        if how == "average" and any(map(sum, pads)) and not attributes.get("count_include_pad", 0):
            wrong.append("count_include_pad=0 with pads: count them, or pad nothing")
        if wrong:
            raise NotMapped(f"has {'; '.join(wrong)}")
        made = blocks.pool(node.draft, value, how, kernel=kernel, stride=strides, padding=[low for low, _ in pads])
        return [Held(made), Unread("the places of the largest")]

    return run


def _global_pool(how: Literal["mean", "max"]) -> Handler:
    def run(node: Node, x: Any) -> Held:
        value = _leading(node, x)
        return Held(operations.reduce(node.draft, value, range(1, len(value.shape)), how, keeps_dims=True))

    return run


def _last_norm(node: Node, x: Any, scale: Any, bias: Any = None) -> list[Any]:
    read, is_rms = held(x), node.operator == "RMSNormalization"
    axis = node.attributes.get("axis", -1) % read.rank
    if axis <= read.batch:
        raise NotMapped("normalises over the examples of a batch; keep them apart")
    shape = read.value.shape[axis - 1 :]
    weight = np.broadcast_to(node.walk.take(scale), shape)
    shift = None if bias is None else np.broadcast_to(node.walk.take(bias), shape)
    eps = float(node.attributes.get("epsilon", 1e-5))
    kind: Any = wire.RMSNorm if is_rms else wire.LayerNorm
    value = blocks.last_norm(node.draft, read.value, kind, shape, weight, shift, eps=eps)
    return [replace(read, value=value), Unread("means"), Unread("deviations")]


def _instance_norm(node: Node, x: Any, scale: Any, bias: Any) -> Held:
    value = _leading(node, x)
    return Held(_grouped(node, value, value.shape[0], scale, bias))


def _group_norm(node: Node, x: Any, scale: Any, bias: Any) -> Held:
    value, groups = _leading(node, x), int(node.attributes["num_groups"])
    if isinstance(scale, Constant) and scale.array.size != value.shape[0]:
        raise NotMapped("has a weight for each group; export with opset 21 or later, where each channel has one")
    return Held(_grouped(node, value, groups, scale, bias))


def _grouped(node: Node, value: Value, groups: int, scale: Any, bias: Any) -> Value:
    eps = float(node.attributes.get("epsilon", 1e-5))
    weight, shift = (None if each is None else each.array for each in (scale, bias))
    if (
        weight is not None
        and shift is not None
        and (weight == 1).all()
        and not shift.any()
        and groups == value.shape[0]
    ):
        return blocks.group_norm(
            node.draft, value, groups, None, None, eps=eps
        )  # the weights of a group norm come after
    weight, shift = node.walk.take(scale), node.walk.take(bias)
    return blocks.group_norm(node.draft, value, groups, weight, shift, eps=eps)


def _batch_norm(node: Node, *given: Any) -> Any:
    raise NotMapped(
        "normalises over the examples of a batch, so that none can be clipped by itself; use GroupNorm instead"
    )


def _gather(node: Node, data: Any, indices: Any) -> Held:
    axis = node.attributes.get("axis", 0)
    if isinstance(data, Constant) and isinstance(indices, Held):
        if axis or data.array.ndim != 2:
            raise NotMapped("looks up what is no table of rows; use an embedding")
        table = node.walk.take(data)
        return replace(indices, value=node.draft.embedding(indices.value, table, padding_idx=None, is_frozen=False))
    read = held(data)
    chosen = numbers(indices)
    if indices.array.ndim > 1:
        raise NotMapped("takes several lists of positions; take one")
    part = operations.select(node.draft, read.value, read.dimension(axis), chosen)
    found = replace(read, value=part)
    if indices.array.ndim:
        return found
    full = list(found.full(node.examples))
    del full[axis % read.rank]
    return node.reshaped(found, full)


def _recurrent(
    node: Node, x: Any, w: Any, r: Any, b: Any = None, lengths: Any = None, h: Any = None, c: Any = None, p: Any = None
) -> list[Any]:
    read, attributes, draft = held(x), node.attributes, node.draft
    first = attributes.get("layout", 0)
    direction = attributes.get("direction", b"forward").decode()
    wrong = _strange(node, lengths=lengths, states=(h, c), peepholes=p)
    if direction not in ("forward", "bidirectional"):
        wrong.append(f"direction {direction}: take forward or bidirectional")
    if read.rank != 3 or read.batch != (0 if first else 1):
        wrong.append("examples in another dimension than its layout says")
    if wrong:
        raise NotMapped(f"has {'; '.join(wrong)}")
    weights: dict[str, _Array] = {}
    inward, across = (_in_torchs_order(node.operator, node.walk.take(each)) for each in (w, r))
    biases = None if b is None else np.split(node.walk.take(b), 2, axis=1)
    for index, ending in enumerate(("", "_reverse") if direction == "bidirectional" else ("",)):
        weights |= {f"weight_ih_l0{ending}": inward[index], f"weight_hh_l0{ending}": across[index]}
        for name, bias in zip(("bias_ih_l0", "bias_hh_l0"), biases or (), strict=False):
            weights[f"{name}{ending}"] = _in_torchs_order(node.operator, bias)[index]
    kinds: dict[str, Literal["lstm", "gru", "rnn"]] = {"LSTM": "lstm", "GRU": "gru", "RNN": "rnn"}
    sequence = blocks.recurrent(
        draft,
        read.value,
        kinds[node.operator],
        weights,
        input_size=inward.shape[2],
        hidden_size=across.shape[2],
        has_bias=b is not None,
        is_bidirectional=direction == "bidirectional",
        nonlinearity=_activations(node)[0].lower() if node.operator == "RNN" else None,
    )
    directions, hidden = inward.shape[0], across.shape[2]
    each = draft.reshape(sequence, (sequence.shape[0], directions, hidden))
    last = draft.reshape(blocks.last_state(draft, sequence), (directions, hidden))
    return [Held(each, 0 if first else 2), Held(last, 0 if first else 1), Unread("the last cell state of an LSTM")]


def _strange(node: Node, *, lengths: Any, states: Sequence[Any], peepholes: Any) -> list[str]:
    wrong = []
    wrong += ["lengths of its sequences: pad them, and give none"] if lengths is not None else []
    wrong += ["peepholes: make it without"] if peepholes is not None else []
    wrong += ["a clip: make it without"] if "clip" in node.attributes else []
    wrong += ["input_forget: make it without"] if node.attributes.get("input_forget", 0) else []
    if any(each is not None and not (isinstance(each, Constant) and not each.array.any()) for each in states):
        wrong.append("states that it begins from: let it begin from zeros")
    if node.operator == "GRU" and not node.attributes.get("linear_before_reset", 0):
        wrong.append("linear_before_reset=0: make it 1, as torch and Keras (reset_after) do")
    usual = {"LSTM": ["Sigmoid", "Tanh", "Tanh"], "GRU": ["Sigmoid", "Tanh"]}.get(node.operator)
    given = _activations(node)
    if (usual and given[: len(usual)] != usual) or (not usual and given[0] not in ("Tanh", "Relu")):
        wrong.append(f"activations {given}: take the usual ones")
    return wrong


def _activations(node: Node) -> list[str]:
    usual = {"LSTM": [b"Sigmoid", b"Tanh", b"Tanh"], "GRU": [b"Sigmoid", b"Tanh"], "RNN": [b"Tanh"]}[node.operator]
    return [each.decode() for each in node.attributes.get("activations", usual)]


def _in_torchs_order(operator: str, array: _Array) -> _Array:
    """[directions, gates * hidden, ...]."""
    order = _GATES[operator]
    gates = np.split(array, len(order), axis=1)
    return np.concatenate([gates[gate] for gate in order], axis=1)


LAYERS: dict[str, Handler] = {
    "Gemm": _gemm,
    "MatMul": _matmul,
    "Conv": _convolution,
    "MaxPool": _pool("max"),
    "AveragePool": _pool("average"),
    "GlobalAveragePool": _global_pool("mean"),
    "GlobalMaxPool": _global_pool("max"),
    "LayerNormalization": _last_norm,
    "RMSNormalization": _last_norm,
    "InstanceNormalization": _instance_norm,
    "GroupNormalization": _group_norm,
    "BatchNormalization": _batch_norm,
    "Gather": _gather,
    "LSTM": _recurrent,
    "GRU": _recurrent,
    "RNN": _recurrent,
}
