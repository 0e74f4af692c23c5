"""Tensor names of transformers' Granite MoE, the architecture that computes what MiniMind2's MoE does.

    model.layers.0.block_sparse_moe.router.layer.weight     [E, C]
    model.layers.0.block_sparse_moe.input_linear.weight     [E, 2 I, C]   gate above up
    model.layers.0.block_sparse_moe.output_linear.weight    [E, C, I]
    model.layers.0.shared_mlp.input_linear.weight           [2 I, C]      I summed over the shared experts
    model.layers.0.shared_mlp.output_linear.weight          [C, I]

Gates there are the softmax over the chosen experts' logits: MiniMind2's softmax over all, normalised over the chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from minimind.config import ModelConfig


def is_granite(state: Mapping[str, Tensor]) -> bool:
    return any(".block_sparse_moe." in name for name in state)


def to_granite(stock: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """Upstream's tensors of a MoE (minimind.weights.to_stock) under Granite's names."""
    out = {name: tensor for name, tensor in stock.items() if ".mlp." not in name}
    for layer in range(config.num_hidden_layers):
        root = f"model.layers.{layer}"
        mlp, moe = f"{root}.mlp", f"{root}.block_sparse_moe"

        def expert(kind: str, group: str, count: int, mlp: str = mlp) -> list[Tensor]:
            return [stock[f"{mlp}.{group}.{e}.{kind}_proj.weight"] for e in range(count)]

        out[f"{moe}.router.layer.weight"] = stock[f"{mlp}.gate.weight"]
        gate, up, down = (torch.stack(expert(k, "experts", config.num_experts)) for k in ("gate", "up", "down"))
        out[f"{moe}.input_linear.weight"] = torch.cat((gate, up), dim=1)
        out[f"{moe}.output_linear.weight"] = down
        if config.num_shared_experts:
            shared = [expert(k, "shared_experts", config.num_shared_experts) for k in ("gate", "up", "down")]
            out[f"{root}.shared_mlp.input_linear.weight"] = torch.cat((*shared[0], *shared[1]))
            out[f"{root}.shared_mlp.output_linear.weight"] = torch.cat(shared[2], dim=1)
    return out


def from_granite(state: Mapping[str, Tensor], config: ModelConfig) -> dict[str, Tensor]:
    """The inverse of to_granite; tensors it does not know keep their names."""
    out: dict[str, Tensor] = {}
    for name, tensor in state.items():
        root, _, leaf = name.rpartition(".block_sparse_moe.")
        if root:
            out.update(_routed(f"{root}.mlp", leaf, tensor))
        elif ".shared_mlp." in name:
            root, _, leaf = name.rpartition(".shared_mlp.")
            out.update(_shared(f"{root}.mlp.shared_experts", leaf, tensor, config.num_shared_experts))
        else:
            out[name] = tensor
    return out


def _routed(mlp: str, leaf: str, tensor: Tensor) -> dict[str, Tensor]:
    if leaf == "router.layer.weight":
        return {f"{mlp}.gate.weight": tensor}
    experts = enumerate(tensor)
    if leaf == "output_linear.weight":
        return {f"{mlp}.experts.{e}.down_proj.weight": down for e, down in experts}
    return {
        f"{mlp}.experts.{e}.{kind}_proj.weight": half
        for e, both in experts
        for kind, half in zip(("gate", "up"), both.chunk(2), strict=True)
    }


def _shared(prefix: str, leaf: str, tensor: Tensor, count: int) -> dict[str, Tensor]:
    name: Callable[[int, str], str] = lambda s, kind: f"{prefix}.{s}.{kind}_proj.weight"  # noqa: E731
    if leaf == "output_linear.weight":
        return {name(s, "down"): part for s, part in enumerate(tensor.chunk(count, dim=1))}
    gate, up = tensor.chunk(2)
    return {
        name(s, kind): part for kind, half in (("gate", gate), ("up", up)) for s, part in enumerate(half.chunk(count))
    }
