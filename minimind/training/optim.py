"""Optimizers and learning-rate schedules."""

from __future__ import annotations

import math
from typing import Literal

import torch
from torch import nn

ScheduleName = Literal["cosine", "wsd", "constant"]


def build_adamw(
    model: nn.Module, lr: float, weight_decay: float, betas: tuple[float, float] = (0.9, 0.95)
) -> torch.optim.AdamW:
    """Fused AdamW (Loshchilov & Hutter 2019, arXiv 1711.05101); matrices decay, norm gains do not."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.ndim >= 2], "weight_decay": weight_decay},
        {"params": [p for p in parameters if p.ndim < 2], "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(groups, lr=lr, betas=betas, fused=True)


def lr_factor(schedule: ScheduleName, step: int, steps: int, warmup: int, final: float = 0.1) -> float:
    """Multiplier on the peak rate at `step` in 0..steps-1: linear warm-up, then the schedule down to `final`.

    cosine: half a period. wsd: flat, then linear down over the last fifth (warm-up-stable-decay, Hu et al. 2024,
    arXiv 2404.06395). constant: flat.
    """
    if step < warmup:
        return (step + 1) / warmup
    if schedule == "constant":
        return 1.0
    if schedule == "wsd":
        decay = max(1, steps // 5)
        return 1.0 - (1.0 - final) * max(0, step - (steps - decay) + 1) / decay
    if schedule == "cosine":
        progress = (step - warmup + 1) / max(1, steps - warmup)
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"unknown schedule {schedule!r}; choose cosine, wsd or constant")


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = lr
