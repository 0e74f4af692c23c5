"""A row of the built-in text as tokens, and how byte-pair encoding builds one word of it."""

from __future__ import annotations

import json
from collections.abc import Iterator
from itertools import pairwise

from figures.style import GREY, INK, ORANGE, PALE, SKY, box, panels, plain
from matplotlib.figure import Figure

from minimind.data import builtin_corpus, read_documents
from minimind.tokenization import load_tokenizer
from minimind.tokenization.tokenizer import DEFAULT_FOLDER

START = "Add counts from two counters."
WORD = " counters"
FILLS = ("#9fd0ee", "#f5d08a", "#8fd6bd")


def draw() -> Figure:
    tokenizer = load_tokenizer()
    row = next(d.text for d in read_documents(builtin_corpus()) if d.text.startswith(START))
    figure, (left, right) = panels(1.75, 1)
    ids = tokenizer.encode(row, allow_special=False)
    _tokens(left, row, tokenizer.offsets(row, allow_special=False), ids)
    left.set_title(f"one row: {len(row.encode())} bytes, {len(ids)} tokens")
    steps = list(merges(WORD.replace(" ", "Ġ")))
    _merging(right, steps)
    right.set_title(f"“{WORD}”: {len(steps[0])} bytes, {len(steps) - 1} merges")
    return figure


def merges(word: str) -> Iterator[list[str]]:
    """The parts of a word after 0, 1, ... merges: always the pair that comes first in the tokenizer's list."""
    model = json.loads((DEFAULT_FOLDER / "tokenizer.json").read_text(encoding="utf-8"))["model"]
    ranks = {tuple(pair): rank for rank, pair in enumerate(model["merges"])}
    parts = list(word)
    yield parts
    while pairs := [pair for pair in pairwise(parts) if pair in ranks]:
        first, second = min(pairs, key=ranks.__getitem__)
        at = next(i for i in range(len(parts)) if parts[i : i + 2] == [first, second])
        parts = [*parts[:at], first + second, *parts[at + 2 :]]
        yield parts


def _tokens(axes, row: str, offsets: list[tuple[int, int]], ids: list[int]) -> None:
    width, line = 34, 0
    x = 0.0
    for i, ((start, stop), token) in enumerate(zip(offsets, ids, strict=True)):
        shown = row[start:stop].replace("\n", "↵").replace(" ", "·")
        size = max(len(shown), len(str(token)) * 0.8) + 0.7
        if x + size > width:
            x, line = 0.0, line + 1
        colour = FILLS[i % 3]
        box(axes, x, -1.6 * line, size, 0.8, shown, colour, family="DejaVu Sans Mono", color=INK)
        axes.text(x + size / 2, -1.6 * line - 0.25, str(token), ha="center", va="center", fontsize=7, color=GREY)
        x += size
    axes.set(xlim=(0, width), ylim=(-1.6 * line - 0.8, 1.0))
    plain(axes)


def _merging(axes, steps: list[list[str]]) -> None:
    for number, parts in enumerate(steps):
        new = set(parts) - set(steps[number - 1]) if number else set()
        x = 0
        for part in parts:
            colour = ORANGE if part in new else SKY if number == len(steps) - 1 else PALE
            box(axes, x, -number, len(part), 0.75, part.replace("Ġ", "·"), colour, family="DejaVu Sans Mono")
            x += len(part)
    axes.set(xlim=(0, len(steps[0])), ylim=(1 - len(steps) - 0.2, 1.0))
    plain(axes)
