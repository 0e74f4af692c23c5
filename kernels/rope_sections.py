"""The Triton kernels of rope.py: split, normalise and rotate a packed projection, and compute its whole gradient.

Programs are divided into three ranges for query, key and value rows, so one scalar branch selects a program's work. A
row is one head of one token. A tile is BLOCK_R rows by two halves, padded to a power of two (40 to 64, 48 to 64). The
weights' gradients need no atomics: each program sums its rows in float32, and one reduction over programs follows.

    angles = (p_cos, p_sin, p_position, n_ids, n_positions)      the tables, and each token's row in them
"""

from minimind.kernels.triton_support import jit, tl


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
def _load_angles(angles, o_token, m_row, HALF: tl.constexpr, BLOCK_H: tl.constexpr):
    """Load cos and sin. A position outside the tables uses their first or last row, so nothing beyond them is read."""
    p_cos, p_sin, p_position, n_ids, n_positions = angles
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
    p_qkv, qkv_stride, p_weight, p_out, p_rstd, i_block, n_tokens, eps, angles,
    ROTATED: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    NORMED: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Process block i_block of the rows of heads FIRST to FIRST + COUNT of qkv. p_weight None: no norm. NORMED: the
    number of normalised heads."""
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
        tl.store(p_rstd + o_token * NORMED + o_head, b_rstd, mask=m_row)
        b_w_first, b_w_second = _load_weight(p_weight, HALF, BLOCK_H)
        b_first = b_first * b_rstd[:, None] * b_w_first
        b_second = b_second * b_rstd[:, None] * b_w_second
    if ROTATED:
        b_cos, b_sin = _load_angles(angles, o_token, m_row, HALF, BLOCK_H)
        b_first, b_second = _rotate(b_first, b_second, b_cos, b_sin)
    _store_halves(p_out + o_row[:, None] * (2 * HALF) + o_d[None, :], b_first, b_second, mask, HALF)


@jit(do_not_specialize=["n_tokens", "n_ids", "n_positions", "q_blocks", "k_blocks"])
def rope_forward_kernel(
    p_qkv, p_cos, p_sin, p_position, p_q_weight, p_k_weight, p_q, p_k, p_v, p_rstd,
    n_tokens, n_ids, n_positions, q_blocks, k_blocks, qkv_stride, eps,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    angles = (p_cos, p_sin, p_position, n_ids, n_positions)
    i_block = tl.program_id(0)
    if i_block < q_blocks:
        _forward_section(
            p_qkv, qkv_stride, p_q_weight, p_q, p_rstd, i_block, n_tokens, eps, angles,
            True, 0, H, H + G, HALF, BLOCK_R, BLOCK_H,
        )  # fmt: skip
    elif i_block < q_blocks + k_blocks:
        _forward_section(
            p_qkv, qkv_stride, p_k_weight, p_k, p_rstd, i_block - q_blocks, n_tokens, eps, angles,
            True, H, G, H + G, HALF, BLOCK_R, BLOCK_H,
        )  # fmt: skip
    else:
        _forward_section(
            p_qkv, qkv_stride, None, p_v, p_rstd, i_block - q_blocks - k_blocks, n_tokens, eps, angles,
            False, H + G, G, H + G, HALF, BLOCK_R, BLOCK_H,
        )  # fmt: skip


@jit
def _backward_section(
    p_dout, p_qkv, qkv_stride, p_weight, p_rstd, p_dqkv, p_partial, i_first, programs, n_tokens, angles,
    ROTATED: tl.constexpr, FIRST: tl.constexpr, COUNT: tl.constexpr,
    NORMED: tl.constexpr, HEADS: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """Process every `programs`-th block from i_first of the rows of _forward_section. HEADS: the heads of qkv."""
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
            b_cos, b_sin = _load_angles(angles, o_token, m_row, HALF, BLOCK_H)
            b_first, b_second = _rotate(b_first, b_second, b_cos, -b_sin)
        if p_weight is not None:
            o_qkv = (o_token * qkv_stride + o_head * (2 * HALF))[:, None] + o_d[None, :]
            b_x_first, b_x_second = _load_halves(p_qkv + o_qkv, mask, HALF)
            b_rstd = tl.load(p_rstd + o_token * NORMED + o_head, mask=m_row, other=0.0)  # [BLOCK_R]
            b_rstd = b_rstd[:, None]
            b_x_first, b_x_second = b_x_first * b_rstd, b_x_second * b_rstd
            b_dw_first += b_first * b_x_first
            b_dw_second += b_second * b_x_second
            b_first, b_second = b_first * b_w_first, b_second * b_w_second
            b_mean = tl.sum(b_first * b_x_first + b_second * b_x_second, axis=1)[:, None] / (2 * HALF)
            b_first = b_rstd * (b_first - b_x_first * b_mean)
            b_second = b_rstd * (b_second - b_x_second * b_mean)
        o_dqkv = ((o_token * HEADS + o_head) * (2 * HALF))[:, None] + o_d[None, :]
        _store_halves(p_dqkv + o_dqkv, b_first, b_second, mask, HALF)
    if p_weight is not None:
        p_row = p_partial + tl.program_id(0) * (2 * HALF) + o_d
        _store_halves(p_row, tl.sum(b_dw_first, axis=0), tl.sum(b_dw_second, axis=0), o_d < HALF, HALF)


@jit(do_not_specialize=["n_tokens", "n_ids", "n_positions", "q_programs", "k_programs", "v_programs"])
def rope_backward_kernel(
    p_dq, p_dk, p_dv, p_qkv, p_cos, p_sin, p_position, p_q_weight, p_k_weight, p_rstd, p_dqkv, p_partial,
    n_tokens, n_ids, n_positions, q_programs, k_programs, v_programs, qkv_stride,
    H: tl.constexpr, G: tl.constexpr, HALF: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    angles = (p_cos, p_sin, p_position, n_ids, n_positions)
    i_program = tl.program_id(0)
    if i_program < q_programs:
        _backward_section(
            p_dq, p_qkv, qkv_stride, p_q_weight, p_rstd, p_dqkv, p_partial, i_program, q_programs, n_tokens, angles,
            True, 0, H, H + G, H + 2 * G, HALF, BLOCK_R, BLOCK_H,
        )  # fmt: skip
    elif i_program < q_programs + k_programs:
        i_program -= q_programs
        _backward_section(
            p_dk, p_qkv, qkv_stride, p_k_weight, p_rstd, p_dqkv, p_partial, i_program, k_programs, n_tokens, angles,
            True, H, G, H + G, H + 2 * G, HALF, BLOCK_R, BLOCK_H,
        )  # fmt: skip
    else:
        i_program -= q_programs + k_programs
        _backward_section(
            p_dv, None, 0, None, p_rstd, p_dqkv, p_partial, i_program, v_programs, n_tokens, angles,
            False, H + G, G, H + G, H + 2 * G, HALF, BLOCK_R, BLOCK_H,
        )  # fmt: skip
