"""Schedules, what Muon makes of a real gradient of minimind2-small, and what a step keeps in memory."""

from __future__ import annotations

import torch
from figures.style import BLUE, CYCLE, GREY, INK, ORANGE, PALE, panels
from matplotlib.figure import Figure

from minimind.config import ModelConfig
from minimind.data import PackedLoader, builtin_corpus, open_corpus
from minimind.modeling import Model
from minimind.objectives.next_token import next_token_loss
from minimind.tokenization import load_tokenizer
from minimind.training.batches import activation_bytes, to_device
from minimind.training.optim import lr_factor

STEPS, WARMUP = 1000, 50


def draw() -> Figure:
    figure, (left, middle, right) = panels(1, 1, 1.05, height=3.3)
    for name, colour in (("cosine", BLUE), ("wsd", ORANGE), ("constant", GREY)):
        left.plot([lr_factor(name, i, STEPS, WARMUP) for i in range(STEPS)], color=colour, lw=2, label=name)
    left.set(xlabel="step of 1,000", ylabel="share of the peak rate", title="schedules", ylim=(0, 1.25))
    left.legend(fontsize=8, ncols=3, loc="upper center", columnspacing=0.9, handlelength=1.2)
    _muon(middle)
    _memory(right)
    return figure


def _muon(axes) -> None:
    config = ModelConfig.preset("minimind2-small")
    torch.manual_seed(0)
    model = Model(config)
    loader = PackedLoader(open_corpus([builtin_corpus()], load_tokenizer()), 512, 2)
    batch = to_device(loader.next_batch(), torch.device("cpu"))
    weight = model.layers[0].mlp.down_proj.weight
    loss, _ = next_token_loss(model, batch)
    (weight.grad,) = torch.autograd.grad(loss / batch.num_targets, weight)
    before, gradient = weight.detach().clone(), weight.grad.clone()
    torch.optim.Muon([weight], lr=1.0, weight_decay=0.0, momentum=0.0, adjust_lr_fn="match_rms_adamw").step()
    update = before - weight.detach()
    for matrix, colour, label in ((gradient, ORANGE, "gradient"), (update, BLUE, "Muon's update")):
        values = torch.linalg.svdvals(matrix)
        axes.semilogy(values / values.max(), color=colour, lw=2, label=label)
    axes.set(
        xlabel="singular value, by size", title="layer 0, down_proj", ylim=(1e-4, 3), ylabel="share of the largest"
    )
    axes.grid(color=PALE)
    axes.legend(fontsize=8, loc="lower left")


def _memory(axes) -> None:
    config = ModelConfig.preset("minimind2-small")
    with torch.device("meta"):
        parameters = Model(config).num_parameters()
    parts = {"weights": 4, "gradients": 4, "AdamW m, v": 8, "16-bit copy": 2}
    tokens = (4096, 16384, 65536)
    bottom = [0.0] * len(tokens)
    for (name, size), colour in zip(parts.items(), CYCLE, strict=False):
        value = size * parameters / 1e9
        axes.bar(range(len(tokens)), value, 0.6, bottom=bottom, color=colour, label=name)
        bottom = [b + value for b in bottom]
    kept = [n * activation_bytes(config) / 1e9 for n in tokens]
    axes.bar(
        range(len(tokens)), kept, 0.6, bottom=bottom, color=PALE, edgecolor=GREY, lw=0.6, label="kept for the backward"
    )
    for i, (b, k) in enumerate(zip(bottom, kept, strict=True)):
        axes.text(i, b + k + 0.1, f"{b + k:.1f} GB", ha="center", color=INK, fontsize=8)
    axes.set_xticks(range(len(tokens)), [f"{n // 1024}k" for n in tokens])
    axes.set(
        xlabel="tokens at once",
        ylabel="GB",
        title="a step's memory (arithmetic)",
        ylim=(0, 1.15 * (bottom[-1] + kept[-1])),
    )
    axes.legend(fontsize=8, loc="upper left")
