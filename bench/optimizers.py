"""AdamW against Muon: how many tokens each needs to reach a held-out loss, over data, learning rates and seeds.

    python bench/optimizers.py --data poems.jsonl web.jsonl [--tokens 600000] [--seeds 1 2] [--adamw-lr 4e-3 8e-3]

Every run is `train/pretrain.py` itself with other flags, minutes on a CPU, in a folder under --runs; the same command
goes on where it was cut off and repeats no finished run. Tokens are compared, not seconds: no idle machine is needed.

For each file the target is what the worse of the two optimizers reaches at its best rate, in its worse seed; a run's
tokens_to_target are interpolated between its evaluations, which all take the same held-out documents. Rows are added to
optimizers.csv in --out, and a picture is drawn beside it. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import datetime
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

from bench.operators.report import append, check_columns, columns_of, slug
from minimind.data.builtin.docstrings import builtin_corpus
from minimind.data.cache import open_corpus
from minimind.tokenization import load_tokenizer
from minimind.training.metrics import read_metrics
from minimind.training.run_folder import versions
from minimind.utils.device import choose_device, describe_device
from minimind.utils.display import caption
from minimind.utils.stdio import command_line

ROOT = Path(__file__).parents[1]
EVERYTHING = 1 << 40  # tokens: every evaluation takes all that is held out


@dataclass(frozen=True)
class Args:
    """Compare optimizers on real data. Every default works."""

    data: tuple[str, ...] = ()
    """Files as in train/pretrain.py, each a comparison of its own; None takes the built-in corpus."""
    preset: str = "nano"
    """Model shape."""
    tokens: int = 600_000
    """Tokens of a run, padding included."""
    seeds: tuple[int, ...] = (1, 2)
    """Each decides initial weights and data order."""
    muon_lr: tuple[float, ...] = (4e-3,)
    """Peak rates of Muon; the default is that of train/pretrain.py for nano."""
    adamw_lr: tuple[float, ...] = (4e-3, 8e-3, 16e-3)
    """Peak rates of AdamW."""
    heldout_tokens: int = 49_152
    """About so many are held out of each file, its last documents."""
    evals: int = 10
    """Measurements of the held-out loss in a run, beside the first."""
    runs: str = "runs/optimizers"
    """Folder of the runs."""
    out: str | None = None
    """Folder for the rows and the picture; None for bench/results/DEVICE."""


@dataclass(frozen=True)
class Run:
    """One training run; curve: (tokens, held-out loss in nats per token) of every evaluation, the last at the end."""

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
class OptimizerRow:
    """One run: its held-out loss at the end in nats per token, over heldout_tokens, and the tokens after which it was
    at target_loss, None where it never was."""

    date: str
    commit: str | None
    device: str
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
    """Seed by seed, so that a campaign that is cut off has compared something."""
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
    """The run to its end; nothing where it is there. Raises ValueError where it fails."""
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
    """Held-out loss at the end, the mean over seeds, by optimizer and rate."""
    settings = dict.fromkeys((run.optimizer, run.lr) for run in runs)
    return {s: statistics.fmean(r.loss for r in runs if (r.optimizer, r.lr) == s) for s in settings}


def best_settings(runs: Sequence[Run]) -> list[tuple[str, float]]:
    """Each optimizer at its best rate, the better optimizer first."""
    means = mean_losses(runs)
    names = dict.fromkeys(run.optimizer for run in runs)
    best = [min((s for s in means if s[0] == name), key=means.__getitem__) for name in names]
    return sorted(best, key=means.__getitem__)


def target_of(runs: Sequence[Run]) -> float:
    """Runs of one file -> what the worse optimizer reaches at its best rate, in its worse seed."""
    worse = best_settings(runs)[-1]
    return max(run.loss for run in runs if (run.optimizer, run.lr) == worse)


def tokens_to(curve: Sequence[tuple[int, float]], target: float) -> float | None:
    """Where the loss first falls to `target`, on straight lines between the evaluations; None where it never does."""
    if curve[0][1] <= target:
        return curve[0][0]
    for (before, high), (after, low) in pairwise(curve):
        if low <= target:
            return before + (after - before) * (high - target) / (high - low)
    return None


def rows_of(runs: Sequence[Run], args: Args) -> list[OptimizerRow]:
    """Runs of one file."""
    target, date = target_of(runs), datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
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
    """Rows of one file."""
    first = rows[0]
    table = Table(
        title=f"{first.data}, {first.preset}, {first.tokens:,} tokens, {first.heldout_tokens:,} held out",
        caption=f"target: {first.target_loss:.3f} nats per token",
    )
    for column in ("optimizer", "rate", "seeds", "held-out loss", "from-to", "bits/byte", "tokens to target"):
        table.add_column(column, justify="left" if column == "optimizer" else "right")
    for optimizer, lr in dict.fromkeys((row.optimizer, row.lr) for row in rows):
        mine = [row for row in rows if (row.optimizer, row.lr) == (optimizer, lr)]
        losses, needed = [row.heldout_loss for row in mine], [row.tokens_to_target for row in mine]
        table.add_row(
            optimizer,
            f"{lr:g}",
            str(len(mine)),
            f"{statistics.fmean(losses):.3f}",
            f"{min(losses):.3f}-{max(losses):.3f}",
            f"{statistics.fmean(row.heldout_bpb for row in mine):.3f}",
            ", ".join("not reached" if n is None else f"{n:,.0f}" for n in needed),
        )
    console.print(table)


def plot(runs: Sequence[Run], path: Path, title: str) -> None:
    """Held-out loss over tokens, a panel a file: thick lines are each optimizer's best rate; one line a seed."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    files = list(dict.fromkeys(run.data for run in runs))
    figure, axes = plt.subplots(1, len(files), figsize=(5.2 * len(files), 4), squeeze=False, layout="constrained")
    for axis, file in zip(axes[0], files, strict=True):
        mine = [run for run in runs if run.data == file]
        best, means, target = best_settings(mine), mean_losses(mine), target_of(mine)
        for i, setting in enumerate(means):
            style = {"linewidth": 2.0 if setting in best else 0.9, "color": f"C{i}"}
            for n, run in enumerate(r for r in mine if (r.optimizer, r.lr) == setting):
                label = f"{setting[0]} {setting[1]:g}: {means[setting]:.3f}" if n == 0 else None
                axis.plot([t / 1e6 for t, _ in run.curve], [x for _, x in run.curve], label=label, **style)
        axis.axhline(target, color="gray", linewidth=0.8, linestyle=":")
        axis.set_ylim(min(means.values()) - 0.1, target + 1.5)
        axis.set_title(caption(Path(file).name), fontsize=10)
        axis.set_xlabel("tokens trained on, millions", fontsize=9)
        axis.legend(fontsize=8, frameon=False)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0, 0].set_ylabel("held-out loss, nats per token", fontsize=9)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main(args: Args) -> dict[str, Any]:
    console = Console(stderr=True)
    if not args.seeds or not (args.muon_lr or args.adamw_lr):
        raise ValueError("--seeds, and --muon-lr or --adamw-lr: name at least one of each")
    stamp = versions(describe_device(choose_device("auto")))
    folder = Path(args.out) if args.out else Path(__file__).parent / "results" / slug(stamp["device"])
    table = folder / "optimizers.csv"
    check_columns(table, columns_of(OptimizerRow))
    paths = [str(Path(path).resolve()) for path in args.data] or [str(builtin_corpus(console=console))]
    shares = {path: args.heldout_tokens / open_corpus([path], load_tokenizer()).num_tokens for path in paths}
    runs = planned(args, paths)
    for number, run in enumerate(runs, 1):
        console.print(f"run {number} of {len(runs)}: {run.folder.name}", highlight=False, soft_wrap=True)
        train(run, args, shares[run.data])
    runs = [with_curve(run) for run in runs]
    rows: list[OptimizerRow] = []
    for path in paths:
        new = rows_of([run for run in runs if run.data == path], args)
        show(new, Console(width=None if sys.stdout.isatty() else 120))
        rows += new
    append(table, rows)
    picture = folder / f"optimizers-{args.preset}.png"
    plot(runs, picture, f"{args.preset}, {args.tokens:,} tokens a run, {len(args.seeds)} seeds each")
    return {"csv": str(table), "png": str(picture), "rows": [dataclasses.asdict(row) for row in rows]}


if __name__ == "__main__":
    try:
        outcome = main(command_line(Args, __doc__))
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(json.dumps(outcome))
