"""The flags that all stages share, and the rules for defaults that depend on the data or the weights.

Every script adds its own flags in a dataclass derived from StageArgs. docs/training.md has the sources of the defaults.
"""

from __future__ import annotations

import dataclasses
import math
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import tyro

from minimind.config import ModelConfig
from minimind.data.mixture import parse_part
from minimind.ops.varlen import AttentionName
from minimind.training.metrics import TrackerName
from minimind.training.muon import TORCHS_ITERATIONS
from minimind.training.optim import Legs, OptimizerName, RateSchedule, ScheduleName
from minimind.training.parallel import ParallelName, ReduceDtypeName
from minimind.training.run_folder import ResumeMode
from minimind.utils.device import PrecisionName
from minimind.utils.files import read_json

PresetName = Literal["nano", "minimind2-small", "minimind2", "minimind2-moe", "minimind3", "minimind3-moe"]

FromFlag = Annotated[str | None, tyro.conf.arg(name="from")]  # `from` is a Python keyword

_PLAN = {"plan": False, "plan_gb": None, "plan_gpu": False, "plan_measure": True, "plan_json": None}
# Flags that do not change what a run computes.
_NOT_SAVED = {*_PLAN, "resume", "lengthen", "new_tokenizer", "out", "track", "profile", "scale"}
_OF_MUON = ("muon_momentum", "momentum_warmup", "muon_row_beta", "muon_iterations", "muon_block",
            "cautious_decay")  # fmt: skip
_FIRST_MOMENTUM = 0.85  # Jordan's
_POSITIVE = ("tokens", "epochs", "seq_len", "batch_tokens", "micro_tokens", "lr", "muon_iterations", "grad_clip",
             "eval_tokens", "evals", "save_every", "keep_checkpoints", "log_every", "patience", "plan_gb")  # fmt: skip


