"""torch's multi-head attention, as its four projections around one scaled dot product. Exactly this class."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional

from cloister_privacy.errors import UncoveredParameter
from cloister_privacy.training.rules.tape import Tape

__all__ = ["attention"]


def attention(
    module: nn.MultiheadAttention,
    tape: Tape,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, None]:
    """As the module itself, without the weights."""
    if module.bias_k is not None or module.add_zero_attn or not module._qkv_same_embed_dim:
        raise UncoveredParameter(
            "MultiheadAttention with add_bias_kv, add_zero_attn, kdim or vdim is not clipped by example; use it without"
        )
    if query.ndim != 3:
        raise UncoveredParameter("MultiheadAttention is clipped on batches only; give it [n, T, d]")
    is_self = query is key and key is value
    if not module.batch_first:
        query, key, value = (each.transpose(0, 1) for each in (query, key, value))
    if is_self:
        projected = tape.linear(query, module.in_proj_weight, module.in_proj_bias).chunk(3, dim=-1)
    else:
        raise UncoveredParameter("MultiheadAttention is clipped as self-attention only, on one and the same tensor")
    q, k, v = (each.view(*each.shape[:2], module.num_heads, -1).transpose(1, 2) for each in projected)
    mask = _mask(attn_mask, key_padding_mask, n=len(q), heads=module.num_heads)
    attended = functional.scaled_dot_product_attention(
        q,
        k,
        v,
        attn_mask=mask,
        dropout_p=module.dropout if module.training else 0.0,
        is_causal=is_causal and mask is None,
    )
    output = tape.linear(attended.transpose(1, 2).flatten(2), module.out_proj.weight, module.out_proj.bias)
    return output if module.batch_first else output.transpose(0, 1), None


def _mask(attn_mask: Tensor | None, key_padding_mask: Tensor | None, *, n: int, heads: int) -> Tensor | None:
    """Both masks as one that is added to the scores, [n or 1, heads or 1, T, T]."""
    parts = []
    if attn_mask is not None:
        added = _added(attn_mask)
        parts.append(added.view(n, heads, *added.shape[1:]) if added.ndim == 3 else added[None, None])
    if key_padding_mask is not None:
        parts.append(_added(key_padding_mask)[:, None, None, :])
    return sum(parts[1:], start=parts[0]) if parts else None


def _added(mask: Tensor) -> Tensor:
    if mask.dtype != torch.bool:
        return mask
    return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(mask, -torch.inf)
