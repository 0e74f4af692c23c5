"""From a Request to a Job, or one line that says why not."""

from __future__ import annotations

from collections.abc import Container, Sequence

from minimind.config import ModelConfig
from minimind.inference.requests import Request
from minimind.inference.tracking import RequestState, mix
from minimind.tokenization import Tokenizer


def max_positions(config: ModelConfig, wanted: int | None) -> int:
    """Tokens of prompt and output together: all positions that the model has, YaRN's included, or fewer as wanted."""
    positions = config.positions
    if wanted is not None and not 2 <= wanted <= positions:
        raise ValueError(f"max_context={wanted} must lie in 2..{positions}, the positions that the model has")
    return wanted or positions


class Admission:
    """The limits of an engine: vocabulary, the ids below which its model's tokens lie, context in tokens, cache in
    pages."""

    def __init__(
        self, vocabulary: int, tokenizer: Tokenizer | None, context: int, pages: int, page_size: int, seed: int
    ) -> None:
        self._vocabulary, self._tokenizer, self._context = vocabulary, tokenizer, context
        self._pages, self._page_size, self._seed = pages, page_size, seed
        self._token_bytes = None if tokenizer is None else tokenizer.token_bytes()
        self._requests = 0

    def job(self, request: Request, taken: Container[str]) -> RequestState:
        """taken: ids of unfinished requests. Raises ValueError, one line."""
        number = self._requests
        self._requests += 1
        name = f"request-{number}" if request.id is None else request.id
        if name in taken:
            raise ValueError(f"request id {name!r} is that of an unfinished request; take another")
        params, prompt = request.params, self._encode(request.prompt)
        limit = self._limit(len(prompt), params.max_new_tokens)
        seed = mix(self._seed, number) if params.seed is None else params.seed
        stop_ids = self._stop_ids(request)
        return RequestState(name, prompt, params, seed, limit, stop_ids, self._token_bytes, request.constraint)

    def _encode(self, prompt: str | Sequence[int]) -> list[int]:
        if isinstance(prompt, str):
            if self._tokenizer is None:
                raise ValueError("this engine has no tokenizer: give the prompt as token ids")
            ids = self._tokenizer.encode(prompt)
        else:
            try:
                ids = [int(i) for i in prompt]
            except (TypeError, ValueError):
                raise ValueError("the prompt is neither a str nor a sequence of token ids") from None
        if not ids:
            raise ValueError("the prompt is empty; give at least one token, such as the tokenizer's bos_token_id")
        wrong = next((i for i in ids if not 0 <= i < self._vocabulary), None)
        if wrong is not None:
            raise ValueError(f"token id {wrong} of the prompt is outside the vocabulary of {self._vocabulary}")
        return ids

    def _limit(self, prompt: int, new_tokens: int | None) -> int:
        """Tokens of prompt and output together. The last one is drawn but never stored."""
        if prompt >= self._context:
            raise ValueError(
                f"the prompt has {prompt} tokens, the context {self._context}: shorten it to at most "
                f"{self._context - 1}, so that one can follow"
            )
        capacity = self._pages * self._page_size
        limit = self._context if new_tokens is None else min(self._context, prompt + new_tokens)
        if new_tokens is None:
            limit = min(limit, max(capacity, prompt) + 1)
        if limit - 1 > capacity:
            raise ValueError(
                f"the request may need {limit - 1} tokens of cache, which holds {capacity}: give the engine more "
                f"kv_bytes, or the request a shorter prompt or fewer max_new_tokens"
            )
        return limit

    def _stop_ids(self, request: Request) -> frozenset[int]:
        params, tokenizer = request.params, self._tokenizer
        ids = set(params.stop_token_ids)
        if tokenizer is None:
            if params.stop:
                raise ValueError("this engine has no tokenizer: give stop_token_ids instead of stop strings")
            return frozenset(ids)
        if not params.ignore_eos:
            ids.add(tokenizer.eos_token_id)
        ids.update(tokenizer.special_tokens[text] for text in params.stop if text in tokenizer.special_tokens)
        return frozenset(ids)
