"""What an average of the weights (--ema) is worth, by the schedule of the rate: held-out loss of both.

    python bench/averaging.py --data poems.jsonl [--tokens 600000] [--seeds 1 2] [--schedules constant wsd cosine]

A run is pretraining with train/pretrain.py's optimizer and rate for the preset, its loop without checkpoints, so that
one run carries averages of several spans. A span is a share of the run's steps, over which the average is about:
decay 1 - 1 / (span x steps). Rows are added to averaging.csv in --out. Losses are compared, not seconds.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from rich.console import Console

from bench.operators.report import append, check_columns, columns_of, slug
from minimind import ModelConfig, load_tokenizer
from minimind.data import Corpus, PackedLoader, open_corpus
from minimind.data.builtin.docstrings import builtin_corpus
from minimind.data.split import split
from minimind.modeling import Model
from minimind.objectives.next_token import next_token_loss
from minimind.training.averaging import WeightAverage
from minimind.training.batches import to_device
from minimind.training.heldout import heldout_loss
from minimind.training.optim import ScheduleName, build_optimizers, lr_factor
from minimind.training.parallel import Parallel
from minimind.training.run_folder import versions
from minimind.utils.device import choose_device, choose_precision, describe_device
from minimind.utils.stdio import command_line

ROW, BATCH, HELD_OUT = 512, 4096, 32_768  # tokens


@dataclass(frozen=True)
class Args:
    """Compare weights with their averages. Every default works."""

    data: tuple[str, ...] = ()
    """Files as in train/pretrain.py; None takes the built-in corpus."""
    preset: str = "nano"
    """Model shape."""
    tokens: int = 600_000
    """Tokens of a run, padding included."""
    lr: float = 4e-3
    """Peak rate; the default is that of train/pretrain.py for nano."""
    seeds: tuple[int, ...] = (1, 2)
    """Each decides initial weights and data order."""
    schedules: tuple[ScheduleName, ...] = ("constant", "wsd", "cosine")
    """How the rate falls."""
    spans: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    """Of the averages, as shares of the steps."""
    evals: int = 4
    """Measurements in a run, the last at its end."""
    out: str | None = None
    """Folder for the rows; None for bench/results/DEVICE."""


@dataclass(frozen=True)
class AveragingRow:
    """One measurement. span: of the average, 0 for the weights themselves; losses in nats per token."""

    date: str
    commit: str | None
    device: str
    torch: str
    data: str
    preset: str
    schedule: str
    lr: float
    seed: int
    steps: int
    step: int
    span: float
    heldout_tokens: int
    heldout_loss: float


def train(args: Args, schedule: ScheduleName, seed: int, corpus: Corpus) -> Iterator[tuple[int, float, int, float]]:
    """(step, span, held-out tokens, held-out loss) of the weights and of every average."""
    torch.manual_seed(seed)
    device = choose_device("auto")
    model = Model(ModelConfig.preset(args.preset)).to(device)
    model.compute_dtype = choose_precision(device).compute_dtype
    data, heldout = split(corpus, 0.05)
    loader = PackedLoader(data, ROW, BATCH // ROW, seed, True, 0, 1)
    steps = args.tokens // BATCH
    optimizer = build_optimizers(model, "muon", args.lr, 0.1)
    averages = {span: WeightAverage(model, max(0.0, 1 - 1 / (span * steps))) for span in args.spans}
    measure = partial(heldout_loss, model, heldout, ROW, HELD_OUT, Parallel())
    for step in range(steps):
        model.train()
        optimizer.set_lr_factor(lr_factor(schedule, step, steps, max(1, round(0.02 * steps))))
        batch = to_device(loader.next_batch(), device)
        loss, aux, *_ = next_token_loss(model, batch)
        (loss / batch.global_num_targets + aux).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        for average in averages.values():
            average.update()
        if (step + 1) * args.evals // steps > step * args.evals // steps:
            found = measure()
            yield step + 1, 0.0, found["heldout_tokens"], found["heldout_loss"]
            for span, average in averages.items():
                with average.in_place():
                    found = measure()
                yield step + 1, span, found["heldout_tokens"], found["heldout_loss"]


def measured(args: Args, table: Path, console: Console) -> list[AveragingRow]:
    """Every run, seed by seed, so that a campaign that is cut off has compared something; each measurement is shown,
    and the rows of a run are added to `table` at its end."""
    stamp = versions(describe_device(choose_device("auto")))
    paths = list(args.data) or [str(builtin_corpus(console=console))]
    corpus = open_corpus(paths, load_tokenizer())
    rows: list[AveragingRow] = []
    for seed in args.seeds:
        for schedule in args.schedules:
            first = len(rows)
            for step, span, tokens, loss in train(args, schedule, seed, corpus):
                rows.append(
                    AveragingRow(
                        datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"), stamp["commit"],
                        stamp["device"], stamp["torch"], Path(paths[0]).name, args.preset, schedule, args.lr, seed,
                        args.tokens // BATCH, step, span, tokens, loss,
                    )
                )  # fmt: skip
                what = f"average over {span:.0%}" if span else "weights"
                console.print(f"{schedule}, seed {seed}, step {step}: {what} {loss:.4f}", highlight=False)
            append(table, rows[first:])
    return rows


def gains(rows: Sequence[AveragingRow]) -> dict[tuple[str, float], list[float]]:
    """What each average's loss at the end is below that of the weights, a number for each seed."""
    ends = [row for row in rows if row.step == row.steps]
    weights = {(row.schedule, row.seed): row.heldout_loss for row in ends if not row.span}
    found: dict[tuple[str, float], list[float]] = {}
    for row in ends:
        if row.span:
            gain = weights[row.schedule, row.seed] - row.heldout_loss
            found.setdefault((row.schedule, row.span), []).append(gain)
    return found


def main(args: Args) -> Path:
    """The table that the rows were added to. ValueError names what no run can use."""
    if not args.seeds or not args.schedules or not all(0 < span <= 1 for span in args.spans):
        raise ValueError("--seeds and --schedules: name some; --spans: shares of the steps, above 0 and up to 1")
    if args.tokens < BATCH * max(1, args.evals):
        raise ValueError(f"--tokens {args.tokens}: {BATCH} a step; take as many steps as --evals {args.evals}")
    console = Console(stderr=True)
    folder = Path(args.out) if args.out else Path(__file__).parent / "results"
    if not args.out:
        folder /= slug(describe_device(choose_device("auto")))
    table = folder / "averaging.csv"
    check_columns(table, columns_of(AveragingRow))
    rows = measured(args, table, console)
    for (schedule, span), mine in gains(rows).items():
        console.print(f"{schedule}: average over {span:.0%} better by {', '.join(f'{g:+.4f}' for g in mine)}")
    return table


if __name__ == "__main__":
    try:
        print(main(command_line(Args, __doc__)))
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
