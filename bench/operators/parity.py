"""The numerics contract, checked before an implementation is timed: compared with float64, its error is at most twice
that of plain PyTorch in the same dtype, for every output and gradient (as in tests/kernels/contract.py)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from bench.common.timing import Function

ALLOWED = 2.0
PARITY_TOKENS = 256


def worst_ratio(function: Function, reference: Function, leaves: Sequence[Tensor]) -> float:
    """The largest error of any output or gradient of `function`, divided by plain PyTorch's error plus rounding. At
    most ALLOWED passes. inf if a number is not finite or a shape differs from the reference's."""
    truths = _results(reference, leaves, torch.float64)
    plains = _results(reference, leaves, None)
    values = _results(function, leaves, None)
    ratios = []
    for value, plain, truth in zip(values, plains, truths, strict=True):
        if value.shape != truth.shape or not value.isfinite().all():
            return float("inf")
        rounding = 2 * torch.finfo(torch.float32).eps * (1 + _largest(truth))
        ratios.append(_largest(value.double() - truth) / (_largest(plain.double() - truth) + rounding))
    return max(ratios)


def _results(function: Function, leaves: Sequence[Tensor], dtype: torch.dtype | None) -> list[Tensor]:
    """Outputs and gradients, on copies of the leaves: an implementation may overwrite its inputs."""
    copies = [leaf.detach().clone().to(dtype or leaf.dtype).requires_grad_() for leaf in leaves]
    result = function(*copies)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    seeds = [_seed(out, i, leaves[0].dtype) for i, out in enumerate(outputs)]
    kept = [out.detach().clone() for out in outputs]
    gradients = torch.autograd.grad(outputs, copies, seeds, allow_unused=True)
    return kept + [
        torch.zeros_like(copy) if grad is None else grad for copy, grad in zip(copies, gradients, strict=True)
    ]


def _seed(out: Tensor, number: int, dtype: torch.dtype) -> Tensor:
    """A gradient of this output, the same for every implementation: rounded to the activations' dtype."""
    generator = torch.Generator().manual_seed(number)
    return torch.randn(out.shape, generator=generator).to(out.device).to(dtype).to(out.dtype)


def _largest(tensor: Tensor) -> float:
    return tensor.abs().max().item() if tensor.numel() else 0.0
