"""Models with random weights, ours and transformers', for measurements that do not depend on the weights."""

from __future__ import annotations

from typing import Any

import torch

from minimind.config import ModelConfig
from minimind.modeling import Model


def random_model(config: ModelConfig, seed: int = 0) -> Model:
    """A model whose matrices are drawn from N(0, 1 / columns), so that every block changes the residual stream by about
    its own size. With the small weights of a new model, each token would repeat the last one, as with a broken
    decoder."""
    generator = torch.Generator().manual_seed(seed)
    model = Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model


def transformers_model(c: ModelConfig) -> Any:
    """transformers' Llama of this shape, or its Qwen3 for a model with QK-norm."""
    from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

    names = (
        "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads", "head_dim", "rms_norm_eps",
        "intermediate_size", "vocab_size", "tie_word_embeddings", "max_position_embeddings",
    )  # fmt: skip
    shape: dict[str, Any] = {name: getattr(c, name) for name in names}
    shape["rope_parameters"] = {"rope_type": "default", "rope_theta": c.rope_theta}
    return Qwen3ForCausalLM(Qwen3Config(**shape)) if c.qk_norm else LlamaForCausalLM(LlamaConfig(**shape))
