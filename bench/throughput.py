"""Compare training steps: throughput and memory of each stage, ours beside other implementations.

    python bench/throughput.py                                       pretraining on the built-in corpus
    python bench/throughput.py --stage pretrain,sft,dpo --data sft=chats.jsonl dpo=pairs.jsonl
    python bench/throughput.py --peer ours,hf,upstream-style --preset minimind2-small,minimind2

Each implementation (bench/training/implementations.py) runs in a process of its own, so that its peak memory is its
own; they take turns, a few steps each. If one fails, the others go on, and the exit status is 1. Positions are all that
a model computes; real tokens are those that are not padding. The padding of upstream's rows is counted over all of the
data and shown below the table. For a step that took much longer than the others, a line shows where its time went.

Rows are added to throughput.csv in --out, and a picture is drawn beside it. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import itertools
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch
from rich.console import Console

from bench import projection
from bench.common.command import check_at_least, check_choices, run, table_console
from bench.common.record import append, as_dicts, check_columns, results_folder, stamp
from bench.common.timing import limits, spread
from bench.common.worker import ImplementationError, Worker, take_turn
from bench.training.implementations import IMPLEMENTATIONS, ThroughputSetting, optimizer_of, why_not
from bench.training.report import ThroughputRow, plot, show
from bench.training.stages import STAGES, Padding, padding_of
from bench.training.worker import StepCost, start
from minimind.config import PRESETS, ModelConfig
from minimind.data.corpus import Corpus
from minimind.modeling import Model
from minimind.training.optim import OptimizerName
from minimind.utils.device import choose_device, choose_precision
from minimind.utils.display import duration

WHOLE_MODEL = ("pretrain", "sft", "reason")  # stages whose step computes nothing but the model


@dataclass(frozen=True)
class Args:
    """Compare training steps."""

    stage: tuple[str, ...] = ("pretrain",)
    """Any of pretrain, sft, lora, distill, reason, dpo, separated by commas or spaces."""
    data: tuple[str, ...] = ()
    """Files as the stage's script takes them; STAGE=FILE if there are several stages. Empty: the built-in data."""
    preset: tuple[str, ...] = ("minimind2-small",)
    """Model shapes."""
    peer: tuple[str, ...] = ("ours", "ours-muon", "upstream-style")
    """Any of ours, ours-muon, ours-eager, eager, compile, upstream-style, upstream-bf16, hf, hf-bf16, liger; ratios are
    against the last."""
    steps: int = 12
    """Timed steps of each implementation."""
    warmup: int = 3
    """Untimed steps of each, in which it compiles."""
    turn: int = 4
    """Steps in a turn."""
    rows: int | None = None
    """Rows of --seq-len in a batch, for dpo two a pair; None: about 4096 tokens on a CPU and 16384 on a GPU."""
    seq_len: int | None = None
    """Tokens in a row. None: the length to which upstream pads, 340 for sft, lora and distill, 720 for reason, 1024 for
    dpo; 512 for pretrain."""
    optimizer: OptimizerName = "adamw"
    """Optimizer of ours and ours-eager; ours-muon has Muon, the others have AdamW."""
    device: str = "auto"
    """Device: cpu, cuda, or auto, which takes a GPU if there is one."""
    out: str | None = None
    """Folder of the rows and the picture; None: bench/results/DEVICE."""
    project: bool = False
    """Also print the throughput that this would mean on an RTX 3090 and 4090: a projection, not a measurement."""
    headline: bool = False
    """Also print the time and cost of upstream's two-hour run at the measured rate: a projection."""


