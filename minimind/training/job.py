"""What all stages do alike: from the flags to the device, the run folder, the model, the loop and its last line.

job = Job.begin("sft", args, console)              device, processes, precision, tokenizer, shape
args = job.settle("seq_len", rule)                 what flags leave to the data, as the run began with it
plan = job.plan(make_loader)                       batches and the number of steps
job.open_run()                                     the run folder, locked; where to continue
model, trained = job.build_model()                 the weights, and what trains them
return job.fit(plan, model, objective, lines)      to the last step
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from rich.console import Console

from minimind import ops
from minimind.config import ModelConfig
from minimind.data import Corpus
from minimind.modeling import Model
from minimind.ops import varlen
from minimind.ops.attention import attention_name
from minimind.tokenization import Tokenizer
from minimind.training.arguments import StageArgs
from minimind.training.averaging import FOLDER as AVERAGE
from minimind.training.batches import DeviceBatches, to_device
from minimind.training.checkpoint import list_checkpoints, load_weights_into, share_trainer_state
from minimind.training.compiling import compile_model
from minimind.training.estimate import Estimate, PlanOnly, estimate
from minimind.training.identity import Defaults
from minimind.training.lengthen import Curve, Legs, describe_rates, find_source, rate_factor
from minimind.training.memory import GPU_BATCH, MOST_TOKENS, halved, tokens_that_fit
from minimind.training.optim import Optimizers, build_optimizers, cooldown_steps, lr_factor
from minimind.training.origin import InitialModel
from minimind.training.parallel import Parallel
from minimind.training.profiling.profiler import StepProfiler, mark_blocks
from minimind.training.run_folder import RunFolder, find_run, open_run, record_versions
from minimind.training.tracking import make_tracker
from minimind.training.trainer import ClipGroup, Event, Loader, LoopOptions, Stage, StageLoss, Trainer
from minimind.utils.device import Precision, choose_precision, describe_device, keep_sums_float32
from minimind.utils.display import say
from minimind.utils.spans import nvtx_mode
from minimind.weights import fingerprint, save_weights


class EpochLoader(Protocol):
    """A loader on the host that knows how long a pass over its data is."""

    @property
    def tokens_per_epoch(self) -> int:
        """Tokens of one pass, padding left out."""

    @property
    def fill(self) -> float:
        """Share of the positions of a batch that hold tokens."""

    @property
    def view(self) -> Corpus:
        """The documents."""


@dataclass(frozen=True)
class TrainingPlan:
    """What is trained on: the host's loader, or one whose batches are on the device; the steps, and the tokens of one,
    0 where they vary."""

    loader: Any
    steps: int
    micro_batches: int
    step_tokens: int


@dataclass(frozen=True)
class Objective:
    """What a stage minimises, measures and shows; the functions are those of `Stage`, which says more."""

    loss: Callable[[Any], StageLoss]
    evaluate: Callable[[bool], dict[str, Any]]
    sample: Callable[[], str]
    describe: Callable[[Any], list[Any]]
    data_fingerprint: str
    peak_lr: float  # where --lr is not given
    save_model: Callable[[Model, Path], None] = save_weights
    load_model: Callable[[Model, Path, Parallel], None] = load_weights_into
    place: Callable[..., Any] = to_device  # the loader's batches on the device, as DeviceBatches says
    loss_unit: str = "nats per token"
    news: Callable[[], Event | None] = lambda: None
    apart: Sequence[ClipGroup] = ()
    before_update: Callable[[], None] = lambda: None
    others: Sequence[Model] = ()  # frozen models that a step goes through as well
    first_passes: float = 0.0  # forwards over the training data before the first step
    estimate: Callable[..., Estimate] = estimate  # of a run, for --plan


@dataclass
class Job:
    """One process of one run of a stage."""

    stage: str
    args: StageArgs
    console: Console
    parallel: Parallel
    device: torch.device
    precision: Precision
    origin: InitialModel
    attention: str  # which form of it runs, in one line
    given: StageArgs = field(init=False)  # the flags as they were given; args: with what the data decided
    notes: list[str] = field(default_factory=list)  # lines about what was decided
    remembered: list[str] = field(default_factory=list)  # what an earlier start of this run decided
    shortened: float = 0.0  # share of the documents that were cut before they came to the loader
    make_loader: Callable[..., EpochLoader] = field(init=False, repr=False)
    run: RunFolder = field(init=False)
    state: dict[str, Any] = field(init=False)  # the trainer's, of the checkpoint
    references: dict[str, str] = field(default_factory=dict)  # fingerprints of other models that it learns by
    planned: Callable[[dict[str, Any]], int] = field(
        init=False, repr=False
    )  # steps that flags of a run's length come to

    def __post_init__(self) -> None:
        self.given = self.args

    @staticmethod
    def begin(stage: str, args: StageArgs, console: Console) -> Job:
        """Check the flags, choose device and precision, set the ops' mode, find tokenizer and shape."""
        args.check()
        parallel = Parallel.from_env(args.parallel, args.replicas, args.reduce_dtype)
        device = parallel.choose_device(args.device)
        if args.cuda_graph and device.type != "cuda":
            raise ValueError(f"--cuda-graph: there is none on {device}; drop the flag")
        if args.cuda_graph and parallel.strategy == "fsdp":
            raise ValueError("--cuda-graph: FSDP's weights are in another place each time; take --parallel ddp")
        precision = choose_precision(device, args.precision)
        keep_sums_float32()
        ops.set_mode("fused" if args.fused else "reference")
        origin = InitialModel.of(args, console)
        if args.seq_len is not None and args.seq_len > origin.config.positions:
            raise ValueError(
                f"{args.row_flags} {args.seq_len}: the model knows {origin.config.positions} positions; take no more "
                "tokens"
            )
        attention = _choose_attention(args, device, precision, origin.config)
        parallel.join(device)
        return Job(stage, args, console, parallel, device, precision, origin, attention)

    def refer(self, name: str, weights: Path) -> None:
        """The run learns by the weights in this folder or file too, so that other ones make another run: a teacher, a
        reward model, an adapter to go on with. Before the first `settle`."""
        assert "chosen" not in vars(self)
        self.references[name] = fingerprint(weights).split()[-1]

    @cached_property
    def chosen(self) -> dict[str, Any]:
        """What is not in the flags and decides what is computed: of an unfinished run that goes on, as it began."""
        if self.given.plan:
            return {}
        where, given = (self.given.out, self._name), self.given
        return self.parallel.share(
            lambda: find_run(*where, self._identity(), given.resume, self._defaults, lengthen=given.lengthen)
        )

    def settle(self, name: str, rule: Callable[[], tuple[Any, str]]) -> Any:
        """The flag `name`, or where it was left to the data (None) or is no flag what rule() -> (value, reason in one
        line) says at a run's first start and the run folder ever after. Sets the flag in `args`."""
        is_flag = hasattr(self.args, name)
        if is_flag and getattr(self.given, name) not in (None, self._defaults.flags.get(name)):
            return getattr(self.given, name)
        if name in self.chosen:
            label = f"--{name.replace('_', '-')}" if is_flag else name.replace("_", " ")
            told = f"{label} {self.chosen[name]}"
            self.remembered += [] if told in self.remembered else [told]
        else:
            self.chosen[name], reason = rule()
            if reason:
                self.notes.append(reason)
        if is_flag:
            self.args = dataclasses.replace(self.args, **{name: self.chosen[name]})
        return self.chosen[name]

    @property
    def tokenizer(self) -> Tokenizer:
        return self.origin.tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.origin.config

    def plan(self, make_loader: Callable[..., EpochLoader]) -> TrainingPlan:
        """make_loader(rows=, rank=, world_size=) -> the loader of this rank; rows are those of all ranks together."""
        args = self.args
        rows, micro_batches = self._batch_shape()
        self.make_loader = make_loader
        loader = make_loader(rows=rows, rank=self.parallel.rank, world_size=self.parallel.world_size)
        shape = self._fitted(loader, rows, micro_batches)
        if shape != (rows, micro_batches):
            rows, micro_batches = shape
            loader = make_loader(rows=rows, rank=self.parallel.rank, world_size=self.parallel.world_size)
        step_tokens = rows * args.row * micro_batches

        def planned(flags: dict[str, Any]) -> int:
            tokens, epochs = flags["tokens"], flags["epochs"]
            budget = tokens if tokens is not None else epochs * args.scale * loader.tokens_per_epoch / loader.fill
            return max(1, math.ceil(budget / step_tokens))

        self.planned = planned
        steps = planned(vars(args))
        if getattr(loader, "mixture", None):
            loader.horizon = steps * micro_batches * rows  # type: ignore[attr-defined]
        return TrainingPlan(loader, steps, micro_batches, step_tokens)

    def open_run(self) -> None:
        """Continue the unfinished run of these flags and weights, or make a new folder."""
        if self.given.plan:
            self.run, self.state = RunFolder(Path("runs") / self._name, None, None), {"step": 0}
            return
        self.run = self.parallel.share(self._open_run)
        if self.parallel.main:
            attention = attention_name(self.device, self.precision.compute_dtype, self.args.fused)
            record_versions(self.run, f"{describe_device(self.device)}; {self.parallel}", attention)
        self.state = {"step": 0, "tracker": {}}
        if self.run.checkpoint is not None:
            self.state = share_trainer_state(self.run.checkpoint, self.parallel)
        if self.run.lengthens:  # a tracker's curve is that of one run
            self.state["tracker"] = {}
        self.notes += self.run.notes

    def _open_run(self) -> RunFolder:
        config, given = self._identity() | {"chosen": self.chosen}, self.given
        source = None
        if given.lengthen is not None:
            source = find_source(given.lengthen, config, self._defaults, self.planned, self._flat_steps)
        return open_run(given.out, self._name, config, given.resume, defaults=self._defaults, source=source)

    def build_model(
        self, prepare: Callable[[Model], None] | None = None, make: Callable[[Model], Model] | None = None
    ) -> tuple[Model, Model]:
        """(the model, the module whose forward and backward train it: replicated, sharded, compiled).

        prepare: what is done to the model on its device before that: adapters, frozen parts. make: another one made of
        it, such as one with a critic.
        """
        torch.manual_seed(self.args.seed)
        model = self.place(self.origin.model())
        model.recompute = self.args.recompute
        if prepare is not None:
            prepare(model)
        if make is not None:
            model = make(model)
        if self.args.profile or nvtx_mode():
            mark_blocks(model)
        trained = cast(Model, self.parallel.wrap(model))
        if self.args.compile:  # sampling and evaluation stay eager: their shapes differ from step to step
            trained = compile_model(trained, self.args.cuda_graph, whole=self.parallel.strategy == "none")
        return model, trained

    def place(self, model: Model) -> Model:
        """On the device, computing in the run's precision: also for a teacher or a reference model."""
        model = model.to(self.device)
        model.compute_dtype = self.precision.compute_dtype
        return model

    def fit(self, plan: TrainingPlan, model: Model, objective: Objective, lines: Sequence[str] = ()) -> bool:
        """Train to the last step; False when it was interrupted. lines: what is printed about the data at start."""
        if self.given.plan:
            raise PlanOnly(objective.estimate(self, plan, model, objective, lines))
        args, parallel, start = self.args, self.parallel, self.state["step"]
        self._say_what_runs(plan, model, lines)
        stage = self._stage(plan, model, objective)
        track = args.track if parallel.main else "none"
        flags = self._saved() | self.chosen
        tracker = make_tracker(track, self.run.path, flags, self.state["tracker"], start)
        profiler = None
        if args.profile and parallel.main:
            profiler = StepProfiler(self.run.path / "profile", self.console)
        trainer = Trainer(stage, self._options(plan), self.run, tracker, self.console, parallel, profiler)
        if self.run.checkpoint is not None:
            trainer.resume(self.state)
        self.state = {}  # a copy of the optimizer's
        if not trainer.fit():
            return False
        if args.ema is not None:
            newest = list_checkpoints(self.run.path)[-1] if parallel.main else self.run.path
            say(self.console, f"the averaged weights: --model or --from {newest / AVERAGE}")
        say(self.console, f"finished in {self.run.path}: see loss.png and samples.txt")
        return True

    def _stage(self, plan: TrainingPlan, model: Model, objective: Objective) -> Stage:
        args = self.args
        peak = args.lr if args.lr is not None else objective.peak_lr
        curve, legs, rise = self._curve(plan.steps)
        if legs:
            say(self.console, describe_rates(curve, plan.steps, legs, rise))
        return Stage(
            model=model,
            tokenizer=self.tokenizer,
            optimizer=self.optimizers(model, objective, peak),
            loader=self._on_device(plan.loader, objective),
            loss=objective.loss,
            peak_lr=peak,
            lr_factor=lambda step: rate_factor(curve, step, plan.steps, legs, rise),
            evaluate=self._against_chance(objective),
            sample=objective.sample,
            describe=objective.describe,
            title=f"{self.run.path.name}: {model.num_parameters() / 1e6:.1f}M parameters",
            data_fingerprint=objective.data_fingerprint,
            save_model=objective.save_model,
            load_model=objective.load_model,
            loss_unit=objective.loss_unit,
            news=objective.news,
            apart=objective.apart,
            before_update=objective.before_update,
        )

    def _against_chance(self, objective: Objective) -> Callable[[bool], dict[str, Any]]:
        """The stage's held-out figures. Says so where the weights that a run begins with predict worse than a guess: a
        .pth brings no tokenizer, so that nothing else tells a wrong one."""
        uniform = math.log(self.tokenizer.vocab_size)
        first = self.state["step"] == 0 and self.origin.weights is not None
        unsure = first and objective.loss_unit == "nats per token"

        def evaluate(final: bool) -> dict[str, Any]:
            nonlocal unsure
            found = objective.evaluate(final)
            if unsure and found.get("heldout_loss", 0.0) > uniform:
                say(
                    self.console,
                    f"warning: {self.origin.weights} predicts held-out tokens at {found['heldout_loss']:.2f} nats, "
                    f"worse than a guess ({uniform:.2f}): is this the tokenizer that it was trained with?",
                )
            unsure = False
            return found

        return evaluate

    def _curve(self, steps: int) -> tuple[Curve, Legs, int]:
        """(the schedule, the lengths that the run had before this one, the steps of its warm-up)."""
        args, legs = self.args, self.run.legs
        warmup = max(1, round(args.warmup * (legs[0][0] if legs else steps)))
        final = 0.1 if args.final_lr is None else args.final_lr

        def curve(step: int, steps: int) -> float:
            return lr_factor(args.schedule, step, steps, warmup, final, self._cooldown)

        return curve, legs, warmup

    @property
    def _cooldown(self) -> float:
        return 0.2 if self.args.cooldown is None else self.args.cooldown

    def _flat_steps(self, steps: int) -> int:
        """After how many of `steps` steps a longer run can go on at the rate there is: with --schedule wsd where the
        cooldown begins, else after all that were done."""
        return steps - cooldown_steps(steps, self._cooldown) if self.args.schedule == "wsd" else steps

    def optimizers(self, model: Model, objective: Objective, peak: float) -> Optimizers:
        """As the flags say, with the parts' own multiples of `peak`."""
        args = self.args
        assert args.optimizer is not None
        momentum = 0.95 if args.muon_momentum is None else args.muon_momentum
        optimizer = build_optimizers(model, args.optimizer, peak, args.weight_decay, args.betas, momentum)
        for end, rate in args.lr_multiples().items():
            if rate != 1:
                optimizer.set_rate([p for name, p in model.named_parameters() if name.endswith(end)], rate)
        for part in objective.apart:
            optimizer.set_rate(part.parameters, part.rate)
        return optimizer

    def _on_device(self, loader: Any, objective: Objective) -> Loader:
        placed = hasattr(loader, "fetch")
        return loader if placed else DeviceBatches(loader, self.device, objective.place)

    def _options(self, plan: TrainingPlan) -> LoopOptions:
        args = self.args
        return LoopOptions(
            steps=plan.steps,
            micro_batches=plan.micro_batches,
            tokens_per_step=plan.step_tokens,
            grad_clip=args.grad_clip,
            log_every=args.log_every,
            eval_every=math.ceil(plan.steps / max(1, args.evals)),
            save_every=args.save_every or max(1, plan.steps // 20),
            keep_checkpoints=args.keep_checkpoints,
            branch=self._flat_steps(plan.steps),
            keep_best=args.keep_best or args.patience is not None,
            patience=args.patience,
            own_gradients=args.cuda_graph,
            ema=args.ema,
        )

    def _say_what_runs(self, plan: TrainingPlan, model: Model, lines: Sequence[str]) -> None:
        size = f" of {plan.step_tokens:,} tokens" if plan.step_tokens else ""
        resumed = f", continuing after step {self.state['step']}" if self.run.checkpoint else ""
        for line in (
            f"device: {describe_device(self.device)}; {self.parallel}",
            f"precision: {self.precision}",
            ops.describe(self.device),
            *([self.attention] if self.attention else []),
            f"model: {self.origin.preset}, {model.num_parameters() / 1e6:.1f}M parameters "
            f"({model.num_parameters(active=True) / 1e6:.1f}M active), "
            f"{model.flops_per_token(self.args.row) / 1e6:.0f} MFLOP per token trained, "
            f"{model.kv_bytes_per_token() / 1024:.1f} KiB of bf16 KV per token",
            *([f"weights: {self.origin.weights}"] if self.origin.weights else []),
            *lines,
            *self.notes,
            *([f"as this run began: {', '.join(self.remembered)}"] if self.remembered else []),
            f"run: {self.run.path}, {plan.steps} steps{size}{resumed}",
        ):
            say(self.console, line)

    def _saved(self) -> dict[str, Any]:
        """The flags as config.json has them."""
        return self.given.saved() | ({} if self.given.from_ else {"preset": self.origin.preset})

    @property
    def _name(self) -> str:
        """Of the run folder."""
        return f"{self.stage}-{self.origin.preset}-{self.given.data_name}"

    @property
    def _defaults(self) -> Defaults:
        return Defaults(type(self.given)().saved(), self.given.legacy)

    def _identity(self) -> dict[str, Any]:
        """What makes a run this run and no other."""
        weights = self.origin.fingerprint()
        identity = {
            "stage": self.stage,
            "args": self._saved(),
            "model": self.config.to_dict(),
            "tokenizer": self.tokenizer.fingerprint,
            "references": self.references,
        }
        return identity if weights is None else identity | {"weights": weights}

    def _fitted(self, loader: EpochLoader, rows: int, micro_batches: int) -> tuple[int, int]:
        """_batch_shape of a step that a pass over the data has rows for, where --batch-tokens does not say; a run goes
        on with what it began with. What data smaller than a step comes to is noted in one line."""
        row, step, ranks = self.args.row, rows * micro_batches, self.parallel.world_size
        there = max(1, round(loader.tokens_per_epoch * self.args.scale / loader.fill / row))  # rows of a pass
        if step <= there:
            return rows, micro_batches
        taken = step
        if self.given.batch_tokens is None:
            part = rows if self.args.micro_tokens or rows <= there else ranks  # the step is a multiple of it
            fitting = max(part, there // part * part) * row
            kept = self.settle("step", lambda: (fitting, ""))
            taken = step if kept == "usual" else kept // row
        said = "--batch-tokens sets another" if self.given.batch_tokens is None else "lower --batch-tokens"
        size = f"{loader.view.num_documents:,} documents, {loader.tokens_per_epoch:,} tokens in {there:,} rows"
        self.notes.append(
            f"little data: {size} of {row}, less than a step of {step * row:,} tokens; a step takes {taken * row:,}, "
            f"each row {taken / there:.1f} times; {said}"
        )
        return (rows, micro_batches) if taken == step else self._batch_shape(taken * row)

    def _batch_shape(self, batch_tokens: int | None = None) -> tuple[int, int]:
        """(rows of a micro-batch, micro-batches of a step)."""
        args, ranks = self.args, self.parallel.world_size
        batch_tokens = batch_tokens or self.settle("batch_tokens", lambda: (self.usual_batch, ""))
        micro_tokens = args.micro_tokens or self._micro_tokens(batch_tokens)
        if batch_tokens % micro_tokens or micro_tokens % args.row:
            raise ValueError(
                f"--batch-tokens {batch_tokens} must be a multiple of --micro-tokens {micro_tokens}, "
                f"and that of --seq-len {args.seq_len}"
            )
        if micro_tokens < ranks * args.row:
            raise ValueError(
                f"--micro-tokens {micro_tokens}: fewer than a row of --seq-len {args.seq_len} for each of {ranks} "
                f"processes; use {ranks * args.row} or more, or fewer processes"
            )
        return micro_tokens // args.row, batch_tokens // micro_tokens

    @property
    def usual_batch(self) -> int:
        """Tokens of an optimizer step where neither flag nor data say."""
        return GPU_BATCH if self.rules == "cuda" and self.origin.preset != "nano" else 4096

    @property
    def rules(self) -> str:
        """The type of device whose defaults are taken."""
        return "cuda" if self.args.plan_gpu else self.device.type

    def longest_row(self, most: int = 4096) -> int:
        """The longest row, a power of two up to `most`, that divides the tokens of a step and of a micro-batch, leaves
        every process one, and of which one fits into the memory of a GPU; 512 where that would be shorter."""
        args, ranks = self.args, self.parallel.world_size
        batch = args.batch_tokens or self.usual_batch
        parts = [batch, args.micro_tokens or batch]
        fits, row = min(_fitting(self.config, self.device, args.recompute), self.config.positions), most
        while row > 512 and (any(part % row or part < ranks * row for part in parts) or row > fits):
            row //= 2
        return row

    def _micro_tokens(self, batch_tokens: int) -> int:
        """All of the step's tokens, halved until a part is small enough for a GPU's memory."""
        ranks = self.parallel.world_size
        limit = min(MOST_TOKENS, ranks * _fitting(self.config, self.device, self.args.recompute))
        return halved(batch_tokens, limit, self.args.row, ranks)


def _fitting(config: ModelConfig, device: torch.device, recompute: bool) -> int:
    """Tokens of a forward and backward that fit into the memory of one GPU; elsewhere there is no limit."""
    if device.type != "cuda":
        return 1 << 62
    memory = torch.cuda.get_device_properties(device).total_memory
    with torch.device("meta"):
        parameters = Model(config).num_parameters()
    return tokens_that_fit(config, parameters, memory, recompute)


def _choose_attention(args: StageArgs, device: torch.device, precision: Precision, config: ModelConfig) -> str:
    """What --attention comes to, in one line, empty where there is no choice. Raises ValueError."""
    if not args.fused:
        if args.attention != "auto":
            raise ValueError(f"--attention {args.attention}: not with --no-fused, which takes plain attention")
        return ""
    heads = varlen.Heads(
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, precision.compute_dtype
    )
    return varlen.choose(args.attention, device, heads)
