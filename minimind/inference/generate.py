"""Continues a few prompts in one call, for samples and answers during training.

On a GPU the engine is kept for later calls with the same model, because the capture of its CUDA graphs takes time and
empties the cache of training's memory allocator. The graphs are valid as long as the weights keep their addresses. The
engine is dropped with the model, when a larger one is needed, and if training may need the memory. On a CPU there are
no graphs and a new engine takes 10 to 30 ms, so none is kept.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch

from minimind.inference.engine import Engine
from minimind.inference.request_state import derive_seed
from minimind.inference.requests import Request, SamplingParams
from minimind.modeling import Model

_PAGE = 16
_MEMORY_SHARE = 0.8  # of the memory available to this process: limit of training's peak plus a kept engine


@dataclass(frozen=True)
class _EngineSize:
    """The size of an engine. Both numbers are powers of two, so that results do not depend on which engine is kept:
    graphs pad the batch to a power of two in any of them."""

    max_batch: int
    kv_tokens: int
    device: torch.device
    dtype: torch.dtype

    @staticmethod
    def for_prompts(model: Model, prompts: list[list[int]], max_new_tokens: int) -> _EngineSize:
        pages = sum(
            1 + -(-(len(prompt) + max_new_tokens) // _PAGE) for prompt in prompts
        )  # so that all are admitted at once
        dtype = model.compute_dtype or model.dtype
        return _EngineSize(_power_of_two(len(prompts)), _power_of_two(pages * _PAGE), model.device, dtype)

    def fits(self, other: _EngineSize) -> bool:
        """Whether an engine of size `other` is large enough."""
        enough = other.max_batch >= self.max_batch and other.kv_tokens >= self.kv_tokens
        return enough and (other.device, other.dtype) == (self.device, self.dtype)


_kept: WeakKeyDictionary[Model, tuple[_EngineSize, Engine]] = WeakKeyDictionary()
_first_seen: WeakKeyDictionary[Model, int] = WeakKeyDictionary()  # its weights' versions, summed, at the first call


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

    Returns the new ids of each prompt, before the first of `stop_ids`. The same seed and weights give the same ids,
    whatever ran before; the global RNG and the model's mode do not change. ValueError for an empty prompt, one longer
    than the model's context, or a negative temperature.
    """
    if not prompts:
        return []
    seeds = (derive_seed(seed, i) for i in range(len(prompts)))
    options: dict[str, Any] = {"temperature": temperature, "top_k": top_k, "stop_token_ids": stop_ids}
    params = [SamplingParams(max_new_tokens, seed=each, **options) for each in seeds]
    requests = [Request(prompt, p) for prompt, p in zip(prompts, params, strict=True)]
    size = _EngineSize.for_prompts(model, prompts, max_new_tokens)
    _, engine = sized = _take_engine(model, size)
    outputs = engine.generate(requests)  # if this fails, the engine is dropped
    if _worth_keeping(model, engine):
        engine.release_model()
        _kept[model] = sized
    return [_new_ids(output.token_ids, output.error, stop_ids) for output in outputs]


def _take_engine(model: Model, size: _EngineSize) -> tuple[_EngineSize, Engine]:
    """The kept engine, which is no longer kept, or a new one; and its size."""
    kept_size, engine = _kept.pop(model, (None, None))
    if kept_size is not None and engine is not None and size.fits(kept_size):
        engine.refresh_weights()
        return kept_size, engine
    del engine  # before its successor allocates memory
    options: dict[str, Any] = {"kv_tokens": size.kv_tokens, "max_batch": size.max_batch, "page_size": _PAGE}
    return size, Engine(model, None, prefix_cache=False, **options)


def _worth_keeping(model: Model, engine: Engine) -> bool:
    """Whether the engine has graphs and fits beside training's peak of memory. The peak is known only after the model
    was trained for a step since the first call."""
    device = model.device
    written = sum(parameter._version for parameter in model.parameters())
    if device.type != "cuda" or written == _first_seen.setdefault(model, written):
        return False
    available = torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device)
    return torch.cuda.max_memory_allocated(device) + engine.held_bytes <= _MEMORY_SHARE * available


def _power_of_two(number: int) -> int:
    """The next power of two, `number` itself included."""
    return 1 << (number - 1).bit_length()


def _new_ids(ids: list[int], error: str | None, stop_ids: tuple[int, ...]) -> list[int]:
    if error is not None:
        raise ValueError(error)
    return ids[:-1] if ids and ids[-1] in stop_ids else ids
