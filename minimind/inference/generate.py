"""Continuations of a few prompts in one call: samples and answers during training.

On a GPU the engine of a call serves the next ones with the same model: its CUDA graphs, whose capture takes time and
empties the allocator's cache of what training had there, hold as long as the weights stay where they are. It dies with
the model, or when a larger one is needed, and is not kept where training may want the memory. On a CPU there are no
graphs, and an engine takes 10 to 30 ms: less than the memory is worth.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from minimind.inference.engine import Engine
from minimind.inference.requests import Request, SamplingParams
from minimind.inference.tracking import mix
from minimind.modeling import Model

_PAGE = 16
_SHARE = 0.8  # of the memory that this process can have, for training's peak and what is kept here together


@dataclass(frozen=True)
class _Need:
    """What an engine must be made for. Both numbers are powers of two, so that what a prompt's graphs compute does not
    depend on which engine is there: rows are padded to a power of two in any."""

    max_batch: int
    kv_tokens: int
    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def of(model: Model, prompts: list[list[int]], max_new_tokens: int) -> _Need:
        pages = sum(1 + -(-(len(prompt) + max_new_tokens) // _PAGE) for prompt in prompts)  # all admitted at once
        dtype = model.compute_dtype or model.dtype
        return _Need(_power(len(prompts)), _power(pages * _PAGE), model.device, dtype)

    def is_met_by(self, other: _Need) -> bool:
        enough = other.max_batch >= self.max_batch and other.kv_tokens >= self.kv_tokens
        return enough and (other.device, other.dtype) == (self.device, self.dtype)


_kept: WeakKeyDictionary[Model, tuple[_Need, Engine]] = WeakKeyDictionary()
_first_seen: WeakKeyDictionary[Model, int] = WeakKeyDictionary()  # how often its weights had been written


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
    requests = [Request(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    need = _Need.of(model, prompts, max_new_tokens)
    _, engine = kept = _engine(model, need)
    outputs = engine.generate(requests)  # if this fails, the engine is gone
    if _worth_keeping(model, engine):
        engine.let_go_of_model()
        _kept[model] = kept
    return [_new_ids(output.token_ids, output.error, stop_ids) for output in outputs]


def _engine(model: Model, need: _Need) -> tuple[_Need, Engine]:
    """The one that was kept, which is then kept no more, or a new one; and what it was made for."""
    made_for, engine = _kept.pop(model, (None, None))
    if made_for is not None and engine is not None and need.is_met_by(made_for):
        engine.refresh_weights()
        return made_for, engine
    del engine  # before its successor takes memory
    size: dict[str, Any] = {"kv_tokens": need.kv_tokens, "max_batch": need.max_batch, "page_size": _PAGE}
    return need, Engine(model, None, prefix_cache=False, **size)


def _worth_keeping(model: Model, engine: Engine) -> bool:
    """Whether there are graphs to keep, and room beside the most that training takes: which is not known before the
    model was trained for a step since the first call."""
    device = model.device
    written = sum(parameter._version for parameter in model.parameters())
    if device.type != "cuda" or written == _first_seen.setdefault(model, written):
        return False
    ours = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return torch.cuda.max_memory_allocated(device) + engine.held_bytes <= _SHARE * ours


def _power(number: int) -> int:
    """The next power of two."""
    return 1 << (number - 1).bit_length()


def _new_ids(ids: list[int], error: str | None, stop_ids: tuple[int, ...]) -> list[int]:
    if error is not None:
        raise ValueError(error)
    return ids[:-1] if ids and ids[-1] in stop_ids else ids
