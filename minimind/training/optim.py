"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import Any, Literal, cast

import torch
from torch import nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule

from minimind.modeling import MLP, Attention, Model, MoE
from minimind.training.muon import Muon
from minimind.training.parallel import from_rank_0, to_rank_0

OptimizerName = Literal["muon", "adamw"]
ScheduleName = Literal["cosine", "wsd", "constant"]


class Optimizers:
    """Several torch optimizers stepped as one; every group's rate is its peak times one common factor."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        self.peaks = [[group["lr"] for group in part.param_groups] for part in parts]

    def set_lr_factor(self, factor: float) -> None:
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def set_rate(self, parameters: Iterable[nn.Parameter], rate: float) -> None:
        """Give these parameters `rate` times the peak that they have, in groups of their own; before the first step."""
        chosen = {id(parameter) for parameter in parameters}
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in list(zip(part.param_groups, peaks, strict=True)):
                mine = [p for p in group["params"] if id(p) in chosen]
                if not mine:
                    continue
                group["params"] = [p for p in group["params"] if id(p) not in chosen]
                part.param_groups.append({**group, "params": mine})
                peaks.append(peak * rate)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    @torch.no_grad()
    def own_gradients(self) -> None:
        """Put copies in place of the gradients: to be added to where the next backward writes over what it gave out."""
        for part in self.parts:
            for parameter in (p for group in part.param_groups for p in group["params"]):
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()

    def state_dict(self, model: Model) -> dict[str, Any]:
        """Whole tensors by parameter name, whatever the strategy; on rank 0, empty elsewhere. All ranks call it."""
        return get_optimizer_state_dict(model, self.parts, options=to_rank_0())

    def load_state_dict(self, model: Model, state: dict[str, Any]) -> str | None:
        """state: from `state_dict`, on rank 0; what the others pass is not looked at. All ranks call it. Returns what
        did not fit as it was, one line, or None."""
        names = {id(p): name for name, p in model.named_parameters()}
        muon = [group["params"] for part in self.parts if isinstance(part, Muon) for group in part.param_groups]
        state, moved = _experts_to_muon(state, [[names[id(p)] for p in group] for group in muon])
        set_optimizer_state_dict(model, self.parts, state, options=from_rank_0())
        if not moved:
            return None
        return f"{len(moved)} stacks of experts were AdamW's and are Muon's now: their mean gradients become momentum"


def _experts_to_muon(state: dict[str, Any], names: Sequence[Sequence[str]]) -> tuple[dict[str, Any], list[str]]:
    """A state of when AdamW updated the stacked experts, as Muon, whose groups hold `names`, takes it; and what has
    moved. AdamW's first moment is what Muon calls momentum."""
    if not state:
        return state, []
    held = state["state"]
    moved = [name for group in names for name in group if "exp_avg" in held.get(name, {})]
    if not moved:
        return state, []
    groups = [{**g, "params": [n for n in g["params"] if n not in moved]} for g in state["param_groups"]]
    for group, own in zip([g for g in groups if "momentum" in g], names, strict=True):
        group["params"] += [name for name in own if name in moved]
    kept = {name: {"momentum_buffer": held[name]["exp_avg"]} for name in moved}
    return {"state": {**held, **kept}, "param_groups": groups}, moved


def build_optimizers(
    model: Model,
    name: OptimizerName,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    momentum: float = 0.95,
) -> Optimizers:
    """The optimizer of a run. Matrices and embeddings decay, norm gains do not. betas are AdamW's, momentum is Muon's.

    adamw: fused AdamW for everything (Loshchilov & Hutter 2019, arXiv 1711.05101).
    muon: momentum orthogonalised by Newton-Schulz for the matrices inside the blocks (Jordan et al. 2024), those of
      each expert and packed q, k, v, gate and up apart, its update scaled to the size of AdamW's so that one `lr`
      serves both (Moonlight, arXiv 2502.16982); AdamW for the embedding, the head, the router, the gains and adapters.
    """
    if isinstance(model, FSDPModule):
        model.reshard()  # a forward without a backward leaves whole parameters in place of the shards
    parameters = [(n, p) for n, p in model.named_parameters() if p.requires_grad]
    muon = [p for n, p in parameters if name == "muon" and _is_block_matrix(n, p)]
    orthogonal = {id(p) for p in muon}
    rest = [(n, p) for n, p in parameters if id(p) not in orthogonal]
    groups: list[dict[str, Any]] = [
        {"params": [p for _, p in rest if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for _, p in rest if p.ndim < 2], "weight_decay": 0.0},
    ]
    parts: list[torch.optim.Optimizer] = [torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)]
    if muon:
        parts.append(Muon(muon, lr=lr, weight_decay=weight_decay, momentum=momentum, rows=packed_rows(model)))
    return Optimizers(parts)


def _is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    inside = ".layers." in f".{name}" and "router" not in name
    return parameter.ndim in (2, 3) and inside and ".adapters." not in name  # those of q, k and v are stacked


def packed_rows(model: Model) -> dict[nn.Parameter, tuple[int, ...]]:
    """The rows of q, k and v, or of gate and up, in each weight that holds them one under the other."""
    config = model.config
    queries, keys = config.num_attention_heads * config.head_dim, config.num_key_value_heads * config.head_dim
    rows: dict[nn.Parameter, tuple[int, ...]] = {}
    for module in model.modules():
        if isinstance(module, Attention):
            rows[cast(nn.Parameter, module.qkv_proj.weight)] = (queries, keys, keys)
        elif isinstance(module, MLP | MoE):
            gate_up = module.gate_up_proj
            weight = gate_up if isinstance(gate_up, nn.Parameter) else cast(nn.Parameter, gate_up.weight)
            rows[weight] = (weight.shape[-2] // 2,) * 2
    return rows


def cooldown_steps(steps: int, cooldown: float) -> int:
    """Of `steps`, those over which the rate of schedule wsd falls."""
    return max(1, int(steps * cooldown))


def lr_factor(
    schedule: ScheduleName, step: int, steps: int, warmup: int, final: float = 0.1, cooldown: float = 0.2
) -> float:
    """Multiplier on the peak rate at `step` in 0..steps-1: linear warm-up, then the schedule down to `final`.

    cosine: half a period. wsd: flat, then linear down over the last `cooldown` of the steps (warm-up-stable-decay, Hu
    et al. 2024, arXiv 2404.06395). constant: flat.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        decay = cooldown_steps(steps, cooldown)
        return 1.0 - (1.0 - final) * max(0, step - (steps - decay) + 1) / decay
    if schedule == "cosine":
        progress = (step - warmup + 1) / max(1, steps - warmup)
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"unknown schedule {schedule!r}; choose cosine, wsd or constant")
