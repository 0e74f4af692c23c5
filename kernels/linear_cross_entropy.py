"""Linear head and cross-entropy in one, without the [N, V] logits.

    raw = x w^T       z = c tanh(raw / c), or raw       p = softmax(z)       lse = log sum_v exp z_v
    loss = sum_t a_t (lse_t - z_t[y_t] + b lse_t^2) / A
    dz_t = a_t (p_t (1 + 2 b lse_t) - onehot(y_t)) / A

x [N, D]; w [V, D]; y the targets; a the loss weights and A their global sum; c the soft cap (Gemma 2, arXiv
2408.00118); b the z-loss (PaLM, arXiv 2204.02311). The gradient is made in the forward, a chunk of logits at a time
(Liger, arXiv 2410.10989), so that the head costs three matrix products; the backward only scales it.

Logits are shifted by their maximum before anything is summed, and 1 is taken off the target's p in float32 by expm1:
near p = 1 both the loss and its gradient are small differences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.kernels.chunked_linear import (
    cap_slope,
    capped,
    check_head,
    check_per_row,
    check_weight_sum,
    chunk_rows,
    expm1,
    load_logits,
    logit_bytes,
    normalised,
    register_made_gradient,
    row_sums,
    row_tile,
    run_chunks,
    select_rows,
    split_weight_sum,
    store_zeros,
    target_rows,
)
from minimind.kernels.triton_support import check, jit, launch, tl


def linear_cross_entropy_ref(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor | None = None,
    weight_sum: Tensor | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float = 0.0,
) -> Tensor:
    logits = F.linear(x, weight.to(x.dtype))
    logits = logits.float() if logits.dtype != torch.float64 else logits
    if softcap:
        logits = softcap * torch.tanh(logits / softcap)
    loss = F.cross_entropy(logits, targets, ignore_index=ignore_index, reduction="none")
    if z_loss:
        loss = loss + z_loss * logits.logsumexp(-1).pow(2).masked_fill(targets == ignore_index, 0)
    total = loss.sum() if loss_weights is None else (loss * loss_weights).sum()
    return normalised(total, weight_sum)


@jit
def _cross_entropy_kernel(
    p_logits, p_targets, p_scale, p_losses, z_loss, softcap,
    V: tl.constexpr, BLOCK_V: tl.constexpr, CAPPED: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * V
    b_scale = tl.load(p_scale + i_row)
    if b_scale == 0.0:
        tl.store(p_losses + i_row, 0.0)
        if GRADIENT:
            store_zeros(p_row, V, BLOCK_V)
        return
    z_loss = tl.cast(z_loss, tl.float32)
    softcap = tl.cast(softcap, tl.float32)
    b_target = tl.load(p_targets + i_row)
    # read before the reductions, whose barrier keeps it apart from the stores below
    b_z_target = load_logits(p_row, b_target, softcap, V, CAPPED)
    b_z, b_max, b_sum, _ = row_sums(p_row, 1.0, softcap, V, BLOCK_V, CAPPED, False)
    b_log_sum = tl.log(b_sum)
    b_log_p = (b_z_target - b_max) - b_log_sum
    b_lse = b_max + b_log_sum
    tl.store(p_losses + i_row, b_scale * (z_loss * b_lse * b_lse - b_log_p))
    if GRADIENT:
        b_more = 2.0 * z_loss * b_lse
        b_factor = b_scale * (1.0 + b_more) / b_sum
        b_at_target = b_scale * (expm1(b_log_p) + tl.exp(b_log_p) * b_more)
        for start in range(0, V, BLOCK_V):
            o_v = start + tl.arange(0, BLOCK_V)
            b_tile = b_z if BLOCK_V >= V else load_logits(p_row, o_v, softcap, V, CAPPED)  # [BLOCK_V]
            b_dz = tl.where(o_v == b_target, b_at_target, tl.exp(b_tile - b_max) * b_factor)
            if CAPPED:
                b_dz *= cap_slope(b_tile, softcap)
            tl.store(p_row + o_v, b_dz, mask=o_v < V)


def _rows_torch(
    logits: Tensor, targets: Tensor, scale: Tensor, losses: Tensor, z_loss: float, softcap: float, gradient: bool
) -> Tensor:
    index, scale = targets.unsqueeze(1), scale.unsqueeze(1)
    z = capped(logits, softcap)
    slope = 1 - (z / softcap).square() if softcap and gradient else None
    highest = z.amax(dim=1, keepdim=True)
    z -= highest
    target = z.gather(1, index)
    e = z.exp_()
    total = e.sum(dim=1, keepdim=True)
    log_total = total.log()
    log_p, lse = target - log_total, highest + log_total
    torch.sum((z_loss * lse.square() - log_p) * scale, dim=1, out=losses)
    if not gradient:
        return logits
    more = 2 * z_loss * lse
    grad = e.mul_(scale * (1 + more) / total)
    grad.scatter_(1, index, scale * (log_p.expm1() + log_p.exp() * more))
    if slope is not None:
        grad *= slope
    return grad.to(logits.dtype)


def _rows(
    logits: Tensor,
    targets: Tensor,
    scale: Tensor,
    losses: Tensor,
    z_loss: float,
    softcap: float,
    gradient: bool,
    kernels: bool,
) -> Tensor:
    """Writes scale * loss of each row to `losses`; the logits become scale * gradient, which is returned."""
    if not kernels:
        return _rows_torch(logits, targets, scale, losses, z_loss, softcap, gradient)
    block_v, warps = row_tile(logits)
    launch(
        _cross_entropy_kernel, (logits.shape[0],), logits, targets, scale, losses, z_loss, softcap,
        V=logits.shape[1], BLOCK_V=block_v, CAPPED=softcap > 0, GRADIENT=gradient, num_warps=warps,
    )  # fmt: skip
    return logits


@torch.library.custom_op("minimind::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor | None,
    divisor: Tensor | None,
    num_targets: int | None,
    ignore_index: int,
    z_loss: float,
    softcap: float,
    kernels: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    vocab = weight.shape[0]
    targets, scale = target_rows(targets, loss_weights, ignore_index, vocab)
    rows = select_rows(scale != 0, num_targets)
    targets, scale = rows.take(targets), rows.guarded(rows.take(scale))
    if divisor is not None:
        scale = scale / divisor
    losses = torch.empty(rows.count, dtype=torch.float32, device=x.device)

    def row_function(part: slice, logits: Tensor) -> Tensor:
        gradient = need_dx or need_dw
        return _rows(logits, targets[part], scale[part], losses[part], z_loss, softcap, gradient, kernels)

    chunk = chunk_rows(x.device, vocab * logit_bytes(x, kernels))
    dx, dw = run_chunks(x, weight, rows, chunk, row_function, need_dx, need_dw)
    return rows.guarded(losses.sum()), dx, dw


register_made_gradient(_linear_cross_entropy, arguments=12)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor | None = None,
    *,
    weight_sum: Tensor | None = None,
    num_targets: int | None = None,
    ignore_index: int = -100,
    z_loss: float = 0.0,
    softcap: float = 0.0,
    kernels: bool,
) -> Tensor:
    """Sum over rows of loss_weight * (-log softmax(x @ weight.T)[target] + z_loss * lse^2), over weight_sum.

    x [N, D] and weight [V, D], float32, bfloat16 or float16, not necessarily the same: the products are in x.dtype and
    each gradient in its tensor's. targets int64 [N]; those equal to ignore_index count for nothing. loss_weights
    float32 [N], None for all ones; weight_sum a float32 scalar tensor, their GLOBAL sum, None for 1, and 0 where no
    row counts; neither gets a gradient. z_loss: coefficient of the squared log-sum-exp. softcap: logits become
    softcap * tanh(logits / softcap), 0 for off. -> float32 scalar.

    num_targets: a bound, known on the host, for the number of rows that count (target not ignored, weight not 0);
    other rows are left out of the matrix products. None: a CPU counts them; elsewhere every row is computed.

    kernels: Triton, or PyTorch alone. ValueError on bad input; for what only the device knows (a target outside the
    vocabulary, num_targets too small) on CPU tensors, or with MINIMIND_CHECK=1, and else the loss is NaN.
    """
    check_head(kernels, x, weight, num_targets)
    check_per_row(x, torch.int64, targets=targets)
    check_per_row(x, torch.float32, loss_weights=loss_weights)
    check_weight_sum(x, weight_sum)
    check(softcap >= 0, "softcap is {}; give a positive number, or 0 for none", softcap)
    mantissa, power = split_weight_sum(weight_sum)
    grad = torch.is_grad_enabled()
    total, _, _ = _linear_cross_entropy(
        x, weight, targets, loss_weights, mantissa, num_targets, ignore_index, z_loss, softcap, kernels,
        grad and x.requires_grad, grad and weight.requires_grad,
    )  # fmt: skip
    return normalised(total, power)
