"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) of a packed projection, with RMSNorm of every query and
key head before it where the model has QK-norm (as in Qwen3, arXiv 2505.09388).

    x1, x2 = halves of a head [D], after the norm          dx1 = dy1 cos + dy2 sin
    y1 = x1 cos - x2 sin,   y2 = x2 cos + x1 sin           dx2 = dy2 cos - dy1 sin
    norm: x = u * r * w, r = 1 / sqrt(mean_d u[d]^2 + eps); its backward is in rms_norm.py

qkv [..., (H + 2 G) D] holds H query, G key and G value heads one after another -> q [..., H, D], k and v [..., G, D].
Angle tables cos, sin float32 [P, D / 2], row position_ids[token]. Pairs are (i, i + D / 2) ("rotate half").

Nothing of the size of qkv is kept for the backward; with the norm, qkv itself and r (float32, one number a head).
v is copied, because a view of qkv would make autograd fill and add two gradients of qkv's size: here one pass writes
the whole of it.

The programs fall into three ranges, of query, key and value rows, so that what a program does is one scalar branch;
a row is a head of a token. A tile is BLOCK_R rows by two halves, padded to a power of two (40 to 64, 48 to 64).
The weights' gradients have no atomics: each program sums its rows in float32, one reduction over programs follows.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from minimind.kernels.rms_norm import rms_norm_ref
from minimind.kernels.triton_support import (
    cdiv,
    check,
    check_tensors,
    config_for,
    jit,
    launch,
    multiprocessors,
    next_power_of_2,
    on_host,
    tl,
)

MAX_D = 256


@dataclass(frozen=True)
class Config:
    elements: int  # of one half of a tile
    num_warps: int
    programs_per_sm: int  # of the backward with the norm, whose programs loop


CONFIGS = {80: Config(elements=512, num_warps=4, programs_per_sm=4)}


def rope_ref(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    heads: int,
    groups: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
    norm: Callable[[Tensor, Tensor, float], Tensor] = rms_norm_ref,
) -> tuple[Tensor, Tensor, Tensor]:
    q, k, v = qkv.unflatten(-1, (heads + 2 * groups, -1)).split((heads, groups, groups), dim=-2)
    if q_weight is not None and k_weight is not None:
        q, k = norm(q, q_weight, eps), norm(k, k_weight, eps)
    cos, sin = cos[position_ids].unsqueeze(-2), sin[position_ids].unsqueeze(-2)
    return _rotate_ref(q, cos, sin), _rotate_ref(k, cos, sin), v


def _rotate_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


@jit
def _load_halves(p_x, mask, HALF: tl.constexpr):
    b_first = tl.load(p_x, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_H]
    b_second = tl.load(p_x + HALF, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_H]
    return b_first, b_second


@jit
def _store_halves(p_x, b_first, b_second, mask, HALF: tl.constexpr):
    tl.store(p_x, b_first, mask=mask)
    tl.store(p_x + HALF, b_second, mask=mask)


@jit
def _load_weight(p_weight, HALF: tl.constexpr, BLOCK_H: tl.constexpr):
    o_d = tl.arange(0, BLOCK_H)
    b_first, b_second = _load_halves(p_weight + o_d, o_d < HALF, HALF)  # [BLOCK_H]
    return b_first[None, :], b_second[None, :]


