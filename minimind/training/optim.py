"""Optimizers, learning-rate schedules, and the running average of the weights."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict, set_optimizer_state_dict
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from minimind.modeling import MLP, Attention, Model, MoE
from minimind.training.muon import Muon
from minimind.training.parallel import from_rank_0, to_rank_0

OptimizerName = Literal["muon", "adamw"]
ScheduleName = Literal["cosine", "wsd", "wsd-sqrt", "constant"]


@dataclass(frozen=True)
class ClipGroup:
    """Parameters whose gradients are clipped by their own norm, logged as NAME_grad_norm, and whose learning rate is
    `rate` times that of the others; for example a critic's."""

    name: str
    parameters: Sequence[nn.Parameter]
    rate: float = 1.0


class Optimizers:
    """Several torch optimizers that step as one. The learning rate of every parameter group is its own peak times one
    common factor."""

    def __init__(self, parts: Sequence[torch.optim.Optimizer]) -> None:
        self.parts = list(parts)
        self.peaks = [[group["lr"] for group in part.param_groups] for part in parts]

    def set_lr_factor(self, factor: float) -> None:
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in zip(part.param_groups, peaks, strict=True):
                group["lr"] = peak * factor

    def set_momentum(self, momentum: float) -> None:
        """Set the momentum of Muon's matrices."""
        for part in self.parts:
            if isinstance(part, Muon):
                for group in part.param_groups:
                    group["momentum"] = momentum

    def set_rate(self, parameters: Iterable[nn.Parameter], rate: float) -> None:
        """Multiply the peak learning rate of these parameters by `rate`, in new groups. Call it before the first
        step."""
        chosen = {id(parameter) for parameter in parameters}
        for part, peaks in zip(self.parts, self.peaks, strict=True):
            for group, peak in list(zip(part.param_groups, peaks, strict=True)):
                moved = [p for p in group["params"] if id(p) in chosen]
                if not moved:
                    continue
                group["params"] = [p for p in group["params"] if id(p) not in chosen]
                part.param_groups.append({**group, "params": moved})
                peaks.append(peak * rate)

    def step(self) -> None:
        for part in self.parts:
            part.step()

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """The parameter groups of all parts, as a torch optimizer has them."""
        return [group for part in self.parts for group in part.param_groups]

    def zero_grad(self) -> None:
        for part in self.parts:
            part.zero_grad()

    @torch.no_grad()
    def own_gradients(self) -> None:
        """Replace the gradients by copies, so that they can be accumulated where the next backward reuses their memory,
        as a CUDA graph's does."""
        for part in self.parts:
            for parameter in (p for group in part.param_groups for p in group["params"]):
                if parameter.grad is not None:
                    parameter.grad = parameter.grad.clone()

    def state_dict(self, model: Model) -> dict[str, Any]:
        """Whole tensors by parameter name on rank 0, empty on other ranks. All ranks call it."""
        return get_optimizer_state_dict(model, self.parts, options=to_rank_0())

    def load_state_dict(self, model: Model, state: dict[str, Any]) -> str | None:
        """Load `state`, made by `state_dict`; only rank 0's is read. All ranks call it. Returns a line about what had
        to be converted, or None."""
        names = {id(p): name for name, p in model.named_parameters()}
        muon = [group["params"] for part in self.parts if isinstance(part, Muon) for group in part.param_groups]
        state, moved = _experts_to_muon(state, [[names[id(p)] for p in group] for group in muon])
        set_optimizer_state_dict(model, self.parts, state, options=from_rank_0())
        if not moved:
            return None
        return f"{len(moved)} stacks of experts were AdamW's and are Muon's now: their mean gradients become momentum"


