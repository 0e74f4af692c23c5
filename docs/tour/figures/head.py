"""The linear head of minimind2-small: one chunk of logits at a time, and the memory of both forms."""

from __future__ import annotations

import torch
from figures.style import BLUE, GREEN, INK, ORANGE, PALE, SKY, box, panels, plain
from matplotlib.figure import Figure
from traffic import traffic

from minimind.config import ModelConfig
from minimind.kernels.chunked_linear import chunk_rows
from minimind.kernels.linear_cross_entropy import linear_cross_entropy_ref

CONFIG = ModelConfig.preset("minimind2-small")
TOKENS = (1024, 2048, 4096, 8192, 16384, 32768, 65536, 131072)
SHOWN = 16384


def draw() -> Figure:
    figure, (left, right) = panels(1.15, 1, height=3.5)
    _shapes(left)
    full, chunked = [full_bytes(n) / 1e9 for n in TOKENS], [chunked_bytes(n) / 1e9 for n in TOKENS]
    right.loglog(TOKENS, full, "o-", color=ORANGE, label="all logits, plain PyTorch (counted)")
    right.loglog(TOKENS, chunked, "s-", color=BLUE, label="a chunk at a time (arithmetic)")
    for values, up in ((full, 1.25), (chunked, 0.5)):
        right.text(TOKENS[-2], values[-2] * up, f"{values[-2]:.2g} GB", ha="center", fontsize=8.5)
    right.set_xticks(TOKENS[::2], [f"{n // 1024}k" for n in TOKENS[::2]])
    right.minorticks_off()
    right.set(xlabel="tokens in a forward and backward", ylabel="GB beside x and w", title="memory of head and loss")
    right.grid(color=PALE)
    right.legend(loc="upper left", fontsize=8)
    return figure


def full_bytes(tokens: int) -> int:
    """The most that PyTorch's operators hold at once, x and w left out."""
    x = torch.empty(tokens, CONFIG.hidden_size, dtype=torch.bfloat16, device="meta", requires_grad=True)
    w = torch.empty(CONFIG.vocab_size, CONFIG.hidden_size, device="meta", requires_grad=True)
    return traffic(linear_cross_entropy_ref, x, w, torch.empty(tokens, dtype=torch.int64, device="meta")).peak


def rows_at_once(tokens: int) -> int:
    """The number of rows whose bf16 logits a GPU holds at once."""
    return min(tokens, chunk_rows(torch.device("cuda"), 2 * CONFIG.vocab_size))


def chunked_bytes(tokens: int) -> int:
    """A chunk of bf16 logits, dx in bf16, w in bf16 and dw in float32."""
    head = CONFIG.vocab_size * CONFIG.hidden_size
    return 2 * rows_at_once(tokens) * CONFIG.vocab_size + 2 * tokens * CONFIG.hidden_size + 6 * head


def _shapes(axes) -> None:
    """x, w and the logits, to one scale."""
    c, v, rows = CONFIG.hidden_size, CONFIG.vocab_size, rows_at_once(SHOWN)
    gap = 900
    box(axes, 0, 0, c, SHOWN, colour=SKY)
    axes.text(c / 2, SHOWN + 250, f"x\n{SHOWN:,} x {c}", ha="center", fontsize=8)
    x = c + gap
    for start in range(0, SHOWN, rows):
        height = min(rows, SHOWN - start)
        now = start == rows
        top = SHOWN - start - height
        box(
            axes, x, top, v, height, f"chunk {start // rows + 1}: {height:,} rows", ORANGE if now else "white", edge=INK
        )
        if now:
            box(axes, 0, top, c, height, colour=BLUE)
            axes.annotate("", (x - 60, top + height / 2), (c + 60, top + height / 2), arrowprops=dict(arrowstyle="->"))
    axes.text(x + v / 2, SHOWN + 250, f"logits, {SHOWN:,} x {v:,}: never there as a whole", ha="center", fontsize=8)
    axes.text(x + v / 2, -300, "a chunk turns into its own gradient, in place", ha="center", va="top", fontsize=8)
    box(axes, x + v + gap, SHOWN - v, c, v, colour=GREEN)
    axes.text(x + v + gap + c / 2, SHOWN + 250, f"w\n{v:,} x {c}", ha="center", fontsize=8)
    axes.set(xlim=(-500, x + v + gap + c + 600), ylim=(-1300, SHOWN + 1900), title="the head, drawn to scale")
    plain(axes)
