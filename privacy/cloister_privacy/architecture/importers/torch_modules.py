"""Torch's modules that are mapped as a whole: recurrent layers, attention, transformer encoders. Each option is mapped or refused."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.nn import functional

from cloister.wire import layers as wire
from cloister_privacy.architecture.importers import blocks
from cloister_privacy.architecture.importers.draft import NotMapped, Place, Value, value_of
from cloister_privacy.architecture.importers.origins import Mask, States, Unread
from cloister_privacy.architecture.importers.torch_attention import is_causal_mask
from cloister_privacy.architecture.importers.torch_recording import Call, Handler

__all__ = ["MODULES"]

_ACTIVATIONS: dict[Any, str] = {functional.relu: "relu", torch.relu: "relu", functional.gelu: "gelu"}


def _recurrent(call: Call, module: nn.RNNBase, input: Any, hx: Any = None) -> list[Any]:
    draft = call.draft
    kind = {"LSTM": "lstm", "GRU": "gru"}.get(module.mode, "rnn")
    if not module.batch_first:
        raise NotMapped("has batch_first=False; make it with batch_first=True, and give it the examples first")
    if module.proj_size:
        raise NotMapped("has proj_size; make it without, and put a linear layer after it")
    if not isinstance(input, Value) or len(input.shape) != 2:
        raise NotMapped(
            "reads what is no sequence, (length, width) of each example; packed sequences have no form here"
        )
    for given in hx if isinstance(hx, tuple) else [] if hx is None else [hx]:
        if not isinstance(given, Tensor) or bool(given.any()):
            raise NotMapped("begins from states that are given; let it begin from zeros")
    if module.dropout and module.num_layers > 1:
        draft.warn("drops out between its layers; here it does not")
    weights, is_frozen = _weights(call, module)
    sequence = blocks.recurrent(
        draft,
        input,
        kind,  # type: ignore[arg-type]  # one of the three
        weights,
        input_size=module.input_size,
        hidden_size=module.hidden_size,
        num_layers=module.num_layers,
        has_bias=module.bias,
        is_bidirectional=module.bidirectional,
        is_frozen=is_frozen,
        nonlinearity=module.nonlinearity if isinstance(module, nn.RNN) else None,
    )
    directions = 2 if module.bidirectional else 1
    states = States(sequence, module.hidden_size, directions * module.num_layers, directions)
    return [sequence, states, *(Unread("the last cell state of an LSTM") for _ in call.outs[2:])]


def _weights(call: Call, module: nn.Module) -> tuple[dict[str, NDArray[np.float32]], bool]:
    """A module's weights by name, and whether it is frozen."""
    parameters = {name: call.owners.of(each) for name, each in module.named_parameters()}
    weights = {name: call.owners.take(call.draft, each) for name, each in parameters.items()}
    return weights, call.owners.is_frozen(call.draft, *parameters.values())


