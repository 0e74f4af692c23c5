"""Matrix products over the rows of each expert: the Triton kernels of moe_experts.py.

`order` int32 [R] lists R = N * K token copies (token * K + choice) sorted by expert, and `offsets` int32 [E + 1] says
where each expert's rows begin. A buffer is called "sorted" if its rows are in that order. Rows of x and of the output
gradient are gathered through order // K as they are loaded, and results are scattered through order as they are stored,
so nothing is sorted or padded in memory (ScatterMoE, arXiv 2403.08245).

    hidden         h = silu(x[token] Wg_e^T) * (x[token] Wu_e^T)             two accumulators, [R, I]
    scatter        out[order] = a W_e, times the copy's gate if asked        [R, C]
    hidden_grad    dh = dout[token] Wd_e, then through the gate and SwiGLU   [R, 2 I] and more
    weight_grad    dW_e = sum over the expert's rows of a^T b                [E, M, N]

The number of tiles per expert is known only on the device. The grid has the maximum, cdiv(R, BLOCK_M) + E rows of
tiles; each program finds its expert and rows from the offsets, and programs past the last tile return. A tile never has
rows of two experts. Accumulators and epilogues are float32, and products of float32 are full precision (no TF32). The
compiler drops masks that are always true because a size is a multiple of the tile.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from minimind.kernels.swiglu import sigmoid
from minimind.kernels.triton_support import cdiv, config_for, jit, launch, next_power_of_2, tl

GROUP_M = 8  # rows of tiles that are processed together, column by column, to share data in L2


@dataclass(frozen=True)
class Tile:
    m: int
    n: int
    k: int
    num_warps: int
    num_stages: int


@dataclass(frozen=True)
class GemmConfig:
    """Tiles of each product. weight_grad has extra stages, since its loads wait for the loads of their indices."""

    hidden: Tile
    scatter: Tile
    hidden_grad: Tile
    weight_grad: Tile


_SMALL_TILES = GemmConfig(
    hidden=Tile(128, 64, 32, num_warps=8, num_stages=4),
    scatter=Tile(128, 128, 32, num_warps=8, num_stages=4),
    hidden_grad=Tile(128, 64, 32, num_warps=8, num_stages=4),
    weight_grad=Tile(128, 128, 32, num_warps=8, num_stages=8),
)
HALF_CONFIGS = {
    80: _SMALL_TILES,
    90: GemmConfig(
        hidden=Tile(128, 128, 64, num_warps=8, num_stages=3),
        scatter=Tile(128, 128, 64, num_warps=8, num_stages=3),
        hidden_grad=Tile(128, 64, 64, num_warps=8, num_stages=3),
        weight_grad=Tile(128, 128, 64, num_warps=8, num_stages=6),
    ),
    120: _SMALL_TILES,  # 99 KiB of shared memory and the tensor cores of sm_80: the tiles of sm_90 would spill
}
FLOAT_CONFIGS = {
    80: GemmConfig(
        hidden=Tile(64, 64, 16, num_warps=8, num_stages=3),
        scatter=Tile(64, 64, 16, num_warps=4, num_stages=3),
        hidden_grad=Tile(64, 64, 16, num_warps=8, num_stages=3),
        weight_grad=Tile(64, 64, 16, num_warps=4, num_stages=6),
    )
}
SUM_ROWS, SUM_COLUMNS = 16, 128  # of a tile of _moe_sum_kernel


@jit
def _tile(i_program, n_m, n_n, GROUP: tl.constexpr):
    """(row of tiles, column of tiles) in groups of GROUP rows."""
    i_group = i_program // (GROUP * n_n)
    n_rows = tl.minimum(n_m - i_group * GROUP, GROUP)
    i_in_group = i_program % (GROUP * n_n)
    return i_group * GROUP + i_in_group % n_rows, i_in_group // n_rows


@jit
def _expert_rows(p_offsets, i_m, E: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_M: tl.constexpr):
    """(expert, first row, end of the expert's rows) of the i_m-th tile; expert E if there is no such tile."""
    o_e = tl.arange(0, BLOCK_E)
    m_e = o_e < E
    b_first = tl.load(p_offsets + o_e, mask=m_e, other=0)  # [BLOCK_E]
    b_end = tl.load(p_offsets + o_e + 1, mask=m_e, other=0)  # [BLOCK_E]
    b_tiles = (b_end - b_first + (BLOCK_M - 1)) // BLOCK_M
    b_tiles_end = tl.cumsum(b_tiles, axis=0)
    expert = tl.sum((m_e & (b_tiles_end <= i_m)).to(tl.int32), axis=0)
    b_row = b_first + (i_m - b_tiles_end + b_tiles) * BLOCK_M
    row = tl.sum(tl.where(o_e == expert, b_row, 0), axis=0)
    return expert, row, tl.sum(tl.where(o_e == expert, b_end, 0), axis=0)


@jit(do_not_specialize=["n_m"])
def _moe_hidden_kernel(
    n_m, p_x, p_weight, p_order, p_offsets, p_hidden, p_gate_up, x_stride,
    E: tl.constexpr, TOP_K: tl.constexpr, C: tl.constexpr, INTER: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """p_weight [E, 2 I, C]; p_hidden [R, I] and, unless None, p_gate_up [R, 2 I] are sorted."""
    i_m, i_n = _tile(tl.program_id(0), n_m, tl.cdiv(INTER, BLOCK_N), GROUP)
    expert, row, end = _expert_rows(p_offsets, i_m, E, BLOCK_E, BLOCK_M)
    if expert >= E:
        return
    o_row = row + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_row = o_row < end
    # rows and columns past the end load from valid addresses, and are not stored
    b_token = tl.load(p_order + o_row, mask=m_row, other=0) // TOP_K  # [BLOCK_M]
    p_x += b_token.to(tl.int64)[:, None] * x_stride + o_k[None, :]
    p_weight += expert.to(tl.int64) * (2 * INTER * C)
    p_weight += tl.minimum(o_n, INTER - 1)[None, :] * C + o_k[:, None]
    b_gate = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    b_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, C, BLOCK_K):
        m_k = (C % BLOCK_K == 0) | (o_k < C - k)
        b_x = tl.load(p_x + k, mask=m_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b_w = tl.load(p_weight + k, mask=m_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        b_gate = tl.dot(b_x, b_w, b_gate, input_precision="ieee")
        b_w = tl.load(p_weight + INTER * C + k, mask=m_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        b_up = tl.dot(b_x, b_w, b_up, input_precision="ieee")
    o_row = o_row.to(tl.int64)[:, None]
    mask = m_row[:, None] & (o_n < INTER)[None, :]
    if p_gate_up is not None:
        p_gate_up += o_row * (2 * INTER) + o_n[None, :]
        tl.store(p_gate_up, b_gate, mask=mask)
        tl.store(p_gate_up + INTER, b_up, mask=mask)
    tl.store(p_hidden + o_row * INTER + o_n[None, :], b_gate * sigmoid(b_gate) * b_up, mask=mask)


@jit(do_not_specialize=["n_m"])
def _moe_scatter_kernel(
    n_m, p_a, p_weight, p_order, p_offsets, p_gates, p_out,
    E: tl.constexpr, K: tl.constexpr, N: tl.constexpr, TRANSPOSED: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """p_a [R, K] is sorted; p_weight is [E, K, N], or [E, N, K] if TRANSPOSED; p_gates [R] or None and p_out [R, N] are
    not sorted."""
    i_m, i_n = _tile(tl.program_id(0), n_m, tl.cdiv(N, BLOCK_N), GROUP)
    expert, row, end = _expert_rows(p_offsets, i_m, E, BLOCK_E, BLOCK_M)
    if expert >= E:
        return
    o_row = row + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_row = o_row < end
    m_n = ((N % BLOCK_N == 0) | (o_n < N))[None, :]
    p_a += tl.minimum(o_row, end - 1).to(tl.int64)[:, None] * K + o_k[None, :]
    p_weight += expert.to(tl.int64) * (K * N)
    if TRANSPOSED:
        p_weight += tl.minimum(o_n, N - 1)[None, :] * K + o_k[:, None]
    else:
        p_weight += o_k[:, None] * N + o_n[None, :]
    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, K, BLOCK_K):
        m_k = (K % BLOCK_K == 0) | (o_k < K - k)
        b_a = tl.load(p_a + k, mask=m_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        if TRANSPOSED:
            b_w = tl.load(p_weight + k, mask=m_k[:, None], other=0.0)  # [BLOCK_K, BLOCK_N]
        else:
            b_w = tl.load(p_weight + k * N, mask=m_k[:, None] & m_n, other=0.0)  # [BLOCK_K, BLOCK_N]
        b_out = tl.dot(b_a, b_w, b_out, input_precision="ieee")
    b_copy = tl.load(p_order + o_row, mask=m_row, other=0)  # [BLOCK_M]
    if p_gates is not None:
        b_out *= tl.load(p_gates + b_copy, mask=m_row, other=0.0).to(tl.float32)[:, None]  # [BLOCK_M]
    p_out += b_copy.to(tl.int64)[:, None] * N + o_n[None, :]
    tl.store(p_out, b_out, mask=m_row[:, None] & m_n)


@jit
def _swiglu_grad(b_dh, p_gate_up, p_dgate_up, p_scaled, o_row, o_n, m_row, b_scale, INTER: tl.constexpr):
    """From some columns of dh, without the gate, compute and store what the gradients need; return the rows' dh . h."""
    mask = m_row & (o_n < INTER)
    p_gate_up += o_row * (2 * INTER) + o_n
    b_gate = tl.load(p_gate_up, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N / 2]
    b_up = tl.load(p_gate_up + INTER, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_M, BLOCK_N / 2]
    b_sigmoid = sigmoid(b_gate)
    b_silu = b_gate * b_sigmoid
    b_h = b_silu * b_up
    if p_scaled is not None:
        tl.store(p_scaled + o_row * INTER + o_n, b_scale * b_h, mask=mask)
    if p_dgate_up is not None:
        p_dgate_up += o_row * (2 * INTER) + o_n
        b_du = b_dh * b_scale
        tl.store(p_dgate_up, b_du * (b_up * b_sigmoid + b_h * (1.0 - b_sigmoid)), mask=mask)
        tl.store(p_dgate_up + INTER, b_du * b_silu, mask=mask)
    return tl.sum(b_dh * b_h, axis=1)


@jit(do_not_specialize=["n_m"])
def _moe_hidden_grad_kernel(
    n_m, p_dout, p_weight, p_gate_up, p_order, p_offsets, p_gates, p_dgate_up, p_scaled, p_dgates, dout_stride,
    E: tl.constexpr, TOP_K: tl.constexpr, C: tl.constexpr, INTER: tl.constexpr, BLOCK_E: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """p_weight [E, C, I]. Results, each may be None: p_dgate_up [R, 2 I], sorted; p_scaled [R, I], the gate times h,
    sorted; p_dgates [R, columns of tiles], not sorted, sums over one tile's columns."""
    i_m, i_n = _tile(tl.program_id(0), n_m, tl.cdiv(INTER, BLOCK_N), GROUP)
    expert, row, end = _expert_rows(p_offsets, i_m, E, BLOCK_E, BLOCK_M)
    if expert >= E:
        return
    o_row = row + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    o_k = tl.arange(0, BLOCK_K)
    m_row = o_row < end
    m_n = ((INTER % BLOCK_N == 0) | (o_n < INTER))[None, :]
    b_copy = tl.load(p_order + o_row, mask=m_row, other=0)  # [BLOCK_M]
    p_dout += (b_copy // TOP_K).to(tl.int64)[:, None] * dout_stride + o_k[None, :]
    p_weight += expert.to(tl.int64) * (C * INTER) + o_k[:, None] * INTER + o_n[None, :]
    b_dh = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k in range(0, C, BLOCK_K):
        m_k = (C % BLOCK_K == 0) | (o_k < C - k)
        b_dout = tl.load(p_dout + k, mask=m_k[None, :], other=0.0)  # [BLOCK_M, BLOCK_K]
        b_w = tl.load(p_weight + k * INTER, mask=m_k[:, None] & m_n, other=0.0)  # [BLOCK_K, BLOCK_N]
        b_dh = tl.dot(b_dout, b_w, b_dh, input_precision="ieee")
    # one half of the columns at a time: a whole tile would need over 250 registers
    b_left, b_right = tl.split(b_dh.reshape(BLOCK_M, 2, BLOCK_N // 2).permute(0, 2, 1))
    b_scale = tl.load(p_gates + b_copy, mask=m_row, other=0.0).to(tl.float32)[:, None]  # [BLOCK_M]
    o_half = i_n * BLOCK_N + tl.arange(0, BLOCK_N // 2)[None, :]
    o_row = o_row.to(tl.int64)[:, None]
    m_row = m_row[:, None]
    b_dgates = _swiglu_grad(b_left, p_gate_up, p_dgate_up, p_scaled, o_row, o_half, m_row, b_scale, INTER)
    o_half += BLOCK_N // 2
    b_dgates += _swiglu_grad(b_right, p_gate_up, p_dgate_up, p_scaled, o_row, o_half, m_row, b_scale, INTER)
    if p_dgates is not None:
        o_partial = b_copy.to(tl.int64)[:, None] * tl.cdiv(INTER, BLOCK_N) + i_n
        tl.store(p_dgates + o_partial, b_dgates[:, None], mask=m_row)


@jit
def _moe_weight_grad_kernel(
    p_a, p_b, p_order, p_offsets, p_out, a_stride, b_stride,
    TOP_K: tl.constexpr, M: tl.constexpr, N: tl.constexpr, GATHER_A: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, GROUP: tl.constexpr,
):  # fmt: skip
    """p_out [E, M, N] = a^T b over each expert's rows. One of p_a and p_b is sorted; the rows of the other, a if
    GATHER_A, are gathered by the copies' tokens."""
    n_m, n_n = tl.cdiv(M, BLOCK_M), tl.cdiv(N, BLOCK_N)
    expert = tl.program_id(0) // (n_m * n_n)
    i_m, i_n = _tile(tl.program_id(0) % (n_m * n_n), n_m, n_n, GROUP)
    o_m = i_m * BLOCK_M + tl.arange(0, BLOCK_M)
    o_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    m_m = ((M % BLOCK_M == 0) | (o_m < M))[:, None]
    m_n = ((N % BLOCK_N == 0) | (o_n < N))[None, :]
    row = tl.load(p_offsets + expert)
    end = tl.load(p_offsets + expert + 1)
    b_out = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for i_row in range(row, end, BLOCK_K):
        o_row = i_row + tl.arange(0, BLOCK_K)
        m_row = o_row < end
        o_token = (tl.load(p_order + o_row, mask=m_row, other=0) // TOP_K).to(tl.int64)  # [BLOCK_K]
        o_row = o_row.to(tl.int64)
        o_a, o_b = (o_token, o_row) if GATHER_A else (o_row, o_token)
        # mask both: a value past the expert's rows may be NaN, and NaN times 0 is NaN
        b_a = tl.load(
            p_a + o_a[None, :] * a_stride + o_m[:, None], mask=m_m & m_row[None, :], other=0.0
        )  # [BLOCK_M, BLOCK_K]
        b_b = tl.load(
            p_b + o_b[:, None] * b_stride + o_n[None, :], mask=m_row[:, None] & m_n, other=0.0
        )  # [BLOCK_K, BLOCK_N]
        b_out = tl.dot(b_a, b_b, b_out, input_precision="ieee")
    p_out += expert.to(tl.int64) * (M * N) + o_m[:, None] * N + o_n[None, :]
    tl.store(p_out, b_out, mask=m_m & m_n)


@jit(do_not_specialize=["n_tokens"])
def _moe_sum_kernel(
    p_copies, p_out, n_tokens, TOP_K: tl.constexpr, C: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_C: tl.constexpr
):
    o_token = (tl.program_id(0).to(tl.int64) * BLOCK_T + tl.arange(0, BLOCK_T))[:, None]
    o_c = (tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C))[None, :]
    mask = (o_token < n_tokens) & (o_c < C)
    p_copies += o_token * (TOP_K * C) + o_c
    b_sum = tl.zeros([BLOCK_T, BLOCK_C], tl.float32)
    for k in tl.static_range(TOP_K):
        b_sum += tl.load(p_copies + k * C, mask=mask, other=0.0).to(tl.float32)  # [BLOCK_T, BLOCK_C]
    tl.store(p_out + o_token * C + o_c, b_sum, mask=mask)


def _config(x: Tensor) -> GemmConfig:
    return config_for(FLOAT_CONFIGS if x.dtype == torch.float32 else HALF_CONFIGS, x.device)


def _launch(kernel, tile: Tile, order: Tensor, offsets: Tensor, columns: int, *args, **constants) -> None:
    """Launch one program per tile of sorted rows and columns."""
    experts = offsets.shape[0] - 1
    n_m = cdiv(order.shape[0], tile.m) + experts
    launch(
        kernel, (n_m * cdiv(columns, tile.n),), n_m, *args,
        E=experts, BLOCK_E=next_power_of_2(experts), BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=GROUP_M,
        num_warps=tile.num_warps, num_stages=tile.num_stages, **constants,
    )  # fmt: skip


def _empty(like: Tensor, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
    return torch.empty(shape, dtype=dtype or like.dtype, device=like.device)


def hidden(
    x: Tensor, gate_up: Tensor, order: Tensor, offsets: Tensor, top_k: int, save: bool
) -> tuple[Tensor, Tensor | None]:
    """(h [R, I], the SwiGLU's input [R, 2 I] if `save`), both sorted.

    x [N, C] from `rows_of`; gate_up [E, 2 I, C] in x.dtype and contiguous, like all weights here."""
    rows, inter = order.shape[0], gate_up.shape[1] // 2
    out = _empty(x, rows, inter)
    saved = _empty(x, rows, 2 * inter) if save else None
    _launch(
        _moe_hidden_kernel, _config(x).hidden, order, offsets, inter,
        x, gate_up, order, offsets, out, saved, x.stride(0), TOP_K=top_k, C=x.shape[1], INTER=inter,
    )  # fmt: skip
    return out, saved


def scatter(
    a: Tensor, weight: Tensor, order: Tensor, offsets: Tensor, top_k: int, gates: Tensor | None, transposed: bool
) -> Tensor:
    """Sum over each token's copies of a W, times the copy's gate if gates [N, K] are given: [N, C] in a.dtype.

    a [R, K], sorted; weight [E, K, C], or [E, C, K] if transposed."""
    columns = weight.shape[1 if transposed else 2]
    copies = _empty(a, order.shape[0], columns)
    _launch(
        _moe_scatter_kernel, _config(a).scatter, order, offsets, columns,
        a, weight, order, offsets, gates, copies, K=a.shape[1], N=columns, TRANSPOSED=transposed,
    )  # fmt: skip
    if top_k == 1:
        return copies
    tokens = order.shape[0] // top_k
    out = _empty(a, tokens, columns)
    launch(
        _moe_sum_kernel, (cdiv(tokens, SUM_ROWS), cdiv(columns, SUM_COLUMNS)), copies, out, tokens,
        TOP_K=top_k, C=columns, BLOCK_T=SUM_ROWS, BLOCK_C=SUM_COLUMNS, num_warps=4,
    )  # fmt: skip
    return out


def hidden_grad(
    dout: Tensor, down: Tensor, gate_up: Tensor, order: Tensor, offsets: Tensor, gates: Tensor,
    need_dgate_up: bool, need_scaled: bool, need_dgates: bool,
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:  # fmt: skip
    """(gradient of `gate_up` [R, 2 I], gate * h [R, I], dgates float32 [N, K]), each None if not needed. The first two
    are sorted and in dout.dtype.

    dout [N, C] from `rows_of`; down [E, C, I]; gate_up [R, 2 I] as saved by `hidden`; gates [N, K]."""
    tile = _config(dout).hidden_grad
    (rows, inter), columns = (gate_up.shape[0], down.shape[2]), cdiv(down.shape[2], tile.n)
    dgate_up = _empty(dout, rows, 2 * inter) if need_dgate_up else None
    scaled = _empty(dout, rows, inter) if need_scaled else None
    partial = _empty(dout, rows, columns, dtype=torch.float32) if need_dgates else None
    _launch(
        _moe_hidden_grad_kernel, tile, order, offsets, inter,
        dout, down, gate_up, order, offsets, gates, dgate_up, scaled, partial, dout.stride(0),
        TOP_K=gates.shape[1], C=dout.shape[1], INTER=inter,
    )  # fmt: skip
    return dgate_up, scaled, None if partial is None else partial.sum(dim=1).view(gates.shape)


def weight_grad(
    a: Tensor, b: Tensor, order: Tensor, offsets: Tensor, top_k: int, gather_a: bool, dtype: torch.dtype
) -> Tensor:
    """a^T b over each expert's rows: [E, M, N] in `dtype`, zeros for experts without rows.

    a [R, M] is sorted, and b has one row per token, from `rows_of`; with gather_a it is the other way round."""
    experts, m, n = offsets.shape[0] - 1, a.shape[1], b.shape[1]
    tile = _config(a).weight_grad
    out = _empty(a, experts, m, n, dtype=dtype)
    launch(
        _moe_weight_grad_kernel, (experts * cdiv(m, tile.m) * cdiv(n, tile.n),),
        a, b, order, offsets, out, a.stride(0), b.stride(0), TOP_K=top_k, M=m, N=n, GATHER_A=gather_a,
        BLOCK_M=tile.m, BLOCK_N=tile.n, BLOCK_K=tile.k, GROUP=GROUP_M,
        num_warps=tile.num_warps, num_stages=tile.num_stages,
    )  # fmt: skip
    return out