class LossScaler:
    """Dynamic loss scaling (Micikevicius et al. 2018, arXiv 1710.03740) by torch.amp.GradScaler, for float16: the loss
    is multiplied so that small gradients do not become 0, and the gradients are divided before they are clipped.

    A gradient that overflows skips the whole step, of all optimizers and on all ranks, and halves the scale; `GROWTH`
    steps without an overflow double it. `step` waits for the device. In other dtypes everything passes through.

    overflows: steps skipped since the run began. enabled: whether losses are scaled.
    """

    FIRST, GROWTH = 2.0**16, 2000  # torch's defaults

    def __init__(self, optimizer: Optimizers, device: torch.device, dtype: torch.dtype | None) -> None:
        self.optimizer, self.enabled, self.overflows = optimizer, dtype == torch.float16, 0
        self._scaler = torch.amp.GradScaler(
            device.type, init_scale=self.FIRST, growth_interval=self.GROWTH, enabled=self.enabled
        )

    @property
    def scale(self) -> float:
        """The factor of the loss; 1 where losses are not scaled."""
        return self._scaler.get_scale()

    def scaled(self, loss: Tensor) -> Tensor:
        """`loss` times the scale."""
        return self._scaler.scale(loss)

    def unscale(self) -> None:
        """Divide the gradients by the scale, after the last backward of a step."""
        self._scaler.unscale_(cast(torch.optim.Optimizer, self.optimizer))

    def step(self) -> bool:
        """Update the weights, or skip that where a gradient overflowed; whether they were updated."""
        if not self.enabled:
            self.optimizer.step()
            return True
        before = self.scale
        self._scaler.step(cast(torch.optim.Optimizer, self.optimizer))
        self._scaler.update()
        overflowed = self.scale < before
        self.overflows += overflowed
        return not overflowed

    def summary(self, steps: int) -> str:
        """One line for the end of a run of `steps`."""
        skipped = f"{self.overflows} of {steps} steps were skipped, as a gradient overflowed"
        return f"fp16: {skipped}; the loss scale is {self.scale:g}"

    def state_dict(self) -> dict[str, Any]:
        """Empty where losses are not scaled."""
        return {**self._scaler.state_dict(), "overflows": self.overflows} if self.enabled else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Nothing happens where `state` is empty or losses are not scaled: a run may continue on another device."""
        if self.enabled and state:
            self._scaler.load_state_dict(state)
        self.overflows = state.get("overflows", 0)


def _experts_to_muon(state: dict[str, Any], names: Sequence[Sequence[str]]) -> tuple[dict[str, Any], list[str]]:
    """Convert a state from when AdamW updated the stacked experts for Muon, whose groups hold `names`: AdamW's first
    moment becomes Muon's momentum. Returns the state and the names of the converted parameters."""
    if not state:
        return state, []
    buffers = state["state"]
    moved = [name for group in names for name in group if "exp_avg" in buffers.get(name, {})]
    if not moved:
        return state, []
    groups = [{**g, "params": [n for n in g["params"] if n not in moved]} for g in state["param_groups"]]
    for group, own in zip([g for g in groups if "momentum" in g], names, strict=True):
        group["params"] += [name for name in own if name in moved]
    converted = {name: {"momentum_buffer": buffers[name]["exp_avg"]} for name in moved}
    return {"state": {**buffers, **converted}, "param_groups": groups}, moved


