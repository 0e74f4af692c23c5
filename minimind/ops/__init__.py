"""The fused operators that the model calls, with ONE switch for their implementation:

    reference   plain PyTorch, which defines the correct result
    fused       the fastest implementation for the device: Triton kernels on a GPU, PyTorch and C++ on a CPU
    kernels     only the Triton kernels; an error if they cannot run

`describe()` says what the switch resolves to and why.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.kernels import linear_cross_entropy as _ce
from minimind.kernels import linear_distillation as _distillation
from minimind.kernels import linear_log_probs as _log_probs
from minimind.kernels import moe_experts as _experts
from minimind.kernels import moe_routing as _routing
from minimind.kernels import rms_norm as _norm
from minimind.kernels import rope as _rope
from minimind.kernels import swiglu as _swiglu
from minimind.kernels.moe_routing import Routing
from minimind.kernels.triton_support import before_sm_80, interpreting, why_no_triton
from minimind.ops import native
from minimind.ops.attention import permute_rows
from minimind.ops.expert_linear import expert_linear as _expert_linear

Mode = Literal["reference", "fused", "kernels"]
MODES = ("reference", "fused", "kernels")
_mode: Mode = "fused"
_PLAIN_DEVICES = ("mps",)  # on these, reference and fused are the same: nobody has tried other forms there


def set_mode(mode: Mode) -> None:
    """Choose the implementation for the whole process.

    ValueError for an unknown mode, or for 'kernels' if no Triton kernel can run.
    """
    global _mode
    if mode not in MODES:
        raise ValueError(f"unknown ops mode {mode!r}; choose 'reference', 'fused' or 'kernels'")
    if mode == "kernels":
        device = torch.device("cuda" if torch.cuda.is_available() and not interpreting() else "cpu")
        reason = why_no_triton(device)
        if reason is not None:
            raise ValueError(f"ops mode 'kernels' cannot run here: {reason}; choose 'fused' or 'reference'")
    _mode = mode


def get_mode() -> Mode:
    """The implementation in use."""
    return _mode


@contextlib.contextmanager
def using(mode: Mode) -> Iterator[None]:
    """Use another implementation inside a `with` block."""
    previous = _mode
    set_mode(mode)
    try:
        yield
    finally:
        set_mode(previous)


def describe(device: torch.device) -> str:
    """One line for the head of a run: what the switch resolves to on `device`, and why."""
    if _mode == "reference":
        return "ops: reference (plain PyTorch, full logits)"
    if device.type in _PLAIN_DEVICES:
        return f"ops: {_mode} = reference on {device.type}, where nobody has tried this program yet"
    reason = why_no_triton(device)
    if _mode == "kernels" or (device.type == "cuda" and reason is None):
        old = device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0)
        experts = ", but grouped_mm for experts, which need compute capability 8.0" if old and _mode == "fused" else ""
        return f"ops: {_mode} = Triton kernels{experts}"
    if device.type == "cpu":
        reason = "on a CPU they are faster than Triton, which would run in its interpreter"
    missing = native.why_not(device) if device.type == "cpu" else None
    attention = "native attention" if device.type == "cpu" and missing is None else "attention"
    forms = f"{attention} and experts without padding, chunked linear cross-entropy"
    slower = f"; native attention would be faster, but {missing}" if missing else ""
    return f"ops: fused = PyTorch's fastest forms ({forms}): {reason}{slower}"


def _cuda_kernels() -> bool:
    return why_no_triton(torch.device("cuda", torch.cuda.current_device())) is None


if torch.cuda.is_available():  # not needed elsewhere, and the decorator imports torch._dynamo, which takes 1.5 s
    _cuda_kernels = torch.compiler.assume_constant_result(_cuda_kernels)


def _kernels(x: Tensor) -> bool:
    """Whether this tensor goes to the Triton kernels; they raise an error if they do not support it."""
    return _mode == "kernels" or (_mode == "fused" and x.is_cuda and _cuda_kernels())


def _reference(x: Tensor) -> bool:
    """Whether this tensor goes to the plain reference."""
    return _mode == "reference" or x.device.type in _PLAIN_DEVICES


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """y = x / sqrt(mean(x^2) + eps) * weight over the last dimension, reduced in float32.

    x [..., D], weight [D] -> [..., D] in x.dtype. Zhang & Sennrich 2019, arXiv 1910.07467.
    """
    if _kernels(x):
        return _norm.rms_norm(x, weight, eps)
    if _reference(x) or x.device.type == "cpu":  # on a CPU F.rms_norm is no faster and keeps more memory
        return _norm.rms_norm_ref(x, weight, eps)
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(rms_norm(x + residual), x + residual): [..., D] each, in the dtype of the sum."""
    if _kernels(x) and residual.dtype == x.dtype:
        return _norm.add_rms_norm(x, residual, weight, eps)
    total = x + residual
    return rms_norm(total, weight, eps), total


