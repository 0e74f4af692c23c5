"""Random models of every architecture that is exported, small enough for a test."""

from __future__ import annotations

import dataclasses

import torch

from minimind import ModelConfig
from minimind.config import YarnScaling
from minimind.modeling import Model

SMALL = {
    "hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 32,
    "intermediate_size": 96, "max_position_embeddings": 512,
}  # fmt: skip
EXPERTS = {**SMALL, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 64}
YARN = YarnScaling(factor=4.0, original_max_position_embeddings=64, attention_factor=1.0)
CONFIGS = {
    "llama": ModelConfig(**SMALL),
    "llama, untied": ModelConfig(**SMALL, tie_word_embeddings=False),
    "llama, yarn": ModelConfig(**SMALL, rope_scaling=YARN),
    "qwen3": ModelConfig(**SMALL, qk_norm=True, rms_norm_eps=1e-6),
    "qwen3, yarn of the paper": ModelConfig(
        **SMALL, qk_norm=True, rope_scaling=dataclasses.replace(YARN, attention_factor=None)
    ),
    "qwen3moe": ModelConfig(**{**EXPERTS, "num_experts_per_tok": 1}, qk_norm=True),
    "granitemoe": ModelConfig(**EXPERTS, num_shared_experts=1),
    "granitemoe, two shared": ModelConfig(**EXPERTS, num_shared_experts=2),
}


def model_of(config: ModelConfig) -> Model:
    generator = torch.Generator().manual_seed(0)
    model = Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
            else:
                parameter.uniform_(0.5, 1.5, generator=generator)
    return model