@dataclass(frozen=True)
class StageArgs:
    """The flags of every stage. All defaults work."""

    from_: FromFlag = None
    """Initial weights: the run folder of an earlier stage, a Hugging Face folder, a name on a hub (OWNER/NAME,
    OWNER/NAME@REVISION, modelscope:OWNER/NAME), or an upstream .pth (with --preset and --tokenizer). None: random
    weights."""
    preset: PresetName | None = None
    """Model shape. None: that of --from, else nano, which trains on a CPU."""
    data: tuple[str, ...] = ()
    """Files, folders or globs."""
    tokenizer: str | None = None
    """Folder with tokenizer.json. None: that of --from, else the tokenizer that comes with the program."""
    new_tokenizer: bool = False
    """Use --tokenizer even if --from was trained with another one, whose ids stood for other words."""
    tokens: int | None = None
    """Number of tokens to train on, padding (about 1%) included; overrides --epochs."""
    epochs: float | None = None
    """Passes over the training data. None: one over text; for other data see docs/training.md."""
    seq_len: int | None = 512
    """Tokens in a row; longer documents are cut."""
    batch_tokens: int | None = None
    """Tokens per optimizer step, padding included; a multiple of --seq-len. None: 65536 on a GPU for models larger
    than nano, else 4096, and 2048 in pretraining on up to 1,638,400 tokens on a CPU; fewer if the data has fewer."""
    micro_tokens: int | None = None
    """Tokens per forward and backward over all processes; a step accumulates batch_tokens / micro_tokens of them.
    None: the whole step, at most 65536, and no more than fit on the GPU (docs/scaling.md)."""
    optimizer: OptimizerName | None = None
    """muon: Muon for matrices and AdamW for the rest, which reached AdamW's loss with a sixth to a quarter of the
    tokens (docs/LOG.md) at a quarter more time per step; adamw: AdamW for all. None: muon for random weights, the
    optimizer of the run that --from names, adamw for other weights."""
    lr: float | None = None
    """Peak learning rate. None: the stage's (docs/rates.md)."""
    schedule: ScheduleName = "cosine"
    """Learning rate after the warm-up: cosine, wsd (flat, then a linear cooldown), wsd-sqrt (flat, then a cooldown
    that is fast at first: 1 - sqrt(progress)) or constant."""
    warmup: float = 0.02
    """Share of the steps over which the learning rate rises."""
    cooldown: float | None = None
    """With --schedule wsd: share of the steps over which the rate falls. None: 0.2."""
    final_lr: float | None = None
    """With cosine and wsd: final learning rate as a share of the peak. None: 0.1."""
    embedding_lr: float = 1.0
    """Learning rate of the embedding, and of a head that shares it, as a multiple of --lr."""
    weight_decay: float = 0.1
    """Weight decay of matrices; norm gains never decay."""
    betas: tuple[float, float] = (0.9, 0.95)
    """AdamW's decay rates for the means of gradients and of squared gradients."""
    muon_momentum: float | None = None
    """With --optimizer muon: its momentum. None: 0.95."""
    momentum_warmup: float = 0.0
    """With --optimizer muon: share of the steps over which its momentum rises from 0.85."""
    muon_row_beta: float | None = None
    """With --optimizer muon: divide each row of an update by its running root mean square, which retains this share at
    every step (NorMuon). None: rows are not scaled."""
    muon_iterations: int | None = TORCHS_ITERATIONS
    """With --optimizer muon: iterations that bring the singular values of an update near 1. Each costs the same; with
    fewer, small ones stay smaller."""
    muon_block: int | None = 0
    """With --optimizer muon: cut the shorter side of each matrix into equal blocks of at least this size, and bring the
    singular values of each block near 1 instead of the whole matrix's, which takes less time. 0: whole matrices."""
    cautious_decay: bool = False
    """With --optimizer muon: decay a weight of a matrix only where the update moves it towards zero too."""
    batch_warmup: float = 0.0
    """Share of the tokens that is trained on in smaller steps: the first half of it in quarters of --batch-tokens, the
    second in halves."""
    grad_clip: float = 1.0
    """Largest norm of the gradients; larger ones are scaled down."""
    heldout: float = 0.05
    """Share of the tokens that is held out from training, at most a million; a hash of each document's text decides,
    so that copies of a text stay on one side."""
    dedupe: bool = False
    """Leave out documents that repeat an earlier one or one of --heldout-data."""
    eval_tokens: int = 65536
    """Held-out tokens measured during training; the final figure uses all."""
    evals: int = 10
    """Number of evaluations in a run, each with samples."""
    save_every: int | None = None
    """Steps between checkpoints. None: a twentieth of the run, or more where that would cost a twentieth of its
    time."""
    keep_checkpoints: int = 2
    """Number of newest checkpoints to keep."""
    keep_best: bool = False
    """Also keep the weights with the best held-out figure, which opening the run then uses. All evaluations before the
    final one are compared: they measure the same documents."""
    patience: int | None = None
    """Stop after this many evaluations without a better held-out figure, and keep the best weights. None: never."""
    ema: float | None = None
    """Also keep a running average of the weights that retains this share at every step, and so covers about the last
    1 / (1 - share) steps. It is evaluated too (heldout_ema_...) and stored in average/ of every checkpoint, to be
    opened as a model. None: no average (docs/averaging.md says when it helps)."""
    log_every: int = 10
    """Steps between reads of the loss from the device."""
    compile: bool = False
    """Compile the model with torch.compile, which takes up to a minute at the first run."""
    cuda_graph: bool = False
    """With --compile on a GPU: replay forward and backward as CUDA graphs, which saves launch overhead in short steps
    (docs/kernels.md says why it is not the default)."""
    recompute: bool = False
    """Keep only the inputs of blocks and recompute the rest in the backward: a third more compute, far less memory."""
    profile: bool = False
    """Record three steps: a table on the screen, a trace and a timeline in profile/ of the run folder."""
    fused: bool = True
    """Use the fastest form of every operator on this device; --no-fused uses the plain reference."""
    precision: PrecisionName = "auto"
    """Precision of matrix products; weights are always float32. fp16 scales the loss (docs/training.md). auto: bf16
    where the device has it, else fp16 on a GPU with tensor cores, else fp32."""
    attention: AttentionName = "auto"
    """Flash attention on a GPU: torch's, or that of an installed package: flash2, flash3, flash4 (docs/kernels.md).
    auto: the fastest that works on this GPU."""
    resume: ResumeMode = "auto"
    """auto: continue an unfinished run with these flags; flags that change steps only by rounding may differ
    (docs/runs.md). never: start a new folder."""
    lengthen: str | None = None
    """Continue this run, finished or not, in a folder of its own, with the same flags and a larger --tokens, --epochs
    or --rollouts (docs/runs.md says how the learning rate continues)."""
    on_bad_row: Literal["error", "skip"] = "error"
    """For a malformed row: stop and name it (error), or count it and continue (skip)."""
    ignore_fields: tuple[str, ...] = ()
    """Fields of rows and messages to ignore; other unknown fields are errors (docs/data.md)."""
    cache_dir: str | None = None
    """Folder of tokenized data. None: $MINIMIND_CACHE or ~/.cache/minimind."""
    device: str = "auto"
    """auto, cpu, cuda, cuda:N or mps (an Apple GPU: plain PyTorch, which nobody has tried yet)."""
    parallel: ParallelName = "auto"
    """How the processes of torchrun share the work: ddp (each holds the whole model) or fsdp (each holds a shard).
    auto: ddp if there are several. A run may continue with another number of processes."""
    replicas: int = 1
    """With fsdp: number of groups of processes that each hold the whole model in shards; with several nodes, one group
    per node."""
    reduce_dtype: ReduceDtypeName = "fp32"
    """With ddp or fsdp: dtype in which gradients are sent and summed. bf16 halves the traffic (docs/scaling.md has its
    cost)."""
    seed: int = 42
    """Seed of the initial weights and the data order."""
    plan: bool = False
    """Print what the run would be, without training and without a run folder: documents, tokens, rows, steps, memory
    and hours, from a few megabytes of the data (docs/training.md)."""
    plan_gb: float | None = None
    """With --plan: pretend that --data has this many gigabytes of such rows."""
    plan_gpu: bool = False
    """With --plan on a machine without a GPU: use the defaults of a GPU."""
    plan_measure: bool = True
    """With --plan: time a short step here, to project the hours on this machine."""
    plan_json: str | None = None
    """With --plan: also write its figures to this file."""
    scale: tyro.conf.Suppress[float] = 1.0
    track: TrackerName = "none"
    """Also send the metrics to an experiment tracker. tensorboard and trackio keep them on this machine."""
    out: str | None = None
    """Run folder. None: runs/STAGE-PRESET-DATA, with a number if that is taken."""

    def check(self) -> None:
        """Raise ValueError, naming the flag, for a value that no run can use."""
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
            raise ValueError(f"--ema {self.ema}: must be above 0 and below 1")
        if not 0 <= self.seed < 1 << 63:
            raise ValueError(f"--seed {self.seed}: from 0 to {(1 << 63) - 1}")
        if self.new_tokenizer and self.tokenizer is None:
            raise ValueError("--new-tokenizer: goes with --tokenizer, which names the new one")
        plan_flags = [name for name, default in _PLAN.items() if getattr(self, name) != default]
        if plan_flags and not self.plan:
            raise ValueError(f"--{plan_flags[0].replace('_', '-')}: goes with --plan")
        if self.cuda_graph and not self.compile:
            raise ValueError("--cuda-graph: goes with --compile")
        if self.batch_warmup and self.lengthen is not None:
            raise ValueError(f"--batch-warmup {self.batch_warmup}: a run whose steps grow cannot be lengthened")

    def _check_optimizer(self) -> None:
        if self.cooldown is not None and not self.schedule.startswith("wsd"):
            raise ValueError(f"--cooldown {self.cooldown}: goes with --schedule wsd, not {self.schedule}")
        if self.final_lr is not None and self.schedule == "constant":
            raise ValueError(f"--final-lr {self.final_lr}: the rate of --schedule constant does not fall")
        if self.optimizer not in ("muon", None):
            for name in _OF_MUON:
                if (value := getattr(self, name)) != getattr(type(self)(), name):
                    flag = f"--{name.replace('_', '-')} {value}"
                    raise ValueError(f"{flag}: goes with --optimizer muon, not {self.optimizer}")
        for name in ("cooldown", "final_lr", "momentum_warmup", "batch_warmup"):
            value = getattr(self, name)
            if value is not None and not 0 <= value <= 1:
                raise ValueError(f"--{name.replace('_', '-')} {value}: a share, from 0 to 1")
        row_beta = ("muon-row-beta", (self.muon_row_beta or 0.0,))
        for name, values in (("betas", self.betas), ("muon-momentum", (self.muon_momentum or 0.0,)), row_beta):
            if not all(0 <= value < 1 for value in values):
                raise ValueError(f"--{name} {' '.join(map(str, values))}: from 0 to less than 1")
        if (self.muon_block or 0) < 0:
            raise ValueError(f"--muon-block {self.muon_block}: must be 0, for whole matrices, or more")
        if not 0 <= self.embedding_lr < math.inf:
            raise ValueError(f"--embedding-lr {self.embedding_lr}: must be 0 or more")
        if not 0 <= self.weight_decay < math.inf:
            raise ValueError(f"--weight-decay {self.weight_decay}: must be 0 or more")

    def peak_lr(self, default: float) -> float:
        """--lr, or `default` without it."""
        return default if self.lr is None else self.lr

    def momentum(self, step: int, steps: int) -> float:
        """Muon's momentum at `step` in 0..steps-1."""
        momentum = 0.95 if self.muon_momentum is None else self.muon_momentum
        share = min(1.0, step / (self.momentum_warmup * steps)) if self.momentum_warmup else 1.0
        return momentum + (1 - share) * min(0.0, _FIRST_MOMENTUM - momentum)

    def lr_multiples(self) -> dict[str, float]:
        """Multiples of --lr, by the end of a parameter's name."""
        return {"embed_tokens.weight": self.embedding_lr}

    def rate_schedule(self, steps: int, legs: Legs = ()) -> RateSchedule:
        """The learning rate over `steps`; legs: the earlier lengths of a lengthened run."""
        warmup = max(1, round(self.warmup * (legs[0][0] if legs else steps)))
        final = 0.1 if self.final_lr is None else self.final_lr
        cooldown = 0.2 if self.cooldown is None else self.cooldown
        return RateSchedule(self.schedule, steps, warmup, final, cooldown, legs)

    @property
    def keeps_best(self) -> bool:
        """Whether the weights with the best held-out figure are kept."""
        return self.keep_best or self.patience is not None

    @property
    def legacy(self) -> dict[str, Any]:
        """The fixed values that earlier versions used where the data now decides; their runs continue with them."""
        return {"split": "tail", "fields": "dropped", "step": "usual", "epochs": 1.0, "optimizer": "muon"}

    def saved(self) -> dict[str, Any]:
        """The flags that change what a run computes, named as on the command line (with _ for -)."""
        fields = dataclasses.asdict(self).items()
        return {name.rstrip("_"): value for name, value in fields if name not in _NOT_SAVED}

    @property
    def row(self) -> int:
        """--seq-len, once it is chosen."""
        assert self.seq_len is not None
        return self.seq_len

    def scaled(self, count: int) -> int:
        """`count` extrapolated from the rows that were read to all of the data; under --plan only some are read."""
        return round(count * self.scale)

    @property
    def row_flags(self) -> str:
        """The flags that limit the tokens attention sees, for error messages."""
        return "--seq-len"

    @property
    def passes(self) -> float:
        """--epochs, once they are chosen."""
        assert self.epochs is not None
        return self.epochs

    @property
    def data_name(self) -> str:
        """The data's part of the run folder's name: the first file, and how many more there are."""
        if not self.data:
            return "builtin"
        name = Path(parse_part(self.data[0]).path).name.split(".")[0].strip("*").removeprefix("builtin:") or "data"
        if len(os.fsencode(name)) > 180:  # a folder's name ends at 255 bytes and has other parts
            name = name[:40]
        return name + (f"+{len(self.data) - 1}" if len(self.data) > 1 else "")


