"""Attention, as `nn.MultiheadAttention` computes it, by functions that rules are known of."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from raytrust.persample.watch import Watch


def attention(watch: Watch, *args: Any, **named: Any) -> tuple[Tensor, Tensor | None]:
    with watch:
        return _attention(*args, **named)


def _attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    embed_dim_to_check: int,
    num_heads: int,
    in_proj_weight: Tensor,
    in_proj_bias: Tensor | None,
    bias_k: Any,
    bias_v: Any,
    add_zero_attn: bool,
    dropout_p: float,
    out_proj_weight: Tensor,
    out_proj_bias: Tensor | None,
    training: bool = True,
    key_padding_mask: Tensor | None = None,
    need_weights: bool = True,
    attn_mask: Tensor | None = None,
    use_separate_proj_weight: bool = False,
    q_proj_weight: Any = None,
    k_proj_weight: Any = None,
    v_proj_weight: Any = None,
    static_k: Any = None,
    static_v: Any = None,
    average_attn_weights: bool = True,
    is_causal: bool = False,
) -> tuple[Tensor, Tensor | None]:
    """By products alone, with images first; torch's puts their positions first."""
    if query.ndim != 3 or add_zero_attn or any(t is not None for t in (bias_k, static_k, static_v)):
        raise ValueError("no rule for attention with these options")
    together = query is key is value and not use_separate_proj_weight
    query, key, value = (t.transpose(0, 1) for t in (query, key, value))
    if together:
        q, k, v = F.linear(query, in_proj_weight, in_proj_bias).chunk(3, -1)
    else:
        separate = (q_proj_weight, k_proj_weight, v_proj_weight)
        weights = separate if use_separate_proj_weight else in_proj_weight.chunk(3)
        biases = (None, None, None) if in_proj_bias is None else in_proj_bias.chunk(3)
        q, k, v = map(F.linear, (query, key, value), weights, biases)
    q, k, v = (t.unflatten(2, (num_heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = q @ k.mT / q.shape[-1] ** 0.5
    for mask in (attn_mask, key_padding_mask):
        if mask is None:
            continue
        if mask is key_padding_mask:
            mask = mask[:, None, None]
        elif mask.ndim == 3:
            mask = mask.unflatten(0, (-1, num_heads))
        scores = scores.masked_fill(mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    shares = F.dropout(scores.softmax(-1), dropout_p, training)
    output = F.linear((shares @ v).transpose(1, 2).flatten(2), out_proj_weight, out_proj_bias)
    if need_weights and average_attn_weights:
        shares = shares.mean(1)
    return output.transpose(0, 1), shares if need_weights else None
