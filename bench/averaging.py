"""Compare the weights of a run with their moving averages (--ema), for several schedules of the learning rate.

    python bench/averaging.py --data poems.jsonl [--tokens 600000] [--seeds 1 2] [--schedules constant wsd cosine]

A run is pretraining with the optimizer and the rate of train/pretrain.py for the preset, but without checkpoints, so
that one run can keep several averages. The span of an average is a share of the run's steps: its decay is
1 - 1 / (span x steps). Held-out losses are compared, not seconds. Rows are added to averaging.csv in --out; the last
line of stdout is JSON.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])

import torch
from rich.console import Console

from bench.common.command import run
from bench.common.record import Row, append, as_dicts, check_columns, results_folder, stamp
from minimind import ModelConfig, load_tokenizer
from minimind.data import Corpus, PackedLoader, open_corpus
from minimind.data.builtin.docstrings import builtin_corpus
from minimind.data.split import split
from minimind.modeling import Model
from minimind.objectives.next_token import next_token_loss
from minimind.training.batches import to_device
from minimind.training.evaluation import heldout_loss
from minimind.training.optim import ScheduleName, WeightAverage, build_optimizers, lr_factor
from minimind.training.parallel import Parallel
from minimind.utils.device import choose_device, choose_precision, describe_device

ROW, BATCH, HELD_OUT = 512, 4096, 32_768  # tokens


@dataclass(frozen=True)
class Args:
    """Compare weights with their averages. Every default works."""

    data: tuple[str, ...] = ()
    """Files as in train/pretrain.py; empty: the built-in corpus."""
    preset: str = "nano"
    """Model shape."""
    tokens: int = 600_000
    """Tokens of a run, padding included."""
    lr: float = 4e-3
    """Peak rate; the default is that of train/pretrain.py for nano."""
    seeds: tuple[int, ...] = (1, 2)
    """Seeds of the initial weights and the data order."""
    schedules: tuple[ScheduleName, ...] = ("constant", "wsd", "cosine")
    """Schedules of the learning rate."""
    spans: tuple[float, ...] = (0.02, 0.05, 0.1, 0.2)
    """Spans of the averages, as shares of the steps."""
    evals: int = 4
    """Evaluations in a run, the last at its end."""
    out: str | None = None
    """Folder of the rows; None: bench/results/DEVICE."""


@dataclass(frozen=True)
class AveragingRow(Row):
    """One evaluation. span: of the average, 0 for the weights themselves. heldout_loss: nats per token."""

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
    """Train; yield (step, span, held-out tokens, held-out loss) of the weights and of every average."""
    torch.manual_seed(seed)
    device = choose_device("auto")
    model = Model(ModelConfig.preset(args.preset)).to(device)
    model.compute_dtype = choose_precision(device).compute_dtype
    data, heldout = split(corpus, 0.05)
    loader = PackedLoader(data, ROW, BATCH // ROW, seed, True, 0, 1)
    steps = args.tokens // BATCH
    optimizer = build_optimizers(model, "muon", args.lr, 0.1)
    averages = {span: WeightAverage(model, max(0.0, 1 - 1 / (span * steps))) for span in args.spans}
    evaluate = partial(heldout_loss, model, heldout, ROW, HELD_OUT, Parallel())
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
            figures = evaluate()
            yield step + 1, 0.0, figures["heldout_tokens"], figures["heldout_loss"]
            for span, average in averages.items():
                with average.in_place():
                    figures = evaluate()
                yield step + 1, span, figures["heldout_tokens"], figures["heldout_loss"]


def run_all(args: Args, table: Path, console: Console) -> list[AveragingRow]:
    """Train every run, seed by seed, so that an interrupted benchmark has compared something. Every evaluation is
    printed, and the rows of a run are added to `table` at its end."""
    paths = list(args.data) or [str(builtin_corpus(console=console))]
    corpus = open_corpus(paths, load_tokenizer())
    rows: list[AveragingRow] = []
    for seed in args.seeds:
        for schedule in args.schedules:
            new = []
            for step, span, tokens, loss in train(args, schedule, seed, corpus):
                columns = stamp(choose_device("auto"), "torch")
                new.append(
                    AveragingRow(
                        **columns, data=Path(paths[0]).name, preset=args.preset, schedule=schedule, lr=args.lr,
                        seed=seed, steps=args.tokens // BATCH, step=step, span=span, heldout_tokens=tokens,
                        heldout_loss=loss,
                    )
                )  # fmt: skip
                subject = f"average over {span:.0%}" if span else "weights"
                console.print(f"{schedule}, seed {seed}, step {step}: {subject} {loss:.4f}", highlight=False)
            append(table, new)
            rows += new
    return rows


def gains(rows: Sequence[AveragingRow]) -> dict[tuple[str, float], list[float]]:
    """(schedule, span) -> by how much the average's loss at the end is lower than that of the weights, per seed."""
    ends = [row for row in rows if row.step == row.steps]
    weights = {(row.schedule, row.seed): row.heldout_loss for row in ends if not row.span}
    by_average: dict[tuple[str, float], list[float]] = {}
    for row in ends:
        if row.span:
            gain = weights[row.schedule, row.seed] - row.heldout_loss
            by_average.setdefault((row.schedule, row.span), []).append(gain)
    return by_average


def main(args: Args) -> dict[str, Any]:
    if not args.seeds or not args.schedules or not all(0 < span <= 1 for span in args.spans):
        raise ValueError("--seeds and --schedules need a value; --spans must be above 0 and at most 1")
    if args.tokens < BATCH * max(1, args.evals):
        raise ValueError(f"--tokens {args.tokens}: a step has {BATCH}, and --evals {args.evals} needs as many steps")
    console = Console(stderr=True)
    table = results_folder(args.out, describe_device(choose_device("auto"))) / "averaging.csv"
    check_columns(table, AveragingRow)
    rows = run_all(args, table, console)
    for (schedule, span), losses in gains(rows).items():
        console.print(f"{schedule}: average over {span:.0%} better by {', '.join(f'{g:+.4f}' for g in losses)}")
    return {"csv": str(table), "rows": as_dicts(rows)}


if __name__ == "__main__":
    run(main, Args, __doc__)