def build_optimizers(
    model: Model,
    name: OptimizerName,
    lr: float,
    weight_decay: float,
    betas: tuple[float, float] = (0.9, 0.95),
    momentum: float = 0.95,
    row_beta: float | None = None,
    cautious: bool = False,
    iterations: int = 5,
    block: int = 0,
) -> Optimizers:
    """The optimizer of a run. Weight decay applies to matrices and embeddings, not to norm gains.

    adamw: fused AdamW for all parameters, with `betas` (Loshchilov & Hutter 2019, arXiv 1711.05101).
    muon: momentum orthogonalised by Newton-Schulz for the matrices inside the blocks (Jordan et al. 2024), with
      `momentum`; every expert's and packed q, k, v, gate and up are separate matrices. The update is scaled to the size
      of AdamW's, so that one `lr` serves both (Moonlight, arXiv 2502.16982). AdamW for the embedding, the head, the
      router, the norm gains and adapters. row_beta, cautious, iterations, block: as `Muon` takes them.
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
        rows = packed_rows(model)
        parts.append(Muon(muon, lr, weight_decay, momentum, rows, None, row_beta, cautious, iterations, block))
    return Optimizers(parts)


def _is_block_matrix(name: str, parameter: nn.Parameter) -> bool:
    inside = ".layers." in f".{name}" and "router" not in name
    return parameter.ndim in (2, 3) and inside and ".adapters." not in name  # q's, k's and v's are stacked


def packed_rows(model: Model) -> dict[nn.Parameter, tuple[int, ...]]:
    """For every packed weight, the rows of each matrix in it: q, k and v, or gate and up."""
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
    """Number of steps over which the rate of schedule wsd falls."""
    return max(1, int(steps * cooldown))


def lr_factor(
    schedule: ScheduleName, step: float, steps: int, warmup: int, final: float = 0.1, cooldown: float = 0.2
) -> float:
    """Share of the peak rate at `step` in 0..steps-1: a linear warm-up, then the schedule down to `final`.

    cosine: half a period. wsd: flat, then linear down over the last `cooldown` of the steps (warm-up-stable-decay, Hu
    et al. 2024, arXiv 2404.06395). wsd-sqrt: the same with 1 - sqrt(progress), which falls fast at first (Hägele et al.
    2024, arXiv 2405.18392). constant: flat.
    """
    if step < warmup:
        return min(1.0, (step + 1) / warmup)
    if schedule == "constant":
        return 1.0
    if schedule in ("wsd", "wsd-sqrt"):
        decay = cooldown_steps(steps, cooldown)
        progress = max(0.0, step - (steps - decay) + 1) / decay
        return 1.0 - (1.0 - final) * (progress if schedule == "wsd" else math.sqrt(progress))
    if schedule == "cosine":
        progress = (step - warmup + 1) / max(1, steps - warmup)
        return final + (1.0 - final) * 0.5 * (1.0 + math.cos(math.pi * progress))
    raise ValueError(f"unknown schedule {schedule!r}; choose cosine, wsd, wsd-sqrt or constant")


# (steps planned, step at which a longer plan took over) of every earlier length of a run, in order
Legs = tuple[tuple[int, int], ...]


@dataclass(frozen=True)
class RateSchedule:
    """The learning rate of a run, as a share of its peak.

    A lengthened run leaves its earlier schedule where the longer plan took over, and reaches the curve of its whole
    length in a straight line over as many steps as the warm-up took. A cosine made for fewer steps has fallen too far
    by then: this is the re-warming of continued pretraining (Ibrahim et al. 2024, arXiv 2403.08763), which returns to
    the peak because its data are new; here the data stay the same. wsd is made for this (Hu et al. 2024, 2404.06395):
    the longer run begins before the cooldown, at the peak, so that no rise is needed.

    steps: of the whole run. warmup: steps, by the run's first length. final, cooldown: as `lr_factor` takes them.
    """

    name: ScheduleName
    steps: int
    warmup: int
    final: float = 0.1
    cooldown: float = 0.2
    legs: Legs = ()

    def factor(self, step: float) -> float:
        """Share of the peak rate at `step` in 0..steps-1; between whole steps where steps grow."""
        goal = lr_factor(self.name, step, self.steps, self.warmup, self.final, self.cooldown)
        if not self.legs:
            return goal
        takeover = self.legs[-1][1]
        if step < takeover:
            return self._earlier.factor(step)
        share = min(1.0, (step - takeover + 1) / self.warmup)
        before = self._earlier.factor(takeover - 1)
        return before + (goal - before) * share

    @property
    def stable_steps(self) -> int:
        """Steps after which a longer run can continue at the same rate: with wsd up to the cooldown, else all."""
        return self.steps - cooldown_steps(self.steps, self.cooldown) if self.name.startswith("wsd") else self.steps

    def describe(self) -> str:
        """One line about how the rate of a lengthened run continues."""
        planned, takeover = self.legs[-1]
        before = self._earlier.factor(takeover - 1)
        end = takeover + self.warmup - 1
        after = lr_factor(self.name, end, self.steps, self.warmup, self.final, self.cooldown)
        way = f"the rate goes on at {before:.2f} of the peak"
        if abs(after - before) > 0.005:
            way = f"the rate goes from {before:.2f} of the peak to {after:.2f} over {self.warmup} steps"
        return (
            f"lengthened at step {takeover} from {planned} steps to {self.steps}: {way} and then as in a run of "
            f"{self.steps}"
        )

    @property
    def _earlier(self) -> RateSchedule:
        """The schedule before the last lengthening."""
        return replace(self, steps=self.legs[-1][0], legs=self.legs[:-1])


AVERAGE_FOLDER = "average"  # in a checkpoint


class WeightAverage:
    """A running average of the trained weights (--ema): a <- a + (1 - d) (w - a) after every step, in float32.

    Where the rate does not fall, the average does part of what a falling rate does: the noise of single steps cancels,
    for 4 bytes a parameter (Izmailov et al. 2018, arXiv 1803.05407; Kaddour 2022, 2209.14981). d is `decay`, or
    (1 + t) / (10 + t) after t steps where that is less, so that the initial weights fade soon. `model` may be
    replicated or sharded: each process averages its own part. updates: the number of steps averaged.
    """

    def __init__(self, model: Model, decay: float) -> None:
        self.model, self.decay, self.updates = model, decay, 0
        self._to_shards()
        self._parameters = [p for p in model.parameters() if p.requires_grad]
        self._values = [weight.detach().clone() for weight in self._weights()]

    @torch.no_grad()
    def update(self) -> None:
        """Add the weights after an optimizer step, without waiting for the device."""
        decay = min(self.decay, (1 + self.updates) / (10 + self.updates))
        self.updates += 1
        torch._foreach_lerp_(self._values, self._weights(), 1 - decay)

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """A context in which the model has the averaged weights; afterwards it has its own again, bit for bit."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    @torch.no_grad()
    def _swap(self) -> None:
        self._to_shards()
        for weight, value in zip(self._weights(), self._values, strict=True):
            kept = weight.clone()
            weight.copy_(value)
            value.copy_(kept)

    def _weights(self) -> list[Tensor]:
        """The trained weights that this process holds."""
        return [p.to_local() if isinstance(p, DTensor) else p.data for p in self._parameters]

    def _to_shards(self) -> None:
        """Put the shards back: a forward without a backward leaves whole parameters in their place."""
        if isinstance(self.model, FSDPModule):
            self.model.reshard()
