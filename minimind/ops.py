"""Every fused function as modules call it, behind ONE switch: reference | fused.

`reference` is plain PyTorch, the truth that everything else is held to. `fused` is the fastest form this device
has. Until the Triton kernels land that is, on every device, the best PyTorch form; `describe()` says so.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.attention import permute_rows
from minimind.kernels.triton_support import why_no_triton

Mode = Literal["reference", "fused"]
_mode: Mode = "fused"

# Tokens whose logits exist at one time in the fused loss. 512 x 6400 float32 is 13 MB, and stays in a CPU's cache;
# a GPU wants fewer, larger launches (105 MB).
LOSS_CHUNK = {"cpu": 512, "cuda": 4096}


def set_mode(mode: Mode) -> None:
    """Choose the implementation for the whole process; `describe` says what it resolves to."""
    global _mode
    if mode not in ("reference", "fused"):
        raise ValueError(f"unknown ops mode {mode!r}; choose 'reference' or 'fused'")
    _mode = mode


def get_mode() -> Mode:
    return _mode


@contextlib.contextmanager
def using(mode: Mode) -> Iterator[None]:
    """Switch the implementation inside a `with` block."""
    previous = _mode
    set_mode(mode)
    try:
        yield
    finally:
        set_mode(previous)


def describe(device: torch.device | None = None) -> str:
    """What the switch resolves to, and why: one line for the head of a run."""
    if _mode == "reference":
        return "ops: reference (plain PyTorch, full logits)"
    forms = "F.rms_norm, stacked-document SDPA on a CPU, chunked linear cross-entropy"
    reason = why_no_triton(device) if device is not None else None
    return f"ops: fused = PyTorch's fastest forms ({forms}); no Triton kernels yet" + (
        f", and {reason}" if reason else ""
    )


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    x32 = x.float() if x.dtype != torch.float64 else x
    return weight.to(x.dtype) * (x32 * torch.rsqrt(x32.pow(2).mean(-1, keepdim=True) + eps)).to(x.dtype)


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, reduced in float32.

    x [..., D], weight [D] -> [..., D] in x.dtype. Zhang & Sennrich 2019, arXiv 1910.07467.
    """
    if _mode == "reference":
        return rms_norm_ref(x, weight, eps)
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def rope(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the pairs (i, i + D/2) of every head: x [B, T, H, D], cos and sin float32 [B or 1, T, D/2]."""
    cos, sin = cos.unsqueeze(2), sin.unsqueeze(2)
    first, second = x.to(torch.promote_types(x.dtype, cos.dtype)).chunk(2, dim=-1)
    return torch.cat((first * cos - second * sin, second * cos + first * sin), dim=-1).to(x.dtype)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up over a packed [..., 2 I] -> [..., I]. Shazeer 2020, arXiv 2002.05202."""
    gate, up = gate_up.chunk(2, dim=-1)
    return F.silu(gate) * up


def linear_cross_entropy_ref(
    x: Tensor, weight: Tensor, targets: Tensor, loss_weights: Tensor | None
) -> Tensor:
    logits = F.linear(x, weight.to(x.dtype))
    logits = logits.float() if logits.dtype != torch.float64 else logits
    loss = F.cross_entropy(logits, targets, ignore_index=-100, reduction="none")
    return loss.sum() if loss_weights is None else (loss * loss_weights).sum()


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, loss_weights: Tensor | None = None
) -> Tensor:
    """Sum over tokens of weight_t * -log softmax(x_t @ weight.T)[target_t]: a float32 scalar.

    x [N, D]; weight [V, D]; targets int64 [N], -100 is ignored; loss_weights float32 [N] or None for all ones.
    The caller divides by the GLOBAL weight sum. The fused form never holds more than LOSS_CHUNK rows of logits:
    it makes the gradient in the forward, as in Liger (arXiv 2410.10989), so the head costs three matrix products.
    """
    if _mode == "reference":
        return linear_cross_entropy_ref(x, weight, targets, loss_weights)
    if not torch.is_grad_enabled():  # needs_input_grad does not look at this, and would make the gradients
        x, weight = x.detach(), weight.detach()
    return _ChunkedLinearCrossEntropy.apply(x, weight, targets, loss_weights)


