"""Continuations of a few prompts in one call, by an engine that lives as long as the call: samples during training."""

from __future__ import annotations

from typing import Any

from minimind.inference.engine import Engine
from minimind.inference.requests import Request, SamplingParams
from minimind.inference.tracking import mix
from minimind.modeling import Model


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

    Returns the new ids of each prompt, up to and without the first of `stop_ids`. The same seed and weights give the
    same ids, whatever ran before; neither the global RNG nor the model's mode is touched. ValueError for an empty
    prompt, one longer than the model's context, or a negative temperature.
    """
    if not prompts:
        return []
    seeds = (mix(seed, i) for i in range(len(prompts)))
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "stop_token_ids": stop_ids}
    params = [SamplingParams(max_new_tokens, seed=each, **options) for each in seeds]
    engine = Engine(
        model,
        None,
        kv_tokens=sum(-(-(len(prompt) + max_new_tokens) // 16) * 16 for prompt in prompts),
        max_batch=len(prompts),
        page_size=16,
        prefix_cache=False,
    )
    requests = [Request(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    return [_new_ids(output.token_ids, output.error, stop_ids) for output in engine.generate(requests)]


def _new_ids(ids: list[int], error: str | None, stop_ids: tuple[int, ...]) -> list[int]:
    if error is not None:
        raise ValueError(error)
    return ids[:-1] if ids and ids[-1] in stop_ids else ids
