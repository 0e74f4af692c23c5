"""Training throughput and memory, this project's step beside its peers', taking turns in one run.

    python bench/throughput.py [--data FILE...] [--preset minimind2-small] [--peer ours upstream-style hf] [--steps 20]

Each contender (bench/contenders.py) lives in a process of its own, so that its peak memory is its own too; they take
turns, a few steps each, so that a machine whose speed drifts slows all of them alike. Real tokens are those that a
target was learnt from; positions count padding too.

Rows are added to throughput.csv in --out, and a picture is drawn beside it. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import multiprocessing
import resource
import statistics
import sys
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch
import tyro
from rich.console import Console

from bench import projection
from bench.contenders import MAKERS, Setting, why_not
from bench.kernel_report import append, check_columns, slug
from bench.throughput_report import COLUMNS, Row, plot, show
from bench.timing import limits
from minimind.config import PRESETS, ModelConfig
from minimind.data.cache import open_corpus
from minimind.data.corpus import builtin_corpus
from minimind.data.store import Corpus
from minimind.modeling import Model
from minimind.tokenization import load_tokenizer
from minimind.training.device import choose_device, choose_precision, describe_device
from minimind.training.display import duration
from minimind.training.optim import OptimizerName
from minimind.training.run_folder import versions

STAGES = ("pretrain",)


@dataclass(frozen=True)
class Args:
    """Measure training steps against their peers."""

    stage: tuple[str, ...] = ("pretrain",)
    """Which stages; so far there is one."""
    data: tuple[str, ...] = ()
    """As in train/pretrain.py; None takes the built-in corpus."""
    preset: tuple[str, ...] = ("minimind2-small",)
    """Model shapes."""
    peer: tuple[str, ...] = ("ours", "upstream-style")
    """Any of ours, ours-eager, eager, compile, upstream-style, hf, hf-bf16, liger; ratios are against the last."""
    steps: int = 20
    """Timed steps of each."""
    warmup: int = 3
    """Untimed steps of each, compilation among them."""
    turn: int = 5
    """Steps in a turn."""
    rows: int | None = None
    """Rows in a batch; None for 32, or 8 on a CPU."""
    seq_len: int = 512
    """Tokens in a row."""
    optimizer: OptimizerName = "adamw"
    """Of ours; the peers have AdamW."""
    device: str = "auto"
    """auto, cpu, cuda."""
    out: str | None = None
    """Folder for the rows and the picture; None for bench/results/DEVICE."""
    project: bool = False
    """Also say what these figures would mean on an RTX 3090 and 4090: a projection, not a measurement."""
    headline: bool = False
    """Also say how long and how dear upstream's two-hour run would be at the measured rate: a projection."""


@dataclass(frozen=True)
class Turn:
    """Seconds of each step, real tokens of each."""

    seconds: list[float]
    real: list[int]


def work(name: str, setting: Setting, pipe: Connection) -> None:
    """A contender's process: told a number of steps, it answers with a Turn; told None, with what else it knows."""
    contender = MAKERS[name](setting)
    pipe.send("ready")
    while (count := pipe.recv()) is not None:
        turn = Turn([], [])
        for _ in range(count):
            _wait(setting.device)
            start = time.perf_counter()
            turn.real.append(contender.step())
            _wait(setting.device)
            turn.seconds.append(time.perf_counter() - start)
        pipe.send(turn)
        contender.loading = 0.0 if not pipe.recv() else contender.loading
    pipe.send(_rest(contender, setting.device))


def _rest(contender: Any, device: torch.device) -> dict[str, Any]:
    rest: dict[str, Any] = {"loading": contender.loading, "peak_mib": _peak_mib(device)}
    if device.type == "cuda":
        rest["reserved_mib"] = torch.cuda.max_memory_reserved(device) / 2**20
        rest["host_syncs"] = _count_syncs(contender.step)
    if contender.compiled:
        counters = torch._dynamo.utils.counters
        rest["graph_breaks"] = sum(counters["graph_break"].values())
        rest["graphs"] = counters["stats"]["unique_graphs"]
    return rest


def _peak_mib(device: torch.device) -> float:
    """Allocated at most, of a GPU; resident at most, of this process, on a CPU."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**20
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _count_syncs(step: Any) -> int:
    """How often the host waits for the device in one step."""
    import warnings

    torch.cuda.set_sync_debug_mode("warn")
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    return sum("synchronizing" in str(w.message) for w in caught)


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


class Worker:
    """A contender's process, as this one sees it."""

    def __init__(self, name: str, setting: Setting) -> None:
        context = multiprocessing.get_context("spawn")
        self.name = name
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(name, setting, theirs), daemon=True)
        self.process.start()
        theirs.close()  # so that a dead worker is an end of file here
        self.turns: list[Turn] = []
        self._recv()

    def run(self, steps: int, keep: bool) -> None:
        self.pipe.send(steps)
        turn = self._recv()
        self.pipe.send(keep)
        if keep:
            self.turns.append(turn)

    def finish(self) -> dict[str, Any]:
        self.pipe.send(None)
        rest = self._recv()
        self.process.join()
        return rest

    def _recv(self) -> Any:
        try:
            return self.pipe.recv()
        except EOFError:
            raise ValueError(
                f"--peer {self.name}: its process died (see above); if memory ran out, use fewer --rows or peers"
            ) from None


