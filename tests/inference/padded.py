"""Models with a vocabulary padded beyond their tokenizer's ids, by rows that would win if anything used them."""

from __future__ import annotations

import dataclasses

import torch

from minimind.modeling import Model


def padded(model: Model, rows: int = 64, known: bool = True) -> Model:
    """`model` with `rows` more in its embedding and head: its own first ones, four times as long. known: whether the
    config says which ids the tokenizer has, as it does after a model was opened with its tokenizer."""
    size = model.config.vocab_size
    config = dataclasses.replace(model.config, vocab_size=size + rows)
    wide = Model(config.with_tokenizer(size, "test") if known else config)
    state = dict(model.state_dict())
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in state:
            state[name] = torch.cat((state[name], 4 * state[name][:rows]))
    wide.load_state_dict(state)
    return wide.train(model.training)
