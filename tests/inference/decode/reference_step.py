"""A whole decoding step in plain PyTorch, from the same weights as the native operator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from minimind.inference.decode.int8 import quantize, rounded_activations
from minimind.inference.decode.reference import decode_attention_ref, rope_append_kv_ref
from minimind.inference.decode.step import DecodeWeights
from minimind.kernels.moe_routing import route_ref
from minimind.kernels.rms_norm import rms_norm_ref

Linear = Callable[[Tensor, Tensor], Tensor]  # (x [..., K], weight [N, K]) -> [..., N]


def decode_step_ref(
    weights: DecodeWeights,
    tokens: Tensor,
    positions: Tensor,
    slots: Tensor,
    page_table: Tensor,
    lengths: Tensor,
    cos: Tensor,
    sin: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """`decode_step` on `weights.tensors`, on any device."""
    w = weights
    linear = linear_int8_ref if w.int8 else linear_ref
    embedding, final_norm, head = w.tensors[:3]
    x = embedding[tokens].float()
    slots = torch.where(lengths > 0, slots, -1)
    layers, per_layer, head_dim = len(key_cache), (len(w.tensors) - 3) // len(key_cache), key_cache.shape[-1]
    for i in range(layers):
        input_norm, qkv, *rest = w.tensors[3 + i * per_layer :][:per_layer]
        q_norm, k_norm = rest[:2] if w.qk_norm else (None, None)
        o, post_norm, *mlp = rest[2:] if w.qk_norm else rest
        caches = (key_cache[i], value_cache[i])
        scales = (None if k_scale is None else k_scale[i], None if v_scale is None else v_scale[i])
        packed = linear(norm_ref(x, input_norm, w.eps), qkv)
        q = rope_append_kv_ref(packed, cos, sin, positions, slots, *caches, w.heads, q_norm, k_norm, w.eps, *scales)
        attended = decode_attention_ref(q, *caches, page_table, lengths, head_dim**-0.5, *scales)
        x = x + linear(attended.flatten(1), o)
        x = x + _feed_forward_ref(w, norm_ref(x, post_norm, w.eps), mlp, linear)
    return linear(norm_ref(x, final_norm, w.eps), head) * (lengths > 0)[:, None]


def _feed_forward_ref(w: DecodeWeights, x: Tensor, mlp: list[Tensor], linear: Linear) -> Tensor:
    out = torch.zeros_like(x)
    if w.experts:
        router, gate_up, down, *mlp = mlp
        out = experts_ref(x, router, gate_up, down, w.experts_per_token, w.normalize_gates, linear)
    for gate_up, down in zip(mlp[::2], mlp[1::2], strict=True):
        out = out + mlp_ref(x, gate_up, down, linear)
    return out


def experts_ref(
    x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, top_k: int, normalize: bool, linear: Linear
) -> Tensor:
    """x [B, C] through the top_k of E experts of each row; router [E, C], gate_up [E, 2 J, C], down [E, C, J]."""
    gates, chosen, _ = route_ref(x @ router.to(x.dtype).t(), top_k, normalize)
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for gate, expert in zip(gates[b], chosen[b].tolist(), strict=True):
            out[b] += gate * mlp_ref(x[b], gate_up[expert], down[expert], linear)
    return out


def mlp_ref(x: Tensor, gate_up: Tensor, down: Tensor, linear: Linear) -> Tensor:
    """SwiGLU: x [..., C], gate_up [2 I, C], down [C, I] -> [..., C]."""
    gate, up = linear(x, gate_up).chunk(2, dim=-1)
    return linear(torch.nn.functional.silu(gate) * up, down)


def linear_ref(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T. The factors of a bfloat16 weight are rounded to bfloat16; the sum is as wide as x."""
    if weight.dtype == torch.bfloat16:
        x = x.bfloat16().to(x.dtype)
    return x @ weight.to(x.dtype).t()


def linear_int8_ref(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T with both factors rounded to 8 bits; the sum is as wide as x."""
    integers, scales = quantize(weight.float())
    return rounded_activations(x) @ (integers.to(x.dtype) * scales.to(x.dtype)).t()


def norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm_ref(x, weight.to(x.dtype), eps)
