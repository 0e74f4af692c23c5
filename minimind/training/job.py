"""The frame of a stage's script: from the command line to the device, the run folder, the model, training and exit.

run_script(main, Args, __doc__)                    parse the flags, call main, exit with a status; main then calls:
job = Job.begin("sft", args, console)              device, processes, precision, tokenizer, model shape
value = job.settle("seq_len", rule)                a flag left to the data: chosen once, kept by a resumed run
plan = job.plan(make_loader)                       batches and the number of steps
job.open_run()                                     the run folder, locked; a checkpoint to resume from
model, trained = job.build_model()                 the weights, and the module to train
return job.fit(plan, model, stage, lines)          train to the last step
"""

from __future__ import annotations

import dataclasses
import json
import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NoReturn, TypeVar, cast

import torch
from rich.console import Console
from torch import nn

from minimind import ops
from minimind.config import ModelConfig
from minimind.kernels.triton_support import kernels_fingerprint
from minimind.modeling import Model
from minimind.ops import varlen
from minimind.ops.attention import attention_name
from minimind.tokenization import Tokenizer
from minimind.training.arguments import StageArgs
from minimind.training.batches import (
    DeviceBatches,
    EpochLoader,
    Growth,
    TrainingPlan,
    choose_batch_shape,
    growing_steps,
)
from minimind.training.checkpoint import list_checkpoints, share_trainer_state
from minimind.training.depth import DepthWarmup
from minimind.training.estimate import estimate
from minimind.training.evaluation import warn_of_chance
from minimind.training.identity import Defaults, find_source
from minimind.training.initial_model import InitialModel
from minimind.training.metrics import make_tracker
from minimind.training.optim import AVERAGE_FOLDER, Optimizers, build_optimizers
from minimind.training.parallel import Parallel, leave, rank
from minimind.training.plan import PlanOnly, survey
from minimind.training.profiling import StepProfiler, mark_blocks
from minimind.training.run_folder import RunFolder, find_run, open_run, record_versions
from minimind.training.trainer import Stage, Trainer
from minimind.utils.device import Precision, choose_precision, describe_device, keep_sums_float32
from minimind.utils.display import say
from minimind.utils.files import cache_root, is_disk_full
from minimind.utils.spans import nvtx_mode
from minimind.utils.startup import command_line, prepare_output, started
from minimind.weights import fingerprint

Args = TypeVar("Args", bound=StageArgs)


