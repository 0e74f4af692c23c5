"""Low-rank adapters as any stage trains them: --lora-rank and its relatives, and what such a run reads and keeps.

The base stays frozen. What a stage compares the model with is then the base with the adapter off, of which there is no
second copy, and a checkpoint holds the adapter alone, in peft's form, with a fingerprint of its base.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor
from torch.distributed.checkpoint.state_dict import set_model_state_dict

from minimind.lora import LoRAConfig, add_adapter
from minimind.lora_files import read_adapter, save_adapter
from minimind.modeling import Model
from minimind.training.arguments import StageArgs
from minimind.training.job import Job
from minimind.training.parallel import Parallel, from_rank_0
from minimind.value_head import ValueModel

# Peak rate whatever the preset: an adapter starts at zero, and its size does not follow the model's. On nano 1e-3
# taught as many answers and kept as many others, at twice the held-out loss.
PEAK_LR = 2e-3
# Of the whole model's where that is low: about ten times was best (Schulman et al. 2025, "LoRA Without Regret").
RATE = 10.0


@dataclass(frozen=True)
class AdapterArgs(StageArgs):
    """Flags of a stage that can train an adapter in place of the model."""

    lora_rank: int | None = None
    """Train an adapter of this rank on the frozen model (LoRA); checkpoints hold the adapter alone. None: train the
    model."""
    lora_alpha: float | None = None
    """With --lora-rank: the adapter is scaled by alpha / rank. None: twice the rank."""
    lora_rslora: bool = False
    """With --lora-rank: scale by alpha / sqrt(rank) instead."""
    lora_dora: bool = False
    """With --lora-rank: train the lengths of the adapted rows too (DoRA)."""
    lora_plus: float = 1.0
    """With --lora-rank: rate of the adapter's B as a multiple of --lr (LoRA+, whose authors take 16)."""
    lora_dropout: float = 0.0
    """With --lora-rank: probability that a number does not reach the adapter, in training."""
    lora_targets: tuple[str, ...] = ()
    """With --lora-rank: ends of module names, such as q_proj v_proj. None: all projections but routed experts."""

    def check(self) -> None:
        super().check()
        plain = AdapterArgs()
        for name in ("alpha", "rslora", "dora", "plus", "dropout", "targets"):
            value = getattr(self, f"lora_{name}")
            if self.lora_rank is None and value != getattr(plain, f"lora_{name}"):
                raise ValueError(f"--lora-{name}: goes with --lora-rank, which is how an adapter is asked for")
        if self.lora_rank is None:
            return
        if not 0 < self.lora_plus < math.inf:
            raise ValueError(f"--lora-plus {self.lora_plus}: must be above 0")
        if self.embedding_lr != 1:
            raise ValueError(f"--embedding-lr {self.embedding_lr}: the embedding is frozen; drop the flag")
        self.lora()

    def lora(self) -> LoRAConfig | None:
        """What is trained; None: the whole model. Raises ValueError for numbers that mean nothing."""
        if self.lora_rank is None:
            return None
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        targets = self.lora_targets or None
        return LoRAConfig(self.lora_rank, alpha, self.lora_dropout, targets, self.lora_rslora, self.lora_dora)

    def lr_multiples(self) -> dict[str, float]:
        return super().lr_multiples() | ({".B": self.lora_plus} if self.lora_rank else {})


@dataclass(frozen=True)
class Adapting:
    """What is trained of a run's model: an adapter of this config, or where that is None all of it."""

    job: Job
    config: LoRAConfig | None

    @staticmethod
    def of(job: Job, args: AdapterArgs) -> Adapting:
        """Before the run folder is made: ValueError where the model has no such projections, or there is none."""
        config = args.lora()
        if config is not None:
            if job.origin.weights is None and not args.plan:
                raise ValueError("--lora-rank: random weights learn nothing frozen; name a model with --from")
            with torch.device("meta"), torch.random.fork_rng(devices=[]):
                add_adapter(Model(job.config), config)
        return Adapting(job, config)

    def prepare(self, model: Model) -> None:
        """As Job.build_model takes it."""
        if self.config is not None:
            add_adapter(model, self.config)
            if isinstance(model, ValueModel):
                model.value_head.requires_grad_(True)

    def rate(self, whole: float) -> float:
        """The peak rate, where `whole` is that of the whole model."""
        return whole if self.config is None else min(RATE * whole, PEAK_LR)

    def files(self) -> dict[str, Any]:
        """Of Objective: how checkpoints are written and read."""
        if self.config is None:
            return {}
        return {"save_model": saver(self.job), "load_model": reload}

    def lines(self, model: Model) -> list[str]:
        """For the start of a run."""
        if self.config is None:
            return []
        muon = self.job.args.optimizer == "muon"
        told = ["its matrices are AdamW's: Muon takes none that are stacked"] if muon else []
        if self.job.args.lr is None:
            told.append(f"its peak rate {RATE:g} times the whole model's, but at most {PEAK_LR:g}")
        return ["; ".join([describe_adapter(model, self.config), *told])]


def saver(job: Job) -> Any:
    """save_model(model, folder) for the adapter of `job`'s base."""
    weights, known = job.origin.weights, job.origin.fingerprint()
    return lambda model, folder: save_adapter(model, folder, base_model=weights, base_fingerprint=known)


def reload(model: Model, checkpoint: Path, parallel: Parallel) -> None:
    """Put the adapter in `checkpoint`, read on rank 0, into the one that `model` has. All ranks call it."""
    put(model, read_adapter(model, checkpoint) if parallel.main else {})


def put(model: Model, state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors of rank 0 into the parameters of these names; the others stay. All ranks call it."""
    set_model_state_dict(model, cast(dict[str, Any], dict(state)), options=from_rank_0(strict=False))


def describe_adapter(model: Model, config: LoRAConfig) -> str:
    """What is trained of `model`, a line."""
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    targets = " ".join(config.targets or ("all projections but routed experts",))
    return (
        f"adapter: {own / 1e6:.3f}M parameters are trained, {own / (model.num_parameters() - own):.1%} of the model's; "
        f"rank {config.rank}, scale {config.scale:g}{', DoRA' if config.dora else ''}, {targets}"
    )
