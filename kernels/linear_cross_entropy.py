"""Linear head and cross-entropy in one op, without the [N, V] logits.

    z = x w^T       p = softmax(z)       lse = log sum_v exp z_v
    loss = sum_t a_t (lse_t - z_t[y_t])
    dz_t = a_t (p_t - onehot(y_t))

x [N, D]; w [V, D]; y the targets; a the loss weights. The forward also computes the gradient, one chunk of logits at a
time (Liger, arXiv 2410.10989), so the head costs three matrix products, and the backward only scales it.

Logits are shifted by their maximum before they are summed, and the target's p - 1 is computed in float32 by expm1: near
p = 1 both the loss and its gradient are small differences.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.kernels.chunked_linear import (
    IGNORED,
    check_head,
    check_per_row,
    chunk_rows,
    expm1,
    load_logits,
    logit_bytes,
    register_made_gradient,
    row_sums,
    row_tile,
    run_chunks,
    select_rows,
    store_zeros,
    target_rows,
)
from minimind.kernels.triton_support import jit, launch, tl


def linear_cross_entropy_ref(x: Tensor, weight: Tensor, targets: Tensor, loss_weights: Tensor | None = None) -> Tensor:
    logits = F.linear(x, weight.to(x.dtype))
    logits = logits.float() if logits.dtype != torch.float64 else logits
    loss = F.cross_entropy(logits, targets, ignore_index=IGNORED, reduction="none")
    return loss.sum() if loss_weights is None else (loss * loss_weights).sum()


@jit
def _cross_entropy_kernel(
    p_logits, p_targets, p_scale, p_losses, V: tl.constexpr, BLOCK_V: tl.constexpr, GRADIENT: tl.constexpr
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * V
    b_scale = tl.load(p_scale + i_row)
    if b_scale == 0.0:
        tl.store(p_losses + i_row, 0.0)
        if GRADIENT:
            store_zeros(p_row, V, BLOCK_V)
        return
    b_target = tl.load(p_targets + i_row)
    # read before the reductions: their barrier separates this load from the stores below
    b_z_target = load_logits(p_row, b_target, V)
    b_z, b_max, b_sum, _ = row_sums(p_row, 1.0, V, BLOCK_V, False)
    b_log_sum = tl.log(b_sum)
    b_log_p = (b_z_target - b_max) - b_log_sum
    tl.store(p_losses + i_row, -b_scale * b_log_p)
    if GRADIENT:
        b_factor = b_scale / b_sum
        b_at_target = b_scale * expm1(b_log_p)
        for start in range(0, V, BLOCK_V):
            o_v = start + tl.arange(0, BLOCK_V)
            b_tile = b_z if BLOCK_V >= V else load_logits(p_row, o_v, V)  # [BLOCK_V]
            b_dz = tl.where(o_v == b_target, b_at_target, tl.exp(b_tile - b_max) * b_factor)
            tl.store(p_row + o_v, b_dz, mask=o_v < V)


def _rows_torch(logits: Tensor, targets: Tensor, scale: Tensor, losses: Tensor, gradient: bool) -> Tensor:
    index, scale = targets.unsqueeze(1), scale.unsqueeze(1)
    z = logits.float()
    z -= z.amax(dim=1, keepdim=True)
    target = z.gather(1, index)
    e = z.exp_()
    total = e.sum(dim=1, keepdim=True)
    log_p = target - total.log()
    torch.sum(-log_p * scale, dim=1, out=losses)
    if not gradient:
        return logits
    grad = e.mul_(scale / total)
    grad.scatter_(1, index, scale * log_p.expm1())
    return grad.to(logits.dtype)


def _rows(logits: Tensor, targets: Tensor, scale: Tensor, losses: Tensor, gradient: bool, kernels: bool) -> Tensor:
    """Write scale * loss of each row to `losses`, overwrite the logits with scale * gradient, and return them."""
    if not kernels:
        return _rows_torch(logits, targets, scale, losses, gradient)
    block_v, warps = row_tile(logits)
    launch(
        _cross_entropy_kernel, (logits.shape[0],), logits, targets, scale, losses,
        V=logits.shape[1], BLOCK_V=block_v, GRADIENT=gradient, num_warps=warps,
    )  # fmt: skip
    return logits


@torch.library.custom_op("minimind::linear_cross_entropy", mutates_args=())
def _linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor | None,
    num_targets: int | None,
    kernels: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    vocab = weight.shape[0]
    targets, scale = target_rows(targets, loss_weights, vocab)
    rows = select_rows(scale != 0, num_targets)
    targets, scale = rows.take(targets), rows.guarded(rows.take(scale))
    losses = torch.empty(rows.count, dtype=torch.float32, device=x.device)

    def row_function(part: slice, logits: Tensor) -> Tensor:
        gradient = need_dx or need_dw
        return _rows(logits, targets[part], scale[part], losses[part], gradient, kernels)

    chunk = chunk_rows(x.device, vocab * logit_bytes(x, kernels))
    dx, dw = run_chunks(x, weight, rows, chunk, row_function, need_dx, need_dw)
    return rows.guarded(losses.sum()), dx, dw


register_made_gradient(_linear_cross_entropy, arguments=8)


def linear_cross_entropy(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    loss_weights: Tensor | None = None,
    *,
    num_targets: int | None = None,
    kernels: bool,
) -> Tensor:
    """Sum over rows of loss_weight * -log softmax(x @ weight.T)[target]: a float32 scalar.

    x [N, D] and weight [V, D]: float32, bfloat16 or float16, possibly different; products are in x.dtype, and each
    gradient has its tensor's dtype. targets int64 [N]; rows with target -100 do not count. loss_weights float32 [N],
    without gradient; None: all 1.

    num_targets: an upper bound, known on the host, of the rows that count (target not -100, weight not 0); other rows
    are left out of the matrix products. None: a CPU counts them; elsewhere every row is computed.

    kernels: True for Triton, False for PyTorch. ValueError for bad input. A target outside the vocabulary or a
    num_targets that is too small is a ValueError on CPU tensors or with MINIMIND_CHECK=1; else the loss is NaN.
    """
    check_head(kernels, x, weight, num_targets)
    check_per_row(x, torch.int64, targets=targets)
    check_per_row(x, torch.float32, loss_weights=loss_weights)
    grad = torch.is_grad_enabled()
    total, _, _ = _linear_cross_entropy(
        x, weight, targets, loss_weights, num_targets, kernels,
        grad and x.requires_grad, grad and weight.requires_grad,
    )  # fmt: skip
    return total