@jit
def _load_angles(
    p_cos, p_sin, p_position, o_token, m_row, n_ids, n_positions,
    HALF: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """A position outside the tables takes their first or last row: nothing beyond them is read."""
    o_id = o_token.to(tl.int32) % n_ids  # one row of ids may serve every sequence
    b_position = tl.load(p_position + o_id, mask=m_row, other=0).to(tl.int64)  # [BLOCK_R]
    b_position = tl.minimum(tl.maximum(b_position, 0), n_positions - 1)
    o_d = tl.arange(0, BLOCK_H)
    o_table = b_position[:, None] * HALF + o_d[None, :]
    mask = m_row[:, None] & (o_d < HALF)[None, :]
    b_cos = tl.load(p_cos + o_table, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_H]
    b_sin = tl.load(p_sin + o_table, mask=mask, other=0.0)  # [BLOCK_R, BLOCK_H]
    return b_cos, b_sin


@jit
def _rotate(b_first, b_second, b_cos, b_sin):
    return b_first * b_cos - b_second * b_sin, b_second * b_cos + b_first * b_sin


@jit
def _forward_section(
    p_qkv, p_cos, p_sin, p_position, p_weight, p_out, p_rstd,
    i_block, n_tokens, n_ids, n_positions, qkv_stride, eps,
    ROTATED: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Block i_block of the rows of heads FIRST to FIRST + COUNT of qkv; p_weight None: no norm."""
    o_row = tl.cast(i_block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_token, o_head = o_row // COUNT, FIRST + o_row % COUNT
    o_d = tl.arange(0, BLOCK_H)
    m_row = o_token < n_tokens
    mask = m_row[:, None] & (o_d < HALF)[None, :]
    o_qkv = (o_token * qkv_stride + o_head * (2 * HALF))[:, None] + o_d[None, :]
    b_first, b_second = _load_halves(p_qkv + o_qkv, mask, HALF)
    if p_weight is not None:
        b_square = tl.sum(b_first * b_first + b_second * b_second, axis=1)  # [BLOCK_R]
        b_rstd = tl.rsqrt(b_square / (2 * HALF) + tl.cast(eps, tl.float32))
        tl.store(p_rstd + o_token * (H + G) + o_head, b_rstd, mask=m_row)
        b_w_first, b_w_second = _load_weight(p_weight, HALF, BLOCK_H)
        b_first = b_first * b_rstd[:, None] * b_w_first
        b_second = b_second * b_rstd[:, None] * b_w_second
    if ROTATED:
        b_cos, b_sin = _load_angles(
            p_cos, p_sin, p_position, o_token, m_row, n_ids, n_positions, HALF, BLOCK_H
        )
        b_first, b_second = _rotate(b_first, b_second, b_cos, b_sin)
    _store_halves(p_out + o_row[:, None] * (2 * HALF) + o_d[None, :], b_first, b_second, mask, HALF)


@jit(do_not_specialize=["n_tokens", "n_ids", "n_positions", "q_blocks", "k_blocks"])
def _rope_forward_kernel(
    p_qkv, p_cos, p_sin, p_position, p_q_weight, p_k_weight, p_q, p_k, p_v, p_rstd,
    n_tokens, n_ids, n_positions, q_blocks, k_blocks, qkv_stride, eps,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    i_block = tl.program_id(0)
    if i_block < q_blocks:
        _forward_section(
            p_qkv, p_cos, p_sin, p_position, p_q_weight, p_q, p_rstd,
            i_block, n_tokens, n_ids, n_positions, qkv_stride, eps,
            True, 0, H, H, G, HALF, BLOCK_R, BLOCK_H,
        )  # fmt: skip
    elif i_block < q_blocks + k_blocks:
        _forward_section(
            p_qkv, p_cos, p_sin, p_position, p_k_weight, p_k, p_rstd,
            i_block - q_blocks, n_tokens, n_ids, n_positions, qkv_stride, eps,
            True, H, G, H, G, HALF, BLOCK_R, BLOCK_H,
        )  # fmt: skip
    else:
        _forward_section(
            p_qkv, p_cos, p_sin, p_position, None, p_v, p_rstd,
            i_block - q_blocks - k_blocks, n_tokens, n_ids, n_positions, qkv_stride, eps,
            False, H + G, G, H, G, HALF, BLOCK_R, BLOCK_H,
        )  # fmt: skip


@jit
def _backward_section(
    p_dout, p_qkv, p_cos, p_sin, p_position, p_weight, p_rstd, p_dqkv, p_partial,
    i_first, programs, n_tokens, n_ids, n_positions, qkv_stride,
    ROTATED: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Every `programs`-th block from i_first; the rows of _forward_section."""
    o_d = tl.arange(0, BLOCK_H)
    if p_weight is not None:
        b_w_first, b_w_second = _load_weight(p_weight, HALF, BLOCK_H)
        b_dw_first = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
        b_dw_second = tl.zeros([BLOCK_R, BLOCK_H], tl.float32)
    for i_block in range(i_first, tl.cdiv(tl.cast(n_tokens, tl.int64) * COUNT, BLOCK_R), programs):
        o_row = tl.cast(i_block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        o_token, o_head = o_row // COUNT, FIRST + o_row % COUNT
        m_row = o_token < n_tokens
        mask = m_row[:, None] & (o_d < HALF)[None, :]
        b_first, b_second = _load_halves(p_dout + o_row[:, None] * (2 * HALF) + o_d[None, :], mask, HALF)
        if ROTATED:
            b_cos, b_sin = _load_angles(
                p_cos, p_sin, p_position, o_token, m_row, n_ids, n_positions, HALF, BLOCK_H
            )
            b_first, b_second = _rotate(b_first, b_second, b_cos, -b_sin)
        if p_weight is not None:
            o_qkv = (o_token * qkv_stride + o_head * (2 * HALF))[:, None] + o_d[None, :]
            b_x_first, b_x_second = _load_halves(p_qkv + o_qkv, mask, HALF)
            b_rstd = tl.load(p_rstd + o_token * (H + G) + o_head, mask=m_row, other=0.0)[
                :, None
            ]  # [BLOCK_R, 1]
            b_x_first, b_x_second = b_x_first * b_rstd, b_x_second * b_rstd
            b_dw_first += b_first * b_x_first
            b_dw_second += b_second * b_x_second
            b_first, b_second = b_first * b_w_first, b_second * b_w_second
            b_mean = tl.sum(b_first * b_x_first + b_second * b_x_second, axis=1)[:, None] / (2 * HALF)
            b_first = b_rstd * (b_first - b_x_first * b_mean)
            b_second = b_rstd * (b_second - b_x_second * b_mean)
        o_dqkv = ((o_token * (H + 2 * G) + o_head) * (2 * HALF))[:, None] + o_d[None, :]
        _store_halves(p_dqkv + o_dqkv, b_first, b_second, mask, HALF)
    if p_weight is not None:
        p_row = p_partial + tl.program_id(0) * (2 * HALF) + o_d
        _store_halves(p_row, tl.sum(b_dw_first, axis=0), tl.sum(b_dw_second, axis=0), o_d < HALF, HALF)


@jit(do_not_specialize=["n_tokens", "n_ids", "n_positions", "q_programs", "k_programs", "v_programs"])
def _rope_backward_kernel(
    p_dq, p_dk, p_dv, p_qkv, p_cos, p_sin, p_position, p_q_weight, p_k_weight, p_rstd, p_dqkv, p_partial,
    n_tokens, n_ids, n_positions, q_programs, k_programs, v_programs, qkv_stride,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    if i_program < q_programs:
        _backward_section(
            p_dq, p_qkv, p_cos, p_sin, p_position, p_q_weight, p_rstd, p_dqkv, p_partial,
            i_program, q_programs, n_tokens, n_ids, n_positions, qkv_stride,
            True, 0, H, H, G, HALF, BLOCK_R, BLOCK_H,
        )  # fmt: skip
    elif i_program < q_programs + k_programs:
        _backward_section(
            p_dk, p_qkv, p_cos, p_sin, p_position, p_k_weight, p_rstd, p_dqkv, p_partial,
            i_program - q_programs, k_programs, n_tokens, n_ids, n_positions, qkv_stride,
            True, H, G, H, G, HALF, BLOCK_R, BLOCK_H,
        )  # fmt: skip
    else:
        _backward_section(
            p_dv, None, p_cos, p_sin, p_position, None, p_rstd, p_dqkv, p_partial,
            i_program - q_programs - k_programs, v_programs, n_tokens, n_ids, n_positions, qkv_stride,
            False, H + G, G, H, G, HALF, BLOCK_R, BLOCK_H,
        )  # fmt: skip


def _rows(qkv: Tensor) -> Tensor:
    """qkv as [N, width], the last dimension contiguous: a view if one row stride reaches all rows, else a copy."""
    rows = qkv.reshape(-1, qkv.shape[-1])
    return rows if rows.stride(1) == 1 else rows.contiguous()


def _ids(position_ids: Tensor, shape: torch.Size) -> Tensor:
    """Contiguous ids, of which token n takes number n % numel. `shape`, to which they broadcast, is the tokens'."""
    kept = list(position_ids.shape)
    while kept and kept[0] == 1:
        kept.pop(0)
    if kept != list(shape[len(shape) - len(kept) :]):
        position_ids = position_ids.expand(shape)
    return position_ids.contiguous()


def _tile(half: int, device: torch.device) -> dict[str, int]:
    config = config_for(CONFIGS, device)
    block_h = next_power_of_2(half)
    return dict(HALF=half, BLOCK_R=config.elements // block_h, BLOCK_H=block_h, num_warps=config.num_warps)


def _programs(tokens: int, heads: int, groups: int, block_r: int, limit: int | None = None) -> list[int]:
    """How many programs take query, key and value rows: one a block, or shares of `limit` that loop."""
    counts = (heads, groups, groups)
    blocks = [cdiv(tokens * count, block_r) for count in counts]
    if limit is None:
        return blocks
    return [min(n, cdiv(limit * count, sum(counts))) for n, count in zip(blocks, counts, strict=True)]


def _contiguous(weight: Tensor | None) -> Tensor | None:
    return None if weight is None else weight.contiguous()


@torch.library.custom_op("minimind::rope", mutates_args=())
def _rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    heads: int,
    groups: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """(q, k, v, rstd [..., H + G]); rstd is [0] without the norm."""
    shape, half = qkv.shape[:-1], cos.shape[1]
    q, k, v = (
        torch.empty(*shape, count, 2 * half, dtype=qkv.dtype, device=qkv.device)
        for count in (heads, groups, groups)
    )
    rstd_shape = (0,) if q_weight is None else (*shape, heads + groups)
    rstd = torch.empty(rstd_shape, dtype=torch.float32, device=qkv.device)
    rows, ids, tile = _rows(qkv), _ids(position_ids, shape), _tile(half, qkv.device)
    q_blocks, k_blocks, v_blocks = _programs(rows.shape[0], heads, groups, tile["BLOCK_R"])
    launch(
        _rope_forward_kernel, (q_blocks + k_blocks + v_blocks,),
        rows, cos.contiguous(), sin.contiguous(), ids, _contiguous(q_weight), _contiguous(k_weight), q, k, v, rstd,
        rows.shape[0], ids.numel(), cos.shape[0], q_blocks, k_blocks, rows.stride(0), eps,
        H=heads, G=groups, **tile,
    )  # fmt: skip
    return q, k, v, rstd


@torch.library.custom_op("minimind::rope_backward", mutates_args=())
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
    """(dqkv, dq_weight, dk_weight); the last two are [0] without the norm."""
    shape, (heads, size), groups = dq.shape[:-2], dq.shape[-2:], dk.shape[-2]
    tokens, device = shape.numel(), dq.device
    dqkv = torch.empty(*shape, (heads + 2 * groups) * size, dtype=dq.dtype, device=device)
    ids, tile = _ids(position_ids, shape), _tile(size // 2, device)
    rows, partial, limit = None, None, None
    if qkv is not None:
        rows, limit = _rows(qkv), multiprocessors(device) * config_for(CONFIGS, device).programs_per_sm
    q_programs, k_programs, v_programs = _programs(tokens, heads, groups, tile["BLOCK_R"], limit)
    if qkv is not None:
        partial = torch.empty(q_programs + k_programs, size, dtype=torch.float32, device=device)
    launch(
        _rope_backward_kernel, (q_programs + k_programs + v_programs,),
        dq.contiguous(), dk.contiguous(), dv.contiguous(), rows, cos.contiguous(), sin.contiguous(), ids,
        _contiguous(q_weight), _contiguous(k_weight), rstd, dqkv, partial,
        tokens, ids.numel(), cos.shape[0], q_programs, k_programs, v_programs, 0 if rows is None else rows.stride(0),
        H=heads, G=groups, **tile,
    )  # fmt: skip
    if partial is None or q_weight is None or k_weight is None:
        dq_weight, dk_weight = (torch.empty(0, dtype=torch.float32, device=device) for _ in range(2))
        return dqkv, dq_weight, dk_weight
    dq_partial, dk_partial = partial.split((q_programs, k_programs))
    return dqkv, dq_partial.sum(0).to(q_weight.dtype), dk_partial.sum(0).to(k_weight.dtype)


@_rope.register_fake
def _(qkv, cos, sin, position_ids, heads, groups, q_weight, k_weight, eps):
    shape, size = qkv.shape[:-1], 2 * cos.shape[1]
    q, k, v = (qkv.new_empty(*shape, count, size) for count in (heads, groups, groups))
    rstd_shape = (0,) if q_weight is None else (*shape, heads + groups)
    return q, k, v, qkv.new_empty(rstd_shape, dtype=torch.float32)


@_rope_backward.register_fake
def _(dq, dk, dv, cos, sin, position_ids, qkv, rstd, q_weight, k_weight):
    dqkv = dq.new_empty(*dq.shape[:-2], (dq.shape[-2] + 2 * dk.shape[-2]) * dq.shape[-1])
    if q_weight is None or k_weight is None:
        return dqkv, *(dq.new_empty(0, dtype=torch.float32) for _ in range(2))
    return dqkv, q_weight.new_empty(q_weight.shape), k_weight.new_empty(k_weight.shape)


def _save_rope(ctx, inputs, output):
    qkv, cos, sin, position_ids, ctx.heads, ctx.groups, q_weight, k_weight, _ = inputs
    normed = (None,) * 4 if q_weight is None else (qkv, output[3], q_weight, k_weight)
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(cos, sin, position_ids, *normed)


def _backward_rope(ctx, dq, dk, dv, _drstd):
    cos, sin, position_ids, *normed = ctx.saved_tensors
    given = next((grad for grad in (dq, dk, dv) if grad is not None), None)
    if given is None:
        return (None,) * 9
    dq, dk, dv = (
        given.new_zeros(*given.shape[:-2], count, given.shape[-1]) if grad is None else grad
        for grad, count in ((dq, ctx.heads), (dk, ctx.groups), (dv, ctx.groups))
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
    groups: int,
    q_weight: Tensor | None,
    k_weight: Tensor | None,
) -> None:
    check_tensors(qkv=qkv, cos=cos, sin=sin, q_weight=q_weight, k_weight=k_weight)
    check(heads >= 1 and groups >= 1, f"heads is {heads} and groups {groups}; both count from 1")
    check(
        cos.dtype == sin.dtype == torch.float32 and cos.ndim == 2 and cos.shape == sin.shape and len(cos) > 0,
        f"cos is {cos.dtype} {list(cos.shape)} and sin {sin.dtype} {list(sin.shape)}; both must be float32 [P, D / 2]",
    )
    size = 2 * cos.shape[1]
    check(2 <= size <= MAX_D, f"cos is for heads of {size}; this kernel takes 2 to {MAX_D}")
    width = (heads + 2 * groups) * size
    check(
        qkv.ndim >= 1 and qkv.shape[-1] == width,
        f"qkv is {list(qkv.shape)}; {heads} + 2 x {groups} heads of {size} need a last dimension of {width}",
    )
    check((q_weight is None) == (k_weight is None), "q_weight and k_weight: give both, or neither")
    for name, weight in (("q_weight", q_weight), ("k_weight", k_weight)):
        check(
            weight is None or weight.shape == (size,),
            f"{name} is {None if weight is None else list(weight.shape)}, and qkv needs [{size}]",
        )
    _check_positions(position_ids, qkv, len(cos))


def _check_positions(position_ids: Tensor, qkv: Tensor, positions: int) -> None:
    check(
        position_ids.dtype in (torch.int32, torch.int64) and position_ids.device == qkv.device,
        f"position_ids is {position_ids.dtype} on {position_ids.device}; it must be int32 or int64 on {qkv.device}",
    )
    ids, tokens = position_ids.shape, qkv.shape[:-1]
    check(
        len(ids) <= len(tokens)
        and all(a in (1, b) for a, b in zip(reversed(ids), reversed(tokens), strict=False)),
        f"position_ids is {list(ids)}, which does not broadcast to qkv's {list(tokens)}",
    )
    if on_host(position_ids) and position_ids.numel() > 0:
        low, high = int(position_ids.min()), int(position_ids.max())
        check(
            low >= 0 and high < positions,
            f"position_ids go from {low} to {high}, and cos and sin have rows 0 to {positions - 1}; make longer tables",
        )


def rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    heads: int,
    groups: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a packed projection into q, k and v, and rotate q and k; in float32 inside, rounded once.

    qkv [..., (H + 2 G) D]: H = `heads` query, G = `groups` key and G value heads of even size D up to 256, float32,
    bfloat16 or float16, read where it lies if one row stride reaches all rows and the last dimension is contiguous
    (else it is copied). cos, sin float32 [P, D / 2], which get no gradient. position_ids int32 or int64, of qkv's
    leading shape or broadcasting to it ([1, T] for [B, T]): the table row of each token. q_weight, k_weight [D], of
    any of these dtypes, both or neither: RMSNorm of every query and key head with `eps` first.

    Returns q [..., H, D], k [..., G, D], v [..., G, D], contiguous, in qkv.dtype. v is a copy, so that the backward
    writes all of qkv's gradient in one pass; of a view, autograd would add two gradients of qkv's full size.

    ValueError on other input. Position ids outside 0..P-1 are refused on a CPU; on a GPU, where looking at them
    would wait for the device, they take the nearest row of the tables, and memory beyond them is never read.
    """
    _check(qkv, cos, sin, position_ids, heads, groups, q_weight, k_weight)
    q, k, v, _ = _rope(qkv, cos, sin, position_ids, heads, groups, q_weight, k_weight, eps)
    return q, k, v