def run_script(main: Callable[[Args, Console], bool], args: type[Args], description: str | None) -> NoReturn:
    """Parse the flags of `args`, call main(flags, console), and exit: 0 when main returns True, 130 when training was
    interrupted, 2 after one line about bad input, for which main raises ValueError."""
    prepare_output()
    parsed = command_line(args, description)
    console = Console(quiet=rank() > 0)
    started()
    try:
        if parsed.plan:
            _show_plan(main, parsed, console)
            sys.exit(0)
        done = main(parsed, console)
    except (ValueError, OSError) as problem:  # OSError: a full disk, a folder without permission
        full = isinstance(problem, OSError) and is_disk_full(problem)
        line = f"error: {problem}" + ("; free some space, then run the same command again" if full else "")
        try:
            say(console, line)
        except OSError:  # standard output itself failed, such as a log on a full disk
            print(line, file=sys.stderr)
        if rank() > 0:  # rank 0 may not have failed, and others print nothing
            print(f"rank {rank()}: error: {problem}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        sys.exit(130)
    leave()
    sys.exit(0 if done else 130)


def _show_plan(main: Callable[[Args, Console], bool], args: Args, console: Console) -> None:
    plan = survey(main, args)
    for line in plan.lines():
        say(console, line)
    if args.plan_json is not None:
        Path(args.plan_json).expanduser().write_text(json.dumps(plan.figures(), indent=1) + "\n")


@dataclass
class Job:
    """One process of one run of a stage."""

    stage: str
    args: StageArgs  # the flags, with a value for each that was left open
    console: Console
    parallel: Parallel
    device: torch.device
    precision: Precision
    initial: InitialModel
    attention: str  # one line about the attention kernel; empty where there is no choice
    flags: StageArgs = field(init=False)  # as given on the command line
    notes: list[str] = field(default_factory=list)  # a line for each value that was settled now
    remembered: list[str] = field(default_factory=list)  # values that an earlier start of this run settled
    shortened: float = 0.0  # share of the documents that were cut before they reached the loader
    make_loader: Callable[..., EpochLoader] = field(init=False, repr=False)
    run: RunFolder = field(init=False)
    state: dict[str, Any] = field(init=False)  # the trainer's state in the checkpoint
    decided: set[str] = field(default_factory=set)  # what `settle` decided in this process
    legacy: dict[str, Any] = field(default_factory=dict)  # like StageArgs.legacy, for defaults that depend on the model
    references: dict[str, str] = field(default_factory=dict)  # fingerprints of other models that the run learns from
    count_steps: Callable[[dict[str, Any]], int] = field(init=False, repr=False)  # (flags of a run's length) -> steps

    def __post_init__(self) -> None:
        self.flags = self.args

    @staticmethod
    def begin(stage: str, args: StageArgs, console: Console) -> Job:
        """Check the flags, choose the device and precision, set the mode of the ops, find the tokenizer and the model's
        shape."""
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
        initial = InitialModel.from_args(args, console)
        if args.seq_len is not None and args.seq_len > initial.config.positions:
            raise ValueError(
                f"{args.row_flags} {args.seq_len}: the model knows {initial.config.positions} positions; take no more "
                "tokens"
            )
        attention = _choose_attention(args, device, precision, initial.config)
        parallel.join(device)
        return Job(stage, args, console, parallel, device, precision, initial, attention)

    @property
    def tokenizer(self) -> Tokenizer:
        return self.initial.tokenizer

    @property
    def config(self) -> ModelConfig:
        return self.initial.config

    @property
    def default_device(self) -> str:
        """The type of device whose defaults are used; --plan-gpu asks for a GPU's."""
        return "cuda" if self.args.plan_gpu else self.device.type

    def add_reference(self, name: str, weights: Path) -> None:
        """Make the weights in this folder or file part of the run's identity: a teacher, a reward model, an adapter to
        continue. Call it before the first `settle`."""
        assert "chosen" not in vars(self)
        self.references[name] = fingerprint(weights).split()[-1]

    @cached_property
    def chosen(self) -> dict[str, Any]:
        """The settled values by name. They change what a run computes, so a resumed run keeps those it began with."""
        if self.flags.plan:
            return {}
        flags = self.flags
        return self.parallel.share(
            lambda: find_run(
                flags.out, self._run_name, self._identity(), flags.resume, self._defaults, lengthen=flags.lengthen
            )
        )

    def settle(self, name: str, rule: Callable[[], tuple[Any, str]]) -> Any:
        """Return the value of flag `name`, or of a choice without a flag, and set the flag in `args`.

        If the user left the flag open (None), rule() -> (value, reason in one line) decides when the run first starts;
        when the run resumes, the value comes from its folder.
        """
        is_flag = hasattr(self.args, name)
        if is_flag and getattr(self.flags, name) not in (None, self._defaults.flags.get(name)):
            return getattr(self.flags, name)
        if name in self.chosen:
            label = f"--{name.replace('_', '-')}" if is_flag else name.replace("_", " ")
            line = f"{label} {self.chosen[name]}"
            known = name in self.decided or line in self.remembered
            self.remembered += [] if known else [line]
        else:
            self.decided.add(name)
            self.chosen[name], reason = rule()
            if reason:
                self.notes.append(reason)
        if is_flag:
            self.args = dataclasses.replace(self.args, **{name: self.chosen[name]})
        return self.chosen[name]

    def plan(self, make_loader: Callable[..., EpochLoader]) -> TrainingPlan:
        """Choose the batch size and count the steps. make_loader(rows=, rank=, world_size=) makes the loader of a rank;
        rows: of a micro-batch over all ranks."""
        args = self.args
        self.make_loader = make_loader
        own = partial(make_loader, rank=self.parallel.rank, world_size=self.parallel.world_size)
        rows, micro_batches, loader = choose_batch_shape(self, lambda rows: own(rows=rows))
        step_tokens = rows * args.row * micro_batches

        def budget(flags: dict[str, Any]) -> float:
            tokens, epochs = flags["tokens"], flags["epochs"]
            return tokens if tokens is not None else epochs * args.scale * loader.tokens_per_epoch / loader.fill

        self.count_steps = lambda flags: max(1, math.ceil(budget(flags) / step_tokens))
        steps, growth = self.count_steps(vars(self.args)), Growth()
        if args.batch_warmup:
            steps, growth = growing_steps(budget(vars(self.args)), step_tokens, args.batch_warmup)
        plan = TrainingPlan(loader, steps, micro_batches, step_tokens, growth)
        if getattr(loader, "mixture", None):
            loader.horizon = plan.tokens_before(steps) // args.row  # type: ignore[attr-defined]
        return plan

    def with_shallow_steps(self, plan: TrainingPlan, model: Model, share: float, layers: int) -> TrainingPlan:
        """`plan` with `share` of its steps, in a lengthened run of its first length, training `layers` layers. Unless
        `share` is 1, the last step trains all."""
        steps = self.run.legs[0][0] if self.run.legs else plan.steps
        depth = DepthWarmup.of(model, min(round(share * steps), steps if share == 1 else steps - 1), layers)
        self.notes.append(depth.describe(model))
        return dataclasses.replace(plan, depth=depth)

    def open_run(self) -> None:
        """Continue the unfinished run of these flags and weights, or make a new folder."""
        if self.flags.plan:
            self.run, self.state = RunFolder(Path("runs") / self._run_name, None, None), {"step": 0}
            return
        self.run = self.parallel.share(self._open_run)
        if self.parallel.main:
            attention = attention_name(self.device, self.precision.compute_dtype, self.args.fused)
            record_versions(self.run, f"{describe_device(self.device)}; {self.parallel}", attention)
        self.state = {"step": 0, "tracker": {}}
        if self.run.checkpoint is not None:
            self.state = share_trainer_state(self.run.checkpoint, self.parallel)
        if self.run.lengthens:  # a tracker's curve belongs to one run
            self.state["tracker"] = {}
        self.notes += self.run.notes

    def _open_run(self) -> RunFolder:
        config, flags = self._identity() | {"chosen": self.chosen}, self.flags
        source = None
        if flags.lengthen is not None:
            source = find_source(
                flags.lengthen,
                config,
                self._defaults,
                self.count_steps,
                lambda steps: self.args.rate_schedule(steps).stable_steps,
            )
        return open_run(flags.out, self._run_name, config, flags.resume, defaults=self._defaults, source=source)

    def build_model(
        self, prepare: Callable[[Model], None] | None = None, make: Callable[[Model], Model] | None = None
    ) -> tuple[Model, Model]:
        """(the model, the module whose forward and backward train it: replicated, sharded, compiled).

        prepare: changes the model on its device first, for example adds an adapter or freezes parts. make: builds the
        model to train from it, for example one with a critic.
        """
        torch.manual_seed(self.args.seed)
        model = self.place(self.initial.load())
        model.recompute = self.args.recompute
        if prepare is not None:
            prepare(model)
        if make is not None:
            model = make(model)
        if self.args.profile or nvtx_mode():
            mark_blocks(model)
        trained = cast(Model, self.parallel.wrap(model))
        if self.args.compile:  # sampling and evaluation stay eager: their shapes vary
            trained = compile_model(trained, self.args.cuda_graph, whole=self.parallel.strategy == "none")
        return model, trained

    def place(self, model: Model) -> Model:
        """`model` on the device, computing in the run's precision; also for a teacher or a reference model."""
        model = model.to(self.device)
        model.compute_dtype = self.precision.compute_dtype
        return model

    def fit(self, plan: TrainingPlan, model: Model, stage: Stage, lines: Sequence[str] = ()) -> bool:
        """Train to the last step; False when training was interrupted. lines: printed at start, about the data."""
        if self.flags.plan:
            raise PlanOnly((stage.estimate or estimate)(self, plan, model, stage, lines))
        self._print_setup(plan, model, lines)
        schedule = self.args.rate_schedule(plan.whole_steps, self.run.legs)
        if schedule.legs:
            say(self.console, schedule.describe())
        trainer = Trainer(
            args=self.args,
            plan=plan,
            stage=dataclasses.replace(stage, evaluate=self._checked_evaluate(stage)),
            model=model,
            tokenizer=self.tokenizer,
            optimizer=self.optimizers(model, stage),
            loader=plan.loader
            if hasattr(plan.loader, "fetch")
            else DeviceBatches(plan.loader, self.device, stage.place),
            schedule=schedule,
            run=self.run,
            tracker=make_tracker(
                self.args.track if self.parallel.main else "none",
                self.run.path,
                self._saved_flags() | self.chosen,
                self.state["tracker"],
                self.state["step"],
            ),
            console=self.console,
            parallel=self.parallel,
            profiler=self._profiler(),
        )
        if self.run.checkpoint is not None:
            trainer.resume(self.state)
        self.state = {}  # it holds a copy of the optimizer's state
        if not trainer.fit():
            return False
        if self.args.ema is not None:
            newest = list_checkpoints(self.run.path)[-1] if self.parallel.main else self.run.path
            say(self.console, f"the averaged weights: --model or --from {newest / AVERAGE_FOLDER}")
        say(self.console, f"finished in {self.run.path}: see loss.png and samples.txt")
        return True

    def optimizers(self, model: Model, stage: Stage) -> Optimizers:
        """The optimizer that the flags name, with the stage's own multiples of the learning rate."""
        args = self.args
        assert args.optimizer is not None and args.muon_iterations is not None and args.muon_block is not None
        optimizer = build_optimizers(
            model,
            args.optimizer,
            args.peak_lr(stage.peak_lr),
            args.weight_decay,
            args.betas,
            args.momentum(0, 1),
            args.muon_row_beta,
            args.cautious_decay,
            args.muon_iterations,
            args.muon_block,
        )
        for end, rate in args.lr_multiples().items():
            if rate != 1:
                optimizer.set_rate([p for name, p in model.named_parameters() if name.endswith(end)], rate)
        for group in stage.clip_groups:
            optimizer.set_rate(group.parameters, group.rate)
        return optimizer

    def _profiler(self) -> StepProfiler | None:
        if not (self.args.profile and self.parallel.main):
            return None
        return StepProfiler(self.run.path / "profile", self.console)

    def _checked_evaluate(self, stage: Stage) -> Callable[[bool], dict[str, Any]]:
        """The stage's evaluation; the first one of a new run warns of weights that predict worse than chance."""
        weights = self.initial.weights
        if self.state["step"] or weights is None or stage.loss_unit != "nats per token":
            return stage.evaluate
        return warn_of_chance(stage.evaluate, self.tokenizer.vocab_size, weights, partial(say, self.console))

    def _print_setup(self, plan: TrainingPlan, model: Model, lines: Sequence[str]) -> None:
        sizes = [f"{tokens:,}" for tokens in (*(tokens for _, tokens in plan.growth), plan.step_tokens)]
        size = f" of {', then '.join(sizes)} tokens" if plan.step_tokens else ""
        resumed = f", continuing after step {self.state['step']}" if self.run.checkpoint else ""
        for line in (
            f"device: {describe_device(self.device)}; {self.parallel}",
            f"precision: {self.precision}",
            ops.describe(self.device),
            *([self.attention] if self.attention else []),
            f"model: {self.initial.preset}, {model.num_parameters() / 1e6:.1f}M parameters "
            f"({model.num_parameters(active=True) / 1e6:.1f}M active), "
            f"{model.flops_per_token(self.args.row) / 1e6:.0f} MFLOP per token trained, "
            f"{model.kv_bytes_per_token() / 1024:.1f} KiB of bf16 KV per token",
            *([f"weights: {self.initial.weights}"] if self.initial.weights else []),
            *lines,
            *self.notes,
            *([f"as this run began: {', '.join(self.remembered)}"] if self.remembered else []),
            f"run: {self.run.path}, {plan.steps} steps{size}{resumed}",
        ):
            say(self.console, line)

    def _saved_flags(self) -> dict[str, Any]:
        """The flags as config.json has them."""
        return self.flags.saved() | ({} if self.flags.from_ else {"preset": self.initial.preset})

    @property
    def _run_name(self) -> str:
        return f"{self.stage}-{self.initial.preset}-{self.flags.data_name}"

    @property
    def _defaults(self) -> Defaults:
        return Defaults(type(self.flags)().saved(), self.flags.legacy | self.legacy)

    def _identity(self) -> dict[str, Any]:
        """The configuration that distinguishes this run from others."""
        weights = self.initial.fingerprint()
        identity = {
            "stage": self.stage,
            "args": self._saved_flags(),
            "model": self.config.to_dict(),
            "tokenizer": self.tokenizer.fingerprint,
            "references": self.references,
        }
        return identity if weights is None else identity | {"weights": weights}


def _choose_attention(args: StageArgs, device: torch.device, precision: Precision, config: ModelConfig) -> str:
    """Select the attention kernel that --attention asks for; one line about it, empty where there is no choice."""
    if not args.fused:
        if args.attention != "auto":
            raise ValueError(f"--attention {args.attention}: not with --no-fused, which takes plain attention")
        return ""
    heads = varlen.Heads(
        config.num_attention_heads, config.num_key_value_heads, config.head_dim, precision.compute_dtype
    )
    return varlen.choose(args.attention, device, heads)


def compile_model(model: nn.Module, cuda_graph: bool = False, whole: bool = True) -> Model:
    """`model` compiled for batches of one shape. The machine code is kept in minimind's cache folder, or where
    TORCHINDUCTOR_CACHE_DIR says, so that a second run compiles nothing.

    whole: as one graph, in which a graph break is an error; DDP and FSDP act between the model's parts and need False.
    cuda_graph: also record forward and backward as CUDA graphs, which saves launch overhead of small models and costs
    memory for a copy of the inputs; an error if that is not possible.
    """
    import torch.compiler.config as settings

    os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(cache_root() / "compiled"))
    user_tag = os.environ.get("TORCH_COMPILE_CACHE_KEY_TAG", "")
    settings.cache_key_tag = f"{user_tag}{kernels_fingerprint()}"
    graphs: dict[str, Any] = {"triton.cudagraphs": True, "triton.cudagraph_or_error": True}
    options = graphs if cuda_graph else None
    return cast(Model, torch.compile(model, fullgraph=whole, dynamic=False, options=options))
