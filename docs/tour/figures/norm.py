"""RMSNorm: what its backward does, and the bytes that the plain and the fused form move."""

from __future__ import annotations

import math

import torch
from figures.style import BLUE, GREEN, GREY, INK, ORANGE, RED, panels, plain, stacked
from matplotlib.figure import Figure
from traffic import traffic

from minimind.config import ModelConfig
from minimind.kernels.rms_norm import add_rms_norm_ref, rms_norm_ref

TOKENS = 4096


def draw() -> Figure:
    figure, (left, right) = panels(1, 1.45, height=3.3)
    _geometry(left)
    names, moved = ["plain PyTorch", "one kernel each way"], [plain_form(), fused_form()]
    parts = {
        "forward": [m.forward / TOKENS / 1024 for m in moved],
        "backward": [m.backward / TOKENS / 1024 for m in moved],
    }
    stacked(right, names, parts, "KiB a token, bf16, C = 512 (counted)", (BLUE, GREEN))
    for i, m in enumerate(moved):
        right.text(sum(p[i] for p in parts.values()) + 1, i, f"{m.forward_ops + m.backward_ops} operators", va="center")
    right.set_xlim(0, 1.25 * sum(p[0] for p in parts.values()))
    right.set_title("bytes moved: sum of x and delta, and its norm")
    right.legend(loc="lower right")
    return figure


def _inputs() -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    size = ModelConfig.preset("minimind2-small").hidden_size
    x, delta = (torch.empty(TOKENS, size, dtype=torch.bfloat16, device="meta", requires_grad=True) for _ in range(2))
    return x, delta, torch.empty(size, device="meta", requires_grad=True)


def plain_form():
    return traffic(lambda x, delta, w: add_rms_norm_ref(x, delta, w, 1e-5), *_inputs())


def fused_form():
    return traffic(lambda x, delta, w: torch.ops.minimind.add_rms_norm(x, delta, w, 1e-5)[:2], *_inputs())


def _geometry(axes) -> None:
    """Two numbers a row: the norm puts every x on a circle, and its gradient runs along the circle."""
    x = torch.tensor([2.2, 1.1], requires_grad=True)
    y = rms_norm_ref(x, torch.ones(2), 0.0)
    g = torch.tensor([-0.2, 1.3])
    (dx,) = torch.autograd.grad(y, x, g)
    radial = (g @ y.detach()) / (y.detach() @ y.detach()) * y.detach()
    angle = torch.linspace(-0.45, math.pi / 2 + 0.2, 100)
    axes.plot(math.sqrt(2) * angle.cos(), math.sqrt(2) * angle.sin(), color=GREY, lw=1)
    axes.plot([0, 1.25 * x[0].item()], [0, 1.25 * x[1].item()], color=GREY, lw=0.8, ls=":")
    (a, b), (c, d) = y.tolist(), x.tolist()
    _arrow(axes, (a, b), g.tolist(), ORANGE, "dy", (-0.14, 0.1))
    _arrow(axes, (a, b), radial.tolist(), RED, "along x: lost", (0.08, -0.16))
    _arrow(axes, (a, b), (g - radial).tolist(), BLUE, "the rest", (-0.55, -0.02))
    _arrow(axes, (c, d), dx.tolist(), GREEN, "dx = the rest / rms", (-0.35, 0.1))
    for (u, v), text, shift in (((a, b), r"$\hat{x}$", (-0.22, -0.06)), ((c, d), "$x$", (0.05, -0.17))):
        axes.plot(u, v, "o", color=INK, ms=5)
        axes.text(u + shift[0], v + shift[1], text, fontsize=14)
    axes.set(aspect="equal", xlim=(-0.1, 3.0), ylim=(-0.3, 2.2))
    axes.set_title("the gradient of a norm has no part along x")
    plain(axes)


def _arrow(axes, start, vector, colour, text, shift) -> None:
    end = (start[0] + vector[0], start[1] + vector[1])
    axes.annotate("", end, start, arrowprops=dict(arrowstyle="-|>", color=colour, lw=1.6, shrinkA=0, shrinkB=0))
    axes.text(end[0] + shift[0], end[1] + shift[1], text, color=colour, fontsize=8.5)
