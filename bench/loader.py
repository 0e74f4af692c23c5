"""Measure the packed loader: its tokens per second, or its memory against the size of the corpus.

    python bench/loader.py [--data FILE...] [--seconds 5]     # batches of several shapes from the token cache
    python bench/loader.py --grow 2                           # memory for 2 GiB of generated text and an eighth of it

The first adds rows to loader.csv in --out. The second needs 6 GiB of disk space for a while; it adds rows to memory.csv
and draws memory-COMMIT.png beside it. The last line of stdout is JSON.
"""

from __future__ import annotations

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

from bench.common.command import run, table_console
from bench.common.plots import hide_frame, plt, save
from bench.common.record import Row, append, as_dicts, check_columns, results_folder, stamp
from bench.training.memory import MemoryUse, measure_memory
from minimind.data import Corpus, PackedLoader, builtin_corpus, open_corpus
from minimind.tokenization import load_tokenizer

SHAPES = ((1, 512), (8, 512), (128, 512), (32, 2048), (8, 8192))  # rows, tokens in a row
SMALLER = 8  # --grow compares a corpus with one this many times smaller


@dataclass(frozen=True)
class Args:
    """Measure the loader's speed, or with --grow its memory."""

    data: tuple[str, ...] = ()
    """Files as in train/pretrain.py; empty: the built-in corpus. --grow takes its sentences from them."""
    seconds: float = 5.0
    """Seconds of loading, for every shape or for each size of --grow."""
    grow: float | None = None
    """GiB of text to generate, tokenize and load, in a temporary folder ($TMPDIR), which needs three times the
    space."""
    out: str | None = None
    """Folder of the rows and the picture; None: bench/results/DEVICE."""


@dataclass(frozen=True)
class LoaderRow(Row):
    """One batch shape. tokens_per_second: (input, target) pairs without padding. fill: the share of positions with
    tokens. slowest_ms: the time of a batch for which the next window of documents is packed."""

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
class MemoryRow(Row):
    """One corpus size. Peaks in MiB: of anonymous memory while tokenizing and while loading, and of the resident set,
    which includes the mapped pages of the token cache."""

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
    columns = stamp(torch.device("cpu"), "numpy")
    folder = results_folder(args.out, columns["device"])
    sources = list(args.data) or [str(builtin_corpus(console=console))]
    if args.grow is None:
        return _speed(folder / "loader.csv", columns, open_corpus(sources, load_tokenizer()), args.seconds)
    table = folder / "memory.csv"
    check_columns(table, MemoryRow)
    size = int(args.grow * 2**30)
    usages = measure_memory((size // SMALLER, size), sources, args.seconds, console)
    rows = [_memory_row(columns, usage) for usage in usages]
    append(table, rows)
    picture = folder / f"memory-{columns['commit'] or 'unknown'}.png"
    plot_memory(usages, picture, f"{columns['device']}, {columns['commit']}")
    show_memory(rows)
    return {"csv": str(table), "png": str(picture), "rows": as_dicts(rows)}


def _speed(path: Path, columns: dict[str, Any], corpus: Corpus, seconds: float) -> dict[str, Any]:
    check_columns(path, LoaderRow)
    table = Table(title=f"{corpus.num_documents:,} documents, {corpus.num_tokens:,} tokens")
    for column in ("batch", "tokens/s", "median ms", "slowest ms", "filled"):
        table.add_column(column, justify="right")
    rows = []
    for shape in SHAPES:
        row = time_loader(columns, corpus, *shape, seconds)
        rows.append(row)
        times = f"{row.median_ms:.2f}", f"{row.slowest_ms:,.0f}", f"{row.fill:.1%}"
        table.add_row(f"{row.rows} x {row.seq_len}", f"{row.tokens_per_second:,.0f}", *times)
    append(path, rows)
    table_console().print(table)
    return {"csv": str(path), "rows": as_dicts(rows)}


def time_loader(columns: dict[str, Any], corpus: Corpus, rows: int, seq_len: int, seconds: float) -> LoaderRow:
    """Load batches of rows x seq_len for `seconds`, which includes packing the windows."""
    loader = PackedLoader(corpus, seq_len, rows)
    times: list[float] = []
    tokens, start = 0, time.perf_counter()
    while not times or time.perf_counter() - start < seconds:
        began = time.perf_counter()
        tokens += loader.next_batch().num_targets
        times.append(time.perf_counter() - began)
    return LoaderRow(
        **columns,
        documents=corpus.num_documents, tokens=corpus.num_tokens, rows=rows, seq_len=seq_len, batches=len(times),
        tokens_per_second=tokens / sum(times), median_ms=statistics.median(times) * 1e3, slowest_ms=max(times) * 1e3,
        fill=tokens / (len(times) * rows * seq_len),
    )  # fmt: skip


def _memory_row(columns: dict[str, Any], usage: MemoryUse) -> MemoryRow:
    return MemoryRow(
        **columns,
        text_mib=usage.text_bytes / 2**20, documents=usage.counts["documents"], tokens=usage.counts["tokens"],
        tokenize_seconds=usage.loading_from, tokenize_mb_per_second=usage.text_bytes / 1e6 / usage.loading_from,
        tokenize_peak_mib=usage.peak(loading=False), load_peak_mib=usage.peak(loading=True),
        load_tokens_per_second=usage.counts["tokens_per_second"], rss_peak_mib=usage.peak_rss,
    )  # fmt: skip


def show_memory(rows: Sequence[MemoryRow]) -> None:
    table = Table(title=f"memory against the size of the corpus, {rows[0].device}")
    for column in ("text MiB", "tokens", "tokenizing MB/s", "peak MiB", "loading tokens/s", "peak MiB", "RSS MiB"):
        table.add_column(column, justify="right")
    for row in rows:
        speeds = f"{row.tokenize_mb_per_second:.2f}", f"{row.load_tokens_per_second:,.0f}"
        peaks = f"{row.tokenize_peak_mib:,.0f}", f"{row.load_peak_mib:,.0f}", f"{row.rss_peak_mib:,.0f}"
        table.add_row(f"{row.text_mib:,.0f}", f"{row.tokens:,}", speeds[0], peaks[0], speeds[1], peaks[1], peaks[2])
    table_console().print(table)


def plot_memory(usages: Sequence[MemoryUse], path: Path, title: str) -> None:
    """Memory while tokenizing, over the share of the time, and while loading; a colour for each size."""
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
        hide_frame(axis)
    axes[0].set_ylabel("MiB", fontsize=9)
    save(figure, path, title)


if __name__ == "__main__":
    run(main, Args, __doc__)
