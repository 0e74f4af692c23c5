"""Measure changes of the pretraining recipe: by how much each lowers the held-out loss, at equal tokens and equal time.

    python bench/recipe.py --data tang.jsonl web.jsonl                    # hours; the same command continues later
    python bench/recipe.py --data tang.jsonl --shapes nano --only zero-outputs normuon --minutes 20

docs/recipe.md is made from the rows by bench/performance.py.
A run is a call of train/pretrain.py's own function in this process, with the flags of one try (bench/training/tries.py)
and otherwise those of the reference recipe: the defaults, on a CPU with steps of 4,096 tokens and five iterations of
Muon. For every seed, corpus and shape the reference comes first, then all tries, then the reference with twice the
tokens, which shows how much a longer training lowers the loss. Rows are added to
recipe.csv in --out after each run; a run with a row is not repeated, so that the command can be stopped anywhere. The
last line of stdout is JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from unittest import mock

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from rich.console import Console

from bench.common.command import check_at_least, check_choices, run
from bench.common.record import append, check_columns, now, results_folder
from bench.report.rows import rows_of
from bench.training.tries import BASE, REFERENCE, TRIES, RecipeRow
from minimind.config import PRESETS
from minimind.data import builtin_corpus, open_corpus
from minimind.tokenization import load_tokenizer
from minimind.training.metrics import read_metrics
from minimind.training.trainer import Trainer
from minimind.utils.device import choose_device, describe_device
from minimind.utils.display import duration
from minimind.utils.files import cache_root, make_folder
from train import pretrain

HELDOUT = 32_768  # tokens, about


@dataclass(frozen=True)
class Args:
    """Measure changes of the recipe. Every default works."""

    data: tuple[str, ...] = ("builtin",)
    """Files as in train/pretrain.py, each by itself; builtin: the built-in corpus."""
    shapes: tuple[str, ...] = ("nano", "minimind2-small")
    """Presets: small, and of width 512."""
    tokens: tuple[int, ...] = (409_600,)
    """Tokens of a run; the reference recipe is also run with twice as many."""
    seeds: tuple[int, ...] = (1, 2)
    """Seeds of the initial weights and the data order."""
    only: tuple[str, ...] = ()
    """Names of tries; empty: all of them."""
    minutes: float | None = None
    """Begin no run after this time."""
    work: str | None = None
    """Folder of unfinished runs; None: recipe under $MINIMIND_CACHE or ~/.cache/minimind."""
    out: str | None = None
    """Folder of the rows; None: bench/results/DEVICE."""


@dataclass(frozen=True)
class RecipeRun:
    """One run. attempt: the name of the try, "" for the reference recipe."""

    attempt: str
    corpus: str
    shape: str
    tokens: int
    seed: int

    @property
    def name(self) -> str:
        return f"{self.corpus}-{self.shape}-{self.tokens}-{self.attempt or 'as-it-is'}-seed{self.seed}"


def planned(args: Args, corpora: list[str]) -> Iterator[RecipeRun]:
    """All runs: seed by seed, so that an interrupted benchmark has compared something."""
    tries = [name for name in TRIES if not args.only or name in args.only]
    for seed in args.seeds:
        for tokens in args.tokens:
            for shape in args.shapes:
                for corpus in corpora:
                    for name in (BASE, *tries):
                        yield RecipeRun(name, corpus, shape, tokens, seed)
                    yield RecipeRun(BASE, corpus, shape, 2 * tokens, seed)


def train(one: RecipeRun, data: str, heldout: float, folder: Path) -> RecipeRow:
    """Train the run to its end; an interrupted one continues from its last checkpoint. Raises KeyboardInterrupt if it
    is stopped."""
    flags: dict[str, Any] = {
             "data": (data,), "preset": one.shape, "tokens": one.tokens, "seed": one.seed, "heldout": heldout,
             "evals": 1, "eval_tokens": 4096, "keep_checkpoints": 1, "out": str(folder)}  # fmt: skip
    changes = TRIES[one.attempt].flags if one.attempt else {}
    reference = REFERENCE if choose_device("auto").type == "cpu" else {}
    with busy_steps() as busy:
        if not pretrain.main(pretrain.Args(**(flags | reference | changes)), Console(quiet=True)):
            raise KeyboardInterrupt
    rows = read_metrics(folder / "metrics.jsonl")
    last = [row for row in rows if row["kind"] == "eval"][-1]
    steps = [row for row in rows if row["kind"] == "train"]
    start = json.loads((folder / "versions.json").read_text(encoding="utf-8"))["starts"][-1]
    lr = changes.get("lr") or json.loads((folder / "config.json").read_text(encoding="utf-8"))["chosen"]["lr"]
    shutil.rmtree(folder)
    return RecipeRow(
        date=now(), commit=start["commit"], device=start["device"].partition(";")[0], torch=start["torch"],
        attempt=one.attempt, flags=json.dumps(changes) if changes else "", corpus=one.corpus, shape=one.shape,
        tokens=one.tokens, seed=one.seed, lr=lr, steps=len(steps), seconds=steps[-1]["time"]["seconds"],
        busy_seconds=sum(busy) if len(busy) == len(steps) else None,  # None after an interruption
        heldout_tokens=last["heldout_tokens"], heldout_loss=last["heldout_loss"], heldout_bpb=last["heldout_bpb"],
    )  # fmt: skip


@contextmanager
def busy_steps() -> Iterator[list[float]]:
    """Collects the processor seconds of every training step within the context."""
    seconds: list[float] = []
    step = Trainer._train_step

    def timed(trainer: Trainer) -> None:
        began = time.process_time()
        step(trainer)
        seconds.append(time.process_time() - began)

    with mock.patch.object(Trainer, "_train_step", timed):
        yield seconds


def done(table: Path) -> set[RecipeRun]:
    """The runs that have a row."""
    rows = rows_of(table)
    return {RecipeRun(r["attempt"], r["corpus"], r["shape"], int(r["tokens"]), int(r["seed"])) for r in rows}


def run_all(args: Args, table: Path, console: Console) -> int:
    """Train every run that has no row, until --minutes are over. Returns the number of runs trained."""
    files = {
        Path(p).name.split(".")[0]: p if p != "builtin" else str(builtin_corpus(console=console)) for p in args.data
    }
    shares = {n: HELDOUT / open_corpus([path], load_tokenizer()).num_tokens for n, path in files.items()}
    work = make_folder(Path(args.work) if args.work else cache_root(None) / "recipe")
    runs = list(dict.fromkeys(planned(args, list(files))))
    began, trained = time.monotonic(), 0
    for number, one in enumerate(runs, 1):
        if one in done(table):
            continue
        if args.minutes is not None and time.monotonic() - began > 60 * args.minutes:
            console.print("--minutes are over; run the same command again to continue")
            break
        console.print(f"run {number} of {len(runs)}: {one.name}", highlight=False, soft_wrap=True)
        row = train(one, files[one.corpus], min(0.2, shares[one.corpus]), work / one.name)
        append(table, [row])
        trained += 1
        console.print(f"  {row.heldout_loss:.4f} nats per token, {duration(row.seconds)} of steps", highlight=False)
    return trained


def main(args: Args) -> dict[str, Any]:
    check_at_least(1, tokens=args.tokens, seeds=args.seeds)
    check_choices("shapes", args.shapes, PRESETS)
    check_choices("only", args.only, TRIES)
    missing = next((path for path in args.data if path != "builtin" and not Path(path).is_file()), None)
    if missing is not None or not args.data:
        raise ValueError(f"--data {missing or ''}: no such file; name text files, or builtin")
    table = results_folder(args.out, describe_device(choose_device("auto"))) / "recipe.csv"
    check_columns(table, RecipeRow)
    trained = run_all(args, table, Console(stderr=True))
    return {"csv": str(table), "runs": trained}


if __name__ == "__main__":
    run(main, Args, __doc__)
