"""Tokens per second of the packed loader, and its memory against the size of the corpus.

    python bench/loader.py [--data FILE...] [--seconds 5]     # batches of several shapes from the token cache
    python bench/loader.py --grow 2                           # memory for 2 GiB of made-up text and an eighth of it

The first adds rows to loader.csv in bench/results/DEVICE; the second, which needs 6 GiB of disk for a while, to
memory.csv, and draws memory-COMMIT.png beside it. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import datetime
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

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from bench.operators.report import append, check_columns, columns_of, plt, slug
from bench.training.memory import MemoryUse, measure
from minimind.data import Corpus, PackedLoader, builtin_corpus, open_corpus
from minimind.tokenization import load_tokenizer
from minimind.training.run_folder import versions
from minimind.utils.device import describe_device
from minimind.utils.stdio import command_line

SHAPES = ((1, 512), (8, 512), (128, 512), (32, 2048), (8, 8192))  # rows, tokens in a row
SMALLER = 8  # --grow compares a corpus with one this many times smaller


@dataclass(frozen=True)
class Args:
    """Time the loader, or measure its memory with --grow."""

    data: tuple[str, ...] = ()
    """As in train/pretrain.py; None takes the built-in corpus. --grow draws its sentences from it."""
    seconds: float = 5.0
    """Of loading: for every shape, or at each size of --grow."""
    grow: float | None = None
    """GiB of text to make, tokenize and load, in a temporary folder ($TMPDIR chooses where); three times as much
    must be free."""
    out: str | None = None
    """Folder for the rows and the picture; None for bench/results/DEVICE."""


@dataclass(frozen=True)
class LoaderRow:
    """One batch shape. tokens_per_second: (input, target) pairs; padding counts for nothing. fill: the share of
    positions that hold tokens. A batch of `slowest_ms` is one that packs the next window of documents."""

    date: str
    commit: str | None
    device: str
    numpy: str | None
    documents: int
    tokens: int
    rows: int
    seq_len: int
    batches: int
    tokens_per_second: float
    median_ms: float
    slowest_ms: float
    fill: float


@dataclass(frozen=True)
class MemoryRow:
    """One corpus size. Peaks in MiB: of anonymous memory while tokenizing and while loading, and of RSS, which counts
    the mapped pages of the token cache as well."""

    date: str
    commit: str | None
    device: str
    numpy: str | None
    text_mib: float
    documents: int
    tokens: int
    tokenize_seconds: float
    tokenize_mb_per_second: float
    tokenize_peak_mib: float
    load_tokens_per_second: float
    load_peak_mib: float
    rss_peak_mib: float


def main(args: Args) -> dict[str, Any]:
    console = Console(stderr=True)
    if args.seconds <= 0:
        raise ValueError(f"--seconds {args.seconds:g}: must be above 0")
    if args.grow is not None and args.grow <= 0:
        raise ValueError(f"--grow {args.grow:g}: must be above 0")
    found = versions(describe_device(torch.device("cpu")))
    stamp = {name: found[name] for name in ("device", "commit", "numpy")}
    stamp["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    folder = Path(args.out) if args.out else Path(__file__).parent / "results" / slug(stamp["device"])
    sources = list(args.data) or [str(builtin_corpus(console=console))]
    if args.grow is None:
        return _speed(folder / "loader.csv", stamp, open_corpus(sources, load_tokenizer()), args.seconds)
    table = folder / "memory.csv"
    check_columns(table, columns_of(MemoryRow))
    size = int(args.grow * 2**30)
    usages = measure((size // SMALLER, size), sources, args.seconds, console)
    rows = [_memory_row(stamp, usage) for usage in usages]
    append(table, rows)
    picture = folder / f"memory-{stamp['commit'] or 'unknown'}.png"
    plot_memory(usages, picture, f"{stamp['device']}, {stamp['commit']}")
    show_memory(rows)
    return {"csv": str(table), "png": str(picture), "rows": [dataclasses.asdict(row) for row in rows]}


def _speed(path: Path, stamp: dict[str, Any], corpus: Corpus, seconds: float) -> dict[str, Any]:
    check_columns(path, columns_of(LoaderRow))
    table = Table(title=f"{corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens")
    for column in ("batch", "tokens/s", "median ms", "slowest ms", "filled"):
        table.add_column(column, justify="right")
    rows = []
    for shape in SHAPES:
        row = time_loader(stamp, corpus, *shape, seconds)
        rows.append(row)
        times = f"{row.median_ms:.2f}", f"{row.slowest_ms:,.0f}", f"{row.fill:.1%}"
        table.add_row(f"{row.rows} x {row.seq_len}", f"{row.tokens_per_second:,.0f}", *times)
    append(path, rows)
    Console(width=None if sys.stdout.isatty() else 120).print(table)
    return {"csv": str(path), "rows": [dataclasses.asdict(row) for row in rows]}


def time_loader(stamp: dict[str, Any], corpus: Corpus, rows: int, seq_len: int, seconds: float) -> LoaderRow:
    """Batches of rows x seq_len for `seconds`, the packing of windows included."""
    loader = PackedLoader(corpus, seq_len, rows)
    taken: list[float] = []
    tokens, start = 0, time.perf_counter()
    while not taken or time.perf_counter() - start < seconds:
        began = time.perf_counter()
        tokens += loader.next_batch().num_targets
        taken.append(time.perf_counter() - began)
    return LoaderRow(
        **stamp,
        documents=corpus.num_documents, tokens=corpus.num_tokens, rows=rows, seq_len=seq_len, batches=len(taken),
        tokens_per_second=tokens / sum(taken), median_ms=statistics.median(taken) * 1e3, slowest_ms=max(taken) * 1e3,
        fill=tokens / (len(taken) * rows * seq_len),
    )  # fmt: skip


def _memory_row(stamp: dict[str, Any], usage: MemoryUse) -> MemoryRow:
    return MemoryRow(
        **stamp,
        text_mib=usage.text_bytes / 2**20, documents=usage.found["documents"], tokens=usage.found["tokens"],
        tokenize_seconds=usage.loading_from, tokenize_mb_per_second=usage.text_bytes / 1e6 / usage.loading_from,
        tokenize_peak_mib=usage.peak(loading=False), load_peak_mib=usage.peak(loading=True),
        load_tokens_per_second=usage.found["tokens_per_second"], rss_peak_mib=usage.peak_rss,
    )  # fmt: skip


def show_memory(rows: Sequence[MemoryRow]) -> None:
    table = Table(title=f"memory against the size of the corpus, {rows[0].device}")
    for column in ("text MiB", "tokens", "tokenizing MB/s", "peak MiB", "loading tokens/s", "peak MiB", "RSS MiB"):
        table.add_column(column, justify="right")
    for row in rows:
        speeds = f"{row.tokenize_mb_per_second:.2f}", f"{row.load_tokens_per_second:,.0f}"
        peaks = f"{row.tokenize_peak_mib:,.0f}", f"{row.load_peak_mib:,.0f}", f"{row.rss_peak_mib:,.0f}"
        table.add_row(f"{row.text_mib:,.0f}", f"{row.tokens:,}", speeds[0], peaks[0], speeds[1], peaks[1], peaks[2])
    Console(width=None if sys.stdout.isatty() else 120).print(table)


def plot_memory(usages: Sequence[MemoryUse], path: Path, title: str) -> None:
    """Memory while tokenizing, over the share of its time, and while loading; one colour a size."""
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained")
    for usage, colour in zip(usages, ("#d98324", "#1b6ca8"), strict=True):
        rows = np.array([usage.seconds, usage.anonymous, usage.mapped])
        name = f"{usage.text_bytes / 2**20:,.0f} MiB of text"
        for axis, loading in zip(axes, (False, True), strict=True):
            seconds, own, mapped = rows[:, (rows[0] >= usage.loading_from) == loading]
            x = seconds - usage.loading_from if loading else seconds / usage.loading_from * 100
            axis.plot(x, own, color=colour, label=f"{name}: own memory, peak {own.max(initial=0):,.0f}")
            axis.plot(x, own + mapped, ":", color=colour, label="with mapped pages of files")
    for axis, label in zip(axes, ("tokenizing, % of the time it took", "loading, seconds"), strict=True):
        axis.set_xlabel(label, fontsize=9)
        axis.set_ylim(0, 1.6 * axis.get_ylim()[1])  # room for the legend
        axis.legend(fontsize=8, frameon=False, loc="upper left")
        axis.tick_params(labelsize=8)
        axis.spines[["top", "right"]].set_visible(False)
    axes[0].set_ylabel("MiB", fontsize=9)
    figure.suptitle(title, fontsize=9, x=0.01, ha="left")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    try:
        outcome = main(command_line(Args, __doc__))
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(json.dumps(outcome))
