"""RMSNorm (Zhang & Sennrich 2019, arXiv 1910.07467), plain and fused with the residual addition.

    r_n = 1 / sqrt(mean_d x[n, d]^2 + eps)            y = x * r * w
    dx  = r * (w dy - xhat * mean_d(w dy xhat))       dw = sum_n dy xhat          with xhat = x * r

x [..., D]: each row of the last dimension is normalised. A slice of heads of a packed projection [..., S, D][..., a:b,
:] is read in place. Only D is a compile-time constant: one kernel serves any number of rows, and a second one rows that
no single stride reaches. Besides x, only r (one float32 per row) is kept for the backward.

A program processes BLOCK_R whole rows, so the many short rows of QK-norm use it as well as one long row. The weight
gradient needs no atomics: each program sums its rows in float32, and one reduction over programs follows, so two runs
give the same bits.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minimind.kernels.triton_support import (
    cdiv,
    check,
    check_tensors,
    config_for,
    jit,
    kernel_op,
    launch,
    multiprocessors,
    next_power_of_2,
    tl,
)

MAX_D = 16384


@dataclass(frozen=True)
class NormConfig:
    elements: int  # per tile, which has at least one row
    per_warp: int  # elements per warp
    programs_per_sm: int  # in the backward, whose programs loop


CONFIGS = {80: NormConfig(elements=1024, per_warp=256, programs_per_sm=8)}


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float() if x.dtype != torch.float64 else x
    return weight.to(x.dtype) * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def add_rms_norm_ref(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return rms_norm_ref(total, weight, eps), total


@jit
def _row_offsets(o_row, heads, stride, stride_head, SPLIT: tl.constexpr):
    """Offsets of rows; without SPLIT one stride reaches all of them."""
    return (o_row // heads) * stride + (o_row % heads) * stride_head if SPLIT else o_row * stride


@jit(do_not_specialize=["n_rows", "heads"])
def _rms_norm_forward_kernel(
    p_x, p_residual, p_weight, p_y, p_total, p_rstd,
    n_rows, heads, x_stride, x_stride_head, residual_stride, residual_stride_head, eps,
    D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    o_row = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_d = tl.arange(0, BLOCK_D)
    m_row = o_row < n_rows
    mask = m_row[:, None] & (o_d < D)[None, :]
    o_x = _row_offsets(o_row, heads, x_stride, x_stride_head, SPLIT)
    b_x = tl.load(p_x + o_x[:, None] + o_d[None, :], mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_D]
    o_out = o_row[:, None] * D + o_d[None, :]
    if p_residual is not None:
        o_res = _row_offsets(o_row, heads, residual_stride, residual_stride_head, SPLIT)
        b_res = tl.load(p_residual + o_res[:, None] + o_d[None, :], mask=mask, other=0.0)  # [BLOCK_R, BLOCK_D]
        # the norm reads the stored, rounded sum, as in PyTorch
        b_total = (b_x + b_res.to(tl.float32)).to(p_total.dtype.element_ty)
        tl.store(p_total + o_out, b_total, mask=mask)
        b_x = b_total.to(tl.float32)
    b_rstd = tl.rsqrt(tl.sum(b_x * b_x, axis=1) / D + tl.cast(eps, tl.float32))  # [BLOCK_R]
    tl.store(p_rstd + o_row, b_rstd, mask=m_row)
    b_w = tl.load(p_weight + o_d, mask=o_d < D, other=0.0).to(tl.float32)  # [BLOCK_D]
    tl.store(p_y + o_out, b_x * b_rstd[:, None] * b_w[None, :], mask=mask)


@jit(do_not_specialize=["n_rows", "heads"])
def _rms_norm_backward_kernel(
    p_dy, p_x, p_weight, p_rstd, p_dtotal, p_dx, p_partial,
    n_rows, heads, x_stride, x_stride_head,
    D: tl.constexpr, SPLIT: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    i_program = tl.program_id(0)
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D
    b_w = tl.load(p_weight + o_d, mask=m_d, other=0.0).to(tl.float32)  # [BLOCK_D]
    b_dw = tl.zeros([BLOCK_R, BLOCK_D], tl.float32)
    for i_block in range(i_program, tl.cdiv(n_rows, BLOCK_R), tl.num_programs(0)):
        o_row = tl.cast(i_block, tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
        m_row = o_row < n_rows
        mask = m_row[:, None] & m_d[None, :]
        o_x = _row_offsets(o_row, heads, x_stride, x_stride_head, SPLIT)
        o_out = o_row[:, None] * D + o_d[None, :]
        b_x = tl.load(p_x + o_x[:, None] + o_d[None, :], mask=mask, other=0.0)  # [BLOCK_R, BLOCK_D]
        b_dy = tl.load(p_dy + o_out, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_D]
        b_rstd = tl.load(p_rstd + o_row, mask=m_row, other=0.0)  # [BLOCK_R]
        b_xhat = b_x.to(tl.float32) * b_rstd[:, None]
        b_dw += b_dy * b_xhat
        b_dxhat = b_dy * b_w[None, :]
        b_mean = tl.sum(b_dxhat * b_xhat, axis=1) / D  # [BLOCK_R]
        b_dx = b_rstd[:, None] * (b_dxhat - b_xhat * b_mean[:, None])
        if p_dtotal is not None:
            b_dx += tl.load(p_dtotal + o_out, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_D]
        tl.store(p_dx + o_out, b_dx, mask=mask)
    tl.store(p_partial + i_program * D + o_d, tl.sum(b_dw, axis=0), mask=m_d)


def _row_stride(x: Tensor, dims: int) -> int | None:
    """The stride that walks through the first `dims` dimensions of x in order, or None if there is none."""
    strides = x.stride()[:dims]
    if any(strides[i] != x.shape[i + 1] * strides[i + 1] for i in range(dims - 1)):
        return None
    return strides[-1] if strides else x.shape[-1]


def _rows(x: Tensor) -> tuple[Tensor, int, int, int]:
    """(x or a contiguous copy, heads, token stride, head stride): row n begins at n // heads * token stride + n % heads
    * head stride. heads is 1 if one stride reaches all rows."""
    if x.stride(-1) == 1 or x.shape[-1] == 1:
        stride = _row_stride(x, x.ndim - 1)
        if stride is not None:
            return x, 1, stride, 0
        stride = _row_stride(x, x.ndim - 2)
        if stride is not None:
            return x, x.shape[-2], stride, x.stride(-2)
    return x.contiguous(), 1, x.shape[-1], 0


def _tile(x: Tensor) -> tuple[int, int, int]:
    """(BLOCK_R, BLOCK_D, num_warps)."""
    config = config_for(CONFIGS, x.device)
    block_d = next_power_of_2(x.shape[-1])
    block_r = max(1, config.elements // block_d)
    return block_r, block_d, min(16, max(4, block_r * block_d // config.per_warp))


def _forward(
    x: Tensor, residual: Tensor | None, weight: Tensor, eps: float, total: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Compute (y, rstd), and write x + residual to `total`."""
    size = x.shape[-1]
    y = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    rstd = torch.empty(x.shape[:-1], dtype=torch.float32, device=x.device)
    x, heads, *x_strides = _rows(x)
    residual_strides = [0, 0]
    if residual is not None:
        residual, residual_heads, *residual_strides = _rows(residual)
        if residual_heads != heads:
            x, heads, *x_strides = _rows(x.flatten(0, -2))
            residual, _, *residual_strides = _rows(residual.flatten(0, -2))
    block_r, block_d, warps = _tile(x)
    launch(
        _rms_norm_forward_kernel, (cdiv(rstd.numel(), block_r),),
        x, residual, weight.contiguous(), y, total, rstd,
        rstd.numel(), heads, *x_strides, *residual_strides, eps,
        D=size, SPLIT=heads != 1, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip
    return y, rstd


@kernel_op("rms_norm")
def _rms_norm(x: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _forward(x, None, weight, eps, None)


@kernel_op("add_rms_norm")
def _add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor, Tensor]:
    total = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    y, rstd = _forward(x, residual, weight, eps, total)
    return y, total, rstd


@kernel_op("rms_norm_backward")
def _rms_norm_backward(
    dy: Tensor, x: Tensor, weight: Tensor, rstd: Tensor, dtotal: Tensor | None
) -> tuple[Tensor, Tensor]:
    dx = torch.empty(x.shape, dtype=x.dtype, device=x.device)
    block_r, block_d, warps = _tile(x)
    programs = multiprocessors(x.device) * config_for(CONFIGS, x.device).programs_per_sm
    programs = min(cdiv(rstd.numel(), block_r), programs)
    partial = torch.empty(programs, x.shape[-1], dtype=torch.float32, device=x.device)
    x, heads, *x_strides = _rows(x)
    launch(
        _rms_norm_backward_kernel, (programs,),
        dy.contiguous(), x, weight.contiguous(), rstd, None if dtotal is None else dtotal.contiguous(), dx, partial,
        rstd.numel(), heads, *x_strides,
        D=x.shape[-1], SPLIT=heads != 1, BLOCK_R=block_r, BLOCK_D=block_d, num_warps=warps,
    )  # fmt: skip
    return dx, partial.sum(0).to(weight.dtype)


@_rms_norm.register_fake
def _(x, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_add_rms_norm.register_fake
def _(x, residual, weight, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape), x.new_empty(x.shape[:-1], dtype=torch.float32)


@_rms_norm_backward.register_fake
def _(dy, x, weight, rstd, dtotal):
    return x.new_empty(x.shape), weight.new_empty(weight.shape)


def _save_rms_norm(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[0], inputs[1], output[1])


def _backward_rms_norm(ctx, dy, _drstd):
    x, weight, rstd = ctx.saved_tensors
    return *_rms_norm_backward(dy, x, weight, rstd, None), None


def _save_add_rms_norm(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(inputs[2], output[1], output[2])


def _backward_add_rms_norm(ctx, dy, dtotal, _drstd):
    weight, total, rstd = ctx.saved_tensors
    if dy is None:  # only the sum was used
        return dtotal, dtotal, None, None
    dx, dweight = _rms_norm_backward(dy, total, weight, rstd, dtotal)
    return dx, dx, dweight, None


_rms_norm.register_autograd(_backward_rms_norm, setup_context=_save_rms_norm)
_add_rms_norm.register_autograd(_backward_add_rms_norm, setup_context=_save_add_rms_norm)


def _check(x: Tensor, weight: Tensor, residual: Tensor | None = None) -> None:
    check_tensors(x=x, weight=weight, residual=residual)
    check(x.ndim >= 1, "x is a scalar, and must have a dimension to normalise over")
    size = x.shape[-1]
    check(1 <= size <= MAX_D, "x has rows of {}; this kernel takes 1 to {}", size, MAX_D)
    check(weight.shape == (size,), "weight is {}, and x needs [{}]", list(weight.shape), size)
    if residual is not None:
        check(
            residual.shape == x.shape and residual.dtype == x.dtype,
            "residual is {} {}, and x {} {}",
            residual.dtype,
            list(residual.shape),
            x.dtype,
            list(x.shape),
        )


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last dimension, computed in float32.

    x [..., D]: float32, bfloat16 or float16; it is copied if its last dimension is not contiguous. weight [D], of any
    of these dtypes -> [..., D] contiguous, in x.dtype. ValueError for other input.
    """
    _check(x, weight)
    return _rms_norm(x, weight, eps)[0]


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual) in one pass: all [..., D] in x.dtype."""
    _check(x, weight, residual)
    y, total, _ = _add_rms_norm(x, residual, weight, eps)
    return y, total