@dataclass
class TrainingComparison:
    """The implementations of one stage and preset: started one after another, then timed in turns."""

    setting: ThroughputSetting
    console: Console
    failures: list[str] = dataclasses.field(default_factory=list)  # a line for each implementation that failed
    workers: dict[str, Worker] = dataclasses.field(default_factory=dict)
    costs: dict[str, list[StepCost]] = dataclasses.field(default_factory=dict)

    def run(self, names: Sequence[str], warmup: int, steps: int, turn_steps: int) -> None:
        for name in names:
            self._say(f"warming up {name}")
            self.workers[name], self.costs[name] = Worker(start, name, self.setting), []
            try:
                self.workers[name].ask((warmup, False))
            except ImplementationError as problem:
                self._drop(name, str(problem))
        began, done = time.perf_counter(), 0
        for turn in itertools.count():
            count = min(turn_steps, steps - done)
            if not count or not self.workers:
                break
            take_turn(self.workers, turn, partial(self._step, count), self._drop)
            done += count
            left = duration((time.perf_counter() - began) / done * (steps - done))
            self._say(f"{done}/{steps} steps of each, ETA {left}")
        for name in self.workers:
            if (line := slow_step(self.costs[name])) is not None:
                self._say(f"{name}: {line}")

    def rows(self, limit: float | None, columns: dict[str, Any]) -> list[ThroughputRow]:
        """limit: TFLOP/s of one large product on this device, for the utilisation."""
        rows = []
        for name in list(self.workers):
            try:
                totals = self.workers[name].ask(None)
            except ImplementationError as problem:
                self._drop(name, str(problem))
            else:
                rows.append(self._row(name, totals, limit, columns))
                self.workers.pop(name).close()
        return rows

    def _row(self, name: str, totals: dict[str, Any], limit: float | None, columns: dict[str, Any]) -> ThroughputRow:
        setting, seconds = self.setting, [cost.seconds for cost in self.costs[name]]
        real, positions, total = sum(c.real for c in self.costs[name]), setting.positions * len(seconds), sum(seconds)
        median, p20, p80 = spread(seconds)
        utilisation = None
        if limit is not None and setting.stage in WHOLE_MODEL:
            utilisation = _flops_per_position(setting) * positions / total / (limit * 1e12)
        return ThroughputRow(
            **columns, stage=setting.stage, preset=setting.preset, rows=setting.rows, seq_len=setting.seq_len,
            peer=name, optimizer=optimizer_of(name, setting), attention=totals["attention"], steps=len(seconds),
            tokens_per_second=real / total, positions_per_second=positions / total, step_seconds=median, p20=p20,
            p80=p80, peak_mib=totals["peak_mib"], reserved_mib=totals.get("reserved_mib"), utilisation=utilisation,
            loader_share=totals["loading"] / total, host_syncs=totals.get("host_syncs"), graphs=totals.get("graphs"),
            graph_breaks=totals.get("graph_breaks"), padding=1 - real / positions, once_seconds=totals["once"],
        )  # fmt: skip

    def _step(self, count: int, name: str) -> None:
        self.costs[name] += self.workers[name].ask((count, True))

    def _drop(self, name: str, reason: str) -> None:
        self.failures.append(f"{self.setting.stage}, {self.setting.preset}: --peer {name}: {reason}")
        self.workers.pop(name).close()

    def _say(self, text: str) -> None:
        line = f"{self.setting.stage}, {self.setting.preset}: {text}"
        self.console.print(line, highlight=False, soft_wrap=True)


def _flops_per_position(setting: ThroughputSetting) -> int:
    with torch.device("meta"):
        model = Model(ModelConfig.preset(setting.preset))
    mean_length = setting.corpus.num_tokens // setting.corpus.num_documents
    return model.flops_per_token(min(setting.seq_len, mean_length))


def slow_step(costs: Sequence[StepCost]) -> str | None:
    """A line about the slowest step, if it took at least half as long again as the median."""
    median, slowest = statistics.median(c.seconds for c in costs), max(costs, key=lambda c: c.seconds)
    if slowest.seconds < 1.5 * median:
        return None
    return (
        f"step {list(costs).index(slowest) + 1} took {slowest.seconds:.3g} s instead of {median:.3g}: "
        f"{slowest.busy:.3g} s of processor time, {slowest.kernel:.3g} of them in the kernel, "
        f"{slowest.faults:,} page faults (median {statistics.median(c.busy for c in costs):.3g}, "
        f"{statistics.median(c.kernel for c in costs):.3g}, {statistics.median(c.faults for c in costs):,.0f})"
    )


