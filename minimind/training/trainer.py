"""The one training loop. A stage gives it a loss, its data and what to show; it does the rest.

Order within a step: fetch the micro-batches, so that the global number of targets is known; forward and backward
of each; clip; update. Nothing on the way waits for the device: losses are read back on log steps only. A
checkpoint is written only after every loss before it and every weight in it was found finite. Of several ranks
all run this loop and rank 0 alone writes and speaks.
"""

from __future__ import annotations

import math
import os
import signal
import time
from collections.abc import Callable, Sequence
from contextlib import ExitStack, nullcontext
from dataclasses import asdict, dataclass, field
from functools import partial
from itertools import chain
from pathlib import Path
from typing import Any, Protocol

import torch
from rich.console import Console
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from minimind.modeling import Model
from minimind.tokenization import Tokenizer
from minimind.training.averaging import FOLDER as AVERAGE
from minimind.training.averaging import WeightAverage
from minimind.training.checkpoint import best_folder, load_weights_into, save_best, save_checkpoint
from minimind.training.heldout import loss_lines, rename
from minimind.training.metrics import MetricsLog, plot_losses
from minimind.training.optim import Optimizers
from minimind.training.parallel import Parallel
from minimind.training.profiling.profiler import StepProfiler
from minimind.training.run_folder import RunFolder, truncate
from minimind.training.tracking import Tracker
from minimind.utils.display import Display, duration, say
from minimind.utils.files import sync, write_json
from minimind.utils.spans import span
from minimind.weights import save_weights


class Loader(Protocol):
    """This rank's parts of the micro-batches, on the device; each knows its num_targets, and of all ranks together
    global_num_targets and global_weight, by which the loss is divided."""

    @property
    def host(self) -> Any:
        """The newest batch as it was on the host, for a post-mortem."""

    def next_batch(self) -> Any: ...

    def fetch(self) -> None:
        """Start bringing the next one."""

    def state(self) -> dict[str, Any]:
        """Where it is: numbers, and what else it needs to go on from there, as plain values and tensors."""

    def load_state(self, state: dict[str, Any]) -> None: ...


StageLoss = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Event:
    """A row of metrics.jsonl of its own `kind`, of all ranks together, before that of the step it comes with. seconds:
    what was measured by the clock; line: for the progress line."""

    kind: str
    values: dict[str, Any]
    seconds: dict[str, float]
    line: str = ""


@dataclass(frozen=True)
class LoopOptions:
    steps: int
    micro_batches: int = 1  # per step
    tokens_per_step: int = 0  # tokens of a step, padding included: the x axis; 0: where it varies, targets instead
    grad_clip: float = 1.0
    log_every: int = 10
    eval_every: int = 100
    save_every: int = 100
    keep_checkpoints: int = 2
    branch: int = 0  # a step whose checkpoint is kept for good, for longer runs to begin with
    keep_best: bool = False
    patience: int | None = None  # evaluations without a better held-out figure after which training ends
    ema: float | None = None  # decay of an average of the weights
    own_gradients: bool = False  # those of a CUDA graph's backward lie in its memory, which it fills anew


@dataclass(frozen=True)
class ClipGroup:
    """Parameters that learn beside the rest of a model, such as a critic's: their gradients are clipped by a norm of
    their own, logged as NAME_grad_norm, and their rate is `rate` times the others'."""

    name: str
    parameters: Sequence[nn.Parameter]
    rate: float = 1.0


@dataclass(frozen=True)
class Stage:
    """What a stage brings.

    loss(batch) -> (sum over targets, mean auxiliary loss) of this rank's part, differentiable device scalars; perhaps a
    third, a dict of sums that are logged as the loss is.
    lr_factor(step) -> share of the peak rate. evaluate(final) -> reproducible held-out figures, of all ranks together.
    sample() -> text shown and kept in samples.txt. describe(host batch) -> list of what was in it, for a post-mortem.
    news() -> what became known while a step's batches were made. All ranks call all of them. save_model(whole model,
    folder), on rank 0, and load_model(model, checkpoint, parallel), on all, for what is trained where that is not the
    whole model. apart: see Apart. before_update() is called between the backwards of a step and the optimizer, and may
    take gradients away.
    """

    model: Model
    tokenizer: Tokenizer
    optimizer: Optimizers
    loader: Loader
    loss: Callable[[Any], StageLoss]
    peak_lr: float
    lr_factor: Callable[[int], float]
    evaluate: Callable[[bool], dict[str, Any]]
    sample: Callable[[], str]
    describe: Callable[[Any], list[Any]]
    title: str
    data_fingerprint: str
    save_model: Callable[[Model, Path], None] = save_weights
    load_model: Callable[[Model, Path, Parallel], None] = load_weights_into
    loss_unit: str = "nats per token"
    news: Callable[[], Event | None] = lambda: None
    apart: Sequence[ClipGroup] = ()
    before_update: Callable[[], None] = lambda: None


