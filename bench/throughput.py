"""Training throughput and memory of each stage, this project's step beside its peers', taking turns in one run.

    python bench/throughput.py                                       pretraining on the built-in corpus
    python bench/throughput.py --stage pretrain,sft,dpo --data sft=chats.jsonl dpo=pairs.jsonl
    python bench/throughput.py --peer ours,hf,upstream-style --preset minimind2-small,minimind2

Each contender (bench/training/implementations.py) lives in a process of its own, so that its peak memory is its own too; they take
turns, a few steps each, so that a machine whose speed drifts slows all of them alike; one that dies is left out, and
the exit status is 1. Positions are all that a model
computes; real tokens are those that are no padding. How much of its rows upstream would pad is counted over the whole
data, and stands below the table. A step that took far longer than the others is shown with what it spent its time on.

Rows are added to throughput.csv in --out, and a picture is drawn beside it. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import datetime
import itertools
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch
from rich.console import Console

from bench import projection
from bench.common.timing import limits
from bench.operators.report import append, check_columns, slug
from bench.training.implementations import MAKERS, ThroughputSetting, optimizer_of, why_not
from bench.training.report import COLUMNS, ThroughputRow, plot, show
from bench.training.stages import STAGES, Padding, padding_of
from bench.training.worker import ThroughputWorker, WorkerStep
from minimind.config import PRESETS, ModelConfig
from minimind.data.corpus import Corpus
from minimind.modeling import Model
from minimind.training.optim import OptimizerName
from minimind.training.run_folder import versions
from minimind.utils.device import choose_device, choose_precision, describe_device
from minimind.utils.display import duration
from minimind.utils.stdio import command_line

WHOLE_MODEL = ("pretrain", "sft", "reason")  # the model's own operations are all that a step computes


@dataclass(frozen=True)
class Args:
    """Measure training steps against their peers."""

    stage: tuple[str, ...] = ("pretrain",)
    """Any of pretrain, sft, lora, distill, reason, dpo; here and below divided by commas or spaces."""
    data: tuple[str, ...] = ()
    """Files as the stage's script takes them; of several stages as STAGE=FILE. None: the script's built-in data."""
    preset: tuple[str, ...] = ("minimind2-small",)
    """Model shapes."""
    peer: tuple[str, ...] = ("ours", "ours-muon", "upstream-style")
    """Any of ours, ours-muon, ours-eager, eager, compile, upstream-style, upstream-bf16, hf, hf-bf16, liger; ratios are
    against the last."""
    steps: int = 12
    """Timed steps of each."""
    warmup: int = 3
    """Untimed steps of each, compilation among them."""
    turn: int = 4
    """Steps in a turn."""
    rows: int | None = None
    """Rows of --seq-len in a batch, of dpo two a pair; None for about 4096 tokens on a CPU and 16384 on a GPU."""
    seq_len: int | None = None
    """Tokens in a row. None takes what upstream pads to: 340 for sft, lora and distill, 720 for reason, 1024 for dpo;
    512 for pretrain."""
    optimizer: OptimizerName = "adamw"
    """Of ours and ours-eager; ours-muon has Muon, the peers have AdamW."""
    device: str = "auto"
    """auto, cpu, cuda."""
    out: str | None = None
    """Folder for the rows and the picture; None for bench/results/DEVICE."""
    project: bool = False
    """Also say what these figures would mean on an RTX 3090 and 4090: a projection, not a measurement."""
    headline: bool = False
    """Also say how long and how dear upstream's two-hour run would be at the measured rate: a projection."""


def measure(
    args: Args, setting: ThroughputSetting, names: list[str], console: Console
) -> tuple[dict[str, ThroughputWorker], list[str]]:
    """(those that ran to their end, one line for each that did not)."""
    title = f"{setting.stage}, {setting.preset}"
    workers: dict[str, ThroughputWorker] = {}
    died = []
    for name in names:
        console.print(f"{title}: warming up {name}", highlight=False)
        try:
            workers[name] = ThroughputWorker(name, setting)
            workers[name].run(args.warmup, counts=False)
        except ValueError as problem:  # the others go on
            workers.pop(name, None)
            died.append(f"{title}: {problem}")
    start = time.perf_counter()
    done = 0
    while workers and done < args.steps:
        count = min(args.turn, args.steps - done)
        for name, worker in list(workers.items()):
            try:
                worker.run(count, counts=True)
            except ValueError as problem:
                del workers[name]
                died.append(f"{title}: {problem}")
        done += count
        left = duration((time.perf_counter() - start) / done * (args.steps - done))
        console.print(f"{title}: {done}/{args.steps} steps of each, ETA {left}", highlight=False)
    for worker in workers.values():
        slow = slow_step(worker.steps)
        if slow is not None:
            console.print(f"{title}: {worker.name}: {slow}", highlight=False, soft_wrap=True)
    return workers, died


