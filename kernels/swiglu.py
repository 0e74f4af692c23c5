"""SwiGLU (Shazeer 2020, arXiv 2002.05202) over a packed projection.

    s = 1 / (1 + exp(-gate))                       y = gate * s * up
    dgate = dy * up * s * (1 + gate * (1 - s))     dup = dy * gate * s

gate_up [..., 2 I], gate before up in each row -> y [..., I]. Only gate_up is kept for the backward, which computes s
again and writes dgate_up [..., 2 I] into a new tensor. All arithmetic is float32 and rounded once; PyTorch also rounds
silu(gate).

A program processes a tile of BLOCK_R rows and BLOCK_I columns. 128 columns divide 1408, 2048 and 2432 evenly, and waste
4% of 1728.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.kernels.triton_support import (
    cdiv,
    check,
    check_tensors,
    config_for,
    jit,
    kernel_op,
    launch,
    next_power_of_2,
    rows_of,
    tl,
)


@dataclass(frozen=True)
class SwigluConfig:
    columns: int  # per tile, at most
    elements: int  # per tile
    num_warps: int


CONFIGS = {80: SwigluConfig(columns=128, elements=2048, num_warps=4)}


def swiglu_ref(gate_up: Tensor) -> Tensor:
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


@jit
def sigmoid(x):
    b_exp = tl.exp(-tl.abs(x))  # at most 1, so it cannot overflow
    return tl.where(x >= 0, 1.0, b_exp) / (1.0 + b_exp)


@jit
def _tile_offsets(n_rows, SIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr):
    """(rows [BLOCK_R, 1], columns [1, BLOCK_I], mask) of this program; consecutive programs share a row of tiles."""
    i_program = tl.program_id(0)
    o_row = (i_program // tl.cdiv(SIZE, BLOCK_I)).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    o_col = (i_program % tl.cdiv(SIZE, BLOCK_I)) * BLOCK_I + tl.arange(0, BLOCK_I)
    return o_row[:, None], o_col[None, :], (o_row < n_rows)[:, None] & (o_col < SIZE)[None, :]


@jit(do_not_specialize=["n_rows"])
def _swiglu_forward_kernel(
    p_gate_up, p_y, n_rows, gate_up_stride, SIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr
):
    o_row, o_col, mask = _tile_offsets(n_rows, SIZE, BLOCK_R, BLOCK_I)
    p_gate = p_gate_up + o_row * gate_up_stride + o_col
    b_gate = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_I]
    b_up = tl.load(p_gate + SIZE, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_I]
    tl.store(p_y + o_row * SIZE + o_col, b_gate * sigmoid(b_gate) * b_up, mask=mask)


@jit(do_not_specialize=["n_rows"])
def _swiglu_backward_kernel(
    p_dy, p_gate_up, p_dgate_up, n_rows, gate_up_stride,
    SIZE: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_I: tl.constexpr,
):  # fmt: skip
    o_row, o_col, mask = _tile_offsets(n_rows, SIZE, BLOCK_R, BLOCK_I)
    p_gate = p_gate_up + o_row * gate_up_stride + o_col
    b_gate = tl.load(p_gate, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_I]
    b_up = tl.load(p_gate + SIZE, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_I]
    b_dy = tl.load(p_dy + o_row * SIZE + o_col, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_R, BLOCK_I]
    b_sigmoid = sigmoid(b_gate)
    p_dgate = p_dgate_up + o_row * (2 * SIZE) + o_col
    tl.store(p_dgate, b_dy * b_up * b_sigmoid * (1.0 + b_gate * (1.0 - b_sigmoid)), mask=mask)
    tl.store(p_dgate + SIZE, b_dy * b_gate * b_sigmoid, mask=mask)


def _tiles(rows: int, size: int, device: torch.device) -> tuple[tuple[int], dict[str, int]]:
    """(grid, constants of the kernel)."""
    config = config_for(CONFIGS, device)
    block_i = min(config.columns, next_power_of_2(size))
    block_r = config.elements // block_i
    grid = (cdiv(rows, block_r) * cdiv(size, block_i),)
    return grid, dict(SIZE=size, BLOCK_R=block_r, BLOCK_I=block_i, num_warps=config.num_warps)


@kernel_op("swiglu")
def _swiglu(gate_up: Tensor) -> Tensor:
    size = gate_up.shape[-1] // 2
    y = torch.empty(*gate_up.shape[:-1], size, dtype=gate_up.dtype, device=gate_up.device)
    rows = rows_of(gate_up)
    grid, tile = _tiles(rows.shape[0], size, rows.device)
    launch(_swiglu_forward_kernel, grid, rows, y, rows.shape[0], rows.stride(0), **tile)
    return y


@kernel_op("swiglu_backward")
def _swiglu_backward(dy: Tensor, gate_up: Tensor) -> Tensor:
    dgate_up = torch.empty(gate_up.shape, dtype=gate_up.dtype, device=gate_up.device)
    rows = rows_of(gate_up)
    grid, tile = _tiles(rows.shape[0], dy.shape[-1], rows.device)
    launch(_swiglu_backward_kernel, grid, dy.contiguous(), rows, dgate_up, rows.shape[0], rows.stride(0), **tile)
    return dgate_up


@_swiglu.register_fake
def _(gate_up):
    return gate_up.new_empty(*gate_up.shape[:-1], gate_up.shape[-1] // 2)


@_swiglu_backward.register_fake
def _(dy, gate_up):
    return gate_up.new_empty(gate_up.shape)


def _save_swiglu(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    ctx.save_for_backward(*inputs)


def _backward_swiglu(ctx, dy):
    return None if dy is None else _swiglu_backward(dy, *ctx.saved_tensors)


_swiglu.register_autograd(_backward_swiglu, setup_context=_save_swiglu)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up, computed in float32.

    gate_up [..., 2 I], gate before up: float32, bfloat16 or float16. It is read in place if one stride reaches all rows
    and the last dimension is contiguous, else copied -> [..., I] contiguous, in gate_up.dtype. ValueError for other
    input.
    """
    check_tensors(gate_up=gate_up)
    check(
        gate_up.ndim >= 1 and gate_up.shape[-1] >= 2 and gate_up.shape[-1] % 2 == 0,
        "gate_up is {}; its last dimension must hold gate and up, of equal size",
        list(gate_up.shape),
    )
    return _swiglu(gate_up)
