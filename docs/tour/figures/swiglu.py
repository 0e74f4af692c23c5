"""SwiGLU: the gate and its slope, and the bytes that the plain and the fused form move."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from figures.style import BLUE, GREEN, GREY, ORANGE, PALE, panels, stacked
from matplotlib.figure import Figure
from traffic import traffic

from minimind.config import ModelConfig
from minimind.kernels.swiglu import swiglu_ref

TOKENS = 4096


def draw() -> Figure:
    figure, (left, right) = panels(1, 1.45, height=3.2)
    gate = torch.linspace(-6, 6, 400, requires_grad=True)
    (slope,) = torch.autograd.grad(F.silu(gate).sum(), gate)
    x = gate.detach()
    left.plot(x, F.silu(x), color=BLUE, lw=2, label="silu(gate)")
    left.plot(x, slope, color=ORANGE, lw=2, label="its slope")
    left.plot(x, x.clamp(min=0), color=GREY, lw=1, ls="--", label="relu(gate)")
    left.set(xlabel="gate", title="the gate of SwiGLU", ylim=(-1, 4))
    left.grid(color=PALE)
    left.legend(loc="upper left")
    wide = 2 * ModelConfig.preset("minimind2-small").intermediate_size
    gate_up = torch.empty(TOKENS, wide, dtype=torch.bfloat16, device="meta", requires_grad=True)
    moved = [traffic(swiglu_ref, gate_up), traffic(torch.ops.minimind.swiglu, gate_up)]
    parts = {
        "forward": [m.forward / TOKENS / 1024 for m in moved],
        "backward": [m.backward / TOKENS / 1024 for m in moved],
    }
    stacked(
        right, ["plain PyTorch", "one kernel each way"], parts, "KiB a token, bf16, I = 1408 (counted)", (BLUE, GREEN)
    )
    for i, m in enumerate(moved):
        right.text(
            sum(p[i] for p in parts.values()) + 0.7, i, f"{m.forward_ops + m.backward_ops} operators", va="center"
        )
    right.set_xlim(0, 1.25 * sum(p[0] for p in parts.values()))
    right.set_title("bytes moved between gate_up_proj and down_proj")
    right.legend(loc="lower right")
    return figure