def _contents(fingerprint: str) -> tuple[str, str]:
    """Of the data and of a model beside them; not the name that `minimind.weights.fingerprint` puts between."""
    words = fingerprint.split() or [""]
    return words[0], words[-1]


class NonFiniteLossError(ValueError):
    """The loss or a gradient became NaN or infinite. The newest checkpoint is from before that."""


@dataclass
class _Row:
    """One step's figures, still on the device."""

    step: int
    figures: Tensor  # float32 [3 + n]: this rank's part of loss, auxiliary loss, gradient norm, and what `names` are
    lr: float
    targets: int
    tokens: int  # until here
    position: dict[str, Any]
    names: tuple[str, ...] = ()
    news: Event | None = None


@dataclass
class BestLoss:
    """The best held-out figure of those that are measured on one and the same part; since: evaluations after it."""

    step: int = 0
    value: float = math.nan
    since: int = 0

    def take(self, step: int, values: dict[str, Any]) -> bool:
        """Whether the figures of `step` are the best so far: a loss is to be low, a reward high."""
        value, sign = values.get("heldout_loss"), 1
        if value is None:
            value, sign = values["heldout_reward"], -1
        if math.isnan(self.value) or sign * value < sign * self.value:
            self.step, self.value, self.since = step, value, 0
            return True
        self.since += 1
        return False


