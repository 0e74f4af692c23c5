"""A mixture of experts without padding: token copies sorted by expert, and the tiles that are computed."""

from __future__ import annotations

import torch
from figures.style import CYCLE, GREY, INK, box, panels, plain
from matplotlib.figure import Figure

from minimind import ops
from minimind.config import ModelConfig
from minimind.data import PackedLoader, builtin_corpus, open_corpus
from minimind.kernels.grouped_gemm import HALF_CONFIGS
from minimind.modeling import Model
from minimind.tokenization import load_tokenizer

FEW, ROWS, LENGTH = 8, 2, 512
TILE = HALF_CONFIGS[80].hidden.m


def draw() -> Figure:
    config = ModelConfig.preset("minimind2-moe", num_hidden_layers=1)
    torch.manual_seed(0)
    model = Model(config)
    corpus = open_corpus([builtin_corpus()], load_tokenizer())
    ids = torch.from_numpy(PackedLoader(corpus, LENGTH, ROWS).next_batch().input_ids).flatten()
    figure, (left, right) = panels(1.1, 1, height=3.3)
    _sorted(left, _route(model, ids[:FEW]))
    _tiles(right, _route(model, ids).offsets.diff().tolist())
    return figure


@torch.no_grad()
def _route(model: Model, ids: torch.Tensor) -> ops.Routing:
    """Route the tokens' embeddings with the first block's router; its weights are random."""
    x, _ = model.layers[0].post_attention_layernorm(model.embed_tokens(ids))
    return ops.route(model.layers[0].mlp.router(x), 2, True)


def _sorted(axes, routing: ops.Routing) -> None:
    experts = routing.expert_ids.flatten().tolist()
    order = routing.order.tolist()
    for copy, expert in enumerate(experts):
        box(axes, copy, 2, 0.9, 0.5, str(copy), CYCLE[expert], color="white", fontweight="bold")
    for token in range(len(experts) // 2):
        axes.text(2 * token + 0.95, 2.62, f"token {token}", ha="center", fontsize=8)
    for place, copy in enumerate(order):
        box(axes, place, 0, 0.9, 0.5, str(copy), CYCLE[experts[copy]], color="white", fontweight="bold")
        axes.plot([copy + 0.45, place + 0.45], [1.95, 0.55], color=CYCLE[experts[copy]], lw=1.3)
    for expert, (first, last) in enumerate(
        zip(routing.offsets[:-1].tolist(), routing.offsets[1:].tolist(), strict=True)
    ):
        axes.text((first + last) / 2, -0.15, f"expert {expert}\n{first} to {last}", ha="center", va="top", fontsize=8)
    axes.set(
        xlim=(-0.3, len(experts) + 0.3), ylim=(-0.75, 3), title="two copies a token, sorted by expert (order, offsets)"
    )
    plain(axes)


def _tiles(axes, counts: list[int]) -> None:
    capacity = max(counts)
    for expert, count in enumerate(counts):
        for first in range(0, count, TILE):
            rows = min(TILE, count - first)
            axes.barh(expert, TILE, 0.62, left=first, color="white", edgecolor=GREY, hatch="////", lw=0.6)
            axes.barh(expert, rows, 0.62, left=first, color=CYCLE[expert], edgecolor="white", lw=0.8)
            text = str(rows)
            if rows > TILE / 4:
                axes.text(first + rows / 2, expert, text, ha="center", va="center", fontsize=8, color="white")
    axes.axvline(capacity, color=INK, lw=1, ls="--")
    axes.text(capacity + 8, -0.55, f"padded form:\nall to {capacity}", fontsize=8, va="center")
    axes.set_yticks(range(len(counts)), [f"expert {e}\n{c} rows" for e, c in enumerate(counts)])
    axes.set(xlabel="rows of the sorted copies", ylim=(len(counts) - 0.5, -0.85), xlim=(0, capacity * 1.3))
    axes.set_title(f"tiles of {TILE} rows, {sum(counts) // 2:,} tokens of built-in text")
