"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of a packed projection, optionally after an RMSNorm of
each query and key head (QK-norm, as in Qwen3, arXiv 2505.09388).

    x1, x2 = halves of a head [D], after the norm          dx1 = dy1 cos + dy2 sin
    y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin           dx2 = dy2 cos - dy1 sin
    norm: x = u * r * w, r = 1 / sqrt(mean_d u[d]^2 + eps); its backward is in rms_norm.py

qkv [..., (H + 2 G) D] holds H query, then G key, then G value heads -> q [..., H, D], k and v [..., G, D]. A token uses
row position_ids[token] of the tables cos, sin float32 [P, D / 2]. Pairs are (i, i + D / 2) ("rotate half").

The backward keeps no tensor of qkv's size; with the norm it keeps qkv itself and r (one float32 per head). v is copied:
for a view of qkv, autograd would fill and add two gradients of qkv's size, while here one pass writes all of it. The
kernels are in rope_sections.py.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minimind.kernels.rms_norm import rms_norm_ref
from minimind.kernels.rope_sections import rope_backward_kernel, rope_forward_kernel
from minimind.kernels.triton_support import (
    cdiv,
    check,
    check_tensors,
    config_for,
    kernel_op,
    launch,
    multiprocessors,
    next_power_of_2,
    on_host,
    rows_of,
)

MAX_D = 256


@dataclass(frozen=True)
class RopeConfig:
    elements: int  # per half of a tile
    num_warps: int
    programs_per_sm: int  # in the backward with the norm, whose programs loop


CONFIGS = {80: RopeConfig(elements=512, num_warps=4, programs_per_sm=4)}


def rope_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    heads: int,
    kv_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm_ref,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=-2)
    if q_weight is not None and k_weight is not None:
        q, k = norm(q, q_weight, eps), norm(k, k_weight, eps)
    cos, sin = cos[position_ids].unsqueeze(-2), sin[position_ids].unsqueeze(-2)
    return _rotate_ref(q, cos, sin), _rotate_ref(k, cos, sin), v


def _rotate_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def _ids(position_ids: Tensor, shape: torch.Size) -> Tensor:
    """Contiguous ids such that token n uses ids[n % numel]. `shape` is the tokens' shape, to which they broadcast."""
    trimmed = list(position_ids.shape)
    while trimmed and trimmed[0] == 1:
        trimmed.pop(0)
    if trimmed != list(shape[len(shape) - len(trimmed) :]):
        position_ids = position_ids.expand(shape)
    return position_ids.contiguous()


