"""The forward pass of upstream MiniMind's generation, with this project's plain model: torch.cat appends keys and
values."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind import ops
from minimind.modeling import Model, MoE

KeyValues = list[tuple[Tensor, Tensor] | None]  # of each layer, [B, S, G, D]


def hidden_states(
    model: Model,
    ids: Tensor,
    past: KeyValues,
    table: tuple[Tensor, Tensor],
    positions: Tensor,
    bias: Tensor | None = None,
) -> Tensor:
    """Normalised hidden states [B, T, C] of ids int64 [B, T], which follow the tokens in `past`; their keys and values
    are appended to it. table: cos and sin of the rotation. positions int64 [1 or B, T]. bias [B, 1, T, S] is added to
    the scores; None for causal attention without padding."""
    x, delta = model.embed_tokens(ids), None
    for index, block in enumerate(model.layers):
        layer: Any = block
        normed, x = layer.input_layernorm(x, delta)
        attended = _attention(layer.self_attn, normed, positions, bias, table, past, index)
        normed, x = layer.post_attention_layernorm(x, attended)
        delta = layer.mlp(normed)[0] if isinstance(layer.mlp, MoE) else layer.mlp(normed)
    return model.norm(x, delta)[0]


def _attention(
    layer: Any,
    x: Tensor,
    positions: Tensor,
    bias: Tensor | None,
    table: tuple[Tensor, Tensor],
    past: KeyValues,
    index: int,
) -> Tensor:
    q_gain, k_gain = (None, None) if layer.q_norm is None else (layer.q_norm.weight, layer.k_norm.weight)
    cos, sin = table
    q, k, v = ops.rope(layer.qkv_proj(x), cos, sin, positions, layer.heads, layer.kv_heads, q_gain, k_gain, layer.eps)
    if (earlier := past[index]) is not None:
        k, v = torch.cat((earlier[0], k), dim=1), torch.cat((earlier[1], v), dim=1)
    past[index] = k, v
    q = q.transpose(1, 2)
    k, v = (t.repeat_interleave(layer.heads // layer.kv_heads, dim=2).transpose(1, 2) for t in (k, v))
    if bias is None and x.shape[1] > 1:
        out = F.scaled_dot_product_attention(q, k, v, is_causal=True)
    else:
        scores = q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5
        out = (scores if bias is None else scores + bias).softmax(dim=-1) @ v
    return layer.o_proj(out.transpose(1, 2).flatten(2))
