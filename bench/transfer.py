"""Learning rates that transfer: the best peak rates of small models by width, depth, tokens and batch, and their rule.

    python bench/transfer.py --data poems.jsonl builtin      # hours on two cores; the same command goes on after a cut
    python bench/transfer.py --data poems.jsonl builtin --only width tokens --minutes 30
    python bench/transfer.py --fit                           # the best rates and the rule, from the rows that are there
    python bench/transfer.py --plot                          # the picture of docs/training.md
    python bench/transfer.py --data poems.jsonl --check      # minimind2-small at half, once and twice the rule's rate

A run is one training with the project's own loop, in this process. Rates lie on a grid of factors of two; each scan
begins at the best rate of the scan that is most like it and goes on until its lowest loss has a higher one on either
side. A parabola in log rate through the lowest losses gives the best rate, and least squares over these the rule
(bench/rates/fit.py). Rows are added to transfer.jsonl in --out, and no run that has one is repeated; several
processes may share the work. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

from rich.console import Console
from rich.table import Table

from bench.operators.report import slug
from bench.rates.fit import NOISE, Optimum, Rule, fit, noise_of, optima_of
from bench.rates.plan import FIRST, OutOfTimeError, Sweep, planned
from bench.rates.plot import plot
from bench.rates.runs import Point, TransferRow, read
from minimind.config import PRESETS
from minimind.data.builtin.docstrings import builtin_corpus
from minimind.utils.device import choose_device, describe_device
from minimind.utils.files import cache_root, make_folder
from minimind.utils.stdio import command_line

PICTURE = Path(__file__).parents[1] / "docs" / "images" / "transfer.png"


@dataclass(frozen=True)
class Args:
    """Find the best peak rates of small models. Every default works."""

    data: tuple[str, ...] = ("builtin",)
    """Text files as in train/pretrain.py; builtin is the built-in corpus. Most runs take the first, some the last."""
    widths: tuple[int, ...] = (128, 192, 256, 384, 512)
    """Hidden sizes, multiples of 64; all but the scan over widths takes the first and the third."""
    tokens: int = 204_800
    """Of a run; the scan over tokens takes two, four and eight times as many as well."""
    only: tuple[str, ...] = ()
    """Names of scans to run: tokens, width, seed, batch, depth, adamw, sft, sft-adamw, corpus, adamw-more,
    embedding, tokens-wide, warmup, seed-more. None: all, in this order."""
    minutes: float | None = None
    """Begin no further run after so long."""
    fit: bool = False
    """Run nothing, print the best rates and the rules."""
    plot: bool = False
    """Run nothing, draw docs/images/transfer.png."""
    check: bool = False
    """Run --preset at half, once and twice the rule's rate, on the first of --data, instead of the scans."""
    preset: str = "minimind2-small"
    """With --check: the shape."""
    check_tokens: int = 1_000_000
    """With --check: tokens of a run."""
    out: str | None = None
    """Folder of the rows; None for bench/results/DEVICE."""
    work: str | None = None
    """Folder of unfinished runs; None for one under $MINIMIND_CACHE or ~/.cache/minimind."""


def rules_of(optima: Sequence[Optimum]) -> dict[str, Rule]:
    """By stage and optimizer, "pretrain muon" and so on, of those that have enough scans."""
    found = {}
    for stage, optimizer in FIRST:
        mine = [o for o in optima if (o.point.stage, o.point.optimizer) == (stage, optimizer)]
        try:
            found[f"{stage} {optimizer}"] = fit([o for o in mine if _is_usual(o.point)])
        except ValueError:
            continue
    return found


def _is_usual(point: Point) -> bool:
    """Of the family, with the embedding's rate and the warm-up that the scripts have."""
    return (point.preset, point.embedding, point.warmup) == ("", 1.0, 0.02)


def show(rows: Sequence[TransferRow], console: Console) -> dict[str, Rule]:
    """The scans and the rules, which are returned."""
    optima = optima_of(rows)
    noise = noise_of(rows)
    said = "assumed" if noise is None else "by seeds"
    table = Table(title=f"{len(rows)} runs; noise of a loss {noise or NOISE:.4f} nats ({said})")
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
    """In one line."""
    terms = "".join(f" · {t.name}^({t.exponent:+.2f} ± {t.error:.2f})" for t in rule.terms)
    dropped = ", ".join(f"{t.name} {t.exponent:+.2f} ± {t.error:.2f}" for t in rule.dropped)
    return (
        f"{name}: {rule.rate:.2e} x/÷ {2**rule.error:.2f}{terms}; {rule.points} scans, spread x/÷ {2**rule.spread:.2f}"
        + (f"; not supported: {dropped}" if dropped else "")
    )


def check_point(args: Args, corpus: str) -> Point:
    if args.preset not in PRESETS:
        raise ValueError(f"--preset {args.preset}: choose one of {', '.join(PRESETS)}")
    config = PRESETS[args.preset]
    return Point(corpus, config.hidden_size, config.num_hidden_layers, args.check_tokens, preset=args.preset)


class Files:
    """The corpora of --data by name."""

    def __init__(self, data: Sequence[str], console: Console) -> None:
        if not data:
            raise ValueError("--data: name a file, or builtin")
        self.console = console
        self.paths = {Path(entry).name.split(".")[0]: entry for entry in data}
        missing = next((p for p in data if p != "builtin" and not Path(p).is_file()), None)
        if missing is not None:
            raise ValueError(f"--data {missing}: no such file; check the path given")

    def find(self, corpus: str) -> str:
        """Its path; for SFT that of what its models are pretrained on."""
        entry = self.paths.get(corpus, "builtin")
        return str(builtin_corpus(console=self.console) if entry == "builtin" else Path(entry).resolve())


def run(args: Args, table: Path, console: Console) -> None:
    """The scans or the check, as far as --minutes reach."""
    files = Files(args.data, console)
    corpora = list(files.paths)
    work = make_folder(Path(args.work) if args.work else cache_root(None) / "transfer")
    campaign = Sweep(table, work, files.find, console, args.minutes)
    try:
        if args.check:
            point = check_point(args, corpora[0])
            rules = rules_of(optima_of(read(table)))
            if "pretrain muon" not in rules:
                raise ValueError("--check: there is no rule yet; run the scans first")
            rate = rules["pretrain muon"](point)
            campaign.runs(point, [float(f"{rate * factor:.2g}") for factor in (1, 2, 0.5)])
        else:
            campaign.scans(planned(corpora, args.widths, args.tokens, args.only))
    except OutOfTimeError:
        console.print("--minutes are over; the same command goes on")


def main(args: Args) -> dict[str, Any]:
    device = describe_device(choose_device("auto"))
    folder = Path(args.out) if args.out else Path(__file__).parent / "results" / slug(device)
    table = folder / "transfer.jsonl"
    if not (args.fit or args.plot):
        run(args, table, Console(stderr=True))
    rows = read(table)
    if args.plot:
        plot(rows, PICTURE)
    rules = show(rows, Console(width=None if sys.stdout.isatty() else 140))
    found = {name: dataclasses.asdict(rule) for name, rule in rules.items()}
    return {"jsonl": str(table), "runs": len(rows), "rules": found}


if __name__ == "__main__":
    try:
        outcome = main(command_line(Args, __doc__))
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(json.dumps(outcome))
