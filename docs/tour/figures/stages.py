"""A conversation with its loss weights, and the losses of preferences and policy gradients."""

from __future__ import annotations

import torch
from figures.style import BLUE, GREEN, GREY, INK, ORANGE, PALE, box, panels, plain
from matplotlib.figure import Figure

from minimind.data.builtin.chat import conversations
from minimind.objectives import surrogates
from minimind.objectives.preference import Pairs, dpo
from minimind.tokenization import ChatEncoder, load_tokenizer

WIDTH = 46
TRAINED, LAST = "#8fd6bd", "#f5d08a"


def draw() -> Figure:
    figure, (left, middle, right) = panels(1.7, 1, 1, height=3.4, width=10.5)
    _conversation(left)
    _dpo(middle)
    _clip(right)
    return figure


def _conversation(axes) -> None:
    """The first of two exchanges that fits the panel."""
    encoder = ChatEncoder(load_tokenizer())
    rows = (row for row in conversations()[0] if len(row) == 4)
    chosen = next(row for row in rows if all(ord(c) < 256 for m in row for c in m["content"]) and len(str(row)) < 330)
    encoded = encoder.encode([encoder.pieces(chosen)])[0]
    x, y = 0.0, 0.0
    for token, trained, end in zip(encoded.ids.tolist(), encoded.trained, encoded.ends, strict=True):
        text = encoder.tokenizer.decode([token]).replace(" ", "·").replace("\n", "↵")
        size = len(text) + 1.0
        if x + size > WIDTH:
            x, y = 0.0, y - 1
        colour = LAST if end else TRAINED if trained else PALE
        box(axes, x, y, size, 0.8, text, colour, family="DejaVu Sans Mono", fontsize=7.5)
        x += size
        if text.endswith("↵"):
            x, y = 0.0, y - 1
    axes.set(xlim=(0, WIDTH), ylim=(y - 1.4, 1.0))
    axes.text(
        0, y - 0.4, "gray: weight 0      green: weight 1      yellow: weight 1, ends the turn", fontsize=8, va="top"
    )
    axes.set_title("a built-in conversation and its loss weights")
    plain(axes)


def _dpo(axes) -> None:
    h = torch.linspace(-60, 60, 400, dtype=torch.float64, requires_grad=True)
    zero, one = torch.zeros_like(h), torch.ones_like(h)
    loss = dpo(Pairs(h, zero, one, one, zero, zero), beta=0.1).losses
    (slope,) = torch.autograd.grad(loss.sum(), h)
    axes.plot(h.detach(), loss.detach(), color=BLUE, lw=2, label="loss")
    axes.plot(h.detach(), -10 * slope, color=ORANGE, lw=2, label="pull on h, x 10")
    axes.set(xlabel="h, in nats", title=r"DPO, $\beta$ = 0.1", ylim=(0, 6.5))
    axes.grid(color=PALE)
    axes.legend(fontsize=8)


def _clip(axes) -> None:
    ratio = torch.linspace(0.4, 1.7, 400, dtype=torch.float64)
    at = surrogates.SampledTokens(torch.arange(400), torch.zeros(400, dtype=torch.int64), 1)
    for advantage, colour in ((1.0, GREEN), (-1.0, ORANGE)):
        tokens = surrogates.PolicyTokens(
            at, ratio.log(), torch.zeros(400), torch.full((400,), advantage, dtype=torch.float64)
        )
        axes.plot(ratio, surrogates.clip(tokens).losses, color=colour, lw=2, label=f"A = {advantage:+.0f}")
    for bound in (0.8, 1.2):
        axes.axvline(bound, color=GREY, lw=0.8, ls="--")
    axes.axhline(0, color=INK, lw=0.6)
    axes.set(xlabel="ratio of new to old probability", title="PPO and GRPO: the clip")
    axes.grid(color=PALE)
    axes.legend(fontsize=8)
