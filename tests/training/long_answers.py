"""A policy with long answers, made without training: at every token it stops with the same probability, and all other
tokens are equally likely. So a few rollouts show what training teaches about when to stop."""

from __future__ import annotations

import json
import math
from pathlib import Path

import torch

from minimind import ModelConfig
from minimind.modeling import Model
from minimind.weights import save_weights
from tests.inference.small import small_tokenizer

WIDTH = 48


def save_policy(folder: Path, mean_length: float, seed: int = 0) -> Path:
    """A checkpoint whose answers have `mean_length` tokens on average before any limit.

    All embeddings share a direction, in which every hidden state then points, and the head's row of the end token has
    as much of it as lifts that token's chance to 1 / mean_length.
    """
    tokenizer = small_tokenizer()
    torch.manual_seed(seed)
    model = Model(ModelConfig(WIDTH, 2, 4, 2, 16, 96, tokenizer.vocab_size, qk_norm=True, tie_word_embeddings=False))
    with torch.no_grad():
        model.lm_head.weight.mul_(0.1)
        model.embed_tokens.weight[:, 0] += 1.0
        probe = model(torch.randint(0, tokenizer.vocab_size, (4, 64))).hidden_states[..., 0].mean()
        odds = (tokenizer.vocab_size - 1) / (mean_length - 1)
        model.lm_head.weight[tokenizer.eos_token_id, 0] += math.log(odds) / probe
    save_weights(model, folder)
    tokenizer.save(folder)
    return folder


def save_prompts(path: Path, count: int = 64) -> Path:
    rows = [{"conversations": [{"role": "user", "content": f"Say {i}."}]} for i in range(count)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
