"""Linear head and the targets' log-probabilities in one op, optionally with the entropy, without the [N, V] logits.

    z = x w^T / T                 p = softmax(z)                lse = log sum_v exp z_v
    l = z[y] - lse                H = -sum_v p_v log p_v
    dz = dl (onehot(y) - p) - dH p (log p + H)

x [N, D]; w [V, D]; y the targets; T the temperature. Preference and policy losses need each token's log-probability
and weight it later, so unlike in linear_cross_entropy the forward cannot compute the gradient. Only lse and H are kept,
and the backward computes the logits again: four matrix products in all.

lse is kept as two float32 numbers: the maximum logit, and the log of the sum of exp(logit - maximum). As one number it
would be off by 1e-6 at logits of 20, and so would every p.
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
    row_sums,
    row_tile,
    run_chunks,
    select_rows,
    store_zeros,
    target_rows,
)
from minimind.kernels.triton_support import check, jit, launch, tl


def linear_log_probs_ref(
    x: Tensor, weight: Tensor, targets: Tensor, temperature: float = 1.0, entropy: bool = False
) -> tuple[Tensor, Tensor | None]:
    logits = F.linear(x, weight.to(x.dtype))
    logits = logits.float() if logits.dtype != torch.float64 else logits
    log_p = F.log_softmax(logits / temperature, dim=-1)
    ignored = targets == IGNORED
    index = targets.masked_fill(ignored, 0).unsqueeze(1)
    log_probs = log_p.gather(1, index).squeeze(1).masked_fill(ignored, 0)
    return log_probs, -(log_p.exp() * log_p).sum(-1).masked_fill(ignored, 0) if entropy else None


# rows of one tensor: their alignment depends on its length, which must not cause a new compilation
STATS = ["p_max", "p_log_sum", "p_entropy"]


@jit(do_not_specialize_on_alignment=STATS)
def _linear_log_probs_forward_kernel(
    p_logits, p_targets, p_scale, p_log_probs, p_max, p_log_sum, p_entropy, temperature,
    V: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * V
    b_scale = tl.load(p_scale + i_row)
    if b_scale == 0.0:
        tl.store(p_log_probs + i_row, 0.0)
        tl.store(p_max + i_row, 0.0)
        tl.store(p_log_sum + i_row, 0.0)
        if p_entropy is not None:
            tl.store(p_entropy + i_row, 0.0)
        return
    b_inverse_t = 1.0 / tl.cast(temperature, tl.float32)
    b_z_target = load_logits(p_row, tl.load(p_targets + i_row), V)
    _, b_max, b_sum, b_mean = row_sums(p_row, b_inverse_t, V, BLOCK_V, p_entropy is not None)
    b_log_sum = tl.log(b_sum)
    tl.store(p_log_probs + i_row, b_scale * ((b_z_target - b_max) * b_inverse_t - b_log_sum))
    tl.store(p_max + i_row, b_max)
    tl.store(p_log_sum + i_row, b_log_sum)
    if p_entropy is not None:
        tl.store(p_entropy + i_row, b_scale * (b_log_sum - b_mean / b_sum))


@jit(do_not_specialize_on_alignment=STATS)
def _linear_log_probs_backward_kernel(
    p_logits, p_targets, p_dlog_probs, p_dentropy, p_max, p_log_sum, p_entropy, temperature,
    V: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_row = p_logits + i_row * V
    b_dlog_p = tl.load(p_dlog_probs + i_row)
    b_dentropy = tl.cast(0.0, tl.float32)
    b_entropy = tl.cast(0.0, tl.float32)
    if p_dentropy is not None:
        b_dentropy = tl.load(p_dentropy + i_row)
        b_entropy = tl.load(p_entropy + i_row)
    if (b_dlog_p == 0.0) & (b_dentropy == 0.0):
        store_zeros(p_row, V, BLOCK_V)
        return
    b_inverse_t = 1.0 / tl.cast(temperature, tl.float32)
    b_target = tl.load(p_targets + i_row)
    b_max = tl.load(p_max + i_row)
    b_log_sum = tl.load(p_log_sum + i_row)
    for start in range(0, V, BLOCK_V):
        o_v = start + tl.arange(0, BLOCK_V)
        b_z = load_logits(p_row, o_v, V)  # [BLOCK_V]
        b_log_p = (b_z - b_max) * b_inverse_t - b_log_sum
        b_p = tl.exp(b_log_p)
        b_dz = -b_dlog_p * tl.where(o_v == b_target, expm1(b_log_p), b_p)
        if p_dentropy is not None:
            b_dz -= b_dentropy * b_p * (b_log_p + b_entropy)
        tl.store(p_row + o_v, b_dz * b_inverse_t, mask=o_v < V)


def _forward_torch(
    logits: Tensor, targets: Tensor, scale: Tensor, log_probs: Tensor, stats: Tensor, temperature: float
) -> None:
    z = logits.float()
    torch.amax(z, dim=1, out=stats[0])
    d = z.sub_(stats[0].unsqueeze(1)).div_(temperature)
    target = d.gather(1, targets.unsqueeze(1)).squeeze(1)
    e = d.exp() if len(stats) == 3 else d.exp_()
    total = e.sum(dim=1)
    torch.log(total, out=stats[1])
    torch.mul(target - stats[1], scale, out=log_probs)
    if len(stats) == 3:
        torch.mul(stats[1] - d.mul_(e).sum(dim=1) / total, scale, out=stats[2])


def _backward_torch(
    logits: Tensor, targets: Tensor, dlog_probs: Tensor, dentropy: Tensor | None, stats: Tensor, temperature: float
) -> Tensor:
    index, dlog_probs, stats = targets.unsqueeze(1), dlog_probs.unsqueeze(1), stats.unsqueeze(2)
    log_p = logits.float().sub_(stats[0]).div_(temperature).sub_(stats[1])
    target = log_p.gather(1, index)
    dtarget = dlog_probs * target.expm1()
    if dentropy is None:
        grad = log_p.exp_().mul_(dlog_probs)
    else:
        dentropy = dentropy.unsqueeze(1)
        dtarget += dentropy * target.exp() * (target + stats[2])
        p = log_p.exp()
        grad = log_p.add_(stats[2]).mul_(dentropy).add_(dlog_probs).mul_(p)
    grad.scatter_(1, index, dtarget).mul_(-1 / temperature)
    return grad.to(logits.dtype)


def _forward_rows(
    logits: Tensor, targets: Tensor, scale: Tensor, log_probs: Tensor, stats: Tensor, temperature: float, kernels: bool
) -> Tensor:
    """Write each row's log-probability and stats [2 or 3, R]: maximum, log-sum and, if there is a third, entropy."""
    if not kernels:
        _forward_torch(logits, targets, scale, log_probs, stats, temperature)
        return logits
    block_v, warps = row_tile(logits)
    launch(
        _linear_log_probs_forward_kernel, (logits.shape[0],),
        logits, targets, scale, log_probs, stats[0], stats[1], stats[2] if len(stats) == 3 else None,
        temperature, V=logits.shape[1], BLOCK_V=block_v, num_warps=warps,
    )  # fmt: skip
    return logits


