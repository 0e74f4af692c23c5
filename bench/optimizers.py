"""Compare AdamW with Muon: how many tokens each needs to reach a held-out loss, over data, learning rates and seeds.

    python bench/optimizers.py --data poems.jsonl web.jsonl [--tokens 600000] [--seeds 1 2] [--adamw-lr 4e-3 8e-3]

Every run is a call of train/pretrain.py, which takes minutes on a CPU, in a folder under --runs. The same command
continues an interrupted benchmark and repeats no finished run. Tokens are compared, not seconds, so the machine need
not be idle.

The target of a file is the loss that the worse optimizer reaches at its best rate with its worse seed. A run's
tokens_to_target are interpolated between its evaluations, which all use the same held-out documents. Rows are added to
optimizers.csv in --out, and a picture is drawn beside it. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from rich.console import Console
from rich.table import Table

from bench.common.command import run as run_command
from bench.common.command import table_console
from bench.common.plots import hide_frame, plt, save
from bench.common.record import ROOT, Row, append, as_dicts, check_columns, now, results_folder
from minimind.data.builtin.docstrings import builtin_corpus
from minimind.data.cache import open_corpus
from minimind.tokenization import load_tokenizer
from minimind.training.metrics import read_metrics
from minimind.utils.device import choose_device, describe_device
from minimind.utils.display import caption

EVERYTHING = 1 << 40  # tokens: every evaluation uses all held-out documents


@dataclass(frozen=True)
class Args:
    """Compare optimizers on real data. Every default works."""

    data: tuple[str, ...] = ()
    """Files as in train/pretrain.py, each compared by itself; empty: the built-in corpus."""
    preset: str = "nano"
    """Model shape."""
    tokens: int = 600_000
    """Tokens of a run, padding included."""
    seeds: tuple[int, ...] = (1, 2)
    """Seeds of the initial weights and the data order."""
    muon_lr: tuple[float, ...] = (4e-3,)
    """Peak rates of Muon; the default is that of train/pretrain.py for nano."""
    adamw_lr: tuple[float, ...] = (4e-3, 8e-3, 16e-3)
    """Peak rates of AdamW."""
    heldout_tokens: int = 49_152
    """Tokens held out of each file, about: its last documents."""
    evals: int = 10
    """Evaluations of the held-out loss in a run, after the first."""
    runs: str = "runs/optimizers"
    """Folder of the runs."""
    out: str | None = None
    """Folder of the rows and the picture; None: bench/results/DEVICE."""


@dataclass(frozen=True)
class Run:
    """One training run. curve: (tokens, held-out loss in nats per token) of every evaluation, the last at the end."""

    data: str
    optimizer: str
    lr: float
    seed: int
    folder: Path
    curve: tuple[tuple[int, float], ...] = ()

    @property
    def loss(self) -> float:
        return self.curve[-1][1]


@dataclass(frozen=True)
class OptimizerRow(Row):
    """One run. heldout_loss: at the end, nats per token over heldout_tokens. tokens_to_target: tokens after which the
    loss was target_loss, None if it never was."""

    torch: str
    data: str
    preset: str
    optimizer: str
    lr: float
    seed: int
    tokens: int
    heldout_tokens: int
    heldout_loss: float
    heldout_bpb: float
    target_loss: float
    tokens_to_target: float | None


def planned(args: Args, paths: Sequence[str]) -> list[Run]:
    """All runs, seed by seed, so that an interrupted benchmark has compared something."""
    rates = [("muon", lr) for lr in args.muon_lr] + [("adamw", lr) for lr in args.adamw_lr]
    return [
        Run(path, optimizer, lr, seed, _folder(args, path, f"{optimizer}-{lr:g}-seed{seed}"))
        for seed in args.seeds
        for path in paths
        for optimizer, lr in rates
    ]


def _folder(args: Args, path: str, name: str) -> Path:
    return Path(args.runs).resolve() / f"{Path(path).stem}-{args.preset}-{args.tokens}-{name}"


def train(run: Run, args: Args, heldout: float) -> None:
    """Train the run to its end, unless it is finished already. Raises ValueError if it fails."""
    if (run.folder / "finished").exists():
        return
    flags = {"data": run.data, "preset": args.preset, "optimizer": run.optimizer, "lr": run.lr, "seed": run.seed,
             "tokens": args.tokens, "heldout": heldout, "eval-tokens": EVERYTHING, "evals": args.evals,
             "out": run.folder}  # fmt: skip
    command = [sys.executable, "train/pretrain.py"]
    command += [part for name, value in flags.items() for part in (f"--{name}", str(value))]
    log = run.folder.with_suffix(run.folder.suffix + ".log")
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("a", encoding="utf-8") as file:
        code = subprocess.run(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        raise ValueError(f"train/pretrain.py ended with status {code}; see the end of {log}")


def with_curve(run: Run) -> Run:
    evals = [row for row in read_metrics(run.folder / "metrics.jsonl") if row["kind"] == "eval"]
    return dataclasses.replace(run, curve=tuple((row["tokens"], row["heldout_loss"]) for row in evals))


def mean_losses(runs: Sequence[Run]) -> dict[tuple[str, float], float]:
    """(optimizer, rate) -> held-out loss at the end, the mean over seeds."""
    settings = dict.fromkeys((run.optimizer, run.lr) for run in runs)
    return {s: statistics.fmean(r.loss for r in runs if (r.optimizer, r.lr) == s) for s in settings}


def best_settings(runs: Sequence[Run]) -> list[tuple[str, float]]:
    """(optimizer, its best rate), the better optimizer first."""
    means = mean_losses(runs)
    names = dict.fromkeys(run.optimizer for run in runs)
    best = [min((s for s in means if s[0] == name), key=means.__getitem__) for name in names]
    return sorted(best, key=means.__getitem__)


def target_of(runs: Sequence[Run]) -> float:
    """The loss that the worse optimizer reaches at its best rate with its worse seed, from the runs of one file."""
    worse = best_settings(runs)[-1]
    return max(run.loss for run in runs if (run.optimizer, run.lr) == worse)


def tokens_to(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """Tokens at which the loss first falls to `target`, interpolated linearly; None if it never does."""
    if curve[0][1] <= target:
        return curve[0][0]
    for (before, high), (after, low) in pairwise(curve):
        if low <= target:
            return before + (after - before) * (high - target) / (high - low)
    return None


def rows_of(runs: Sequence[Run], args: Args) -> list[OptimizerRow]:
    """The rows of the runs of one file."""
    target, date = target_of(runs), now()
    rows = []
    for run in runs:
        last = [r for r in read_metrics(run.folder / "metrics.jsonl") if r["kind"] == "eval"][-1]
        start = json.loads((run.folder / "versions.json").read_text(encoding="utf-8"))["starts"][-1]
        rows.append(
            OptimizerRow(
                date=date, commit=start["commit"], device=start["device"].partition(";")[0], torch=start["torch"],
                data=Path(run.data).name, preset=args.preset, optimizer=run.optimizer, lr=run.lr, seed=run.seed,
                tokens=last["tokens"], heldout_tokens=last["heldout_tokens"], heldout_loss=last["heldout_loss"],
                heldout_bpb=last["heldout_bpb"], target_loss=target, tokens_to_target=tokens_to(run.curve, target),
            )
        )  # fmt: skip
    return rows


def show(rows: Sequence[OptimizerRow], console: Console) -> None:
    """A table of one file's rows."""
    first = rows[0]
    table = Table(
        title=f"{first.data}, {first.preset}, {first.tokens:,} tokens, {first.heldout_tokens:,} held out",
        caption=f"target: {first.target_loss:.3f} nats per token",
    )
    for column in ("optimizer", "rate", "seeds", "held-out loss", "from-to", "bits/byte", "tokens to target"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for optimizer, lr in dict.fromkeys((row.optimizer, row.lr) for row in rows):
        group = [row for row in rows if (row.optimizer, row.lr) == (optimizer, lr)]
        losses, tokens = [row.heldout_loss for row in group], [row.tokens_to_target for row in group]
        table.add_row(
            optimizer,
            f"{lr:g}",
            str(len(group)),
            f"{statistics.fmean(losses):.3f}",
            f"{min(losses):.3f}-{max(losses):.3f}",
            f"{statistics.fmean(row.heldout_bpb for row in group):.3f}",
            ", ".join("not reached" if n is None else f"{n:,.0f}" for n in tokens),
        )
    console.print(table)


def plot(runs: Sequence[Run], path: Path, title: str) -> None:
    """Held-out loss over tokens: a panel for each file, a line for each seed, thick at each optimizer's best rate."""
    files = list(dict.fromkeys(run.data for run in runs))
    figure, axes = plt.subplots(1, len(files), figsize=(5.2 * len(files), 4), squeeze=False, layout="constrained")
    for axis, file in zip(axes[0], files, strict=True):
        of_file = [run for run in runs if run.data == file]
        best, means, target = best_settings(of_file), mean_losses(of_file), target_of(of_file)
        for i, setting in enumerate(means):
            style = {"linewidth": 2.0 if setting in best else 0.9, "color": f"C{i}"}
            for n, run in enumerate(r for r in of_file if (r.optimizer, r.lr) == setting):
                label = f"{setting[0]} {setting[1]:g}: {means[setting]:.3f}" if n == 0 else None
                axis.plot([t / 1e6 for t, _ in run.curve], [x for _, x in run.curve], label=label, **style)
        axis.axhline(target, color="gray", linewidth=0.8, linestyle=":")
        axis.set_ylim(min(means.values()) - 0.1, target + 1.5)
        axis.set_title(caption(Path(file).name), fontsize=10)
        axis.set_xlabel("tokens trained on, millions", fontsize=9)
        axis.legend(fontsize=8, frameon=False)
        hide_frame(axis)
    axes[0, 0].set_ylabel("held-out loss, nats per token", fontsize=9)
    save(figure, path, title)


def main(args: Args) -> dict[str, Any]:
    console = Console(stderr=True)
    if not args.seeds or not (args.muon_lr or args.adamw_lr):
        raise ValueError("--seeds needs a value, and so does --muon-lr or --adamw-lr")
    folder = results_folder(args.out, describe_device(choose_device("auto")))
    table = folder / "optimizers.csv"
    check_columns(table, OptimizerRow)
    paths = [str(Path(path).resolve()) for path in args.data] or [str(builtin_corpus(console=console))]
    shares = {path: args.heldout_tokens / open_corpus([path], load_tokenizer()).num_tokens for path in paths}
    runs = planned(args, paths)
    for number, one in enumerate(runs, 1):
        console.print(f"run {number} of {len(runs)}: {one.folder.name}", highlight=False, soft_wrap=True)
        train(one, args, shares[one.data])
    runs = [with_curve(one) for one in runs]
    rows: list[OptimizerRow] = []
    for path in paths:
        new = rows_of([one for one in runs if one.data == path], args)
        show(new, table_console())
        rows += new
    append(table, rows)
    picture = folder / f"optimizers-{args.preset}.png"
    plot(runs, picture, f"{args.preset}, {args.tokens:,} tokens a run, {len(args.seeds)} seeds each")
    return {"csv": str(table), "png": str(picture), "rows": as_dicts(rows)}


if __name__ == "__main__":
    run_command(main, Args, __doc__)
