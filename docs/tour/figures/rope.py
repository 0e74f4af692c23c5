"""Rotary embedding of minimind2-small: how fast each pair turns, with and without YaRN, and what scores become."""

from __future__ import annotations

import dataclasses
import math

import torch
import torch.nn.functional as F
from figures.style import BLUE, GREY, ORANGE, PALE, panels
from matplotlib.figure import Figure

from minimind.config import ModelConfig, YarnScaling
from minimind.rope import inverse_frequencies, rope_cos_sin

DISTANCES, WINDOW = 6000, 128


def draw() -> Figure:
    config = ModelConfig.preset("minimind2-small")
    yarn = dataclasses.replace(config, rope_scaling=YarnScaling())
    figure, (left, right) = panels(1, 1.2, height=3.3)
    for cfg, label, colour, marker in ((config, "plain", BLUE, "o"), (yarn, "YaRN, factor 16", ORANGE, "s")):
        left.semilogy((2 * math.pi / inverse_frequencies(cfg)).numpy(), marker, ms=4, color=colour, label=label)
        score = _score(cfg)
        right.plot(score, color=colour, lw=0.6, alpha=0.35)
        mean = F.avg_pool1d(score[None], WINDOW, 1)[0]
        right.plot(torch.arange(len(mean)) + WINDOW / 2, mean, color=colour, lw=2, label=label)
    original = YarnScaling().original_max_position_embeddings
    left.axhline(original, color=GREY, lw=1, ls="--")
    left.text(31, original / 1.3, f"context before YaRN: {original:,}", fontsize=8, color=GREY, ha="right", va="top")
    left.set(xlabel="pair of dimensions", title="positions for one whole turn")
    left.legend(loc="lower right")
    right.axvline(original, color=GREY, lw=1, ls="--")
    right.set(
        xlabel="distance of query and key",
        title=f"score of equal q and k, all ones (thick: mean of {WINDOW})",
        ylim=(-0.15, 1.05),
    )
    right.legend()
    for axes in (left, right):
        axes.grid(color=PALE)
        axes.set_axisbelow(True)
    return figure


def _score(config: ModelConfig) -> torch.Tensor:
    """(q rotated to m) . (k rotated to n) / D of q = k = ones, by m - n."""
    cos, _ = rope_cos_sin(config, torch.arange(DISTANCES))
    return cos.mean(-1)
