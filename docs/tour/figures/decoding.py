"""Decoding of minimind2-small: the pages that sequences hold, and the bytes that a step reads, beside measured
steps."""

from __future__ import annotations

import csv
from pathlib import Path

import torch
from figures.style import BLUE, CYCLE, GREEN, GREY, INK, ORANGE, PALE, box, panels, plain
from matplotlib.figure import Figure

from minimind.config import ModelConfig
from minimind.inference.scheduler import PagePool, page_key
from minimind.modeling import Model
from minimind.tokenization import load_tokenizer

PAGE = 8
SYSTEM = "You are a helpful assistant, and you answer in one short sentence. "
PROMPTS = (SYSTEM + "What is 8 + 6?", SYSTEM + "Name a colour, please.")
RESULTS = Path(__file__).parents[3] / "bench" / "results"
CONTEXTS = torch.arange(0, 8193, 64)
MEASURED, COMMIT = "amd-epyc-2-threads-avx512/decode.csv", "937ab6294100"  # page 12 quotes the same rows


def draw() -> Figure:
    figure, (left, middle, right) = panels(1.25, 1, 1, height=3.5)
    _pages(left)
    _bytes_read(middle)
    _measured(right)
    return figure


def hold(pool: PagePool, tokens: list[int]) -> tuple[list[int], int]:
    """(the pages of a sequence, how many of them it found there)"""
    keys, parent = [], b""
    for first in range(0, len(tokens) - PAGE + 1, PAGE):
        parent = page_key(parent, tokens[first : first + PAGE])
        keys.append(parent)
    pages = pool.find(keys)
    found = len(pages)
    for number in range(found, -(-len(tokens) // PAGE)):
        page = pool.take()
        assert page is not None
        pages.append(page)
        if number < len(keys):
            pool.publish(page, keys[number])
    return pages, found


def _pages(axes) -> None:
    pool, tokenizer = PagePool(8), load_tokenizer()
    owner: dict[int, list[int]] = {}
    for row, prompt in enumerate(PROMPTS):
        tokens = tokenizer.encode(prompt)
        pages, found = hold(pool, tokens)
        y, end = ((3.2, 0.9), (-3.1, -0.05))[row]
        text = f"block table of sequence {row}: {len(tokens)} tokens" + f", {found} page found" * bool(found)
        axes.text(0, y + 1.05 if row == 0 else y - 0.45, text, fontsize=8)
        for i, page in enumerate(pages):
            owner.setdefault(page, []).append(row)
            box(axes, 1.3 * i, y, 1.15, 0.75, str(page), CYCLE[row], color="white", fontweight="bold")
            axes.plot(
                [1.3 * i + 0.57, 1.02 * page + 0.46], [y if row == 0 else y + 0.75, end], color=CYCLE[row], lw=1.2
            )
    for page in range(pool.pages):
        rows = owner.get(page, [])
        colour = (PALE, CYCLE[rows[0]] if rows else PALE, GREEN)[len(rows)]
        box(axes, 1.02 * page, 0, 0.92, 0.85, str(page), colour, color=INK if not rows else "white", fontweight="bold")
    axes.text(8.4, 1.6, f"the cache, pages of {PAGE} tokens\ngreen: shared; gray: free", ha="right", fontsize=8)
    axes.set(xlim=(-0.2, 8.6), ylim=(-3.9, 4.8), title="two prompts that begin alike")
    plain(axes)


def _bytes_read(axes) -> None:
    with torch.device("meta"):
        model = Model(ModelConfig.preset("minimind2-small"))
    weights = 2 * model.num_parameters()
    for batch, colour in ((1, BLUE), (16, ORANGE), (64, GREEN)):
        cache = batch * CONTEXTS * model.kv_bytes_per_token()
        axes.plot(CONTEXTS, (weights + cache) / batch / 1e6, color=colour, lw=2, label=f"batch {batch}")
    axes.set(xlabel="tokens of context", ylabel="MB read for one new token", ylim=(0, 98))
    axes.set_title("arithmetic, bf16")
    axes.grid(color=PALE)
    axes.legend(fontsize=8, ncols=3, columnspacing=0.8, handlelength=1, loc="upper center")


def _measured(axes) -> None:
    with open(RESULTS / MEASURED, encoding="utf-8", newline="") as file:
        rows = [row for row in csv.DictReader(file) if (row["commit"], row["status"]) == (COMMIT, "ok")]
    rows = [row for row in rows if row["batch"] == "1" and row["width"] in ("bf16", "fp32")]
    rows.sort(key=lambda row: float(row["tpot"]))
    names = [
        row["peer"].removesuffix("-fp32").removesuffix("-f32").removesuffix("-bf16") + f", {row['width']}"
        for row in rows
    ]
    limit = [1e3 * int(row["step_bytes"]) / float(row["bandwidth"]) for row in rows]
    spent = [1e3 * float(row["tpot"]) for row in rows]
    axes.barh(names, spent, 0.62, color=PALE, edgecolor=GREY, lw=0.6, label="a step")
    axes.barh(names, limit, 0.3, color=BLUE, label="reading its bytes")
    axes.tick_params(axis="y", labelsize=7.5)
    axes.invert_yaxis()
    axes.set_xlabel("milliseconds, one sequence")
    axes.set_title(f"measured, {COMMIT[:7]}")
    axes.legend(fontsize=8, loc="upper right")
