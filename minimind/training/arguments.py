"""The flags that all stages share; each script adds its own in a dataclass derived from StageArgs."""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from minimind.data.mixture import parse_part
from minimind.ops.varlen import AttentionName
from minimind.training.optim import OptimizerName, ScheduleName
from minimind.training.parallel import ParallelName, ReduceDtypeName
from minimind.training.run_folder import ResumeMode
from minimind.training.tracking import TrackerName
from minimind.utils.device import PrecisionName

PresetName = Literal["nano", "minimind2-small", "minimind2", "minimind2-moe", "minimind3", "minimind3-moe"]

FromFlag = Annotated[str | None, tyro.conf.arg(name="from")]  # `from` is a word of Python's

# Flags that say nothing about the run itself.
_PLAN = {"plan": False, "plan_gb": None, "plan_gpu": False, "plan_measure": True, "plan_json": None}
_NOT_SAVED = {*_PLAN, "resume", "lengthen", "new_tokenizer", "out", "track", "profile", "scale"}
_POSITIVE = ("tokens", "epochs", "seq_len", "batch_tokens", "micro_tokens", "lr", "grad_clip", "eval_tokens",
             "evals", "save_every", "keep_checkpoints", "log_every", "patience", "plan_gb")  # fmt: skip


@dataclass(frozen=True)
class StageArgs:
    """What every stage can be told. Every default works."""

    from_: FromFlag = None
    """Weights to begin with: the run folder of an earlier stage, a Hugging Face folder, or an upstream .pth (with
    --preset and --tokenizer). None: random ones."""
    preset: PresetName | None = None
    """Model shape. None: that of --from, else nano, which is made for a CPU."""
    data: tuple[str, ...] = ()
    """Files, folders or globs."""
    tokenizer: str | None = None
    """Folder with tokenizer.json. None: that of --from, else the one shipped."""
    new_tokenizer: bool = False
    """Take --tokenizer though it is not the one that --from was trained with, so that the ids it knows mean other words
    from now on."""
    tokens: int | None = None
    """How many tokens to train on, padding (about 1%) included; overrides --epochs."""
    epochs: float | None = None
    """Passes over the training part of the data. None: one of text; of other data docs/training.md says how many."""
    seq_len: int | None = 512
    """Tokens in a row; longer documents are cut."""
    batch_tokens: int | None = None
    """Tokens per optimizer step, padding included; a multiple of --seq-len. None: 65536 on a GPU for models larger
    than nano, else 4096; what the data has, where that is less."""
    micro_tokens: int | None = None
    """Tokens per forward and backward, of all processes together; a step accumulates batch_tokens / micro_tokens of
    them. None: all at once, but no more than 65536, nor more than fit on the GPU (docs/scaling.md)."""
    optimizer: OptimizerName | None = None
    """muon: Muon for the matrices and AdamW for the rest, which came to AdamW's loss in a sixth to a quarter of the
    tokens (docs/LOG.md) for a quarter more time a step; adamw: AdamW for all. None: muon for random weights, what the
    run of --from had for its weights, adamw for others."""
    lr: float | None = None
    """Peak learning rate. None takes the preset's."""
    schedule: ScheduleName = "cosine"
    """How the rate falls after the warm-up."""
    warmup: float = 0.02
    """Share of the steps over which the rate rises."""
    cooldown: float | None = None
    """With --schedule wsd: share of the steps over which the rate falls. None: 0.2."""
    final_lr: float | None = None
    """With cosine and wsd: share of the peak rate that is left at the end. None: 0.1."""
    embedding_lr: float = 1.0
    """Rate of the embedding, and of a head that shares it, as a multiple of --lr."""
    weight_decay: float = 0.1
    """For matrices; norm gains never decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's: how much of its means of gradients and of their squares stays from step to step."""
    muon_momentum: float | None = None
    """With --optimizer muon: how much of its mean of gradients stays from step to step. None: 0.95."""
    grad_clip: float = 1.0
    """Largest gradient norm."""
    heldout: float = 0.05
    """Share of the tokens that is never trained on, at most a million; a hash of each document's text decides, so that
    copies of a text are on one side."""
    dedupe: bool = False
    """Leave out documents whose text an earlier one has, or one of --heldout-data."""
    eval_tokens: int = 65536
    """Held-out tokens used for the figures on the way; the last figure uses all."""
    evals: int = 10
    """How often to measure held-out loss and print samples."""
    save_every: int | None = None
    """Steps between checkpoints. None: twenty in a run."""
    keep_checkpoints: int = 2
    """How many of the newest checkpoints stay."""
    keep_best: bool = False
    """Keep the weights with the best held-out figure too; opening the run then takes them. It is compared where it is
    measured on the same part, --evals times in a run."""
    patience: int | None = None
    """End after so many evaluations without a better held-out figure, and keep the best weights. None: go on."""
    ema: float | None = None
    """Also keep a running average of the weights, of which this share stays at every step, so that it is over about the
    last 1 / (1 - share) steps. It is measured beside them (heldout_ema_...), and lies in average/ in every checkpoint,
    to be opened as a model. None: none (docs/averaging.md says when it helps)."""
    log_every: int = 10
    """Steps between reads of the loss from the device."""
    compile: bool = False
    """Compile the model with torch.compile: up to a minute at the start of the first run."""
    cuda_graph: bool = False
    """With --compile on a GPU: replay forward and backward as CUDA graphs, which saves what launches cost where steps
    are short; docs/kernels.md says why this is not the default."""
    recompute: bool = False
    """Keep only the blocks' inputs and run each again in the backward: a third more compute for far less memory."""
    profile: bool = False
    """Record three steps: a table, a trace and a timeline in the run folder's profile/."""
    fused: bool = True
    """Use the fastest form of every op this device has; --no-fused takes the plain reference."""
    precision: PrecisionName = "auto"
    """What matrix products run in; weights are float32 always."""
    attention: AttentionName = "auto"
    """Flash attention over documents on a GPU: torch, or a package that is installed: flash2, flash3, flash4 (see
    docs/kernels.md). auto: the fastest that works on this GPU."""
    resume: ResumeMode = "auto"
    """auto continues an unfinished run of these flags, of which those that change no step but for rounding may differ
    (docs/runs.md); never starts a new folder."""
    lengthen: str | None = None
    """Begin where this run, finished or not, has come to, with the same flags and a larger --tokens, --epochs or
    --rollouts, in a folder of its own (docs/runs.md says how the rate goes on)."""
    on_bad_row: Literal["error", "skip"] = "error"
    """What to do with a malformed row: stop and name it, or count it and go on."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of rows and messages that are left out: one that is not known is an error (docs/data.md)."""
    cache_dir: str | None = None
    """Where tokenized data is kept. None: $MINIMIND_CACHE or ~/.cache/minimind."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:N."""
    parallel: ParallelName = "auto"
    """How the processes of torchrun share the work: ddp (a model each) or fsdp (a shard of it each). auto: ddp where
    there are several. A run may continue with other numbers of processes."""
    replicas: int = 1
    """With fsdp: groups of processes that each hold the whole model in shards; several nodes: one group per node."""
    reduce_dtype: ReduceDtypeName = "fp32"
    """With ddp or fsdp: what gradients cross the network and are summed in. bf16 sends half the bytes; docs/scaling.md
    says what it costs."""
    seed: int = 42
    """Decides initial weights and data order."""
    plan: bool = False
    """Say what the run would be, without training and without a run folder: documents, tokens, rows, steps, memory and
    hours, from some megabytes of the data (docs/training.md)."""
    plan_gb: float | None = None
    """With --plan: as if --data had so many gigabytes of rows like theirs."""
    plan_gpu: bool = False
    """With --plan, on a machine without a GPU: take the defaults that a GPU would have."""
    plan_measure: bool = True
    """With --plan: run a short step here, for the hours of this machine."""
    plan_json: str | None = None
    """With --plan: also write its figures into this file."""
    scale: tyro.conf.Suppress[float] = 1.0
    track: TrackerName = "none"
    """Also send the metrics to an experiment tracker."""
    out: str | None = None
    """Run folder. None: runs/STAGE-PRESET-DATA, numbered when taken."""

    def check(self) -> None:
        """Refuse numbers that no run can use, in one line."""
        for name in _POSITIVE:
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
        for name in ("epochs", "lr"):
            value = getattr(self, name)
            if value is not None and math.isinf(value):
                raise ValueError(f"--{name} {value}: must be a number")
        if not 0 <= self.warmup <= 1:
            raise ValueError(f"--warmup {self.warmup}: a share of the steps, from 0 to 1")
        self._check_optimizer()
        if self.ema is not None and not 0 < self.ema < 1:
            raise ValueError(f"--ema {self.ema}: a share of the average that stays, above 0 and below 1")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"--seed {self.seed}: from 0 to {(1 << 63) - 1}")
        if self.new_tokenizer and self.tokenizer is None:
            raise ValueError("--new-tokenizer: goes with --tokenizer, which names the new one")
        alone = [name for name, usual in _PLAN.items() if getattr(self, name) != usual]
        if alone and not self.plan:
            raise ValueError(f"--{alone[0].replace('_', '-')}: goes with --plan")
        if self.cuda_graph and not self.compile:
            raise ValueError("--cuda-graph: goes with --compile")

    def _check_optimizer(self) -> None:
        if self.cooldown is not None and self.schedule != "wsd":
            raise ValueError(f"--cooldown {self.cooldown}: goes with --schedule wsd, not {self.schedule}")
        if self.final_lr is not None and self.schedule == "constant":
            raise ValueError(f"--final-lr {self.final_lr}: the rate of --schedule constant does not fall")
        if self.muon_momentum is not None and self.optimizer not in ("muon", None):
            raise ValueError(f"--muon-momentum {self.muon_momentum}: goes with --optimizer muon, not {self.optimizer}")
        for name in ("cooldown", "final_lr"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: a share, from 0 to 1")
        for name, values in (("betas", self.betas), ("muon-momentum", (self.muon_momentum or 0.0,))):
            if not all(0 <= value < 1 for value in values):
                raise ValueError(f"--{name} {' '.join(map(str, values))}: from 0 to less than 1")
        if not 0 <= self.embedding_lr < math.inf:
            raise ValueError(f"--embedding-lr {self.embedding_lr}: must be 0 or more")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"--weight-decay {self.weight_decay}: must be 0 or more")

    def lr_multiples(self) -> dict[str, float]:
        """Of --lr, by the end of a parameter's name."""
        return {"embed_tokens.weight": self.embedding_lr}

    @property
    def legacy(self) -> dict[str, Any]:
        """What runs of earlier versions did where by now the data decides, for these to go on with."""
        return {"split": "tail", "fields": "dropped", "step": "usual", "epochs": 1.0, "optimizer": "muon"}

    def saved(self) -> dict[str, Any]:
        """The flags that say what is computed, under their names on the command line (with _ for -)."""
        fields = dataclasses.asdict(self).items()
        return {name.rstrip("_"): value for name, value in fields if name not in _NOT_SAVED}

    @property
    def row(self) -> int:
        """--seq-len, once it is chosen."""
        assert self.seq_len is not None
        return self.seq_len

    def scaled(self, count: int) -> int:
        """What `count` in the data that is read comes to in all of it: in a plan some of the rows are read."""
        return round(count * self.scale)

    @property
    def row_flags(self) -> str:
        """The flags that say how many tokens attention sees at most."""
        return "--seq-len"

    @property
    def passes(self) -> float:
        """--epochs, once they are chosen."""
        assert self.epochs is not None
        return self.epochs

    @property
    def data_name(self) -> str:
        """Of the run folder: the first file's, and how many more there are."""
        if not self.data:
            return "builtin"
        name = Path(parse_part(self.data[0]).path).name.split(".")[0].strip("*").removeprefix("builtin:") or "data"
        if len(os.fsencode(name)) > 180:  # a folder's name ends at 255 bytes, and there is more in it
            name = name[:40]
        return name + (f"+{len(self.data) - 1}" if len(self.data) > 1 else "")