def _tile(half: int, device: torch.device) -> dict[str, int]:
    config = config_for(CONFIGS, device)
    block_h = next_power_of_2(half)
    return dict(HALF=half, BLOCK_R=config.elements // block_h, BLOCK_H=block_h, num_warps=config.num_warps)


def _programs(tokens: int, heads: int, kv_heads: int, block_r: int, limit: int | None = None) -> list[int]:
    """Numbers of programs for query, key and value rows: one per block, or shares of `limit` programs that loop."""
    counts = (heads, kv_heads, kv_heads)
    blocks = [cdiv(tokens * count, block_r) for count in counts]
    if limit is None:
        return blocks
    return [min(n, cdiv(limit * count, sum(counts))) for n, count in zip(blocks, counts, strict=True)]


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


@kernel_op("rope")
def _rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    heads: int,
    kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, rstd [..., H + G]); rstd has size 0 without the norm."""
    shape, half = qkv.shape[:-1], cos.shape[1]
    q, k, v = (
        torch.empty(*shape, count, 2 * half, dtype=qkv.dtype, device=qkv.device)
        for count in (heads, kv_heads, kv_heads)
    )
    rstd_shape = (0,) if q_weight is None else (*shape, heads + kv_heads)
    rstd = torch.empty(rstd_shape, dtype=torch.float32, device=qkv.device)
    rows, ids, tile = rows_of(qkv), _ids(position_ids, shape), _tile(half, qkv.device)
    q_blocks, k_blocks, v_blocks = _programs(rows.shape[0], heads, kv_heads, tile["BLOCK_R"])
    launch(
        rope_forward_kernel, (q_blocks + k_blocks + v_blocks,),
        rows, cos.contiguous(), sin.contiguous(), ids, _contiguous(q_weight), _contiguous(k_weight), q, k, v, rstd,
        rows.shape[0], ids.numel(), cos.shape[0], q_blocks, k_blocks, rows.stride(0), eps,
        H=heads, G=kv_heads, **tile,
    )  # fmt: skip
    return q, k, v, rstd


@kernel_op("rope_backward")
def _rope_backward(
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    qkv: Tensor | None,
    rstd: Tensor | None,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """(dqkv, dq_weight, dk_weight); the last two have size 0 without the norm."""
    shape, (heads, size), kv_heads = dq.shape[:-2], dq.shape[-2:], dk.shape[-2]
    tokens, device = (math.prod(shape), dq.device)  # Size.numel() would become a constant under torch.compile
    dqkv = torch.empty(*shape, (heads + 2 * kv_heads) * size, dtype=dq.dtype, device=device)
    ids, tile = _ids(position_ids, shape), _tile(size // 2, device)
    rows, partial, limit = None, None, None
    if qkv is not None:
        rows, limit = rows_of(qkv), multiprocessors(device) * config_for(CONFIGS, device).programs_per_sm
    q_programs, k_programs, v_programs = _programs(tokens, heads, kv_heads, tile["BLOCK_R"], limit)
    if qkv is not None:
        partial = torch.empty(q_programs + k_programs, size, dtype=torch.float32, device=device)
    launch(
        rope_backward_kernel, (q_programs + k_programs + v_programs,),
        dq.contiguous(), dk.contiguous(), dv.contiguous(), rows, cos.contiguous(), sin.contiguous(), ids,
        _contiguous(q_weight), _contiguous(k_weight), rstd, dqkv, partial,
        tokens, ids.numel(), cos.shape[0], q_programs, k_programs, v_programs, 0 if rows is None else rows.stride(0),
        H=heads, G=kv_heads, **tile,
    )  # fmt: skip
    if partial is None or q_weight is None or k_weight is None:
        dq_weight, dk_weight = (torch.empty(0, dtype=torch.float32, device=device) for _ in range(2))
        return dqkv, dq_weight, dk_weight
    dq_partial, dk_partial = partial.split((q_programs, k_programs))
    return dqkv, dq_partial.sum(0).to(q_weight.dtype), dk_partial.sum(0).to(k_weight.dtype)


@_rope.register_fake
def _(qkv, cos, sin, position_ids, heads, kv_heads, q_weight, k_weight, eps):
    shape, size = qkv.shape[:-1], 2 * cos.shape[1]
    q, k, v = (qkv.new_empty(*shape, count, size) for count in (heads, kv_heads, kv_heads))
    rstd_shape = (0,) if q_weight is None else (*shape, heads + kv_heads)
    return q, k, v, qkv.new_empty(rstd_shape, dtype=torch.float32)


@_rope_backward.register_fake
def _(dq, dk, dv, cos, sin, position_ids, qkv, rstd, q_weight, k_weight):
    dqkv = dq.new_empty(*dq.shape[:-2], (dq.shape[-2] + 2 * dk.shape[-2]) * dq.shape[-1])
    if q_weight is None or k_weight is None:
        return dqkv, *(dq.new_empty(0, dtype=torch.float32) for _ in range(2))
    return dqkv, q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape)


def _save_rope(ctx, inputs, output):
    qkv, cos, sin, position_ids, ctx.heads, ctx.kv_heads, q_weight, k_weight, _ = inputs
    normed = (None,) * 4 if q_weight is None else (qkv, output[3], q_weight, k_weight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin, position_ids, *normed)


def _backward_rope(ctx, dq, dk, dv, _drstd):
    cos, sin, position_ids, *normed = ctx.saved_tensors
    like = next((grad for grad in (dq, dk, dv) if grad is not None), None)
    if like is None:
        return (None,) * 9
    dq, dk, dv = (
        like.new_zeros(*like.shape[:-2], count, like.shape[-1]) if grad is None else grad
        for grad, count in ((dq, ctx.heads), (dk, ctx.kv_heads), (dv, ctx.kv_heads))
    )
    dqkv, *dweights = _rope_backward(dq, dk, dv, cos, sin, position_ids, *normed)
    return dqkv, *(None,) * 5, *((None, None) if normed[0] is None else dweights), None


_rope.register_autograd(_backward_rope, setup_context=_save_rope)


def _check(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    heads: int,
    kv_heads: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> None:
    check_tensors(qkv=qkv, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight)
    check(heads >= 1 and kv_heads >= 1, "heads is {} and kv_heads {}; both must be 1 or more", heads, kv_heads)
    check(
        cos.dtype == sin.dtype == torch.float32 and cos.ndim == 2 and cos.shape == sin.shape and len(cos) > 0,
        "cos is {} {} and sin {} {}; both must be float32 [P, D / 2]",
        cos.dtype,
        list(cos.shape),
        sin.dtype,
        list(sin.shape),
    )
    size = 2 * cos.shape[1]
    check(2 <= size <= MAX_D, "cos is for heads of {}; this kernel takes 2 to {}", size, MAX_D)
    width = (heads + 2 * kv_heads) * size
    message = "qkv is {}; {} + 2 x {} heads of size {} need a last dimension of {}"
    check(qkv.shape[-1:] == (width,), message, list(qkv.shape), heads, kv_heads, size, width)
    check((q_weight is None) == (k_weight is None), "give both q_weight and k_weight, or neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        if weight is not None:
            check(weight.shape == (size,), "{} is {}, and qkv needs [{}]", name, list(weight.shape), size)
    _check_positions(position_ids, qkv, len(cos))


def _check_positions(position_ids: Tensor, qkv: Tensor, positions: int) -> None:
    dtype, device = position_ids.dtype, position_ids.device
    message = "position_ids is {} on {}; it must be int32 or int64 on {}"
    check(dtype in (torch.int32, torch.int64) and device == qkv.device, message, dtype, device, qkv.device)
    ids, tokens = position_ids.shape, qkv.shape[:-1]
    fits = all(a in (1, b) for a, b in zip(reversed(ids), reversed(tokens), strict=False))
    message = "position_ids is {}, which does not broadcast to qkv's {}"
    check(len(ids) <= len(tokens) and fits, message, list(ids), list(tokens))
    check(tokens.numel() < 2**31, "qkv has {} tokens; they must stay below 2^31", tokens.numel())
    if on_host(position_ids) and position_ids.numel() > 0:
        low, high = int(position_ids.min()), int(position_ids.max())
        message = "position_ids go from {} to {}, but cos and sin have rows 0 to {}; make longer tables"
        check(low >= 0 and high < positions, message, low, high, positions - 1)


def rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    heads: int,
    kv_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a packed projection into q, k and v, and rotate q and k; computed in float32 and rounded once.

    qkv [..., (H + 2 G) D]: H = `heads` query, G = `kv_heads` key and G value heads of even size D up to 256; float32,
    bfloat16 or float16. It is read in place if one stride reaches all rows and the last dimension is contiguous, else
    copied. cos, sin float32 [P, D / 2], without gradient. position_ids int32 or int64: each token's row of the tables,
    of qkv's leading shape or broadcasting to it ([1, T] for [B, T]). q_weight, k_weight [D], of any of these dtypes,
    both or neither: first apply RMSNorm with `eps` to each query and key head.

    Returns q [..., H, D], k [..., G, D], v [..., G, D], contiguous, in qkv.dtype. v is a copy, so the backward can
    write all of qkv's gradient in one pass.

    ValueError for other input. Position ids outside 0..P-1 are an error on a CPU. On a GPU, where reading them would
    wait for the device, they use the nearest row of the tables, and memory beyond the tables is never read.
    """
    _check(qkv, cos, sin, position_ids, heads, kv_heads, q_weight, k_weight)
    q, k, v, _ = _rope(qkv, cos, sin, position_ids, heads, kv_heads, q_weight, k_weight, eps)
    return q, k, v
