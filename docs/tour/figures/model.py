"""One block of minimind2-small: how wide a token is on its way, and where parameters and operations are."""

from __future__ import annotations

import torch
from figures.style import BLUE, GREEN, INK, ORANGE, PINK, RED, SKY, box, panels, plain
from matplotlib.figure import Figure

from minimind.config import ModelConfig
from minimind.modeling import Model

CONTEXT = 512


def draw() -> Figure:
    with torch.device("meta"):
        model = Model(ModelConfig.preset("minimind2-small"))
    figure, (left, right) = panels(2.1, 1, height=3.9)
    _block(left, model)
    left.set_title("one block: numbers of a token, drawn to scale")
    _parts(right, model)
    right.set_title("where they are, %")
    return figure


def _block(axes, model: Model) -> None:
    layer = model.layers[0]
    attn, mlp = layer.self_attn, layer.mlp
    c, qkv, heads = attn.qkv_proj.in_features, attn.qkv_proj.out_features, attn.o_proj.in_features
    wide, inner = mlp.gate_up_proj.out_features, mlp.down_proj.in_features
    widths = [c, c, qkv, qkv, heads, c, c, c, wide, inner, c, c]
    colours = [BLUE, SKY, GREEN, GREEN, GREEN, GREEN, BLUE, SKY, ORANGE, ORANGE, ORANGE, BLUE]
    names = ["x", "norm", "q k v", "rotated", "heads", "out", "x", "norm", "gate up", "hidden", "out", "x"]
    steps = [
        "RMSNorm",
        "qkv_proj",
        "RoPE",
        "attention",
        "o_proj",
        "+",
        "RMSNorm",
        "gate_up_proj",
        "SwiGLU",
        "down_proj",
        "+",
    ]
    for i, (width, colour, name) in enumerate(zip(widths, colours, names, strict=True)):
        box(axes, i - 0.16, 0, 0.32, width / wide, colour=colour)
        axes.text(i, -0.03, f"{name}\n{width}", ha="center", va="top", fontsize=8)
    for i, step in enumerate(steps):
        colour = RED if step.endswith("proj") else INK
        axes.annotate("", (i + 0.84, 0.07), (i + 0.16, 0.07), arrowprops=dict(arrowstyle="->", color=colour, lw=1.2))
        axes.text(i + 0.5, 0.11, step, rotation=90, ha="center", va="bottom", fontsize=8.5, color=colour)
    for first, last in ((0, 6), (6, 11)):
        axes.plot([first + 0.05, first + 0.05, last - 0.05], [-0.16, -0.24, -0.24], color=BLUE, lw=1.2)
        axes.annotate(
            "", (last - 0.05, -0.15), (last - 0.05, -0.245), arrowprops=dict(arrowstyle="->", color=BLUE, lw=1.2)
        )
        axes.text((first + last) / 2, -0.25, "residual stream", ha="center", va="top", fontsize=8, color=BLUE)
    axes.set(xlim=(-0.4, 11.4), ylim=(-0.33, 1.02))
    plain(axes)


def _parts(axes, model: Model) -> None:
    sizes = {
        "vocabulary": model.embed_tokens.weight.numel(),
        "attention": sum(p.numel() for n, p in model.named_parameters() if "attn" in n),
        "SwiGLU": sum(p.numel() for n, p in model.named_parameters() if "mlp" in n),
    }
    total = model.flops_per_token(CONTEXT, training=False)
    scores = total - 2 * sum(sizes.values())
    parameters = {**{k: 100 * v / model.num_parameters() for k, v in sizes.items()}, "scores": 0.0}
    flops = {**{k: 100 * 2 * v / total for k, v in sizes.items()}, "scores": 100 * scores / total}
    bottoms = [0.0, 0.0]
    for name, colour in zip(flops, (BLUE, GREEN, ORANGE, PINK), strict=True):
        values = [parameters[name], flops[name]]
        axes.bar([0, 1], values, 0.62, bottom=bottoms, color=colour)
        for x, value in enumerate(values):
            if value:
                dark = colour == ORANGE
                axes.text(x, bottoms[x] + value / 2, f"{name} {value:.0f}%", ha="center", va="center", fontsize=8,
                          color=INK if dark else "white")  # fmt: skip
        bottoms = [a + b for a, b in zip(bottoms, values, strict=True)]
    labels = [
        f"parameters\n{model.num_parameters() / 1e6:.1f}M",
        f"operations a token,\ncontext {CONTEXT}: {total / 1e6:.0f}M",
    ]
    axes.set_xticks([0, 1], labels)
    axes.set_ylim(0, 101)
