"""The numerics contract: against float64 truth, a kernel's error is at most twice that of plain PyTorch in the same
dtype, for every output and every gradient."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

Function = Callable[..., "Tensor | tuple[Tensor, ...]"]


def rand(*shape: int, seed: int = 0, scale: float = 1.0) -> Tensor:
    """Normal float32 numbers on DEVICE, the same on every machine."""
    generator = torch.Generator().manual_seed(seed)
    return (torch.randn(shape, generator=generator) * scale).to(DEVICE)


def run(function: Function, inputs: Sequence[Tensor], dtype: torch.dtype | None, grads: bool) -> list[Tensor]:
    """Outputs, then the gradients of all inputs, for fixed random output gradients; inputs cast to `dtype`."""
    leaves = [_cast_like(t, dtype).requires_grad_(grads) for t in inputs]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    if not grads:
        return outputs
    seeds = [rand(*out.shape, seed=99 + i).to(out.dtype) for i, out in enumerate(outputs)]
    if dtype == torch.float64:  # the truth is told the same rounded gradients as the rest
        seeds = [
            rand(*out.shape, seed=99 + i).to(inputs[0].dtype).to(out.dtype) for i, out in enumerate(outputs)
        ]
    gradients = torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)
    return [out.detach() for out in outputs] + [
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, gradients, strict=True)
    ]


def _cast_like(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """`tensor` in `dtype`, detached, with the strides it has."""
    strided = torch.empty_strided(
        tensor.size(), tensor.stride(), dtype=dtype or tensor.dtype, device=tensor.device
    )
    return strided.copy_(tensor.detach())


def error(value: Tensor, truth: Tensor) -> float:
    assert value.isfinite().all(), "not finite"
    return (value.double() - truth).abs().max().item() if truth.numel() else 0.0


def assert_contract(
    kernel: Function, reference: Function, inputs: Sequence[Tensor], names: Sequence[str], grads: bool = True
) -> None:
    """`kernel` and `reference` take the differentiable `inputs` (float32 or lower, on DEVICE, any strides) and return
    one or several tensors. names: of the outputs, then of the inputs' gradients."""
    truths = run(reference, inputs, torch.float64, grads)
    plains = run(reference, inputs, None, grads)
    mine = run(kernel, inputs, None, grads)
    assert len(mine) == len(truths) == len(names), f"{len(mine)} results for {names}"
    for name, value, plain, truth in zip(names, mine, plains, truths, strict=True):
        assert value.shape == plain.shape and value.dtype == plain.dtype, name
        scale = truth.abs().max().item() if truth.numel() else 0.0
        allowed = 2 * error(plain, truth) + 4 * torch.finfo(torch.float32).eps * (1 + scale)
        assert error(value, truth) <= allowed, (
            f"{name}: error {error(value, truth):.3e}, allowed {allowed:.3e}"
        )


def assert_second_backward_agrees(function: Function, inputs: Sequence[Tensor]) -> None:
    """A backward must leave what it saved, and the gradient it was given, as they were."""
    leaves = [_cast_like(t, None).requires_grad_() for t in inputs]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    seeds = [rand(*out.shape, seed=99 + i).to(out.dtype) for i, out in enumerate(outputs)]
    kept = [s.clone() for s in seeds]
    first = torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, seeds)
    for a, b in zip([*first, *seeds], [*second, *kept], strict=True):
        assert torch.equal(a, b)
