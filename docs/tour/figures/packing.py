"""A batch of the built-in text, padded and packed, and the share of padding by row length."""

from __future__ import annotations

import sys
from itertools import pairwise

import numpy as np
from figures.style import BLUE, CYCLE, GREY, INK, ORANGE, PALE, panels, plain
from matplotlib.figure import Figure

from minimind.data import PackedLoader, builtin_corpus, open_corpus
from minimind.data.packing import assign_rows, cut_documents
from minimind.tokenization import load_tokenizer

ROWS, LENGTH = 8, 512
LENGTHS = (128, 256, 340, 512, 1024, 2048)


def draw() -> Figure:
    corpus = open_corpus([builtin_corpus()], load_tokenizer())
    lengths = corpus.lengths(np.arange(corpus.num_documents))
    figure, (left, middle, right) = panels(1, 1, 1.05, height=3.2)
    _padded(left, lengths[:ROWS])
    _packed(middle, PackedLoader(corpus, LENGTH, ROWS))
    _shares(right, lengths)
    version = ".".join(map(str, sys.version_info[:3]))
    right.set_title(f"padding of the built-in text (Python {version})", fontsize=9)
    return figure


def shares(lengths: np.ndarray, seq_len: int) -> tuple[float, float]:
    """Share of padding with one document a row, cut to seq_len, and packed."""
    padded = 1 - np.minimum(lengths - 1, seq_len).mean() / seq_len
    _, _, pieces = cut_documents(lengths, seq_len)
    rows = int(assign_rows(pieces, seq_len).max()) + 1
    return float(padded), float(1 - pieces.sum() / (rows * seq_len))


def _padded(axes, lengths: np.ndarray) -> None:
    for row, length in enumerate(np.minimum(lengths - 1, LENGTH)):
        axes.barh(row, length, 0.78, color=CYCLE[row % 5])
        axes.barh(row, LENGTH - length, 0.78, left=length, color="white", edgecolor=GREY, hatch="///", linewidth=0.5)
    real = np.minimum(lengths - 1, LENGTH).sum() / (ROWS * LENGTH)
    axes.set_title(f"one document a row: {1 - real:.0%} padding", fontsize=9)
    _rows(axes)


def _packed(axes, loader: PackedLoader) -> None:
    batch = loader.next_batch()
    ends = batch.cu_seqlens
    for n, (start, stop) in enumerate(pairwise(ends)):
        row, at = divmod(int(start), LENGTH)
        real = batch.targets.flat[start] >= 0
        style = dict(color=CYCLE[n % 5]) if real else dict(color="white", edgecolor=GREY, hatch="///")
        axes.barh(row, stop - start, 0.78, left=at, linewidth=0.5, **style)
        axes.plot([at, at], [row - 0.39, row + 0.39], color="white", linewidth=0.8)
    axes.set_title(f"packed: {1 - batch.num_targets / (ROWS * LENGTH):.1%} padding", fontsize=9)
    _rows(axes)


def _rows(axes) -> None:
    plain(axes)
    axes.set(xlim=(0, LENGTH), ylim=(ROWS - 0.5, -0.5), xlabel=f"{ROWS} rows of {LENGTH} positions")


def _shares(axes, lengths: np.ndarray) -> None:
    padded, packed = zip(*(shares(lengths, n) for n in LENGTHS), strict=True)
    x = np.arange(len(LENGTHS))
    for values, label, colour, shift in ((padded, "one document a row", ORANGE, -0.2), (packed, "packed", BLUE, 0.2)):
        bars = axes.bar(x + shift, [100 * v for v in values], 0.38, label=label, color=colour)
        axes.bar_label(bars, [f"{100 * v:.1f}" if v < 0.1 else f"{100 * v:.0f}" for v in values], fontsize=7, color=INK)
    axes.set_xticks(x, [str(n) for n in LENGTHS])
    axes.set(xlabel="positions in a row", ylabel="% padding", ylim=(0, 105))
    axes.grid(axis="y", color=PALE)
    axes.set_axisbelow(True)
    axes.legend(loc="upper left", fontsize=8)