def measure(args: Args, setting: Setting, names: list[str], console: Console) -> dict[str, Worker]:
    workers = {name: Worker(name, setting) for name in names}
    for name, worker in workers.items():
        console.print(f"{setting.preset}: warming up {name}", highlight=False)
        worker.run(args.warmup, keep=False)
    start = time.perf_counter()
    done = 0
    while done < args.steps:
        count = min(args.turn, args.steps - done)
        for worker in workers.values():
            worker.run(count, keep=True)
        done += count
        left = duration((time.perf_counter() - start) / done * (args.steps - done))
        console.print(f"{setting.preset}: {done}/{args.steps} steps of each, ETA {left}", highlight=False)
    return workers


def rows_of(
    args: Args, setting: Setting, workers: dict[str, Worker], limit: float | None, stamp: dict[str, Any]
) -> list[Row]:
    """limit: TFLOP/s that this device reaches in one large product, for the utilisation."""
    with torch.device("meta"):
        model = Model(ModelConfig.preset(setting.preset))
    mean_length = setting.corpus.num_tokens // setting.corpus.num_documents
    flops = model.flops_per_token(min(setting.seq_len, mean_length))
    rows = []
    for name, worker in workers.items():
        seconds = [s for turn in worker.turns for s in turn.seconds]
        real = sum(n for turn in worker.turns for n in turn.real)
        rest = worker.finish()
        total = sum(seconds)
        quintiles = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else seconds * 4
        computed = setting.positions * len(seconds) / total
        rows.append(
            Row(
                **stamp,
                stage=args.stage[0], preset=setting.preset, rows=setting.rows, seq_len=setting.seq_len,
                data="+".join(Path(d).name for d in args.data) or "built-in", peer=name, steps=len(seconds),
                optimizer=args.optimizer if name.startswith("ours") else "adamw",
                tokens_per_second=real / total, positions_per_second=computed,
                step_seconds=statistics.median(seconds), p20=quintiles[0], p80=quintiles[-1],
                peak_mib=rest["peak_mib"], reserved_mib=rest.get("reserved_mib"),
                utilisation=None if limit is None else flops * computed / (limit * 1e12),
                loader_share=rest["loading"] / total, host_syncs=rest.get("host_syncs"),
                graphs=rest.get("graphs"), graph_breaks=rest.get("graph_breaks"),
            )
        )  # fmt: skip
    return rows


def main(args: Args) -> dict[str, Any]:
    console = Console(stderr=True)
    device = _check(args)
    names = list(args.peer)
    found = versions(describe_device(device))
    stamp = {name: found[name] for name in ("device", "commit", "torch", "triton")}
    stamp["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    folder = Path(args.out) if args.out else Path(__file__).parent / "results" / slug(stamp["device"])
    table = folder / "throughput.csv"
    check_columns(table, COLUMNS)
    corpus = _corpus(args)  # tokenized before the clock starts and before processes share the cores
    dtype = choose_precision(device).compute_dtype
    limit = limits(device, dtype)["TFLOP/s"] if device.type == "cuda" else None
    rows_in_batch = args.rows or (32 if device.type == "cuda" else 8)
    rows: list[Row] = []
    for preset in args.preset:
        setting = Setting(preset, corpus, rows_in_batch, args.seq_len, args.optimizer, device)
        able = []
        for name in names:
            reason = why_not(name, preset, device)
            if reason is None:
                able.append(name)
            else:
                console.print(f"{preset}: without {name}: {reason}", highlight=False)
        workers = measure(args, setting, able, console)
        new = rows_of(args, setting, workers, limit, stamp)
        append(table, new)
        show(new, Console(width=None if sys.stdout.isatty() else 140))
        rows += new
    picture = folder / f"throughput-{stamp['commit'] or 'unknown'}.png"
    plot(rows, picture)
    result: dict[str, Any] = {"csv": str(table), "png": str(picture), "limit_tflops": limit}
    if args.project:
        result["projection"] = projection.cards(rows, Console())
    if args.headline:
        result["headline"] = projection.headline(rows, corpus, Console())
    return result | {"rows": [dataclasses.asdict(row) for row in rows]}


def _check(args: Args) -> torch.device:
    for flag, given, known in (
        ("stage", args.stage, STAGES), ("preset", args.preset, PRESETS), ("peer", args.peer, MAKERS),
    ):  # fmt: skip
        for value in given:
            if value not in known:
                raise ValueError(f"--{flag} {value}: unknown; choose from {', '.join(known)}")
    for flag in ("steps", "warmup", "turn", "rows", "seq_len"):
        value = getattr(args, flag)
        if value is not None and value < 1:
            raise ValueError(f"--{flag.replace('_', '-')} {value}: counts from 1")
    device = choose_device(args.device)
    if args.project and device.type != "cuda":
        raise ValueError("--project: a CPU's figures say nothing about a GPU; run it where there is one")
    return device


def _corpus(args: Args) -> Corpus:
    return open_corpus(list(args.data) or [builtin_corpus()], load_tokenizer())


if __name__ == "__main__":
    try:
        outcome = main(tyro.cli(Args, description=__doc__))
    except ValueError as problem:
        raise SystemExit(f"error: {problem}") from None
    print(json.dumps(outcome))
