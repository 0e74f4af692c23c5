"""Models with random weights, for measurements that do not depend on the weights."""

from __future__ import annotations

import torch

from minimind.config import ModelConfig
from minimind.modeling import Model


def random_model(config: ModelConfig, seed: int = 0) -> Model:
    """Matrices are drawn from N(0, 1 / columns), so that every block changes the residual stream by about its own size.
    With the small weights of a new model, the next token repeats the last, as it would in a broken decoder."""
    generator = torch.Generator().manual_seed(seed)
    model = Model(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.ndim > 1:
                parameter.normal_(0.0, parameter.shape[-1] ** -0.5, generator=generator)
    return model
