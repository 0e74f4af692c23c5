"""The implementations that our ops are compared with, beside plain PyTorch: PyTorch's fused functions and Liger-Kernel.

All take the model's own tensors: packed projections and float32 weights. Liger's functions are looked up by name in the
installed version, and their options are passed by keyword.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from minimind.kernels.rope import rope_ref
from minimind.kernels.swiglu import swiglu_ref
from minimind.ops.attention import permute_rows


def native_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, (x.shape[-1],), weight.to(x.dtype), eps)


def native_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    total = x + residual
    return native_rms_norm(total, weight, eps), total


def native_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, position_ids: Tensor, heads: int, kv_heads: int,
    q_weight: Tensor, k_weight: Tensor, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=-2)
    q, k = native_rms_norm(q, q_weight, eps), native_rms_norm(k, k_weight, eps)
    return rope_ref(torch.cat((q, k, v), dim=-2).flatten(-2), cos, sin, position_ids, heads, kv_heads)


def native_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    options: dict[str, Any] = {}
    if hasattr(torch.nn, "LinearCrossEntropyOptions"):  # the chunked form; the default computes the full logits
        options["options"] = torch.nn.LinearCrossEntropyOptions()
    return F.linear_cross_entropy(x, weight.to(x.dtype), targets, reduction="sum", **options)


def native_linear_log_probs(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -F.linear_cross_entropy(x, weight.to(x.dtype), targets, reduction="none")


def choose(logits: Tensor, top_k: int, normalize: bool) -> tuple[Tensor, Tensor]:
    """(gates, expert ids int64) by topk, as in upstream's router; route_ref sorts instead, to break ties."""
    scores = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(dim=-1)
    gates, ids = scores.topk(top_k, dim=-1)
    return gates / (gates.sum(dim=-1, keepdim=True) + 1e-20) if normalize else gates, ids


def native_moe(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int, normalize: bool) -> Tensor:
    """Tokens sorted by expert, one F.grouped_mm for each projection, no loop over experts."""
    gates, expert_ids = choose(logits, top_k, normalize)
    flat = expert_ids.flatten()
    order = flat.argsort(stable=True)
    inverse = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=x.device))
    counts = torch.zeros(logits.shape[1], dtype=torch.int64, device=x.device)
    ends = counts.scatter_add_(0, flat, torch.ones_like(flat)).cumsum(0).int()
    copies = permute_rows(x.repeat_interleave(top_k, dim=0), order, inverse)
    hidden = swiglu_ref(F.grouped_mm(copies, gate_up.to(x.dtype).transpose(1, 2), offs=ends))
    hidden = F.grouped_mm(hidden, down.to(x.dtype).transpose(1, 2), offs=ends)
    hidden = permute_rows(hidden, inverse, order).view(x.shape[0], top_k, -1)
    return (hidden * gates.to(x.dtype).unsqueeze(-1)).sum(dim=1)


def has_native_head() -> bool:
    """Whether this torch has F.linear_cross_entropy; 2.11 has not."""
    return hasattr(F, "linear_cross_entropy")


def has_liger() -> bool:
    return importlib.util.find_spec("liger_kernel") is not None


def _liger(function: str, *inputs: Any, **options: Any) -> Any:
    """Apply the autograd function of this name, with options at their places in its signature."""
    autograd_function = getattr(importlib.import_module("liger_kernel.ops"), function)
    parameters = list(inspect.signature(autograd_function.forward).parameters.values())[1 + len(inputs) :]
    last = max((i for i, p in enumerate(parameters) if p.name in options), default=-1)
    missing = options.keys() - {p.name for p in parameters}
    if missing:
        raise TypeError(f"{function} takes no {', '.join(sorted(missing))}")
    return autograd_function.apply(*inputs, *(options.get(p.name, p.default) for p in parameters[: last + 1]))


def liger_rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return _liger("LigerRMSNormFunction", x, weight, eps)


def liger_add_rms_norm(x: Tensor, residual: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    return _liger("LigerFusedAddRMSNormFunction", x, residual, weight, eps)


def liger_rope(
    qkv: Tensor, cos: Tensor, sin: Tensor, heads: int, kv_heads: int,
    q_weight: Tensor | None, k_weight: Tensor | None, eps: float,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """cos, sin float32 [1, T, D], gathered and doubled beforehand, since a model does that once for all layers."""
    q, k, v = qkv.unflatten(-1, (heads + 2 * kv_heads, -1)).split((heads, kv_heads, kv_heads), dim=-2)
    if q_weight is not None and k_weight is not None:
        q, k = liger_rms_norm(q, q_weight, eps), liger_rms_norm(k, k_weight, eps)
    q, k = _liger("LigerRopeFunction", q.transpose(1, 2), k.transpose(1, 2), cos, sin)
    return q.transpose(1, 2), k.transpose(1, 2), v


def liger_swiglu(gate_up: Tensor) -> Tensor:
    """Liger's form for a packed projection, if this version has it."""
    if hasattr(importlib.import_module("liger_kernel.ops"), "LigerFusedGateUpSiLUMulFunction"):
        return _liger("LigerFusedGateUpSiLUMulFunction", gate_up)
    return _liger("LigerSiLUMulFunction", *gate_up.chunk(2, dim=-1))


def liger_moe(x: Tensor, logits: Tensor, gate_up: Tensor, down: Tensor, top_k: int, normalize: bool) -> Tensor:
    gates, ids = choose(logits, top_k, normalize)
    weights = gate_up.to(x.dtype), down.to(x.dtype)
    return _liger("LigerFusedMoEFunction", x, *weights, ids.int(), gates)


def liger_linear_cross_entropy(x: Tensor, weight: Tensor, targets: Tensor, reduction: str = "sum") -> Tensor:
    result = _liger(
        "LigerFusedLinearCrossEntropyFunction",
        x,
        weight.to(x.dtype),
        targets,
        reduction=reduction,
        accum_dtype=torch.float32,
    )
    return result[0] if isinstance(result, tuple) else result


def liger_linear_log_probs(x: Tensor, weight: Tensor, targets: Tensor) -> Tensor:
    return -liger_linear_cross_entropy(x, weight, targets, reduction="none")


def liger_linear_distillation(
    x: Tensor, weight: Tensor, teacher_x: Tensor, teacher_weight: Tensor, temperature: float
) -> Tensor:
    """KL(teacher || student), summed: Liger's beta is 0 for it, and Liger takes the mean over tokens."""
    mean = _liger(
        "LigerFusedLinearJSDFunction", x, weight.to(x.dtype), teacher_x, teacher_weight.to(x.dtype),
        jsd_beta=0.0, temperature=temperature,
    )  # fmt: skip
    return mean * x.shape[0]
