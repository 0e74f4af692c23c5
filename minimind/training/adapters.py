"""Low-rank adapters in any stage: the flags --lora-rank and so on, the setup of the model, and checkpoints.

The base model stays frozen. It also serves as the reference model, with the adapter switched off, so that there is no
second copy. A checkpoint holds only the adapter, in peft's format, with a fingerprint of its base.
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

# Peak rate for all presets: an adapter starts at zero, and its size does not follow the model's. On nano 1e-3 taught
# as many answers and kept as many others, but at twice the held-out loss.
PEAK_LR = 2e-3
# Multiple of the whole model's rate where that is low: ten was about best (Schulman et al. 2025, "LoRA Without
# Regret").
RATE = 10.0


@dataclass(frozen=True)
class AdapterArgs(StageArgs):
    """Flags of a stage that can train an adapter instead of the model."""

    lora_rank: int | None = None
    """Train an adapter of this rank on the frozen model (LoRA); checkpoints then hold only the adapter. None: train the
    whole model."""
    lora_alpha: float | None = None
    """With --lora-rank: the adapter is scaled by alpha / rank. None: twice the rank."""
    lora_rslora: bool = False
    """With --lora-rank: scale by alpha / sqrt(rank) instead."""
    lora_dora: bool = False
    """With --lora-rank: also train the lengths of the adapted rows (DoRA)."""
    lora_plus: float = 1.0
    """With --lora-rank: learning rate of the adapter's B as a multiple of --lr (LoRA+, whose authors use 16)."""
    lora_dropout: float = 0.0
    """With --lora-rank: dropout of the adapter's inputs."""
    lora_targets: tuple[str, ...] = ()
    """With --lora-rank: ends of the names of the modules to adapt, such as q_proj v_proj. Empty: all projections except
    routed experts."""

    def check(self) -> None:
        super().check()
        defaults = AdapterArgs()
        for name in ("alpha", "rslora", "dora", "plus", "dropout", "targets"):
            value = getattr(self, f"lora_{name}")
            if self.lora_rank is None and value != getattr(defaults, f"lora_{name}"):
                raise ValueError(f"--lora-{name}: goes with --lora-rank, which turns on the adapter")
        if self.lora_rank is None:
            return
        if not 0 < self.lora_plus < math.inf:
            raise ValueError(f"--lora-plus {self.lora_plus}: must be above 0")
        if self.embedding_lr != 1:
            raise ValueError(f"--embedding-lr {self.embedding_lr}: the embedding is frozen; drop the flag")
        self.lora()

    def lora(self) -> LoRAConfig | None:
        """The adapter's configuration, or None to train the whole model. Raises ValueError for impossible numbers."""
        if self.lora_rank is None:
            return None
        alpha = 2.0 * self.lora_rank if self.lora_alpha is None else self.lora_alpha
        targets = self.lora_targets or None
        return LoRAConfig(self.lora_rank, alpha, self.lora_dropout, targets, self.lora_rslora, self.lora_dora)

    def lr_multiples(self) -> dict[str, float]:
        return super().lr_multiples() | ({".B": self.lora_plus} if self.lora_rank else {})


@dataclass(frozen=True)
class AdapterSetup:
    """Whether a run trains an adapter, with this `config`, or the whole model, where it is None."""

    job: Job
    config: LoRAConfig | None

    @staticmethod
    def from_args(job: Job, args: AdapterArgs) -> AdapterSetup:
        """Call it before the run folder is made. Raises ValueError if the model is random or has no such modules."""
        config = args.lora()
        if config is not None:
            if job.initial.weights is None and not args.plan:
                raise ValueError("--lora-rank: the frozen model would be random; name one with --from")
            with torch.device("meta"):
                add_adapter(Model(job.config), config)
        return AdapterSetup(job, config)

    def prepare(self, model: Model) -> None:
        """Add the adapter; for Job.build_model."""
        if self.config is not None:
            add_adapter(model, self.config)
            if isinstance(model, ValueModel):
                model.value_head.requires_grad_(True)

    def peak_lr(self, whole: float) -> float:
        """The peak learning rate; whole: the one of the whole model."""
        return whole if self.config is None else min(RATE * whole, PEAK_LR)

    def checkpoint_functions(self) -> dict[str, Any]:
        """save_model and load_model of Stage, if an adapter is trained."""
        if self.config is None:
            return {}
        return {"save_model": adapter_saver(self.job), "load_model": load_adapter_weights}

    def lines(self, model: Model) -> list[str]:
        """Lines about the adapter, printed at start."""
        if self.config is None:
            return []
        muon = self.job.args.optimizer == "muon"
        remarks = ["AdamW trains its matrices, which are stacked: Muon cannot"] if muon else []
        if self.job.args.lr is None:
            remarks.append(f"its peak rate {RATE:g} times the whole model's, but at most {PEAK_LR:g}")
        return ["; ".join([describe_adapter(model, self.config), *remarks])]


def adapter_saver(job: Job) -> Any:
    """save_model(model, folder) that writes an adapter of the job's initial model."""
    weights, base = job.initial.weights, job.initial.fingerprint()
    return lambda model, folder: save_adapter(model, folder, base_model=weights, base_fingerprint=base)


def load_adapter_weights(model: Model, checkpoint: Path, parallel: Parallel) -> None:
    """Copy the adapter in `checkpoint`, read on rank 0, into that of `model`. All ranks call it."""
    set_parameters(model, read_adapter(model, checkpoint) if parallel.main else {})


def set_parameters(model: Model, state: Mapping[str, Tensor]) -> None:
    """Copy whole tensors from rank 0 into the parameters with these names. All ranks call it."""
    set_model_state_dict(model, cast(dict[str, Any], dict(state)), options=from_rank_0(strict=False))


def describe_adapter(model: Model, config: LoRAConfig) -> str:
    """One line about the adapter's size."""
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    targets = " ".join(config.targets or ("all projections but routed experts",))
    return (
        f"adapter: {own / 1e6:.3f}M parameters are trained, {own / (model.num_parameters() - own):.1%} of the model's; "
        f"rank {config.rank}, scale {config.scale:g}{', DoRA' if config.dora else ''}, {targets}"
    )