class _ChunkedLinearCrossEntropy(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, weight, targets, loss_weights):
        need_x, need_w = ctx.needs_input_grad[:2]
        w = weight.to(x.dtype)
        total = torch.zeros((), dtype=torch.float32, device=x.device)
        grad_x = torch.empty_like(x) if need_x else None
        grad_w = torch.zeros(w.shape, dtype=torch.float32, device=x.device) if need_w else None
        chunk = LOSS_CHUNK[x.device.type]
        for start in range(0, x.shape[0], chunk):
            part = slice(start, start + chunk)
            scale = targets[part].ne(-100).float()
            if loss_weights is not None:
                scale = scale * loss_weights[part]
            index = targets[part].clamp(min=0).unsqueeze(1)
            weights = F.linear(x[part], w).float()
            # shifted by the maximum before anything is summed: near p = 1 the loss is a small difference
            weights -= weights.amax(dim=1, keepdim=True)
            target_logit = weights.gather(1, index)
            normaliser = weights.exp_().sum(dim=1, keepdim=True)
            log_p = target_logit - normaliser.log()
            total -= (log_p.squeeze(1) * scale).sum()
            if not (need_x or need_w):
                continue
            grad = weights.mul_(scale.unsqueeze(1) / normaliser)
            # 1 is taken off the target's p in float32, for the same reason
            grad.scatter_(1, index, log_p.expm1() * scale.unsqueeze(1))
            grad = grad.to(x.dtype)
            if grad_x is not None:
                torch.mm(grad, w, out=grad_x[part])
            if grad_w is not None:
                grad_w += grad.t() @ x[part]
        ctx.save_for_backward(*(g for g in (grad_x, grad_w) if g is not None))
        ctx.weight_dtype = weight.dtype
        return total

    @staticmethod
    def backward(ctx, *grads):
        saved = list(ctx.saved_tensors)
        grad_x = saved.pop(0) * grads[0] if ctx.needs_input_grad[0] else None
        grad_w = (saved.pop(0) * grads[0]).to(ctx.weight_dtype) if ctx.needs_input_grad[1] else None
        return grad_x, grad_w, None, None


def moe_experts(
    x: Tensor, gate_up: Tensor, down: Tensor, expert_ids: Tensor, gates: Tensor, counts: Tensor
) -> Tensor:
    """Every token through its own experts: sum over k of gates[t, k] * expert[expert_ids[t, k]](x[t]).

    x [N, D]; gate_up [E, 2 I, D]; down [E, D, I]; expert_ids int64 [N, K]; gates float32 [N, K]; counts int64 [E],
    what `expert_counts` gives -> [N, D].
    Token copies are sorted by expert and each projection is one grouped matrix product: no loop over experts,
    no padding, no host sync of ours.
    """
    tokens, top_k = expert_ids.shape
    flat = expert_ids.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
    ends = counts.cumsum(0).to(torch.int32)
    copies = x.unsqueeze(1).expand(-1, top_k, -1).reshape(tokens * top_k, -1)
    hidden = permute_rows(copies, order, inverse)
    hidden = swiglu(F.grouped_mm(hidden, gate_up.to(x.dtype).transpose(1, 2), offs=ends))
    hidden = F.grouped_mm(hidden, down.to(x.dtype).transpose(1, 2), offs=ends)
    hidden = permute_rows(hidden, inverse, order).view(tokens, top_k, -1)
    return (hidden * gates.to(x.dtype).unsqueeze(-1)).sum(dim=1)


def expert_counts(expert_ids: Tensor, experts: int) -> Tensor:
    """How many token copies each expert gets: int64 [experts]. No host sync (bincount would)."""
    flat = expert_ids.flatten()
    return torch.zeros(experts, dtype=torch.int64, device=flat.device).scatter_add_(
        0, flat, torch.ones_like(flat)
    )