def main(args: Args) -> dict[str, Any]:
    console = Console(stderr=True)
    args, device = _check(args)
    columns = stamp(device, "torch", "triton")
    folder = results_folder(args.out, columns["device"])
    check_columns(folder / "throughput.csv", ThroughputRow)
    # tokenized before the clock starts and before processes share the cores
    corpora = {stage: STAGES[stage].open(data_of(args, stage), console) for stage in args.stage}
    limit = None
    if device.type == "cuda":
        limit = limits(device, choose_precision(device).compute_dtype)["TFLOP/s"]
        torch.cuda.empty_cache()  # for the other processes
    rows: list[ThroughputRow] = []
    paddings: dict[str, Padding] = {}
    failures: list[str] = []
    for stage, preset in itertools.product(args.stage, args.preset):
        setting = _setting(args, stage, preset, corpora[stage], device)
        names = _runnable(args.peer, setting, console)
        paddings[stage] = padding_of(setting.kind, setting.corpus, setting.rows, setting.seq_len)
        comparison = TrainingComparison(setting, console)
        comparison.run(names, args.warmup, args.steps, args.turn)
        data = "+".join(Path(path).name for path in data_of(args, stage)) or "built-in"
        new = comparison.rows(limit, columns | {"data": data})
        failures += comparison.failures
        if not new:
            raise ValueError(failures[-1])
        append(folder / "throughput.csv", new)
        show(new, paddings[stage], table_console(140))
        rows += new
    subject = "-".join((*args.stage, *args.preset)) if len(args.stage) + len(args.preset) == 2 else "several"
    picture = folder / f"throughput-{subject}-{columns['commit'] or 'unknown'}.png"
    plot(rows, picture)
    result: dict[str, Any] = {
        "csv": str(folder / "throughput.csv"), "png": str(picture), "limit_tflops": limit, "died": failures,
        "padding": {stage: dataclasses.asdict(padding) for stage, padding in paddings.items()},
    }  # fmt: skip
    if args.project:
        result["projection"] = projection.cards(rows, Console())
    if args.headline:
        result["headline"] = projection.headline(rows, corpora["pretrain"], Console())
    return result | {"rows": as_dicts(rows)}


def _runnable(names: Sequence[str], setting: ThroughputSetting, console: Console) -> list[str]:
    """The implementations that can run here; a line for each that cannot. ValueError if none can."""
    stage, preset, runnable = setting.stage, setting.preset, []
    for name in names:
        reason = why_not(name, stage, preset, setting.device)
        if reason is None:
            runnable.append(name)
        else:
            console.print(f"{stage}, {preset}: without {name}: {reason}", highlight=False)
    if not runnable:
        raise ValueError(f"--peer: none of {', '.join(names)} can run {stage} with {preset} here")
    return runnable


def _setting(args: Args, stage: str, preset: str, corpus: Corpus, device: torch.device) -> ThroughputSetting:
    seq_len = args.seq_len or STAGES[stage].seq_len
    tokens = 16384 if device.type == "cuda" else 4096
    rows = args.rows or 2 * max(1, round(tokens / seq_len / 2))
    if STAGES[stage].pairs and rows % 2:
        raise ValueError(f"--rows {rows}: {stage} needs two rows a pair; give an even number")
    steps = args.warmup + args.steps
    return ThroughputSetting(stage, preset, corpus, rows, seq_len, args.optimizer, device, steps)


def data_of(args: Args, stage: str) -> list[str]:
    """The files of `stage`. ValueError for a file without a stage, if there are several stages."""
    paths: list[str] = []
    for part in args.data:
        owner, equals, path = part.partition("=")
        if equals and owner in STAGES:
            paths += [path] if owner == stage else []
        elif len(args.stage) > 1:
            raise ValueError(f"--data {part}: with several stages, name the stage: {args.stage[0]}={part}")
        else:
            paths.append(part)
    return paths


def _check(args: Args) -> tuple[Args, torch.device]:
    """The flags with their lists split at commas, and the device."""
    args = dataclasses.replace(args, stage=_split(args.stage), preset=_split(args.preset), peer=_split(args.peer))
    check_choices("stage", args.stage, STAGES)
    check_choices("preset", args.preset, PRESETS)
    check_choices("peer", args.peer, IMPLEMENTATIONS)
    check_at_least(1, steps=args.steps, warmup=args.warmup, turn=args.turn, rows=args.rows, seq_len=args.seq_len)
    for part in args.data:
        owner, equals, _ = part.partition("=")
        if equals and owner in STAGES and owner not in args.stage:
            raise ValueError(f"--data {part}: --stage does not name {owner}")
    if "lora" in args.stage and args.optimizer != "adamw":
        raise ValueError(f"--optimizer {args.optimizer}: adapters are trained with adamw")
    device = choose_device(args.device)
    if args.project and device.type != "cuda":
        raise ValueError("--project: needs a GPU; a CPU's rates say nothing about one")
    if args.headline and "pretrain" not in args.stage:
        raise ValueError("--headline: needs --stage pretrain")
    return args, device


def _split(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for value in values for part in value.split(",") if part)


if __name__ == "__main__":
    run(main, Args, __doc__, lambda result: "; ".join(result["died"]))
