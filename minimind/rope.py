"""Rotary position embedding (Su et al. 2021, arXiv 2104.09864) and YaRN (Peng et al. 2023, arXiv 2309.00071).

As in HF Llama, dimension i is paired with i + head_dim / 2 ("rotate half").
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from minimind.config import ModelConfig, YarnScaling


def inverse_frequencies(config: ModelConfig, device: torch.device | str | None = None) -> Tensor:
    """Radians per position of each rotated pair: float32 [head_dim / 2]."""
    dim = config.head_dim
    exponent = torch.arange(0, dim, 2, dtype=torch.float32, device=device) / dim
    freqs = 1.0 / (config.rope_theta**exponent)
    return freqs if config.rope_scaling is None else _yarn(freqs, config, config.rope_scaling)


def attention_factor(config: ModelConfig) -> float:
    """The factor on cos and sin: 1 without YaRN."""
    scaling = config.rope_scaling
    if scaling is None:
        return 1.0
    if scaling.attention_factor is None:
        return 0.1 * math.log(scaling.factor) + 1.0
    return scaling.attention_factor


def rope_cos_sin(config: ModelConfig, position_ids: Tensor) -> tuple[Tensor, Tensor]:
    """(cos, sin) of the angles at position_ids, int [...]: float32 [..., head_dim / 2] each."""
    angles = position_ids.float().unsqueeze(-1) * inverse_frequencies(config, position_ids.device)
    factor = attention_factor(config)
    return angles.cos() * factor, angles.sin() * factor


def _yarn(freqs: Tensor, config: ModelConfig, scaling: YarnScaling) -> Tensor:
    """f'(i) = f(i) * ((1 - r(i)) + r(i) / factor), where r is a linear ramp between the dimensions of beta_fast and
    beta_slow."""
    dim = config.head_dim

    def dim_of(rotations: float) -> float:  # the dimension that rotates this often in the original context
        ratio = scaling.original_max_position_embeddings / (rotations * 2 * math.pi)
        return dim * math.log(ratio) / (2 * math.log(config.rope_theta))

    low = max(math.floor(dim_of(scaling.beta_fast)), 0)
    high = min(math.ceil(dim_of(scaling.beta_slow)), dim - 1)
    index = torch.arange(dim // 2, dtype=torch.float32, device=freqs.device)
    ramp = ((index - low) / max(high - low, 0.001)).clamp(0, 1)
    return freqs * (1 - ramp + ramp / scaling.factor)