def rope(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    position_ids: Tensor,
    heads: int,
    kv_heads: int,
    q_weight: Tensor | None = None,
    k_weight: Tensor | None = None,
    eps: float = 1e-6,
) -> tuple[Tensor, Tensor, Tensor]:
    """Split a packed projection into q, k and v. q and k are RMS-normalised per head if weights [D] are given, then
    rotated.

    qkv [B, T, (heads + 2 kv_heads) D]; cos, sin float32 [P, D / 2]; position_ids int [B or 1, T], rows of the tables
    -> q [B, T, heads, D], k and v [B, T, kv_heads, D]. Pairs are (i, i + D / 2), as in HF Llama.
    """
    if _kernels(qkv):
        return _rope.rope(qkv, cos, sin, position_ids, heads, kv_heads, q_weight, k_weight, eps)
    norm = _norm.rms_norm_ref if _reference(qkv) else rms_norm
    return _rope.rope_ref(qkv, cos, sin, position_ids, heads, kv_heads, q_weight, k_weight, eps, norm)


def swiglu(gate_up: Tensor) -> Tensor:
    """silu(gate) * up over a packed [..., 2 I] -> [..., I]. Shazeer 2020, arXiv 2002.05202."""
    return _swiglu.swiglu(gate_up) if _kernels(gate_up) else _swiglu.swiglu_ref(gate_up)


def _round_up(num_targets: int | None) -> int | None:
    """Round the bound up to a multiple of 64: oneDNN compiles, and keeps, code for every new number of rows."""
    return None if num_targets is None else -(-num_targets // 64) * 64


def linear_cross_entropy(
    x: Tensor, weight: Tensor, targets: Tensor, loss_weights: Tensor | None = None, *, num_targets: int | None = None
) -> Tensor:
    """Sum over tokens of weight_t * -log softmax(x_t @ weight.T)[target_t]: a float32 scalar; the caller divides.

    x [N, D]; weight [V, D]; targets int64 [N], with -100 for tokens to ignore; loss_weights float32 [N], or None for
    all 1. num_targets: the number of targets that are not -100, if the host knows it; ignored tokens then cost nothing.
    """
    inputs = (x, weight, targets, loss_weights)
    if _reference(x):
        return _ce.linear_cross_entropy_ref(*inputs)
    return _ce.linear_cross_entropy(*inputs, num_targets=_round_up(num_targets), kernels=_kernels(x))


def linear_log_probs(
    x: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    temperature: float = 1.0,
    entropy: bool = False,
    num_targets: int | None = None,
) -> tuple[Tensor, Tensor | None]:
    """(log softmax(x_t @ weight.T / temperature)[target_t], the entropy of that distribution or None): float32 [N]
    each, 0 where the target is -100. Arguments as in `linear_cross_entropy`."""
    if _reference(x):
        return _log_probs.linear_log_probs_ref(x, weight, targets, temperature=temperature, entropy=entropy)
    return _log_probs.linear_log_probs(
        x, weight, targets,
        temperature=temperature, entropy=entropy, num_targets=_round_up(num_targets), kernels=_kernels(x),
    )  # fmt: skip


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
) -> Tensor:
    """Weighted sum over tokens of the divergence between the teacher's and the student's next-token distributions.

    beta 0: KL(teacher || student); 1: KL(student || teacher); between: generalised Jensen-Shannon (arXiv 2306.13649).
    Arguments as in `linear_cross_entropy`; the teacher may have another hidden size and gets no gradient.
    """
    inputs = (x, weight, teacher_x, teacher_weight, loss_weights)
    if _reference(x):
        return _distillation.linear_distillation_ref(*inputs, temperature=temperature, beta=beta)
    return _distillation.linear_distillation(
        *inputs, temperature=temperature, beta=beta, num_targets=_round_up(num_targets), kernels=_kernels(x)
    )


