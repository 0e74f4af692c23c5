"""What the decoding operators take: a wrong argument is one ValueError line that names it. No device is asked."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

FLOATS = (torch.bfloat16, torch.float16, torch.float32)
CACHES = (*FLOATS, torch.float8_e4m3fn)


def check(name: str, tensor: Any, shape: tuple[int | None, ...], dtypes: tuple[torch.dtype, ...], like: Tensor) -> None:
    """shape: None where any size will do."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name} must be a tensor, got {type(tensor).__name__}")
    right = tensor.ndim == len(shape) and all(
        want is None or want == got for want, got in zip(shape, tensor.shape, strict=True)
    )
    if not right:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} must have shape [{wanted}], got {list(tensor.shape)}")
    if tensor.dtype not in dtypes:
        raise ValueError(f"{name} must be {' or '.join(map(_short, dtypes))}, got {_short(tensor.dtype)}")
    if tensor.device != like.device:
        raise ValueError(f"{name} lies on {tensor.device}, the first argument on {like.device}")


def _short(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def check_cache(
    key_cache: Tensor, value_cache: Tensor, k_scale: Tensor | None, v_scale: Tensor | None, like: Tensor
) -> None:
    check("key_cache", key_cache, (None, None, None, None), CACHES, like)
    check("value_cache", value_cache, tuple(key_cache.shape), (key_cache.dtype,), like)
    _, tokens, groups, dim = key_cache.shape
    if 0 in (tokens, groups, dim) or dim % 2 or dim > 256:
        raise ValueError(f"key_cache [P, S, G, D] must have an even D of at most 256, got {list(key_cache.shape)}")
    for name, cache in (("key_cache", key_cache), ("value_cache", value_cache)):
        if cache.shape[0] and not cache[0].is_contiguous():
            raise ValueError(f"{name} must be dense within a page, got strides {cache.stride()}")
    if value_cache.stride(0) != key_cache.stride(0):
        raise ValueError("key_cache and value_cache must have the same strides")
    for name, scale in (("k_scale", k_scale), ("v_scale", v_scale)):
        if (scale is not None) != (key_cache.dtype == torch.float8_e4m3fn):
            raise ValueError(f"{name} must be given for a float8 cache and for no other")
        if scale is not None:
            check(name, scale, (groups,), (torch.float32,), like)


def check_rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    positions: Tensor,
    slots: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    check("qkv", qkv, (None, None), FLOATS, qkv)
    check_cache(key_cache, value_cache, k_scale, v_scale, qkv)
    groups, dim = key_cache.shape[2:]
    check_heads(heads, groups)
    tokens = qkv.shape[0]
    check("qkv", qkv, (tokens, (heads + 2 * groups) * dim), FLOATS, qkv)
    check("cos", cos, (None, dim // 2), (torch.float32,), qkv)
    check("sin", sin, tuple(cos.shape), (torch.float32,), qkv)
    if cos.shape[0] == 0:
        raise ValueError("cos must have at least one row")
    check("positions", positions, (tokens,), (torch.int32,), qkv)
    check("slots", slots, (tokens,), (torch.int64,), qkv)
    if (q_weight is None) != (k_weight is None):
        raise ValueError("q_weight and k_weight must be given together")
    if q_weight is not None:
        check("q_weight", q_weight, (dim,), FLOATS, qkv)
        check("k_weight", k_weight, (dim,), (q_weight.dtype,), qkv)


def check_heads(heads: int, groups: int) -> None:
    if heads <= 0 or heads % groups:
        raise ValueError(f"heads={heads} must be a multiple of the {groups} key/value heads of key_cache")


def check_attention(
    q: Tensor,
    key_cache: Tensor,
    value_cache: Tensor,
    block_table: Tensor,
    lengths: Tensor,
    scale: float,
    k_scale: Tensor | None,
    v_scale: Tensor | None,
) -> None:
    check("q", q, (None, None, None), FLOATS, q)
    check_cache(key_cache, value_cache, k_scale, v_scale, q)
    batch, heads, _ = q.shape
    check("q", q, (batch, heads, key_cache.shape[3]), FLOATS, q)
    check_heads(heads, key_cache.shape[2])
    check("block_table", block_table, (batch, None), (torch.int32,), q)
    check("lengths", lengths, (batch,), (torch.int32,), q)


def check_sample(
    logits: Tensor,
    temperature: Tensor,
    top_k: Tensor,
    top_p: Tensor,
    min_p: Tensor,
    repetition_penalty: Tensor,
    presence_penalty: Tensor,
    history: Tensor,
    seeds: Tensor,
    offsets: Tensor,
) -> None:
    check("logits", logits, (None, None), (torch.float32,), logits)
    batch, vocab = logits.shape
    if vocab == 0:
        raise ValueError("logits must have at least one column")
    floats = {
        "temperature": temperature,
        "top_p": top_p,
        "min_p": min_p,
        "repetition_penalty": repetition_penalty,
        "presence_penalty": presence_penalty,
    }
    for name, tensor in floats.items():
        check(name, tensor, (batch,), (torch.float32,), logits)
    check("top_k", top_k, (batch,), (torch.int32,), logits)
    check("history", history, (batch, vocab), (torch.int32,), logits)
    check("seeds", seeds, (batch,), (torch.int64,), logits)
    check("offsets", offsets, (batch,), (torch.int64,), logits)