def _attention(
    call: Call,
    module: nn.MultiheadAttention,
    query: Any,
    key: Any,
    value: Any,
    key_padding_mask: Any = None,
    need_weights: bool = True,
    attn_mask: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> list[Any]:
    _require_plain(module)
    if not isinstance(query, Value) or query != key or query != value:
        raise NotMapped(
            "attends to something else than it asks from; the language has self-attention: attention(x, x, x)"
        )
    if module.dropout:
        call.draft.warn("drops out attention weights; here it does not")
    weights, is_frozen = _weights(call, module)
    made = blocks.attention(
        call.draft,
        query,
        _tokens(key_padding_mask),
        weights,
        num_heads=module.num_heads,
        is_causal=is_causal_mask(attn_mask, query.shape[0]),
        is_frozen=is_frozen,
    )
    return [made, *(Unread("attention weights") for _ in call.outs[1:])]


def _require_plain(module: nn.MultiheadAttention) -> None:
    wrong = []
    wrong += ["batch_first=False: make it with batch_first=True"] if not module.batch_first else []
    wrong += ["kdim or vdim: give keys and values the width of the queries"] if not module._qkv_same_embed_dim else []
    wrong += ["add_bias_kv: leave it out"] if module.bias_k is not None else []
    wrong += ["add_zero_attn: leave it out"] if module.add_zero_attn else []
    if wrong:
        raise NotMapped(f"has {'; '.join(wrong)}")


def _tokens(mask: Any) -> Value | None:
    if mask is None or (isinstance(mask, Tensor) and not bool(mask.any())):
        return None
    if isinstance(mask, Mask) and not mask.is_there:
        return mask.tokens
    raise NotMapped("has a key_padding_mask that is not `tokens == 0` of a column of tokens")


def _transformer_layer(
    call: Call,
    module: nn.TransformerEncoderLayer,
    src: Any,
    src_mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool = False,
) -> Value:
    _require_plain(module.self_attn)
    if not isinstance(src, Value) or len(src.shape) != 2:
        raise NotMapped("reads what is no sequence, (length, width) of each example")
    rates = {module.dropout.p, module.dropout1.p, module.dropout2.p}
    if len(rates) > 1:
        raise NotMapped(f"has several rates of dropout, {sorted(rates)}; give it one")
    if module.self_attn.dropout:
        call.draft.warn("drops out attention weights too; here it does not")
    if len(list(module.parameters())) != 12:
        call.draft.warn("has no biases; here it has them, and they start from 0")
    weights, is_frozen = _weights(call, module)
    return blocks.transformer_layer(
        call.draft,
        src,
        _tokens(src_key_padding_mask),
        weights,
        d_model=module.linear1.in_features,
        nhead=module.self_attn.num_heads,
        dim_feedforward=module.linear1.out_features,
        activation=_activation(module.activation),
        norm_first=module.norm_first,
        causal=is_causal_mask(src_mask, src.shape[0]),
        dropout=rates.pop(),
        eps=module.norm1.eps,
        frozen=is_frozen,
    )


def _activation(given: Any) -> str:
    if isinstance(given, nn.ReLU) or (isinstance(given, nn.GELU) and given.approximate == "none"):
        return "relu" if isinstance(given, nn.ReLU) else "gelu"
    if given not in _ACTIVATIONS:
        raise NotMapped("has another activation than relu or gelu; take one of these")
    return _ACTIVATIONS[given]


def _transformer(
    call: Call,
    module: nn.TransformerEncoder,
    src: Any,
    mask: Any = None,
    src_key_padding_mask: Any = None,
    is_causal: bool | None = None,
) -> Value:
    value, place = src, call.draft.place
    for index, layer in enumerate(module.layers):
        if type(layer) is not nn.TransformerEncoderLayer:
            raise NotMapped(f"holds a {type(layer).__name__}; the language has torch.nn.TransformerEncoderLayer")
        call.draft.place = Place(f"{place.path}.layers.{index}".strip("."), "TransformerEncoderLayer")
        value = _transformer_layer(call, layer, value, mask, src_key_padding_mask)
    call.draft.place = Place(f"{place.path}.norm".strip("."), "LayerNorm")
    if module.norm is not None:
        if not isinstance(module.norm, nn.LayerNorm):
            raise NotMapped("ends with another norm than LayerNorm; take that one")
        weights, is_frozen = _weights(call, module.norm)
        value = blocks.last_norm(
            call.draft,
            value,
            wire.LayerNorm,
            tuple(module.norm.normalized_shape),
            weights.get("weight"),
            weights.get("bias"),
            eps=module.norm.eps,
            is_frozen=is_frozen and bool(weights),
        )
    call.draft.place = place
    return value_of(value)


def _refused(why: str) -> Handler:
    def run(call: Call, module: nn.Module, *args: Any, **kwargs: Any) -> Any:
        raise NotMapped(why)

    return run


MODULES: tuple[tuple[type[nn.Module], Handler], ...] = (
    (nn.LSTM, _recurrent),
    (nn.GRU, _recurrent),
    (nn.RNN, _recurrent),
    (nn.MultiheadAttention, _attention),
    (nn.TransformerEncoderLayer, _transformer_layer),
    (nn.TransformerEncoder, _transformer),
    (nn.TransformerDecoderLayer, _refused("is a decoder; the language has encoders, which may be causal")),
    (nn.TransformerDecoder, _refused("is a decoder; the language has encoders, which may be causal")),
    (nn.Transformer, _refused("has a decoder; the language has encoders, torch.nn.TransformerEncoder")),
)