@dataclass(frozen=True)
class Passes:
    """Default passes over a stage's data. builtin: over built-in data, as its learning tests were tuned. files: over
    the user's files, for the reason `why`; more, up to MOST times as many, in runs of fewer than `least` tokens."""

    builtin: float
    files: float
    why: str = ""
    least: int = 0


# Upstream takes 10 passes over its 34 MB of lora_medical and took 50 over the 91 rows of lora_identity.
MOST = 5
_STEPS = 100  # of 4096 tokens, or of an adapter 1024: the stages' smallest steps
PASSES = {
    "pretrain": Passes(1, 1),
    "distill": Passes(1, 1),
    "sft": Passes(3, 2, "upstream's, of data of this size", _STEPS * 4096),
    "reason": Passes(4, 1, "upstream's, of data of this size", _STEPS * 4096),
    "lora": Passes(6, 10, "upstream's, of data of this size", _STEPS * 1024),
    "dpo": Passes(6, 1, "upstream's, of data of this size", _STEPS * 4096),
    # Ouyang et al. 2022 (arXiv 2203.02155, C.2)
    "reward": Passes(6, 1, "more overfit a reward model", _STEPS * 4096),
}


def default_epochs(stage: str, builtin: bool, tokens: int) -> tuple[float, str]:
    """(passes over training data of `tokens` tokens, the reason in one line or empty for the usual number)."""
    rule = PASSES[stage]
    if builtin or not rule.least:
        return float(rule.builtin if builtin else rule.files), ""
    needed = math.ceil(rule.least / max(1, tokens))
    if needed <= rule.files:
        return float(rule.files), f"--epochs {rule.files:g}: {rule.why}"
    epochs = float(min(needed, MOST * rule.files))
    return epochs, (
        f"--epochs {epochs:g}: a pass has only {tokens:,} tokens; a run should see at least {rule.least:,}, in at most "
        f"{MOST * rule.files:g} passes"
    )


