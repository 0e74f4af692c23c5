"""Linear heads of a student and a teacher, and the divergence between them, in one op without [N, V] logits.

    q = softmax(x w^T / T)         p = softmax(x_t w_t^T / T)         m = beta p + (1 - beta) q
    beta = 0   KL(p || q)          dz = (q - p) / T
    beta = 1   KL(q || p)          dz = q (log(q / p) - KL) / T
    between    beta KL(p || m) + (1 - beta) KL(q || m)
                                   dz = (1 - beta) q (log(q / m) - sum_v q log(q / m)) / T
    loss = sum_t a_t divergence_t

x [N, D], w [V, D] of the student; x_t [N, D_t], w_t [V, D_t] of the teacher, which gets no gradient; a the loss
weights. This is the generalised Jensen-Shannon divergence of Agarwal et al. 2023 (arXiv 2306.13649). The forward also
computes the gradient, one chunk of logits at a time, as in linear_cross_entropy.

Everything is derived from log p and log q, which stay finite where p and q are 0, and the mixture from their
difference: log(q / m) = -log(1 - beta + beta p / q) and log(p / m) = -log(beta + (1 - beta) q / p). Neither subtracts
large numbers.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.kernels.chunked_linear import (
    check_head,
    check_per_row,
    chunk_rows,
    load_logits,
    logit_bytes,
    register_made_gradient,
    row_sums,
    row_tile,
    run_chunks,
    select_rows,
    store_zeros,
)
from minimind.kernels.triton_support import check, jit, launch, tl


def linear_distillation_ref(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    loss_weights: Tensor | None = None,
    temperature: float = 1.0,
    beta: float = 0.0,
) -> Tensor:
    def log_softmax(x: Tensor, weight: Tensor) -> Tensor:
        logits = F.linear(x, weight.to(x.dtype))
        logits = logits.float() if logits.dtype != torch.float64 else logits
        return F.log_softmax(logits / temperature, dim=-1)

    def kl(log_a: Tensor, log_b: Tensor) -> Tensor:
        return F.kl_div(log_b, log_a, reduction="none", log_target=True).sum(-1)

    log_q, log_p = log_softmax(x, weight), log_softmax(teacher_x.detach(), teacher_weight.detach())
    if beta == 0:
        loss = kl(log_p, log_q)
    elif beta == 1:
        loss = kl(log_q, log_p)
    else:
        log_m = torch.logaddexp(log_p + math.log(beta), log_q + math.log1p(-beta))
        loss = beta * kl(log_p, log_m) + (1 - beta) * kl(log_q, log_m)
    return loss.sum() if loss_weights is None else (loss * loss_weights).sum()


@jit
def _log_over_mixture(b_d, b_part, b_rest):
    """-log(rest + part e^d) with part + rest = 1: exact at d = 0, and without cancellation if e^d is small. d is
    clamped to 80, beyond which the factor of the result is below e^-80."""
    b_e = tl.exp(tl.minimum(b_d, 80.0))
    return -tl.log(tl.where(b_e < 0.5, b_rest + b_part * b_e, 1.0 + b_part * (b_e - 1.0)))


@jit
def _log_pair(
    p_student, p_teacher, b_student, b_teacher, o_v, b_inverse_t,
    b_q_max, b_q_log_sum, b_p_max, b_p_log_sum, V: tl.constexpr, BLOCK_V: tl.constexpr,
):  # fmt: skip
    """log q and log p at o_v, from the tiles in registers if those hold whole rows."""
    if BLOCK_V < V:
        b_student = load_logits(p_student, o_v, V)  # [BLOCK_V]
        b_teacher = load_logits(p_teacher, o_v, V)  # [BLOCK_V]
    b_log_q = (b_student - b_q_max) * b_inverse_t - b_q_log_sum
    return b_log_q, (b_teacher - b_p_max) * b_inverse_t - b_p_log_sum


@jit
def _distillation_kernel(
    p_logits, p_teacher_logits, p_scale, p_losses, temperature, beta, rest,
    V: tl.constexpr, BLOCK_V: tl.constexpr, FORM: tl.constexpr, GRADIENT: tl.constexpr,
):  # fmt: skip
    i_row = tl.program_id(0).to(tl.int64)
    p_student = p_logits + i_row * V
    p_teacher = p_teacher_logits + i_row * V
    b_scale = tl.load(p_scale + i_row)
    if b_scale == 0.0:
        tl.store(p_losses + i_row, 0.0)
        if GRADIENT:
            store_zeros(p_student, V, BLOCK_V)
        return
    b_inverse_t = 1.0 / tl.cast(temperature, tl.float32)
    beta = tl.cast(beta, tl.float32)
    rest = tl.cast(rest, tl.float32)
    b_student, b_q_max, b_q_sum, _ = row_sums(p_student, b_inverse_t, V, BLOCK_V, False)
    b_teacher, b_p_max, b_p_sum, _ = row_sums(p_teacher, b_inverse_t, V, BLOCK_V, False)
    b_q_log_sum = tl.log(b_q_sum)
    b_p_log_sum = tl.log(b_p_sum)
    b_loss = tl.cast(0.0, tl.float32)
    b_mean = tl.cast(0.0, tl.float32)  # sum of q log(q / m), or q log(q / p)
    for start in range(0, V, BLOCK_V):
        b_log_q, b_log_p = _log_pair(
            p_student, p_teacher, b_student, b_teacher, start + tl.arange(0, BLOCK_V), b_inverse_t,
            b_q_max, b_q_log_sum, b_p_max, b_p_log_sum, V, BLOCK_V,
        )  # fmt: skip
        if FORM == "forward":
            b_loss += tl.sum(tl.exp(b_log_p) * (b_log_p - b_log_q), axis=0)
        elif FORM == "reverse":
            b_mean += tl.sum(tl.exp(b_log_q) * (b_log_q - b_log_p), axis=0)
        else:
            b_d = b_log_p - b_log_q
            b_loss += tl.sum(tl.exp(b_log_p) * _log_over_mixture(-b_d, rest, beta), axis=0)
            b_mean += tl.sum(tl.exp(b_log_q) * _log_over_mixture(b_d, beta, rest), axis=0)
    if FORM == "reverse":
        b_loss = b_mean
    elif FORM == "mixed":
        b_loss = beta * b_loss + rest * b_mean
    tl.store(p_losses + i_row, b_scale * b_loss)
    if GRADIENT:
        b_factor = b_scale * b_inverse_t
        for start in range(0, V, BLOCK_V):
            o_v = start + tl.arange(0, BLOCK_V)
            b_log_q, b_log_p = _log_pair(
                p_student, p_teacher, b_student, b_teacher, o_v, b_inverse_t,
                b_q_max, b_q_log_sum, b_p_max, b_p_log_sum, V, BLOCK_V,
            )  # fmt: skip
            b_q = tl.exp(b_log_q)
            if FORM == "forward":
                b_dz = b_q - tl.exp(b_log_p)
            elif FORM == "reverse":
                b_dz = b_q * (b_log_q - b_log_p - b_mean)
            else:
                b_dz = rest * b_q * (_log_over_mixture(b_log_p - b_log_q, beta, rest) - b_mean)
            tl.store(p_student + o_v, b_dz * b_factor, mask=o_v < V)


def _log_softmax(logits: Tensor, temperature: float) -> Tensor:
    """log softmax(logits / temperature) in float32; may overwrite the logits."""
    z = logits.float()
    z.sub_(z.amax(dim=1, keepdim=True)).div_(temperature)
    return z.sub_(z.exp().sum(dim=1, keepdim=True).log_())


def _log_over_mixture_torch(d: Tensor, part: float, rest: float) -> Tensor:
    e = d.clamp(max=80).exp_()
    return torch.where(e < 0.5, rest + part * e, 1 + part * (e - 1)).log_().neg_()


def _rows_torch(
    logits: Tensor,
    teacher_logits: Tensor,
    scale: Tensor,
    losses: Tensor,
    temperature: float,
    beta: float,
    gradient: bool,
) -> Tensor:
    log_q, log_p = _log_softmax(logits, temperature), _log_softmax(teacher_logits, temperature)
    factor = scale.unsqueeze(1) / temperature
    if beta == 0:
        p = log_p.exp()
        torch.mul(log_p.sub_(log_q).mul_(p).sum(dim=1), scale, out=losses)
        return log_q.exp_().sub_(p).mul_(factor).to(logits.dtype) if gradient else logits
    if beta == 1:
        q = log_q.exp()
        log_ratio = log_q.sub_(log_p)  # log(q / p)
        loss = mean = (q * log_ratio).sum(dim=1)
    else:
        d = log_p - log_q
        loss = beta * _log_over_mixture_torch(-d, 1 - beta, beta).mul_(log_p.exp_()).sum(dim=1)
        log_ratio, q = _log_over_mixture_torch(d, beta, 1 - beta), log_q.exp_()  # log(q / m)
        mean = (q * log_ratio).sum(dim=1)
        loss += (1 - beta) * mean
        factor *= 1 - beta
    torch.mul(loss, scale, out=losses)
    return log_ratio.sub_(mean.unsqueeze(1)).mul_(q).mul_(factor).to(logits.dtype) if gradient else logits


def _rows(
    logits: Tensor,
    teacher_logits: Tensor,
    scale: Tensor,
    losses: Tensor,
    temperature: float,
    beta: float,
    gradient: bool,
    kernels: bool,
) -> Tensor:
    """Write scale * divergence of each row to `losses`, overwrite the logits with scale * gradient, and return them."""
    if not kernels:
        return _rows_torch(logits, teacher_logits, scale, losses, temperature, beta, gradient)
    block_v, warps = row_tile(logits)
    form = {0.0: "forward", 1.0: "reverse"}.get(beta, "mixed")
    launch(
        _distillation_kernel, (logits.shape[0],), logits, teacher_logits, scale, losses, temperature, beta,
        1 - beta, V=logits.shape[1], BLOCK_V=block_v, FORM=form, GRADIENT=gradient, num_warps=warps,
    )  # fmt: skip
    return logits


@torch.library.custom_op("minimind::linear_distillation", mutates_args=())
def _linear_distillation(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    loss_weights: Tensor | None,
    num_targets: int | None,
    temperature: float,
    beta: float,
    kernels: bool,
    need_dx: bool,
    need_dw: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    vocab = weight.shape[0]
    scale = torch.ones(x.shape[0], dtype=torch.float32, device=x.device) if loss_weights is None else loss_weights
    rows = select_rows(scale != 0, num_targets)
    scale = rows.guarded(rows.take(scale))
    losses = torch.empty(rows.count, dtype=torch.float32, device=x.device)
    chunk = chunk_rows(x.device, vocab * (logit_bytes(x, kernels) + logit_bytes(teacher_x, kernels)))
    teacher_w = teacher_weight.to(teacher_x.dtype).t()
    buffer = torch.empty(min(chunk, rows.count), vocab, dtype=teacher_x.dtype, device=x.device)

    def row_function(part: slice, logits: Tensor) -> Tensor:
        teacher_logits = buffer[: len(logits)]
        torch.matmul(rows.chunk(teacher_x, part), teacher_w, out=teacher_logits)
        gradient = need_dx or need_dw
        return _rows(logits, teacher_logits, scale[part], losses[part], temperature, beta, gradient, kernels)

    dx, dw = run_chunks(x, weight, rows, chunk, row_function, need_dx, need_dw)
    return rows.guarded(losses.sum()), dx, dw


register_made_gradient(_linear_distillation, arguments=11)


def linear_distillation(
    x: Tensor,
    weight: Tensor,
    teacher_x: Tensor,
    teacher_weight: Tensor,
    loss_weights: Tensor | None = None,
    *,
    temperature: float = 1.0,
    beta: float = 0.0,
    num_targets: int | None = None,
    kernels: bool,
) -> Tensor:
    """Sum over rows of loss_weight * divergence(teacher, student) at the temperature: a float32 scalar.

    x [N, D], weight [V, D] of the student; teacher_x [N, D_t], teacher_weight [V, D_t]: float32, bfloat16 or float16,
    each product in the dtype of its x. beta in [0, 1]: 0 is KL(teacher || student), 1 is KL(student || teacher),
    between them the generalised Jensen-Shannon divergence (arXiv 2306.13649). loss_weights float32 [N]; None: all 1.
    Only x and weight get a gradient. The result is not multiplied by temperature^2, so gradients shrink as it grows.

    num_targets: an upper bound, known on the host, of the rows whose loss weight is not 0; other rows are left out of
    the matrix products. None: a CPU counts them; elsewhere every row is computed.

    kernels: True for Triton, False for PyTorch. ValueError for bad input. A num_targets that is too small is a
    ValueError on CPU tensors or with MINIMIND_CHECK=1; else the loss is NaN.
    """
    check_head(kernels, x, weight, num_targets)
    check_head(kernels, teacher_x, teacher_weight, num_targets, ("teacher_x", "teacher_weight"))
    sizes = teacher_weight.shape[0], weight.shape[0]
    message = "teacher_weight has {} rows and weight {}; the two models need the same vocabulary"
    check(sizes[0] == sizes[1], message, *sizes)
    check(
        (teacher_x.shape[0], teacher_x.device) == (x.shape[0], x.device),
        "teacher_x has {} rows on {}, and x has {} on {}; they must agree",
        teacher_x.shape[0],
        teacher_x.device,
        x.shape[0],
        x.device,
    )
    check_per_row(x, torch.float32, loss_weights=loss_weights)
    check(temperature > 0, "temperature is {}; give a positive number", temperature)
    check(0 <= beta <= 1, "beta is {}; give a number from 0 to 1", beta)
    grad = torch.is_grad_enabled()
    total, _, _ = _linear_distillation(
        x, weight, teacher_x, teacher_weight, loss_weights, num_targets, temperature, beta, kernels,
        grad and x.requires_grad, grad and weight.requires_grad,
    )  # fmt: skip
    return total
