"""Find the best peak learning rates of small models by width, depth, tokens and batch, and a rule for larger models.

    python bench/transfer.py --data poems.jsonl builtin      # hours on two cores; the same command continues later
    python bench/transfer.py --data poems.jsonl builtin --only width tokens --minutes 30
    python bench/transfer.py --fit                           # the best rates and the rule, from the existing rows
    python bench/transfer.py --plot                          # the picture of docs/rates.md
    python bench/transfer.py --data poems.jsonl --check      # minimind2-small at half, once and twice the rule's rate

A run is one training with the project's own loop, in this process. Rates lie on a grid of factors of two. A scan begins
at the best rate of the most similar scan and continues until its lowest loss has a higher loss on either side. A
parabola in log rate through the lowest losses gives the best rate, and least squares over the best rates give the rule
(bench/rates/fit.py). Rows are added to transfer.jsonl in --out; a run with a row is not repeated, and several processes
can share the work. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from rich.console import Console
from rich.table import Table

from bench.common.command import check_choices, run, table_console
from bench.common.record import ROOT, results_folder
from bench.rates.fit import NOISE, Optimum, Rule, fit, noise_of, optima_of
from bench.rates.plan import FIRST, OutOfTimeError, Sweep, planned
from bench.rates.plot import plot
from bench.rates.runs import Point, TransferRow, read
from minimind.config import PRESETS
from minimind.data.builtin.docstrings import builtin_corpus
from minimind.utils.device import choose_device, describe_device
from minimind.utils.files import cache_root, make_folder

PICTURE = ROOT / "docs" / "transfer.png"


@dataclass(frozen=True)
class Args:
    """Find the best peak rates of small models. Every default works."""

    data: tuple[str, ...] = ("builtin",)
    """Text files as in train/pretrain.py; builtin is the built-in corpus. Most runs use the first, some the last."""
    widths: tuple[int, ...] = (128, 192, 256, 384, 512)
    """Hidden sizes, multiples of 64; scans other than that over widths use the first and the third."""
    tokens: int = 204_800
    """Tokens of a run; the scan over tokens also takes two, four and eight times as many."""
    only: tuple[str, ...] = ()
    """Names of scans to run: tokens, width, seed, batch, depth, adamw, sft, sft-adamw, corpus, tokens-wide,
    adamw-more, embedding, warmup. Empty: all of them, in this order."""
    minutes: float | None = None
    """Begin no run after this time."""
    fit: bool = False
    """Print the best rates and the rules; run nothing."""
    plot: bool = False
    """Draw docs/transfer.png; run nothing."""
    check: bool = False
    """Instead of the scans, run --preset at half, once and twice the rule's rate on the first of --data."""
    preset: str = "minimind2-small"
    """Model shape of --check."""
    check_tokens: int = 1_000_000
    """Tokens of a run of --check."""
    out: str | None = None
    """Folder of the rows; None: bench/results/DEVICE."""
    work: str | None = None
    """Folder of unfinished runs; None: transfer under $MINIMIND_CACHE or ~/.cache/minimind."""


def rules_of(optima: Sequence[Optimum]) -> dict[str, Rule]:
    """ "pretrain muon" and so on -> the rule, for every stage and optimizer with enough scans."""
    rules = {}
    for stage, optimizer in FIRST:
        group = [o for o in optima if (o.point.stage, o.point.optimizer) == (stage, optimizer)]
        try:
            rules[f"{stage} {optimizer}"] = fit([o for o in group if _is_usual(o.point)])
        except ValueError:
            continue
    return rules


def _is_usual(point: Point) -> bool:
    """Whether it is of the family, with the embedding's rate and the warm-up of the scripts."""
    return (point.preset, point.embedding, point.warmup) == ("", 1.0, 0.02)