def _backward_rows(
    logits: Tensor,
    targets: Tensor,
    dlog_probs: Tensor,
    dentropy: Tensor | None,
    stats: Tensor,
    temperature: float,
    kernels: bool,
) -> Tensor:
    """Overwrite the logits with their gradient and return them."""
    if not kernels:
        return _backward_torch(logits, targets, dlog_probs, dentropy, stats, temperature)
    block_v, warps = row_tile(logits)
    launch(
        _linear_log_probs_backward_kernel, (logits.shape[0],),
        logits, targets, dlog_probs, dentropy, stats[0], stats[1], None if dentropy is None else stats[2],
        temperature, V=logits.shape[1], BLOCK_V=block_v, num_warps=warps,
    )  # fmt: skip
    return logits


@torch.library.custom_op("minimind::linear_log_probs", mutates_args=())
def _linear_log_probs(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float,
    entropy: bool,
    num_targets: int | None,
    kernels: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """(log_probs [N], entropy [N] or [0], stats [2 or 3, N])."""
    vocab = weight.shape[0]
    targets, scale = target_rows(targets, None, vocab)
    rows = select_rows(scale != 0, num_targets)
    targets, scale = rows.take(targets), rows.take(scale)
    log_probs = torch.empty(rows.count, dtype=torch.float32, device=x.device)
    stats = torch.empty(3 if entropy else 2, rows.count, dtype=torch.float32, device=x.device)

    def row_function(part: slice, logits: Tensor) -> Tensor:
        return _forward_rows(logits, targets[part], scale[part], log_probs[part], stats[:, part], temperature, kernels)

    run_chunks(x, weight, rows, chunk_rows(x.device, vocab * logit_bytes(x, kernels)), row_function)
    log_probs, stats = rows.guarded(rows.put(log_probs)), rows.guarded(rows.put(stats))
    return (log_probs, stats[2].clone() if entropy else torch.empty(0, dtype=torch.float32, device=x.device), stats)


@torch.library.custom_op("minimind::linear_log_probs_backward", mutates_args=())
def _linear_log_probs_backward(
    dlog_probs: Tensor | None,
    dentropy: Tensor | None,
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    stats: Tensor,
    temperature: float,
    num_targets: int | None,
    kernels: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor]:
    vocab = weight.shape[0]
    targets, scale = target_rows(targets, None, vocab)
    rows = select_rows(scale != 0, num_targets)
    targets, scale, stats = rows.take(targets), rows.guarded(rows.take(scale)), rows.take(stats)

    def masked(gradient: Tensor) -> Tensor:  # an ignored row has no gradient, whatever the caller did with its 0
        return (rows.take(gradient) * scale).masked_fill_(scale == 0, 0)

    dlog_p = scale.new_zeros(rows.count) if dlog_probs is None else masked(dlog_probs)
    dh = None if dentropy is None else masked(dentropy)

    def row_function(part: slice, logits: Tensor) -> Tensor:
        dh_part = None if dh is None else dh[part]
        return _backward_rows(logits, targets[part], dlog_p[part], dh_part, stats[:, part], temperature, kernels)

    chunk = chunk_rows(x.device, vocab * logit_bytes(x, kernels))
    dx, dw = run_chunks(x, weight, rows, chunk, row_function, need_dx, need_dw)
    return dx, dw.to(weight.dtype)


@_linear_log_probs.register_fake
def _(x, weight, targets, temperature, entropy, num_targets, kernels):
    per_row = x.new_empty(x.shape[0], dtype=torch.float32)
    stats = x.new_empty(3 if entropy else 2, x.shape[0], dtype=torch.float32)
    return per_row, x.new_empty(x.shape[0] if entropy else 0, dtype=torch.float32), stats


@_linear_log_probs_backward.register_fake
def _(dlog_probs, dentropy, x, weight, targets, stats, temperature, num_targets, kernels, need_dx, need_dw):
    return x.new_empty(x.shape if need_dx else (0,)), weight.new_empty(weight.shape if need_dw else (0,))


def _save(ctx, inputs, output):
    ctx.set_materialize_grads(False)
    x, weight, targets, temperature, entropy, num_targets, kernels = inputs
    ctx.mark_non_differentiable(output[2] if entropy else output[1], output[2])
    ctx.save_for_backward(x, weight, targets, output[2])
    ctx.options = temperature, num_targets, kernels


def _backward(ctx, dlog_probs, dentropy, _dstats):
    need_dx, need_dw = ctx.needs_input_grad[:2]
    if dlog_probs is None and dentropy is None:
        return (None,) * 7
    dx, dw = _linear_log_probs_backward(dlog_probs, dentropy, *ctx.saved_tensors, *ctx.options, need_dx, need_dw)
    return dx if need_dx else None, dw if need_dw else None, *(None,) * 5


_linear_log_probs.register_autograd(_backward, setup_context=_save)


def linear_log_probs(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    num_targets: int | None = None,
    kernels: bool,
) -> tuple[Tensor, Tensor | None]:
    """(log softmax(x @ weight.T / temperature)[target], entropy of that softmax or None): float32 [N] in nats, both
    differentiable.

    x [N, D] and weight [V, D]: float32, bfloat16 or float16, possibly different; products are in x.dtype, and each
    gradient has its tensor's dtype. targets int64 [N]; rows with target -100 give 0 and get no gradient. entropy: also
    compute the entropy.

    num_targets: an upper bound, known on the host, of the targets that are not -100; other rows are left out of the
    matrix products. None: a CPU counts them; elsewhere every row is computed.

    kernels: True for Triton, False for PyTorch. ValueError for bad input. A target outside the vocabulary or a
    num_targets that is too small is a ValueError on CPU tensors or with MINIMIND_CHECK=1; else such a target makes its
    row NaN, and such a num_targets every row.
    """
    check_head(kernels, x, weight, num_targets)
    check_per_row(x, torch.int64, targets=targets)
    check(temperature > 0, "temperature is {}; give a positive number", temperature)
    log_probs, entropies, _ = _linear_log_probs(x, weight, targets, temperature, entropy, num_targets, kernels)
    return log_probs, entropies if entropy else None
