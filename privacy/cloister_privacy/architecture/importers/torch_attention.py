"""Attention that a torch module's forward spells out by matrix products, or by scaled_dot_product_attention."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from cloister_privacy.architecture.importers.attention import attended
from cloister_privacy.architecture.importers.draft import NotMapped, Value
from cloister_privacy.architecture.importers.origins import Scores
from cloister_privacy.architecture.importers.torch_recording import Call, Handler

__all__ = ["ATTENTION", "is_causal_mask", "product", "scaled"]


def _attention(
    call: Call,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Value:
    if not isinstance(query, Value) or not isinstance(key, Value) or not isinstance(value, Value) or enable_gqa:
        raise NotMapped("attends to what is no value, or shares keys among heads; use torch.nn.MultiheadAttention")
    causal = is_causal or is_causal_mask(None if attn_mask is None else _allowed(attn_mask), query.shape[-2])
    return attended(call.draft, query, key, value, scale=scale, is_causal=causal)


def _allowed(mask: Any) -> Any:
    """scaled_dot_product_attention's masks tell what may be looked at, and a layer's what may not."""
    return ~mask if isinstance(mask, Tensor) and mask.dtype == torch.bool else mask


def product(call: Call, first: Any, second: Any) -> Any:
    """Of two matrices of each head that both depend on the input."""
    if isinstance(first, Scores) and first.is_softmaxed and isinstance(second, Value):
        scores = first
        return attended(call.draft, scores.query, scores.key, second, scale=scores.scale, is_causal=scores.is_causal)
    if isinstance(first, Value) and isinstance(second, Value) and len(first.shape) == len(second.shape) == 3:
        return Scores(first, call.draft.permute(second, (0, 2, 1)))
    raise NotMapped("multiplies matrices that both depend on the input; for attention use torch.nn.MultiheadAttention")


def scaled(scores: Scores, by: Any) -> Scores:
    """Raises NotMapped where they are scaled by what is no number, or after their softmax."""
    if isinstance(by, Tensor) and by.numel() == 1:
        by = float(by)
    if scores.is_softmaxed or not isinstance(by, int | float):
        raise NotMapped("scales attention by what is no number; use torch.nn.MultiheadAttention")
    return replace(scores, scale=scores.scale * by)


def _masked_fill(call: Call, input: Any, mask: Any, value: Any) -> Any:
    filled = float(value) if isinstance(value, int | float | Tensor) else 0.0
    if not isinstance(input, Scores) or input.is_softmaxed or not filled < -1e8:
        raise NotMapped("fills by a mask; the language has masks in attention (key_padding_mask, or a causal one)")
    return replace(input, is_causal=is_causal_mask(mask, input.query.shape[1]) or input.is_causal)


def is_causal_mask(mask: Any, length: int) -> bool:
    """Whether a constant mask lets each position see those up to itself. Raises NotMapped where it lets it see others but all."""
    if mask is None:
        return False
    if isinstance(mask, Tensor):
        mask = mask[(0,) * (mask.ndim - 2)] if mask.ndim > 2 and mask.shape[:-2].numel() == 1 else mask
    if not isinstance(mask, Tensor) or mask.ndim != 2:
        raise NotMapped("has an attn_mask that is not constant, one for all heads")
    hidden = mask.cpu() if mask.dtype == torch.bool else mask.cpu() < -1e30
    later = torch.ones(length, length, dtype=torch.bool).triu(1)
    if mask.dtype != torch.bool and bool(mask.cpu()[~hidden].any()):
        raise NotMapped("has an attn_mask that adds to attention; the language has a causal one or none")
    if not bool(hidden.any()):
        return False
    if not torch.equal(hidden, later):
        raise NotMapped("has an attn_mask that is not causal; the language has a causal one or none")
    return True


ATTENTION: dict[str, Handler] = {"scaled_dot_product_attention": _attention, "masked_fill": _masked_fill}
