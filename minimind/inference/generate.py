"""Sampling continuations by recomputing the whole context for every token.

Right for a few samples during training, whatever the model; no key/value cache, so the cost grows with the square
of the length.
"""

from __future__ import annotations

import torch
from torch import Tensor

from minimind.modeling import Model


@torch.no_grad()
def generate(
    model: Model,
    prompts: list[list[int]],
    max_new_tokens: int,
    *,
    temperature: float = 0.8,
    top_k: int = 50,
    seed: int = 0,
    stop_ids: tuple[int, ...] = (),
) -> list[list[int]]:
    """Continue every prompt (non-empty token ids); temperature 0 takes the likeliest token.

    Returns the new ids of each prompt, up to and without the first of `stop_ids`. Does not touch the global RNG.
    Raises ValueError for an empty prompt or a negative temperature.
    """
    if not prompts or any(not p for p in prompts):
        raise ValueError("generate needs at least one token in every prompt")
    if temperature < 0:
        raise ValueError(f"temperature={temperature} must be 0 or more")
    was_training = model.training
    model.eval()
    device = model.head_weight.device
    lengths = torch.tensor([len(p) for p in prompts], device=device)
    total = int(lengths.max()) + max_new_tokens
    ids = torch.zeros(len(prompts), total, dtype=torch.int64, device=device)
    for row, prompt in enumerate(prompts):
        ids[row, : len(prompt)] = torch.tensor(prompt, device=device)
    generator = torch.Generator(device).manual_seed(seed)
    rows = torch.arange(len(prompts), device=device)
    stops = torch.tensor(stop_ids, dtype=torch.int64, device=device)
    running = torch.ones(len(prompts), dtype=torch.bool, device=device)
    for offset in range(max_new_tokens):
        end = lengths + offset  # causal attention: what lies to the right of a row's end does not matter
        hidden = model(ids[:, : int(end.max())], return_logits=False).hidden_states[rows, end - 1]
        logits = (hidden @ model.head_weight.to(hidden.dtype).t()).float()
        ids[rows, end] = _pick(logits, temperature, top_k, generator)
        running &= torch.isin(ids[rows, end], stops, invert=True)
        if not running.any():
            break
    model.train(was_training)
    return [_cut(ids[r, n : n + max_new_tokens].tolist(), stop_ids) for r, n in enumerate(lengths.tolist())]


def _pick(logits: Tensor, temperature: float, top_k: int, generator: torch.Generator) -> Tensor:
    if temperature == 0:
        return logits.argmax(dim=-1)
    values, indices = logits.topk(min(top_k, logits.shape[-1]), dim=-1)
    choice = torch.multinomial((values / temperature).softmax(dim=-1), 1, generator=generator)
    return indices.gather(1, choice).squeeze(1)


def _cut(ids: list[int], stop_ids: tuple[int, ...]) -> list[int]:
    return next((ids[:i] for i, token in enumerate(ids) if token in stop_ids), ids)
