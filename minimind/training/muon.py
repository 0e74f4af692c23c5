"""Muon: the momentum of each matrix with its singular values brought near 1 (Jordan et al. 2024), matrices of one shape
in one batch of products.

    m <- m + (1 - mu) (g - m);  u = g + mu (m - g);  w <- w (1 - lr decay) - 0.2 lr sqrt(max(rows, columns)) NS(u)

The factor gives an update the size of AdamW's, so that one `lr` serves both (Moonlight, arXiv 2502.16982). It is what
torch.optim.Muon computes with adjust_lr_fn="match_rms_adamw", and their state dicts fit each other.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minimind.training.muon_plan import MuonPlan, cut, exchange, take

_A, _B, _C = 3.4445, -4.7750, 2.0315  # of Jordan's quintic: steep at 0, and bounded
_ITERATIONS, _EPS = 5, 1e-7

# Elements of a batch. On a GPU 64 MB of bf16: copies of it stay small beside the model. On a CPU what a core's cache
# holds: one larger matrix after the other took a fifth less time there than a batch of them (docs/LOG.md).
_BATCH, _BATCH_ON_CPU = 1 << 25, 1 << 18


class Muon(torch.optim.Optimizer):
    """params: float32 matrices [m, n] or stacks of them [E, m, n]; under FSDP all on one mesh.

    rows: for a parameter that holds several matrices one under the other, such as packed q, k and v, the rows of each;
      they add up to m, for each of a stack. Without it [m, n] is one matrix, and a stack has E.
    batch_elements: of a batch; a larger matrix is alone. None: what suits the device.
    """

    def __init__(
        self,
        params: Iterable[nn.Parameter],
        lr: float = 1e-3,
        weight_decay: float = 0.1,
        momentum: float = 0.95,
        rows: Mapping[nn.Parameter, Sequence[int]] | None = None,
        batch_elements: int | None = None,
    ) -> None:
        # the keys of torch.optim.Muon, so that checkpoints of either load into the other
        fixed = {"nesterov": True, "ns_coefficients": (_A, _B, _C), "eps": _EPS, "ns_steps": _ITERATIONS,
                 "adjust_lr_fn": "match_rms_adamw"}  # fmt: skip
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, **fixed})
        self.rows = {id(p): tuple(parts) for p, parts in (rows or {}).items()}
        on_cpu = self.param_groups[0]["params"][0].device.type == "cpu"
        self.batch_elements = batch_elements or (_BATCH_ON_CPU if on_cpu else _BATCH)
        self._plans: dict[tuple[int, ...], MuonPlan] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        for group in self.param_groups:
            for parameters in self._portions([p for p in group["params"] if p.grad is not None]):
                self._step(parameters, group["lr"], group["weight_decay"], group["momentum"])

    def _portions(self, parameters: list[nn.Parameter]) -> list[list[nn.Parameter]]:
        """What is updated at once: everything, or on a CPU what fits into the cache together."""
        if not parameters or parameters[0].device.type != "cpu" or isinstance(parameters[0], DTensor):
            return [parameters] if parameters else []
        portions: list[list[nn.Parameter]] = []
        room = 0
        for parameter in sorted(parameters, key=lambda p: p.shape):
            if parameter.numel() > room:
                portions, room = [*portions, []], self.batch_elements
            portions[-1].append(parameter)
            room -= parameter.numel()
        return portions

    def _step(self, parameters: list[nn.Parameter], lr: float, decay: float, momentum: float) -> None:
        plan = self._plan(parameters)
        for p in parameters:
            if "momentum_buffer" not in self.state[p]:
                self.state[p]["momentum_buffer"] = torch.zeros_like(p)
        weights = [_rows(_local(p)) for p in parameters]
        gradients = [_rows(_local(p.grad).contiguous()) for p in parameters if p.grad is not None]
        means = [_rows(_local(self.state[p]["momentum_buffer"])) for p in parameters]
        torch._foreach_lerp_(means, gradients, 1 - momentum)
        updates = list(torch._foreach_lerp(gradients, means, momentum))
        orthogonalise(updates, plan)
        torch._foreach_mul_(weights, 1 - lr * decay)
        for scale, pieces in plan.by_scale.items():
            torch._foreach_add_(take(weights, pieces), take(updates, pieces), alpha=-lr * scale)

    def _plan(self, parameters: list[nn.Parameter]) -> MuonPlan:
        key = tuple(id(p) for p in parameters)
        if key not in self._plans:
            parts = [self.rows.get(id(p)) for p in parameters]
            self._plans[key] = MuonPlan.of(parameters, parts, self.batch_elements)
        return self._plans[key]


def orthogonalise(updates: list[Tensor], plan: MuonPlan) -> None:
    """Replace each matrix in `updates`, float32 [rows, columns], by its orthogonal factor. All ranks call it."""
    mine = updates[0].new_empty(sum(plan.sent), dtype=torch.bfloat16)
    torch._foreach_copy_(cut(mine, plan.mine), take(updates, plan.mine))
    with exchange(mine, plan) as stacks:
        for stack in stacks:
            newton_schulz_(stack)
    torch._foreach_copy_(take(updates, plan.mine), cut(mine, plan.mine))


def newton_schulz_(matrices: Tensor) -> None:
    """bf16 [m, n] or [K, m, n]: put U S' V^T in place of each U S V^T, with S' from about 0.7 to 1.2."""
    tall = matrices.shape[-2] > matrices.shape[-1]
    multiply_add = torch.addmm if matrices.ndim == 2 else torch.baddbmm
    x = matrices / matrices.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for i in range(_ITERATIONS):
        gram = x.mT @ x if tall else x @ x.mT  # of the shorter side
        polynomial = multiply_add(gram, gram, gram, beta=_B, alpha=_C)
        factors = (x, polynomial) if tall else (polynomial, x)
        x = multiply_add(x, *factors, beta=_A, out=matrices if i == _ITERATIONS - 1 else None)


def _local(tensor: Tensor) -> Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _rows(tensor: Tensor) -> Tensor:
    """[rows, columns], a view: the leading dimensions of a stack as one."""
    return tensor.view(-1, tensor.shape[-1])