def slow_step(steps: Sequence[WorkerStep]) -> str | None:
    """One line on the slowest step, where it took half as long again as the median or longer."""
    median, slowest = statistics.median(s.seconds for s in steps), max(steps, key=lambda s: s.seconds)
    if slowest.seconds < 1.5 * median:
        return None
    return (
        f"step {list(steps).index(slowest) + 1} took {slowest.seconds:.3g} s instead of {median:.3g}: "
        f"{slowest.busy:.3g} s of processor time, {slowest.kernel:.3g} of them in the kernel, "
        f"{slowest.faults:,} page faults (median {statistics.median(s.busy for s in steps):.3g}, "
        f"{statistics.median(s.kernel for s in steps):.3g}, {statistics.median(s.faults for s in steps):,.0f})"
    )


def rows_of(
    args: Args,
    setting: ThroughputSetting,
    workers: dict[str, ThroughputWorker],
    limit: float | None,
    stamp: dict[str, Any],
    died: list[str],
) -> list[ThroughputRow]:
    """limit: TFLOP/s that this device reaches in one large product, for the utilisation; died: gets a line for each
    that dies while it is asked for the rest."""
    with torch.device("meta"):
        model = Model(ModelConfig.preset(setting.preset))
    mean_length = setting.corpus.num_tokens // setting.corpus.num_documents
    flops = model.flops_per_token(min(setting.seq_len, mean_length))
    paths = data_of(args, setting.stage)
    rows = []
    for name, worker in workers.items():
        seconds = [step.seconds for step in worker.steps]
        real, total = sum(step.real for step in worker.steps), sum(seconds)
        try:
            rest = worker.finish()
        except ValueError as problem:
            died.append(f"{setting.stage}, {setting.preset}: {problem}")
            continue
        quintiles = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else seconds * 4
        computed = setting.positions * len(seconds) / total
        whole = limit is not None and setting.stage in WHOLE_MODEL
        rows.append(
            ThroughputRow(
                **stamp,
                stage=setting.stage, preset=setting.preset, rows=setting.rows, seq_len=setting.seq_len,
                data="+".join(Path(path).name for path in paths) or "built-in", peer=name, steps=len(seconds),
                optimizer=optimizer_of(name, setting), attention=rest["attention"],
                tokens_per_second=real / total, positions_per_second=computed,
                step_seconds=statistics.median(seconds), p20=quintiles[0], p80=quintiles[-1],
                peak_mib=rest["peak_mib"], reserved_mib=rest.get("reserved_mib"),
                utilisation=flops * computed / (limit * 1e12) if limit is not None and whole else None,
                loader_share=rest["loading"] / total, host_syncs=rest.get("host_syncs"),
                graphs=rest.get("graphs"), graph_breaks=rest.get("graph_breaks"),
                padding=1 - real / (setting.positions * len(seconds)), once_seconds=rest["once"],
            )
        )  # fmt: skip
    return rows


