"""A .pth file as upstream MiniMind saves and, strictly, loads it: a state dict, the tied head written out as well."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from minimind.modeling import Model
from minimind.weights import to_stock


def export_pth(model: Model, path: str | Path, dtype: torch.dtype = torch.float32) -> None:
    """Write upstream's names and shapes in `dtype`.

    Raises ValueError for what upstream's code has not: an output head of its own, QK-norm beside shared experts.
    """
    torch.save(pth_state(model, dtype), path)


def pth_state(model: Model, dtype: torch.dtype = torch.float32) -> dict[str, Tensor]:
    config = model.config
    if not config.tie_word_embeddings:
        raise ValueError("--to pth: upstream ties the output head to the embedding; this model has both")
    if config.qk_norm and config.num_shared_experts:
        raise ValueError("--to pth: upstream has no model with both QK-norm and shared experts")
    stock = to_stock(model.state_dict(), config)
    state = {name: tensor.detach().to("cpu", dtype) for name, tensor in stock.items()}
    return {**state, "lm_head.weight": state["model.embed_tokens.weight"]}
