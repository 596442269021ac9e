"""Keras' recurrent layers and attention, in the layers of the language: gates in torch's order, heads side by side."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from numpy.typing import NDArray

from cloister.wire import layers as wire
from cloister_privacy.architecture.importers import blocks
from cloister_privacy.architecture.importers.draft import NotMapped, Value, value_of
from cloister_privacy.architecture.importers.keras_graph import Handler, Node
from cloister_privacy.architecture.importers.keras_layers import tokens_of
from cloister_privacy.architecture.importers.origins import Unread

__all__ = ["SEQUENCES"]

_Array = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class _Direction:
    """The weights of one direction of a recurrent layer, as torch has them."""

    inward: _Array
    across: _Array
    bias_inward: _Array | None
    bias_across: _Array | None


def _recurrent(node: Node, sequence: Any, initial_state: Any = None, mask: Any = None, **kwargs: Any) -> Any:
    layer = node.operation
    if initial_state is not None or kwargs:
        raise NotMapped("begins from states that are given; let it begin from zeros")
    _require_plain(layer)
    if layer.go_backwards:
        raise NotMapped("goes backwards; use Bidirectional, or reverse nothing")
    return _given(node, value_of(sequence), [layer], mask or node.mask)


def _bidirectional(node: Node, sequence: Any, initial_state: Any = None, mask: Any = None, **kwargs: Any) -> Any:
    layer = node.operation
    if initial_state is not None or kwargs:
        raise NotMapped("begins from states that are given; let it begin from zeros")
    if layer.merge_mode != "concat":
        raise NotMapped(f"has merge_mode {layer.merge_mode!r}; take 'concat'")
    if mask is not None or node.mask is not None:
        raise NotMapped("skips the zeros of its tokens in both directions; make the embedding without mask_zero")
    parts = [layer.forward_layer, layer.backward_layer]
    for each in parts:
        _require_plain(each)
    if type(parts[0]) is not type(parts[1]) or parts[0].units != parts[1].units:
        raise NotMapped("has another layer backwards than forwards; take one for both")
    return _given(node, value_of(sequence), parts, None)


def _require_plain(layer: Any) -> None:
    kind = type(layer).__name__
    if kind not in ("LSTM", "GRU", "SimpleRNN"):
        raise NotMapped(f"runs {kind}; the language has LSTM, GRU and SimpleRNN")
    wrong = []
    name = getattr(layer.activation, "__name__", "?")
    if name != "tanh" and not (kind == "SimpleRNN" and name == "relu"):
        wrong.append(f"the activation {name}: take tanh")
    if kind != "SimpleRNN" and getattr(layer.recurrent_activation, "__name__", "?") != "sigmoid":
        wrong.append("a recurrent_activation that is not sigmoid: take that one")
    if kind == "GRU" and not layer.reset_after:
        wrong.append("reset_after=False: make it with reset_after=True")
    if layer.stateful:
        wrong.append("stateful=True, which mixes examples: make it False")
    if wrong:
        raise NotMapped(f"has {'; '.join(wrong)}")


def _given(node: Node, value: Value, parts: list[Any], mask: Any) -> Any:
    first, draft = parts[0], node.draft
    kind: Literal["lstm", "gru", "rnn"] = {"LSTM": "lstm", "GRU": "gru"}.get(type(first).__name__, "rnn")  # type: ignore[assignment]  # one of the three
    weights: dict[str, _Array] = {}
    for part, ending in zip(parts, ("", "_reverse"), strict=False):
        if part.dropout or part.recurrent_dropout:
            draft.warn("drops out its inputs or states; here it does not")
        found = _direction(node, part, kind)
        weights |= {f"weight_ih_l0{ending}": found.inward, f"weight_hh_l0{ending}": found.across}
        if found.bias_inward is not None and found.bias_across is not None:
            weights |= {f"bias_ih_l0{ending}": found.bias_inward, f"bias_hh_l0{ending}": found.bias_across}
    sequence = blocks.recurrent(
        draft,
        value,
        kind,
        weights,
        input_size=value.shape[-1],
        hidden_size=first.units,
        has_bias=first.use_bias,
        is_bidirectional=len(parts) > 1,
        is_frozen=node.is_frozen,
        nonlinearity=first.activation.__name__ if kind == "rnn" else None,
    )
    if first.return_sequences:
        out = sequence
    elif mask is not None:
        out = draft.emit(wire.SequencePool, sequence, tokens_of(mask), how="last")
    else:
        out = blocks.last_state(draft, sequence)
    return [out, *(Unread("the states of a recurrent layer") for _ in node.shapes[1:])]


def _direction(node: Node, layer: Any, kind: str) -> _Direction:
    cell = layer.cell
    inward, across, bias = (node.take(name, of=cell) for name in ("kernel", "recurrent_kernel", "bias"))
    if inward is None or across is None:
        raise NotMapped("has no weights; call the model once, so that it is built")
    inward, across = _gates(inward.T, kind), _gates(across.T, kind)
    if bias is None:
        return _Direction(inward, across, None, None)
    if kind == "gru":
        return _Direction(inward, across, _gates(bias[0], kind), _gates(bias[1], kind))
    return _Direction(inward, across, bias, np.zeros_like(bias))


def _gates(array: _Array, kind: str) -> _Array:
    """Keras has a GRU's gates as update, reset, new; torch as reset, update, new. An LSTM's are in one order."""
    if kind != "gru":
        return array
    update, reset, new = np.split(array, 3)
    return np.concatenate([reset, update, new])


def _attention(
    node: Node,
    query: Any,
    value: Any,
    key: Any = None,
    query_mask: Any = None,
    value_mask: Any = None,
    key_mask: Any = None,
    attention_mask: Any = None,
    return_attention_scores: bool = False,
    use_causal_mask: bool = False,
) -> Any:
    layer, width = node.operation, value_of(query).shape[-1]
    key = value if key is None else key
    if query != value or query != key:
        raise NotMapped("attends to something else than it asks from; the language has self-attention: attention(x, x)")
    if attention_mask is not None:
        raise NotMapped("has an attention_mask; use mask_zero of the embedding, or use_causal_mask")
    inner = layer.num_heads * layer.key_dim
    if inner != width or layer.value_dim != layer.key_dim:
        raise NotMapped(
            f"has {layer.num_heads} heads of {layer.key_dim} and {layer.value_dim} on {width}; here heads share the width, so let "
            f"num_heads * key_dim be {width}"
        )
    if layer._output_dense.kernel.shape[-1] != width or len(value_of(query).shape) != 2:
        raise NotMapped("gives another width than it reads, or attends over several axes; let it give what it reads")
    if layer.dropout:
        node.draft.warn("drops out attention weights; here it does not")
    given = (layer._query_dense, layer._key_dense, layer._value_dense)
    kernels = [node.take("kernel", of=each) for each in given]
    biases = [node.take("bias", of=each) for each in given]
    out_kernel, out_bias = (node.take(name, of=layer._output_dense) for name in ("kernel", "bias"))
    if out_kernel is None:
        raise NotMapped("has no weights; call the model once, so that it is built")
    weights = {
        "in_proj_weight": np.concatenate([each.reshape(width, inner).T for each in kernels if each is not None]),
        "out_proj.weight": out_kernel.reshape(inner, width).T,
    }
    if out_bias is not None:
        weights["in_proj_bias"] = np.concatenate([each.reshape(-1) for each in biases if each is not None])
        weights["out_proj.bias"] = out_bias
    masks = [each for each in (query_mask, value_mask, key_mask, node.mask) if each is not None]
    made = blocks.attention(
        node.draft,
        query,
        tokens_of(masks[0]) if masks else None,
        weights,
        num_heads=layer.num_heads,
        is_causal=use_causal_mask,
        is_frozen=node.is_frozen,
    )
    return [made, *(Unread("attention scores") for _ in node.shapes[1:])]


SEQUENCES: dict[str, Handler] = {
    **dict.fromkeys(("LSTM", "GRU", "SimpleRNN"), _recurrent),
    "Bidirectional": _bidirectional,
    "MultiHeadAttention": _attention,
}
