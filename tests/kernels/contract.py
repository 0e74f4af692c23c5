"""The numerics contract: against float64 truth, a kernel's error is at most twice that of plain PyTorch in the same
dtype, for every output and every gradient."""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
DTYPES = [torch.float32, torch.bfloat16]
EPS = torch.finfo(torch.float32).eps
INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"

Model = TypeVar("Model", bound=torch.nn.Module)
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
    if dtype == torch.float64:  # float64 gets the same rounded output gradients
        seeds = [rand(*out.shape, seed=99 + i).to(inputs[0].dtype).to(out.dtype) for i, out in enumerate(outputs)]
    gradients = torch.autograd.grad(outputs, leaves, seeds, allow_unused=True)
    return [out.detach() for out in outputs] + [
        torch.zeros_like(leaf) if grad is None else grad for leaf, grad in zip(leaves, gradients, strict=True)
    ]


def _cast_like(tensor: Tensor, dtype: torch.dtype | None) -> Tensor:
    """Copy `tensor` to `dtype`, detached, with the same strides."""
    strided = torch.empty_strided(tensor.size(), tensor.stride(), dtype=dtype or tensor.dtype, device=tensor.device)
    return strided.copy_(tensor.detach())


def error(value: Tensor, truth: Tensor) -> float:
    assert value.isfinite().all(), "not finite"
    return (value.double() - truth).abs().max().item() if truth.numel() else 0.0


def assert_within(value: Tensor, plain: Tensor, truth: Tensor, name: str = "", moved: Tensor | None = None) -> None:
    """Check the contract for one tensor: `plain` is PyTorch's result from the same inputs in the same dtype. If `value`
    sums in another order than `plain`, `moved` is the float64 result of the model moved by rounding."""
    assert value.shape == plain.shape and value.dtype == plain.dtype, name
    usual = max(error(plain, truth), 0.0 if moved is None else error(moved, truth))
    off, allowed = error(value, truth), 2 * usual + rounding(truth)
    assert off <= allowed, f"{name}: error {off:.3e}, allowed {allowed:.3e}"


def moved(model: Model, terms: int) -> Model:
    """A float64 copy of a float32 model, moved by rounding."""
    exact = copy.deepcopy(model).double()
    move_by_rounding(exact, terms)
    return exact


def versions(model: Model, terms: int) -> dict[str, Model]:
    """The models that `assert_within` compares a float32 model with; `terms`: the length of its longest sum."""
    return {"truth": copy.deepcopy(model).double(), "plain": model, "moved": moved(model, terms)}


@torch.no_grad()
def move_by_rounding(exact: torch.nn.Module, terms: int) -> None:
    """Move the weights of a float64 model by the error of float32 sums of up to `terms` products.

    A sequential sum rounds each partial sum once, by up to eps / 2. With random signs the k-th partial sum has the size
    of sqrt(k) terms, so the error of the sum is eps / 2 * terms / sqrt(2) of a term, the same as if each term had an
    error of eps / 2 * sqrt(terms / 2). Another order of the sum, as on another processor, is worse only by chance
    (Higham, Accuracy and Stability of Numerical Algorithms, chapters 3 and 4).
    """
    for seed, weight in enumerate(exact.parameters()):
        weight.copy_(moved_tensor(weight, terms, seed))


def moved_tensor(exact: Tensor, terms: int, seed: int = 0) -> Tensor:
    """Move one operand of float64 products by the error of float32 sums over `terms`."""
    noise = torch.randn(exact.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return exact * (1 + noise.to(exact.device) * (EPS / 2 * (terms / 2) ** 0.5))


def rounding(truth: Tensor) -> float:
    """The error of a few roundings to float32 for numbers of this size."""
    return 4 * EPS * (1 + truth.abs().max().item()) if truth.numel() else 0.0


def assert_contract(
    kernel: Function,
    reference: Function,
    inputs: Sequence[Tensor],
    names: Sequence[str],
    grads: bool = True,
    terms: int | None = None,
) -> None:
    """Check `kernel` against `reference`, which take the differentiable `inputs` (float32 or lower, on DEVICE, any
    strides) and return one or several tensors. names: of the outputs, then of the inputs' gradients. terms: the length
    of the longest sum, for results so sensitive to rounding that the reference's error may be small by chance."""
    truths = run(reference, inputs, torch.float64, grads)
    plains = run(reference, inputs, None, grads)
    results = run(kernel, inputs, None, grads)
    off: Sequence[Tensor | None] = [None] * len(truths)
    if terms is not None:
        exact = [moved_tensor(x.double(), terms, seed) for seed, x in enumerate(inputs)]
        off = run(reference, exact, torch.float64, grads)
    assert len(results) == len(truths) == len(names), f"{len(results)} results for {names}"
    for name, value, plain, truth, moved in zip(names, results, plains, truths, off, strict=True):
        assert_within(value, plain, truth, name, moved)


def assert_second_backward_agrees(function: Function, inputs: Sequence[Tensor]) -> None:
    """Check that a backward modifies neither its saved tensors nor the output gradients."""
    leaves = [_cast_like(t, None).requires_grad_() for t in inputs]
    result = function(*leaves)
    outputs = [result] if isinstance(result, Tensor) else list(result)
    seeds = [rand(*out.shape, seed=99 + i).to(out.dtype) for i, out in enumerate(outputs)]
    kept = [s.clone() for s in seeds]
    first = torch.autograd.grad(outputs, leaves, seeds, retain_graph=True)
    second = torch.autograd.grad(outputs, leaves, seeds)
    for a, b in zip([*first, *seeds], [*second, *kept], strict=True):
        assert torch.equal(a, b)