def show(rows: Sequence[TransferRow], console: Console) -> dict[str, Rule]:
    """Print the scans and the rules; return the rules."""
    optima = optima_of(rows)
    noise = noise_of(rows)
    source = "assumed" if noise is None else "from seeds"
    table = Table(title=f"{len(rows)} runs; noise of a loss {noise or NOISE:.4f} nats ({source})")
    for column in ("scan", "best rate", "x/÷", "loss", "higher a factor of 2 away", "rates"):
        table.add_column(column, justify="left" if column == "scan" else "right")
    for o in optima:
        figures = f"{o.rate:.2e}", f"{2**o.error:.2f}", f"{o.loss:.3f}", f"{o.curvature:.3f}", str(o.rates)
        table.add_row(str(o.point), *figures)
    console.print(table)
    rules = rules_of(optima)
    for name, rule in rules.items():
        console.print(describe(name, rule), highlight=False, soft_wrap=True)
    return rules


def describe(name: str, rule: Rule) -> str:
    """A rule in one line."""
    terms = "".join(f" · {t.name}^({t.exponent:+.2f} ± {t.error:.2f})" for t in rule.terms)
    dropped = ", ".join(f"{t.name} {t.exponent:+.2f} ± {t.error:.2f}" for t in rule.dropped)
    return (
        f"{name}: {rule.rate:.2e} x/÷ {2**rule.error:.2f}{terms}; {rule.points} scans, spread x/÷ {2**rule.spread:.2f}"
        + (f"; not supported: {dropped}" if dropped else "")
    )


def check_point(args: Args, corpus: str) -> Point:
    check_choices("preset", [args.preset], PRESETS)
    config = PRESETS[args.preset]
    return Point(corpus, config.hidden_size, config.num_hidden_layers, args.check_tokens, preset=args.preset)


class CorpusFiles:
    """The files of --data by the name of their corpus."""

    def __init__(self, data: Sequence[str], console: Console) -> None:
        if not data:
            raise ValueError("--data: needs a file, or builtin")
        self.console = console
        self.paths = {Path(entry).name.split(".")[0]: entry for entry in data}
        missing = next((p for p in data if p != "builtin" and not Path(p).is_file()), None)
        if missing is not None:
            raise ValueError(f"--data {missing}: no such file")

    def find(self, corpus: str) -> str:
        """The path of a corpus; for SFT, of the text on which its models are pretrained."""
        entry = self.paths.get(corpus, "builtin")
        return str(builtin_corpus(console=self.console) if entry == "builtin" else Path(entry).resolve())


def train_all(args: Args, table: Path, console: Console) -> None:
    """Run the scans or the check, as far as --minutes allows."""
    files = CorpusFiles(args.data, console)
    corpora = list(files.paths)
    work = make_folder(Path(args.work) if args.work else cache_root(None) / "transfer")
    sweep = Sweep(table, work, files.find, console, args.minutes)
    try:
        if args.check:
            point = check_point(args, corpora[0])
            rules = rules_of(optima_of(read(table)))
            if "pretrain muon" not in rules:
                raise ValueError("--check: needs a rule; run the scans first")
            rate = rules["pretrain muon"](point)
            sweep.runs(point, [float(f"{rate * factor:.2g}") for factor in (1, 2, 0.5)])
        else:
            sweep.scans(planned(corpora, args.widths, args.tokens, args.only))
    except OutOfTimeError:
        console.print("--minutes are over; run the same command again to continue")


def main(args: Args) -> dict[str, Any]:
    table = results_folder(args.out, describe_device(choose_device("auto"))) / "transfer.jsonl"
    if not (args.fit or args.plot):
        train_all(args, table, Console(stderr=True))
    rows = read(table)
    if args.plot:
        plot(rows, PICTURE)
    rules = show(rows, table_console(140))
    as_json = {name: dataclasses.asdict(rule) for name, rule in rules.items()}
    return {"jsonl": str(table), "runs": len(rows), "rules": as_json}


if __name__ == "__main__":
    run(main, Args, __doc__)