def main(args: Args) -> dict[str, Any]:
    console = Console(stderr=True)
    args, device = _check(args)
    found = versions(describe_device(device))
    stamp = {name: found[name] for name in ("device", "commit", "torch", "triton")}
    stamp["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    folder = Path(args.out) if args.out else Path(__file__).parent / "results" / slug(stamp["device"])
    table = folder / "throughput.csv"
    check_columns(table, COLUMNS)
    # tokenized before the clock starts and before processes share the cores
    corpora = {stage: STAGES[stage].open(data_of(args, stage), console) for stage in args.stage}
    limit = None
    if device.type == "cuda":
        limit = limits(device, choose_precision(device).compute_dtype)["TFLOP/s"]
        torch.cuda.empty_cache()  # the contenders are other processes
    rows: list[ThroughputRow] = []
    shares: dict[str, Padding] = {}
    died: list[str] = []
    for stage, preset in itertools.product(args.stage, args.preset):
        setting = _setting(args, stage, preset, corpora[stage], device)
        able = []
        for name in args.peer:
            reason = why_not(name, stage, preset, device)
            if reason is None:
                able.append(name)
            else:
                console.print(f"{stage}, {preset}: without {name}: {reason}", highlight=False)
        if not able:
            raise ValueError(f"--peer: none of {', '.join(args.peer)} can run {stage} with {preset} here")
        shares[stage] = padding_of(setting.kind, setting.corpus, setting.rows, setting.seq_len)
        workers, failures = measure(args, setting, able, console)
        died += failures
        new = rows_of(args, setting, workers, limit, stamp, died)
        if not new:
            raise ValueError(died[-1])
        append(table, new)
        show(new, shares[stage], Console(width=None if sys.stdout.isatty() else 140))
        rows += new
    what = "-".join((*args.stage, *args.preset)) if len(args.stage) + len(args.preset) == 2 else "several"
    picture = folder / f"throughput-{what}-{stamp['commit'] or 'unknown'}.png"
    plot(rows, picture)
    result: dict[str, Any] = {"csv": str(table), "png": str(picture), "limit_tflops": limit, "died": died}
    result["padding"] = {stage: dataclasses.asdict(share) for stage, share in shares.items()}
    if args.project:
        result["projection"] = projection.cards(rows, Console())
    if args.headline:
        result["headline"] = projection.headline(rows, corpora["pretrain"], Console())
    return result | {"rows": [dataclasses.asdict(row) for row in rows]}


def _setting(args: Args, stage: str, preset: str, corpus: Corpus, device: torch.device) -> ThroughputSetting:
    seq_len = args.seq_len or STAGES[stage].seq_len
    tokens = 16384 if device.type == "cuda" else 4096
    rows = args.rows or 2 * max(1, round(tokens / seq_len / 2))
    if STAGES[stage].pairs and rows % 2:
        raise ValueError(f"--rows {rows}: {stage} takes two a pair; give an even number")
    steps = args.warmup + args.steps
    return ThroughputSetting(stage, preset, corpus, rows, seq_len, args.optimizer, device, steps)


def data_of(args: Args, stage: str) -> list[str]:
    """The files of `stage`; ValueError for one of several stages that is not said to be whose."""
    found = []
    for part in args.data:
        owner, equals, path = part.partition("=")
        if equals and owner in STAGES:
            found += [path] if owner == stage else []
        elif len(args.stage) > 1:
            raise ValueError(f"--data {part}: with several stages, say whose: {args.stage[0]}={part}")
        else:
            found.append(part)
    return found


def _check(args: Args) -> tuple[Args, torch.device]:
    """The flags with their lists taken apart, and the device."""
    args = dataclasses.replace(args, stage=_apart(args.stage), preset=_apart(args.preset), peer=_apart(args.peer))
    for flag, known in (("stage", STAGES), ("preset", PRESETS), ("peer", MAKERS)):
        for value in getattr(args, flag):
            if value not in known:
                raise ValueError(f"--{flag} {value}: unknown; choose from {', '.join(known)}")
    for flag in ("steps", "warmup", "turn", "rows", "seq_len"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: counts from 1")
    for part in args.data:
        owner, equals, _ = part.partition("=")
        if equals and owner in STAGES and owner not in args.stage:
            raise ValueError(f"--data {part}: --stage has no {owner}")
    if "lora" in args.stage and args.optimizer != "adamw":
        raise ValueError(f"--optimizer {args.optimizer}: adapters are trained with adamw")
    device = choose_device(args.device)
    if args.project and device.type != "cuda":
        raise ValueError("--project: a CPU's figures say nothing about a GPU; run it where there is one")
    if args.headline and "pretrain" not in args.stage:
        raise ValueError("--headline: needs --stage pretrain")
    return args, device


def _apart(values: Sequence[str]) -> tuple[str, ...]:
    return tuple(part for value in values for part in value.split(",") if part)


if __name__ == "__main__":
    try:
        outcome = main(command_line(Args, __doc__))
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(json.dumps(outcome), flush=True)
    if outcome["died"]:
        raise SystemExit("error: " + "; ".join(outcome["died"]))
