"""Decoding with a paged key/value cache in plain PyTorch: what the native operators are held to.

The cache of one layer is key_cache, value_cache [P, S, G, D]: P pages of S tokens, G key/value heads, D head size. A
sequence owns the pages of its row of block_table, in order. The slotted cache is the case of one page per sequence: S
is then the longest length, and block_table is [B, 1]. A float8 cache stores x / scale, one scale for each head.

All arithmetic is float32 (float64 for float64 inputs), rounded once at the end.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimind.inference.decode.cache_dtype import as_bytes, stored
from minimind.kernels.moe_routing import route_ref
from minimind.kernels.rms_norm import rms_norm_ref
from minimind.kernels.rope import rope_ref


def rope_append_kv_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """See `decode_ops.rope_append_kv`."""
    groups = key_cache.shape[2]
    wide = qkv.to(torch.promote_types(qkv.dtype, torch.float32))
    rows = positions.long().clamp(0, cos.shape[0] - 1)
    q, k, v = rope_ref(wide, cos.to(wide.dtype), sin.to(wide.dtype), rows, heads, groups, q_weight, k_weight, eps)
    written = slots >= 0
    page, offset = slots[written] // key_cache.shape[1], slots[written] % key_cache.shape[1]
    for new, cache, scale in ((k, key_cache, k_scale), (v, value_cache, v_scale)):
        as_bytes(cache)[page, offset] = as_bytes(stored(new[written], cache.dtype, scale))
    return (q * written[:, None, None]).to(qkv.dtype)


def decode_attention_ref(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    k_scale: Tensor | None = None,
    v_scale: Tensor | None = None,
) -> Tensor:
    """See `decode_ops.decode_attention`."""
    out = torch.zeros_like(q)
    for b, length in enumerate(lengths.tolist()):
        if length > 0:
            k = gather_cache(key_cache, block_table[b], length, k_scale)
            v = gather_cache(value_cache, block_table[b], length, v_scale)
            out[b] = _attend(q[b], k, v, scale).to(q.dtype)
    return out


def gather_cache(cache: Tensor, table: Tensor, length: int, scale: Tensor | None = None) -> Tensor:
    """The first `length` rows of the sequence whose pages are `table`: float [length, G, D]; float8 becomes float32."""
    pages = cache[table[: -(-length // cache.shape[1])].long()]
    rows = pages.flatten(0, 1)[:length]
    return rows if scale is None else rows.float() * scale[:, None]


def _attend(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """q [H, D], k and v [T, G, D] -> [H, D] in float32 or wider."""
    wide = torch.promote_types(q.dtype, torch.float32)
    grouped = q.to(wide).unflatten(0, (k.shape[1], -1))  # [G, H / G, D]
    scores = torch.einsum("ghd,tgd->ght", grouped, k.to(wide)) * scale
    return torch.einsum("ght,tgd->ghd", scores.softmax(dim=-1), v.to(wide)).flatten(0, 1)


def experts_ref(x: Tensor, router: Tensor, gate_up: Tensor, down: Tensor, top_k: int, normalize: bool) -> Tensor:
    """x [B, C] through the top_k of E experts of each row; router [E, C], gate_up [E, 2 J, C], down [E, C, J]."""
    gates, chosen, _ = route_ref(x @ router.to(x.dtype).t(), top_k, normalize)
    out = torch.zeros_like(x)
    for b in range(x.shape[0]):
        for gate, expert in zip(gates[b], chosen[b].tolist(), strict=True):
            out[b] += gate * mlp_ref(x[b], gate_up[expert], down[expert])
    return out


def mlp_ref(x: Tensor, gate_up: Tensor, down: Tensor) -> Tensor:
    """SwiGLU: x [..., C], gate_up [2 I, C], down [C, I] -> [..., C]; see `linear_ref`."""
    gate, up = linear_ref(x, gate_up).chunk(2, dim=-1)
    return linear_ref(torch.nn.functional.silu(gate) * up, down)


def linear_ref(x: Tensor, weight: Tensor) -> Tensor:
    """x @ weight.T. The factors of a bfloat16 weight are rounded to bfloat16; the sum is as wide as x."""
    if weight.dtype == torch.bfloat16:
        x = x.bfloat16().to(x.dtype)
    return x @ weight.to(x.dtype).t()


def norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return rms_norm_ref(x, weight.to(x.dtype), eps)