# The rule that bench/transfer.py fitted to pretraining with Muon (docs/rates.md). Outside the measured sizes it is
# extrapolated to wider and deeper models only.
_RULE_LR, _WIDTH, _DEPTH, _RULE_STEPS = 7.83e-3, (256, -1.05), (4, -0.40), (50, -0.32)  # (reference, exponent)
_STEPS_BY_WIDTH = 0.16  # what the exponent of the steps gains when the width doubles
_MIN_WIDTH, _MIN_DEPTH, _MIN_STEPS, _MAX_STEPS = 128, 2, 50, 400
_LEAST_SHALLOW = 4  # layers that the rate of a depth warm-up is for; fewer did not learn more at higher rates


def pretraining_lr(
    optimizer: OptimizerName | None, config: ModelConfig, steps: int, otherwise: float, layers: int | None = None
) -> tuple[float, str]:
    """(peak rate of pretraining, the reason in one line). otherwise: the rate for AdamW, which has no rule. layers:
    that most steps train; None: all of them."""
    if optimizer != "muon":
        return otherwise, ""
    width = max(config.hidden_size, _MIN_WIDTH) / _WIDTH[0]
    layers = min(config.num_hidden_layers, max(layers or config.num_hidden_layers, _LEAST_SHALLOW))
    depth = max(layers, _MIN_DEPTH) / _DEPTH[0]
    length = min(max(steps, _MIN_STEPS), _MAX_STEPS) / _RULE_STEPS[0]
    fall = min(0.0, _RULE_STEPS[1] + _STEPS_BY_WIDTH * math.log2(width))
    rate = float(f"{_RULE_LR * width ** _WIDTH[1] * depth ** _DEPTH[1] * length**fall:.2g}")
    return rate, f"--lr {rate:g}: the rule for this width, depth and number of steps (docs/rates.md)"


def default_optimizer(weights: Path | None, adapter: bool = False) -> tuple[OptimizerName, str]:
    """(the optimizer of a run that begins with `weights`, None for random ones; the reason in one line). adapter:
    whether the run trains a low-rank adapter."""
    if adapter:
        return "adamw", "--optimizer adamw: the one for adapters"
    if weights is None:
        return "muon", "--optimizer muon: the weights are random"
    earlier = trained_with(weights)
    if earlier is not None:
        return earlier, f"--optimizer {earlier}: that of the run which made the weights"
    return "adamw", (
        "--optimizer adamw: no run of ours made the weights, and released models come from AdamW, which Muon does not "
        "improve on (docs/training.md)"
    )


def trained_with(weights: Path) -> OptimizerName | None:
    """The optimizer of the run whose folder holds `weights`, or None if no run folder does."""
    for folder in weights.parents[:2]:
        config = read_json(folder / "config.json") or {}
        for flags in (config.get("args"), config.get("chosen")):
            name = flags.get("optimizer") if isinstance(flags, dict) else None
            if name in ("muon", "adamw"):
                return name
    return None