@dataclass
class Trainer:
    stage: Stage
    options: LoopOptions
    run: RunFolder
    tracker: Tracker
    console: Console
    parallel: Parallel = field(default_factory=Parallel)
    profiler: StepProfiler | None = None
    step: int = 0
    targets_seen: int = 0
    seconds: float = 0.0
    interrupted: str | None = None  # the signal's name
    stopping: bool = False  # all ranks know that one was interrupted
    best: BestLoss = field(default_factory=BestLoss)
    heldout: str = ""  # the newest held-out figure, for the progress line
    newest: str = ""  # the newest of the stage's news, for the same
    pending: list[_Row] = field(default_factory=list)
    average: WeightAverage | None = field(init=False, default=None)

    def __post_init__(self) -> None:
        if self.options.ema is not None:
            self.average = WeightAverage(self.stage.model, self.options.ema)

    @property
    def device(self) -> torch.device:
        return self.stage.model.device

    @property
    def tokens(self) -> int:
        """Trained on so far."""
        return self.step * self.options.tokens_per_step or self.targets_seen

    def resume(self, state: dict[str, Any]) -> None:
        """Take everything back to where `state`, the trainer state of the run's checkpoint, was saved."""
        assert self.run.checkpoint is not None
        if _contents(state["data"]) != _contents(self.stage.data_fingerprint):
            raise ValueError(
                f"{self.run.path}: the data or the tokenizer changed since this run began; "
                "put them back or start anew with --resume never"
            )
        if note := self.stage.optimizer.load_state_dict(self.stage.model, state["optimizer"]):
            say(self.console, note)
        self.stage.load_model(self.stage.model, self.run.checkpoint, self.parallel)
        if self.average is not None:
            self.average.updates = state["averaged"]
            with self.average.in_place():
                self.stage.load_model(self.stage.model, self.run.checkpoint / AVERAGE, self.parallel)
        self.stage.loader.load_state({**state["loader"], "step": state["step"]})
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.step, self.targets_seen = state["step"], state["targets_seen"]
        self.seconds = state["seconds"]
        best = BestLoss(**state.get("best", {}))
        if best_folder(self.run.path, best.step).is_dir():  # a lengthened run's may have been replaced since
            self.best = best
        self._cut_logs(state["metrics_bytes"], state["samples_bytes"])

    def fit(self) -> bool:
        """Train to the last step; True when it is done. Ctrl-C or SIGTERM saves after the current step (of several
        ranks, after the next log step) and returns False."""
        if self.step == 0:  # drop what a run killed before its first checkpoint had written
            self._cut_logs(0, 0)
        with ExitStack() as cleanup:
            if self.parallel.main:
                picture, stage = self.run.path / "loss.png", self.stage
                cleanup.callback(plot_losses, self.run.metrics, picture, stage.title, stage.loss_unit)
            cleanup.callback(self.tracker.finish)
            self.metrics = MetricsLog(self.run.metrics if self.parallel.main else Path(os.devnull))
            cleanup.callback(self.metrics.close)
            self.display = Display(self.console, self.options.steps, self.step)
            cleanup.callback(self.display.close)
            if self.profiler is not None:
                cleanup.callback(self.profiler.close)
            for number in (signal.SIGINT, signal.SIGTERM):
                cleanup.callback(signal.signal, number, signal.signal(number, self._interrupt))
            return self._run()

    def _cut_logs(self, metrics_bytes: int, samples_bytes: int) -> None:
        if self.parallel.main:
            truncate(self.run.metrics, metrics_bytes)
            truncate(self.run.samples, samples_bytes)

    def _run(self) -> bool:
        self.clock, self.clock_step, self.clock_tokens = time.perf_counter(), self.step, self.tokens
        if self.step == 0:
            self._sample()
            self._evaluate()
        while self.step < self.options.steps and not self.stopping and not self._enough():
            if self.profiler is not None:
                self.profiler.begin(self.step + 1)
            self._train_step()
            if self.profiler is not None:
                self.profiler.end()
            self._after_step()
        self._save()
        if self.step < self.options.steps and not self._enough():
            reason = self.interrupted or "another process was interrupted"
            self.display.say(f"{reason}: stopped at step {self.step}, saved; the same command continues")
            return False
        self._end_of_best()
        self._evaluate(final=True)
        self._sample()
        if self.parallel.main:
            self.run.mark_finished()
        return True

    def _enough(self) -> bool:
        patience = self.options.patience
        return patience is not None and self.best.since >= patience

    def _end_of_best(self) -> None:
        if not self.options.keep_best:
            return
        if not self._enough():
            self._evaluate()
        best = self.best
        self.display.say(
            f"best held-out figure {best.value:.4f} at step {best.step}, {best.since} evaluations ago; opening the run "
            "takes its weights"
        )

    def _train_step(self) -> None:
        stage, options = self.stage, self.options
        position = stage.loader.state()
        with span("data"):
            batches = [stage.loader.next_batch() for _ in range(options.micro_batches)]
            news = stage.news()
        total = sum(b.global_num_targets for b in batches)
        weight = sum(b.global_weight for b in batches)
        factor = stage.lr_factor(self.step)
        stage.optimizer.set_lr_factor(factor)
        stage.model.train()
        losses, told = [], {}
        ranks = self.parallel.world_size
        for i, batch in enumerate(batches):
            with self.parallel.exchange(last=i == len(batches) - 1):
                with span("forward"):
                    loss, aux, *more = stage.loss(batch)
                    loss, aux = loss / weight, aux * (batch.num_targets / total)
                # DDP and FSDP average gradients over ranks, but each rank's loss is a part of the sum, not a sample
                with span("backward"):
                    ((loss + aux) * ranks).backward()
            if options.own_gradients and i == 0 and len(batches) > 1:
                stage.optimizer.own_gradients()
            told = more[0] if more else {}
            losses.append(torch.stack((loss.detach(), aux.detach(), *(v / weight for v in told.values()))))
        stage.loader.fetch()  # while the device computes
        with span("optimizer"):
            norm, *norms = self._clip()
            sums = torch.stack(losses).sum(0)
            figures = torch.cat((sums[:2], norm[None] / ranks, sums[2:], *(n[None] / ranks for n in norms)))
            stage.before_update()
            stage.optimizer.step()
            stage.optimizer.zero_grad()
            if self.average is not None:
                self.average.update()
        lr = stage.peak_lr * factor
        self.step += 1
        self.targets_seen += total
        names = (*told, *(f"{part.name}_grad_norm" for part in stage.apart))
        self.pending.append(_Row(self.step, figures, lr, total, self.tokens, position, names, news))

    def _clip(self) -> list[Tensor]:
        """Bound the norms of the gradients: (that of the model but for what learns apart, those of these parts)."""
        parts = [list(part.parameters) for part in self.stage.apart]
        own = {id(parameter) for part in parts for parameter in part}
        rest = [parameter for parameter in self.stage.model.parameters() if id(parameter) not in own]
        norms = [torch.nn.utils.clip_grad_norm_(part, self.options.grad_clip) for part in (rest, *parts)]
        return [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]

    def _after_step(self) -> None:
        options = self.options
        last = self.step == options.steps
        evaluate = self.step % options.eval_every == 0 and not last
        save = (self.step % options.save_every == 0 or self.step == options.branch) and not last
        # several ranks learn of an interrupt where they log: looking every step would make every step wait
        stop = self.interrupted is not None and self.parallel.world_size == 1
        if last or stop or evaluate or save or self.step % options.log_every == 0:
            self._log()
        if evaluate:
            self._evaluate()
            self._sample()
        if save:
            self._save()

    def _log(self) -> None:
        """Add up the pending steps over the ranks, read them back in one copy, write them, show the newest."""
        parts = torch.stack([row.figures for row in self.pending])
        interrupted = parts.new_full((1, parts.shape[1]), self.interrupted is not None)
        *values, (stops, *_) = self.parallel.sum(torch.cat((parts, interrupted))).tolist()
        self.stopping = stops > 0
        now = time.perf_counter()
        per_step = (now - self.clock) / max(1, self.step - self.clock_step)
        self.seconds += now - self.clock
        rate = (self.tokens - self.clock_tokens) / max(now - self.clock, 1e-9)
        self.clock, self.clock_step, self.clock_tokens = now, self.step, self.tokens
        for row, (loss, aux, norm, *more) in zip(self.pending, values, strict=True):
            if not all(abs(v) < float("inf") for v in (loss, aux, norm)):
                self._non_finite(row, loss, norm)
            if row.news is not None:
                self._tell(row.news, row.step)
            self.metrics.write(
                "train",
                row.step,
                {
                    "tokens": row.tokens,
                    "targets": row.targets,
                    "loss": loss,
                    "aux_loss": aux,
                    "grad_norm": norm,
                    "lr": row.lr,
                    **dict(zip(row.names, more, strict=True)),
                },
                {"tokens_per_second": round(rate, 1), "seconds": round(self.seconds, 3)},
            )
        self.metrics.flush()
        row, (loss, aux, norm, *more) = self.pending[-1], values[-1]
        told = dict(zip(row.names, more, strict=True))
        self.pending = []
        self.tracker.log(
            row.step,
            {"loss": loss, "aux_loss": aux, "grad_norm": norm, "lr": row.lr, "tokens_per_second": rate, **told},
        )
        left = duration(per_step * (self.options.steps - self.step))
        self.display.update(
            self.step,
            f"loss {loss:.3f}  {self.newest}{self.heldout}lr {row.lr:.1e}  grad {norm:.2f}  "
            f"{rate:,.0f} tokens/s  ETA {left}",
        )

    def _tell(self, news: Event, step: int) -> None:
        self.metrics.write(news.kind, step, news.values, {k: round(v, 3) for k, v in news.seconds.items()})
        self.tracker.log(step, {k: float(v) for k, v in news.values.items()})
        self.newest = news.line

    def _evaluate(self, final: bool = False) -> None:
        started = time.perf_counter()
        values = self.stage.evaluate(final)
        if values and self.average is not None:
            values |= self._of_the_average(self.average, final)
        if values:
            seconds = {"seconds": round(time.perf_counter() - started, 3)}
            self.metrics.write("eval", self.step, {"tokens": self.tokens, **values}, seconds)
            self.metrics.flush()
            self.tracker.log(self.step, {k: float(v) for k, v in values.items()})
            self._say_figures(values, "all of it" if final else "same part each time")
        if self.options.keep_best and not final:
            self._keep_best(values)
        self.clock = time.perf_counter()

    def _of_the_average(self, average: WeightAverage, final: bool) -> dict[str, Any]:
        """The held-out figures of the averaged weights, as those of a set named ema."""
        self.display.say(f"step {self.step}: of the averaged weights:")
        with average.in_place():
            values = self.stage.evaluate(final)
        held = {name: value for name, value in values.items() if name.startswith("heldout_")}
        return {name: value for name, value in rename("ema", held).items() if name != "heldout_all"}

    def _say_figures(self, values: dict[str, Any], scope: str) -> None:
        exact = ""
        if "heldout_exact" in values:
            exact = f"; {values['heldout_exact']:.1%} of {values['heldout_questions']} answers to the letter"
        if "heldout_reward" in values:
            lines = [f"held-out reward {values['heldout_reward']:.4f} a prompt ({scope})"]
            self.heldout = f"held-out {values['heldout_reward']:.3f}  "
        else:
            lines = loss_lines(values, self.stage.loss_unit, scope)
        if "heldout_loss" in values:
            self.heldout = f"held-out {values['heldout_loss']:.3f}  "
        for line in lines:
            self.display.say(f"step {self.step}: {line}{exact}")
            exact = ""

    def _keep_best(self, values: dict[str, Any]) -> None:
        if not values:
            raise ValueError("--keep-best and --patience go by held-out data; hold some out with --heldout")
        if self.best.take(self.step, values):
            whole, stage = self.parallel.whole(self.stage.model), self.stage

            def write() -> None:
                assert whole is not None
                save_best(self.run.path, self.step, whole, stage.tokenizer, stage.save_model)

            self.parallel.share(write)

    def _sample(self) -> None:
        try:
            text = self.stage.sample()
        except Exception as problem:  # a sample is decoration
            text = f"none ({type(problem).__name__}: {problem})"
        if self.parallel.main:
            try:
                with self.run.samples.open("a", encoding="utf-8", errors="backslashreplace") as file:
                    file.write(f"=== step {self.step}\n{text}\n\n")
            except OSError as problem:
                self.display.say(f"{self.run.samples}: not written ({problem})")
        self.display.say(f"samples at step {self.step}\n{text}")
        self.clock = time.perf_counter()

    def _save(self) -> None:
        whole = self.parallel.whole(self.stage.model)
        optimizer = self.stage.optimizer.state_dict(self.stage.model)
        copy = None
        if self.average is not None and self.parallel.strategy == "fsdp":
            with self.average.in_place():
                copy = self.parallel.whole(self.stage.model)
        self.parallel.share(lambda: self._write(whole, optimizer, copy))
        self.clock = time.perf_counter()

    def _write(self, model: Model | None, optimizer: dict[str, Any], copy: Model | None) -> None:
        """The checkpoint, on rank 0. copy: a model with the averaged weights, where `model` cannot take them."""
        assert model is not None
        stage = self.stage
        if not torch.stack([p.isfinite().all() for p in model.parameters()]).all():
            raise NonFiniteLossError(
                f"step {self.step}: a weight is not finite after the update; lower --lr. Checkpoints are from before"
            )
        self.metrics.flush()
        sync(self.run.metrics)  # the sizes below must not outlive the lines they count
        sync(self.run.samples)
        state = {
            "step": self.step,
            "targets_seen": self.targets_seen,
            "seconds": self.seconds,
            "optimizer": optimizer,
            "loader": stage.loader.state(),
            "data": stage.data_fingerprint,
            "best": asdict(self.best),
            "averaged": self.average.updates if self.average is not None else 0,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "tracker": {"name": self.tracker.name, "id": self.tracker.run_id},
            "metrics_bytes": self.run.metrics.stat().st_size,
            "samples_bytes": self.run.samples.stat().st_size,
        }
        save_checkpoint(
            self.run.path,
            self.step,
            model,
            stage.tokenizer,
            state,
            self.options.keep_checkpoints,
            partial(self._save_model, copy),
            self.options.branch,
        )

    def _save_model(self, copy: Model | None, model: Model, folder: Path) -> None:
        self.stage.save_model(model, folder)
        if self.average is not None:
            with self.average.in_place() if copy is None else nullcontext():
                self.stage.save_model(copy or model, folder / AVERAGE)
            self.stage.tokenizer.save(folder / AVERAGE)

    def _non_finite(self, row: _Row, loss: float, norm: float) -> None:
        """Keep what is needed to look at the batch, of all ranks, then stop."""
        report = self.run.path / "nonfinite.json"
        self.stage.loader.load_state(row.position)
        mine = []
        for _ in range(self.options.micro_batches):
            self.stage.loader.next_batch()
            mine.append(self.stage.describe(self.stage.loader.host))
        parts = self.parallel.gather(mine)
        position = {name: value for name, value in row.position.items() if isinstance(value, int)}
        found = {"step": row.step, "loss": str(loss), "grad_norm": str(norm), "position": position}
        if self.parallel.main:
            described = [list(chain(*micro)) for micro in zip(*parts, strict=True)]
            write_json(report, {**found, "batches": described})
        raise NonFiniteLossError(
            f"step {row.step}: loss {loss}, gradient norm {norm}. The batch is described in {report}; look at its "
            "documents or lower --lr. Checkpoints are from before this step"
        )

    def _interrupt(self, number: int, _frame: Any) -> None:
        if self.interrupted is not None:
            raise KeyboardInterrupt
        self.interrupted = signal.Signals(number).name
