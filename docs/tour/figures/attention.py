"""The scores of a packed row of the built-in text, and how many a batch needs."""

from __future__ import annotations

import numpy as np
from figures.style import BLUE, CYCLE, GREEN, ORANGE, panels
from matplotlib.colors import ListedColormap
from matplotlib.figure import Figure

from minimind.data import PackedLoader, builtin_corpus, open_corpus
from minimind.tokenization import load_tokenizer

ROWS, LENGTH = 8, 512


def draw() -> Figure:
    corpus = open_corpus([builtin_corpus()], load_tokenizer())
    batch = PackedLoader(corpus, LENGTH, ROWS).next_batch()
    lengths = np.diff(batch.cu_seqlens).astype(np.int64)
    figure, (left, right) = panels(1, 1.5, height=3.6)
    _mask(left, batch.cu_seqlens)
    _counts(right, lengths)
    return figure


def _mask(axes, ends: np.ndarray) -> None:
    """The row of the batch with the most documents."""
    row = int(np.argmax(np.bincount(ends[:-1] // LENGTH)))
    bounds = ends[(ends >= row * LENGTH) & (ends <= (row + 1) * LENGTH)] - row * LENGTH
    document = np.searchsorted(bounds[1:], np.arange(LENGTH), side="right")
    causal = np.tril(np.ones((LENGTH, LENGTH), bool))
    same = (document[:, None] == document) & causal
    picture = np.where(same, 2 + document[:, None] % 5, np.where(causal, 1, 0))
    axes.imshow(picture, cmap=ListedColormap(["white", "#e0e0e0", *CYCLE[:5]]), interpolation="nearest", vmin=0, vmax=6)
    axes.set(xlabel="key", ylabel="query", title=f"one row, {len(bounds) - 1} documents")
    axes.text(15, 480, "earlier in the row,\nbut of other documents:\nnot computed", fontsize=8, va="bottom")


def _counts(axes, lengths: np.ndarray) -> None:
    total = ROWS * LENGTH * LENGTH
    counts = {
        "every pair in the row,\nthen a mask": total,
        "causal, documents\nnot kept apart": ROWS * LENGTH * (LENGTH + 1) // 2,
        "causal within\ndocuments": int((lengths * (lengths + 1) // 2).sum()),
    }
    bars = axes.barh(list(counts), [n / 1e6 for n in counts.values()], 0.6, color=(ORANGE, GREEN, BLUE))
    axes.bar_label(bars, [f" {n / 1e6:.2f}M, {n / total:.0%}" for n in counts.values()])
    axes.invert_yaxis()
    axes.set(xlabel="millions of scores a head and layer", title=f"scores of {ROWS} rows of {LENGTH}", xlim=(0, 2.7))
