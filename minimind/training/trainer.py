"""The training loop: forward, backward, clip and update, with logs, checkpoints and exact resume.

A step fetches all its micro-batches first, so that the global number of targets is known, then runs forward and
backward on each, clips and updates. No step waits for the device: losses are read back on log steps only. A checkpoint
is written only when every loss before it and every weight in it is finite. All ranks run this loop; rank 0 alone writes
files and prints.
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
from typing import Any

import torch
from rich.console import Console
from torch import Tensor
from torch.distributed.tensor import DTensor

from minimind.modeling import Model
from minimind.tokenization import Tokenizer
from minimind.training.arguments import StageArgs
from minimind.training.batches import Loader, TrainingPlan, to_device
from minimind.training.checkpoint import best_folder, load_weights_into, save_checkpoint
from minimind.training.evaluation import BestFigure, Evaluation
from minimind.training.metrics import Event, MetricsLog, Tracker, plot_losses
from minimind.training.optim import AVERAGE_FOLDER, ClipGroup, LossScaler, Optimizers, RateSchedule, WeightAverage
from minimind.training.parallel import Parallel
from minimind.training.profiling import StepProfiler
from minimind.training.run_folder import RunFolder, truncate
from minimind.utils.display import Display, duration, say
from minimind.utils.files import sync, write_json
from minimind.utils.spans import span
from minimind.weights import save_weights

SAVES = 20  # checkpoints of a run by default
SAVE_SHARE = 20  # they take at most one part in so many of its time
StageLoss = tuple[Tensor, Tensor] | tuple[Tensor, Tensor, dict[str, Tensor]]


@dataclass(frozen=True)
class Stage:
    """The functions and settings that a training stage gives to the trainer. All ranks call every function.

    loss(batch): (sum over targets, mean auxiliary loss) of this rank's share, differentiable device scalars; optionally
      also a dict of sums that are logged like the loss.
    evaluate(final): reproducible held-out figures over all ranks.
    sample(): text that is shown and added to samples.txt.
    describe(host batch): list of the batch's contents, for the report on a loss that is not finite.
    data_fingerprint: a run resumes only on data with the same fingerprint.
    peak_lr: the peak learning rate where --lr is not given.
    save_model(whole model, folder) on rank 0 and load_model(model, checkpoint, parallel) on all ranks: how checkpoints
      are written and read.
    place(batch, device, boundaries): moves a loader's batch to the device; see DeviceBatches.
    event(): the Event that occurred while a step's batches were made, or None.
    clip_groups: parameters with their own gradient clipping and learning rate.
    before_update(): called between the last backward and the optimizer step; may remove gradients.
    frozen_models, first_passes, estimate: for --plan: other models that every step runs forward, forward passes over
      the training data before the first step, and the function that makes the plan (None: that of packed data).
    """

    loss: Callable[[Any], StageLoss]
    evaluate: Callable[[bool], dict[str, Any]]
    sample: Callable[[], str]
    describe: Callable[[Any], list[Any]]
    data_fingerprint: str
    peak_lr: float
    save_model: Callable[[Model, Path], None] = save_weights
    load_model: Callable[[Model, Path, Parallel], None] = load_weights_into
    place: Callable[..., Any] = to_device
    loss_unit: str = "nats per token"
    event: Callable[[], Event | None] = lambda: None
    clip_groups: Sequence[ClipGroup] = ()
    before_update: Callable[[], None] = lambda: None
    frozen_models: Sequence[Model] = ()
    first_passes: float = 0.0
    estimate: Callable[..., Any] | None = None


class NonFiniteLossError(ValueError):
    """The loss, a gradient or a weight became NaN or infinite. The newest checkpoint is from before that."""


@dataclass
class _StepFigures:
    """The figures of one step, still on the device. scaling: figures of loss scaling; overflowed: whether the step was
    skipped, as a gradient overflowed."""

    step: int
    figures: Tensor  # float32 [3 + n]: this rank's part of loss, auxiliary loss, gradient norm and of `names`
    lr: float
    targets: int
    tokens: int  # up to and including this step
    position: dict[str, Any]  # of the loader before the step
    names: tuple[str, ...] = ()
    event: Event | None = None
    scaling: dict[str, float] = field(default_factory=dict)
    overflowed: bool = False


@dataclass
class Trainer:
    """Trains `model` with the functions of `stage` on the batches of `loader`, which are on the device."""

    args: StageArgs
    plan: TrainingPlan
    stage: Stage
    model: Model
    tokenizer: Tokenizer
    optimizer: Optimizers
    loader: Loader
    schedule: RateSchedule
    run: RunFolder
    tracker: Tracker
    console: Console
    parallel: Parallel = field(default_factory=Parallel)
    profiler: StepProfiler | None = None
    step: int = 0
    targets_seen: int = 0
    seconds: float = 0.0
    interrupted: str | None = None  # name of the signal
    stopping: bool = False  # all ranks know that one of them was interrupted
    saved_at: float = 0.0  # on time.perf_counter's clock
    save_seconds: float = 0.0  # that the newest checkpoint took
    event_line: str = ""  # the newest event's part of the progress line
    pending: list[_StepFigures] = field(default_factory=list)
    average: WeightAverage | None = field(init=False, default=None)
    evaluation: Evaluation = field(init=False)
    scaler: LossScaler = field(init=False)

    def __post_init__(self) -> None:
        self.scaler = LossScaler(self.optimizer, self.device, self.model.compute_dtype)
        if self.args.ema is not None:
            self.average = WeightAverage(self.model, self.args.ema)
        self.evaluation = Evaluation(
            self.stage.evaluate, self.stage.loss_unit, self.args.keeps_best, self.args.patience, self.average
        )

    def fit(self) -> bool:
        """Train to the last step and return True. Ctrl-C or SIGTERM saves after the current step (with several ranks
        after the next log step) and returns False."""
        if self.step == 0:  # a start that was killed before its first checkpoint left lines there
            self._cut_logs(0, 0)
        with ExitStack() as cleanup:
            if self.parallel.main:
                title = f"{self.run.path.name}: {self.model.num_parameters() / 1e6:.1f}M parameters"
                picture = self.run.path / "loss.png"
                cleanup.callback(plot_losses, self.run.metrics, picture, title, self.stage.loss_unit)
            cleanup.callback(self.tracker.finish)
            self.metrics = MetricsLog(self.run.metrics if self.parallel.main else Path(os.devnull))
            cleanup.callback(self.metrics.close)
            self.display = Display(self.console, self.plan.steps, self.step)
            cleanup.callback(self.display.close)
            if self.profiler is not None:
                cleanup.callback(self.profiler.close)
            for number in (signal.SIGINT, signal.SIGTERM):
                cleanup.callback(signal.signal, number, signal.signal(number, self._interrupt))
            return self._run()

    def _run(self) -> bool:
        self.clock, self.clock_step, self.clock_tokens = time.perf_counter(), self.step, self.tokens
        if self.step == 0:
            self._sample()
            self._evaluate()
        while self.step < self.plan.steps and not self.stopping and not self.evaluation.exhausted:
            if self.profiler is not None:
                self.profiler.begin(self.step + 1)
            self._train_step()
            if self.profiler is not None:
                self.profiler.end()
            self._after_step()
        self._save()
        if self.step < self.plan.steps and not self.evaluation.exhausted:
            reason = self.interrupted or "another process was interrupted"
            self.display.say(f"{reason}: stopped at step {self.step}, saved; the same command continues")
            return False
        if self.evaluation.keeps_best:
            if not self.evaluation.exhausted:
                self._evaluate()
            self.display.say(self.evaluation.best.summary())
        self._evaluate(final=True)
        self._sample()
        if self.scaler.enabled:
            self.display.say(self.scaler.summary(self.step))
        if self.parallel.main:
            self.run.mark_finished()
        return True

    def _train_step(self) -> None:
        """One optimizer step: data, forward, backward, clip, update."""
        stage, ranks = self.stage, self.parallel.world_size
        position = self.loader.state()
        with span("data"):
            batches = [self.loader.next_batch() for _ in range(self.plan.micro_batches_of(self.step))]
            event = stage.event()
        targets = sum(batch.global_num_targets for batch in batches)
        weight = sum(batch.global_weight for batch in batches)
        factor = self.schedule.factor(self.plan.place_in_schedule(self.step))
        self.optimizer.set_lr_factor(factor)
        if self.args.momentum_warmup:
            self.optimizer.set_momentum(self.args.momentum(self.step, self.plan.steps))
        self.model.train()
        self.plan.depth.apply(self.model, self.step)
        parts, metrics = [], {}
        for i, batch in enumerate(batches):
            with self.parallel.exchange(last=i == len(batches) - 1):
                with span("forward"):
                    loss, aux, *more = stage.loss(batch)
                    loss, aux = loss / weight, aux * (batch.num_targets / targets)
                # DDP and FSDP average gradients over ranks, but each rank's loss is a part of the sum, not a sample
                with span("backward"):
                    self.scaler.scaled((loss + aux) * ranks).backward()
            if self.args.cuda_graph and i == 0 and len(batches) > 1:
                self.optimizer.own_gradients()  # the graph's next backward would overwrite them in place
            metrics = more[0] if more else {}
            parts.append(torch.stack((loss.detach(), aux.detach(), *(v / weight for v in metrics.values()))))
        self.loader.fetch()  # while the device computes
        scale = self.scaler.scale
        with span("optimizer"):
            self.scaler.unscale()
            norm, *group_norms = self._clip()
            stage.before_update()
            updated = self.scaler.step()
            self.optimizer.zero_grad()
            if self.average is not None and updated:
                self.average.update()
        sums = torch.stack(parts).sum(0)
        figures = torch.cat((sums[:2], norm[None] / ranks, sums[2:], *(n[None] / ranks for n in group_norms)))
        self.step += 1
        self.targets_seen += targets
        names = (*metrics, *(f"{group.name}_grad_norm" for group in stage.clip_groups))
        lr = self.args.peak_lr(stage.peak_lr) * factor
        scaling = {"loss_scale": scale, "overflows": self.scaler.overflows} if self.scaler.enabled else {}
        self.pending.append(
            _StepFigures(self.step, figures, lr, targets, self.tokens, position, names, event, scaling, not updated)
        )

    def _clip(self) -> list[Tensor]:
        """Clip the gradients. Returns their norms before clipping: of the parameters in no clip group, then of each
        group."""
        groups = [list(group.parameters) for group in self.stage.clip_groups]
        grouped = {id(parameter) for group in groups for parameter in group}
        rest = [parameter for parameter in self.model.parameters() if id(parameter) not in grouped]
        norms = [torch.nn.utils.clip_grad_norm_(group, self.args.grad_clip) for group in (rest, *groups)]
        return [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]

    def _after_step(self) -> None:
        """Log, evaluate and save if they are due after this step."""
        last = self.step == self.plan.steps
        evaluate = self.step % math.ceil(self.plan.steps / max(1, self.args.evals)) == 0 and not last
        save_every = self.args.save_every or max(1, self.plan.steps // SAVES)
        save = not last and (self.step == self.schedule.stable_steps or (self.step % save_every == 0 and self._pays()))
        # several ranks learn of an interrupt on log steps: a check at every step would make every step wait
        stop = self.interrupted is not None and self.parallel.world_size == 1
        if last or stop or evaluate or save or self.step % self.args.log_every == 0:
            self._log()
        if evaluate:
            self._evaluate()
            self._sample()
        if save:
            self._save()

    def _pays(self) -> bool:
        """Whether the time since the last checkpoint is long enough for another one. In a short run a twentieth of the
        steps may take less time than a checkpoint. --save-every is always followed. All ranks call it."""
        if self.args.save_every is not None:
            return True
        since = time.perf_counter() - self.saved_at
        return self.parallel.share(lambda: since >= SAVE_SHARE * self.save_seconds)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def tokens(self) -> int:
        """Tokens trained on so far, or targets where the plan has no step_tokens."""
        return self.plan.tokens_before(self.step) or self.targets_seen

    def _log(self) -> None:
        """Sum the pending figures over ranks, read them back in one copy, write them, and show the newest."""
        parts = torch.stack([row.figures for row in self.pending])
        interrupted = parts.new_full((1, parts.shape[1]), self.interrupted is not None)
        *values, (stops, *_) = self.parallel.sum(torch.cat((parts, interrupted))).tolist()
        self.stopping = stops > 0
        now = time.perf_counter()
        elapsed = now - self.clock
        self.seconds += elapsed
        done = self.plan.depth.work(self.clock_step, self.step)
        left = self.plan.depth.work(self.step, self.plan.steps) / max(done, 1e-9)
        rate = (self.tokens - self.clock_tokens) / max(elapsed, 1e-9)
        self.clock, self.clock_step, self.clock_tokens = now, self.step, self.tokens
        newest: dict[str, float] = {}
        for row, numbers in zip(self.pending, values, strict=True):
            newest = self._row(row, *numbers)
            if row.event is not None:
                self._log_event(row.event, row.step)
            counts = {"tokens": row.tokens, "targets": row.targets}
            times = {"tokens_per_second": round(rate, 1), "seconds": round(self.seconds, 3)}
            self.metrics.write("train", row.step, counts | newest, times)
        self.metrics.flush()
        self.pending = []
        self.tracker.log(self.step, newest | {"tokens_per_second": rate})
        self.display.update(
            self.step,
            f"loss {newest['loss']:.3f}  {self.event_line}{self.evaluation.line}lr {newest['lr']:.1e}  "
            f"grad {newest['grad_norm']:.2f}  {rate:,.0f} tokens/s  "
            f"ETA {duration(elapsed * left)}",
        )

    def _row(self, row: _StepFigures, loss: float, aux: float, norm: float, *more: float) -> dict[str, float]:
        """The figures of a step by name. Raises NonFiniteLossError; but a gradient may overflow because of the loss's
        scale, in a step that was skipped."""
        skipped = row.overflowed and row.scaling["loss_scale"] > 1
        if not (math.isfinite(loss) and math.isfinite(aux) and (math.isfinite(norm) or skipped)):
            self._report_non_finite(row, loss, norm)
        named = {"loss": loss, "aux_loss": aux, "grad_norm": norm, "lr": row.lr, **row.scaling}
        return named | dict(zip(row.names, more, strict=True))

    def _log_event(self, event: Event, step: int) -> None:
        self.metrics.write(event.kind, step, event.values, {k: round(v, 3) for k, v in event.seconds.items()})
        self.tracker.log(step, {k: float(v) for k, v in event.values.items()})
        self.event_line = event.line

    def _evaluate(self, final: bool = False) -> None:
        started = time.perf_counter()
        values = self.evaluation.measure(final, lambda line: self.display.say(f"step {self.step}: {line}"))
        if values:
            seconds = {"seconds": round(time.perf_counter() - started, 3)}
            self.metrics.write("eval", self.step, {"tokens": self.tokens, **values}, seconds)
            self.metrics.flush()
            self.tracker.log(self.step, {k: float(v) for k, v in values.items()})
        if not final and self.evaluation.is_best(self.step, values):
            self.evaluation.save_best(self.run.path, self.model, self.tokenizer, self.stage.save_model, self.parallel)
        self.clock = time.perf_counter()

    def _sample(self) -> None:
        try:
            text = self.stage.sample()
        except Exception as problem:  # samples are decoration: a failure must not end the run
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
        """Write a checkpoint. All ranks call it."""
        began = time.perf_counter()
        whole = self.parallel.whole(self.model)
        optimizer = self.optimizer.state_dict(self.model)
        averaged = None  # with FSDP `whole` is a copy, so the averaged weights need one too
        if self.average is not None and self.parallel.strategy == "fsdp":
            with self.average.in_place():
                averaged = self.parallel.whole(self.model)
        self.parallel.share(lambda: self._write(whole, optimizer, averaged))
        self.clock = self.saved_at = time.perf_counter()
        self.save_seconds = self.saved_at - began

    def _write(self, whole: Model | None, optimizer: dict[str, Any], averaged: Model | None) -> None:
        assert whole is not None
        if not torch.stack([p.isfinite().all() for p in whole.parameters()]).all():
            raise NonFiniteLossError(
                f"step {self.step}: a weight is not finite after the update; lower --lr. Checkpoints are from before"
            )
        self.metrics.flush()
        sync(self.run.metrics)  # a crash must not lose lines that the checkpoint counts
        sync(self.run.samples)
        save_checkpoint(
            self.run.path,
            self.step,
            whole,
            self.tokenizer,
            self._state(optimizer),
            self.args.keep_checkpoints,
            partial(self._save_model, averaged),
            self.schedule.stable_steps,
        )

    def _save_model(self, averaged: Model | None, whole: Model, folder: Path) -> None:
        self.stage.save_model(whole, folder)
        if self.average is not None:
            with self.average.in_place() if averaged is None else nullcontext():
                self.stage.save_model(averaged or whole, folder / AVERAGE_FOLDER)
            self.tokenizer.save(folder / AVERAGE_FOLDER)

    def _state(self, optimizer: dict[str, Any]) -> dict[str, Any]:
        """The contents of trainer.pt, which `resume` reads."""
        return {
            "step": self.step,
            "targets_seen": self.targets_seen,
            "seconds": self.seconds,
            "optimizer": optimizer,
            "scaler": self.scaler.state_dict(),
            "loader": self.loader.state(),
            "data": self.stage.data_fingerprint,
            "best": asdict(self.evaluation.best),
            "averaged": self.average.updates if self.average is not None else 0,
            "rng": torch.get_rng_state(),
            "cuda_rng": torch.cuda.get_rng_state(self.device) if self.device.type == "cuda" else None,
            "tracker": {"name": self.tracker.name, "id": self.tracker.run_id},
            "metrics_bytes": self.run.metrics.stat().st_size,
            "samples_bytes": self.run.samples.stat().st_size,
        }

    def resume(self, state: dict[str, Any]) -> None:
        """Continue from `state`, the trainer.pt of the run's checkpoint. Raises ValueError if the data or the tokenizer
        changed."""
        assert self.run.checkpoint is not None
        if _content_hashes(state["data"]) != _content_hashes(self.stage.data_fingerprint):
            raise ValueError(
                f"{self.run.path}: the data or the tokenizer changed since this run began; "
                "put them back or start anew with --resume never"
            )
        self.plan.depth.apply(self.model, state["step"] - 1)
        if note := self.optimizer.load_state_dict(self.model, state["optimizer"]):
            say(self.console, note)
        self.scaler.load_state_dict(state.get("scaler", {}))  # earlier versions had none
        self.stage.load_model(self.model, self.run.checkpoint, self.parallel)
        if self.average is not None:
            self.average.updates = state["averaged"]
            with self.average.in_place():
                self.stage.load_model(self.model, self.run.checkpoint / AVERAGE_FOLDER, self.parallel)
        self.loader.load_state({**state["loader"], "step": state["step"]})
        torch.set_rng_state(state["rng"])
        if self.device.type == "cuda" and state["cuda_rng"] is not None:
            torch.cuda.set_rng_state(state["cuda_rng"], self.device)
        self.step, self.targets_seen = state["step"], state["targets_seen"]
        self.seconds = state["seconds"]
        best = BestFigure(**state.get("best", {}))
        if best_folder(self.run.path, best.step).is_dir():  # a lengthened run may have replaced it since
            self.evaluation.best = best
        self._cut_logs(state["metrics_bytes"], state["samples_bytes"])

    def _cut_logs(self, metrics_bytes: int, samples_bytes: int) -> None:
        if self.parallel.main:
            truncate(self.run.metrics, metrics_bytes)
            truncate(self.run.samples, samples_bytes)

    def _report_non_finite(self, row: _StepFigures, loss: float, norm: float) -> None:
        """Describe the step's batches of all ranks in nonfinite.json, then raise NonFiniteLossError."""
        report = self.run.path / "nonfinite.json"
        self.loader.load_state(row.position)
        descriptions = []
        for _ in range(self.plan.micro_batches_of(row.step - 1)):
            self.loader.next_batch()
            descriptions.append(self.stage.describe(self.loader.host))
        parts = self.parallel.gather(descriptions)
        position = {name: value for name, value in row.position.items() if isinstance(value, int)}
        if self.parallel.main:
            batches = [list(chain(*micro)) for micro in zip(*parts, strict=True)]
            figures = {"step": row.step, "loss": str(loss), "grad_norm": str(norm)}
            write_json(report, figures | {"position": position, "batches": batches})
        other = ", or take --precision fp32: fp16 ends at 65,504" if self.scaler.enabled else ""
        raise NonFiniteLossError(
            f"step {row.step}: loss {loss}, gradient norm {norm}. The batch is described in {report}; look at its "
            f"documents or lower --lr{other}. Checkpoints are from before this step"
        )

    def _interrupt(self, number: int, _frame: Any) -> None:
        if self.interrupted is not None:
            raise KeyboardInterrupt
        self.interrupted = signal.Signals(number).name


def _content_hashes(fingerprint: str) -> tuple[str, str]:
    """(hash of the data, hash of the model that it was made with, if any). The model's name between them may change."""
    words = fingerprint.split() or [""]
    return words[0], words[-1]