def route(
    logits: Tensor,
    top_k: int,
    normalize: bool,
    sequence_ids: Tensor | None = None,
    sequences: int = 1,
    mask: Tensor | None = None,
) -> Routing:
    """Choose each token's top_k experts and their gates, and sort the tokens by expert. See Routing.

    logits float32 [N, E]; sequence_ids int64 [N] in 0..sequences-1; mask [N], 0 for tokens that `counts` leaves out.
    """
    if _kernels(logits):
        return _routing.route(logits, top_k, normalize, sequence_ids, sequences, mask)
    return _route_by_sorting(logits, top_k, normalize, sequence_ids, sequences, mask)


def _route_by_sorting(
    logits: Tensor, top_k: int, normalize: bool, sequence_ids: Tensor | None, sequences: int, mask: Tensor | None
) -> Routing:
    gates, expert_ids, scores = _routing.route_ref(logits, top_k, normalize)
    experts = logits.shape[1]
    cell = expert_ids if sequence_ids is None else sequence_ids.unsqueeze(1) * experts + expert_ids
    counted = torch.ones_like(cell) if mask is None else mask.ne(0).long().unsqueeze(1).expand_as(cell)
    counts = _histogram(cell, sequences * experts, counted).view(sequences, experts)
    return Routing(gates, expert_ids, scores, *_sort_copies(expert_ids, experts), counts)


def _sort_copies(expert_ids: Tensor, experts: int) -> tuple[Tensor, Tensor, Tensor]:
    """(order, inverse, offsets) of Routing."""
    order = expert_ids.flatten().argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    copies = _histogram(expert_ids, experts, torch.ones_like(expert_ids))
    return order, inverse, F.pad(copies.cumsum(0), (1, 0)).int()


def _histogram(ids: Tensor, size: int, weights: Tensor) -> Tensor:
    """Sum integer weights by id: int64 [size]. Unlike bincount it does not synchronise with the device."""
    out = torch.zeros(size, dtype=torch.int64, device=ids.device)
    return out.scatter_add_(0, ids.flatten(), weights.flatten())


def moe_experts(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """Run each token through its experts: sum over k of gates[t, k] * expert[expert_ids[t, k]](x[t]).

    x [N, D]; gate_up [E, 2 I, D]; down [E, D, I] -> [N, D].
    """
    if _mode == "kernels" or (_kernels(x) and not before_sm_80()):
        return _experts.moe_experts(x, gate_up, down, routing.gates, routing.order, routing.offsets)
    if _reference(x):
        return _experts.moe_experts_ref(x, gate_up, down, routing.gates, routing.expert_ids)
    return _moe_experts_grouped(x, gate_up, down, routing)


def _moe_experts_grouped(x: Tensor, gate_up: Tensor, down: Tensor, routing: Routing) -> Tensor:
    """Sort the token copies by expert; then each projection is one call for all experts."""
    tokens, top_k = routing.expert_ids.shape
    order, inverse = routing.order, routing.inverse
    copies = x.unsqueeze(1).expand(-1, top_k, -1).reshape(tokens * top_k, -1)
    hidden = permute_rows(copies, order, inverse)
    hidden = _grouped_linear(swiglu(_grouped_linear(hidden, gate_up, routing)), down, routing)
    hidden = permute_rows(hidden, inverse, order).view(tokens, top_k, -1)
    return (hidden * routing.gates.to(x.dtype).unsqueeze(-1)).sum(dim=1)


def _grouped_linear(x: Tensor, weight: Tensor, routing: Routing) -> Tensor:
    """x [R, K] sorted by expert, weight [E, N, K] -> [R, N]."""
    weight = weight.to(x.dtype)
    if x.device.type == "cpu":
        return _expert_linear(x, weight, routing.offsets)
    return F.grouped_mm(x, weight.transpose(1, 2), offs=routing.offsets[1:])
