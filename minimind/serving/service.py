"""What all routes share: the engine's worker, the tokenizer, the limits; and how a request becomes the engine's."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import cached_property

from minimind.inference.requests import MAX_SEED, Constraint, Request, SamplingParams
from minimind.serving.errors import ApiError
from minimind.serving.grammar import Grammars
from minimind.serving.metrics import Metrics
from minimind.serving.prompts import ChatPrompts
from minimind.serving.protocol import SamplingFields
from minimind.serving.worker import DeltaStream, EngineWorker
from minimind.tokenization import Tokenizer

LEAST_TEMPERATURE = 1e-5  # above 0
LEAST_TOP_P = 1e-6  # what 0 is taken for: the likeliest token alone


@dataclass
class Service:
    """model: the name that clients give. default_max_tokens: of answers whose request names none. max_body: bytes.
    api_key: None lets everybody in. allow_origins: of web pages that may call, beside those of this machine."""

    worker: EngineWorker
    tokenizer: Tokenizer
    model: str
    metrics: Metrics
    default_max_tokens: int = 1024
    max_body: int = 4 << 20
    api_key: str | None = None
    allow_origins: tuple[str, ...] = ()
    created: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.context = self.worker.engine.max_context
        stats = self.worker.engine.stats()
        self._cache_tokens = stats.pages_total * stats.page_size

    @cached_property
    def grammars(self) -> Grammars:
        return Grammars(self.tokenizer)

    @cached_property
    def prompts(self) -> ChatPrompts:
        return ChatPrompts(self.tokenizer, self.check_length)

    @cached_property
    def token_bytes(self) -> list[bytes]:
        return self.tokenizer.token_bytes()

    @cached_property
    def _longest_token(self) -> int:
        """Characters that one token can stand for."""
        return max(map(len, [*self.token_bytes, *self.tokenizer.special_tokens]))

    def check_length(self, characters: int) -> None:
        """ApiError 400 for a text that cannot fit the context, whatever its tokens are: encoding megabytes takes
        seconds, and all cores."""
        if characters > self.context * self._longest_token:
            message = f"the prompt has {characters:,} characters, more than a context of {self.context:,} tokens holds"
            raise ApiError(400, message, code="context_length_exceeded")

    def check_model(self, name: str) -> None:
        if name != self.model:
            message = f"there is no model {name[:100]!r} here; this server has {self.model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def params(self, asked: SamplingFields, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """max_tokens: -1 for as many as there is room for. ApiError 400 for what the engine does not do."""
        if asked.frequency_penalty:
            message = "frequency_penalty: not served; presence_penalty and repetition_penalty are"
            raise ApiError(400, message, param="frequency_penalty")
        if asked.logit_bias:
            raise ApiError(400, "logit_bias: not served", param="logit_bias")
        given = asked.model_dump(
            include={"temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty", "n"},
            exclude_none=True,
        )
        if given.get("temperature", 1.0) < LEAST_TEMPERATURE:
            given["temperature"] = 0.0
        if given.get("top_p") == 0:
            given["top_p"] = LEAST_TOP_P
        if given.get("top_k") == -1:
            given["top_k"] = 0
        seed = None if asked.seed is None else asked.seed & MAX_SEED
        named = [asked.stop] if isinstance(asked.stop, str) else asked.stop or []
        stop = tuple(text for text in named if text)
        try:
            limit = self.context if max_tokens == -1 else max_tokens
            return SamplingParams(max_new_tokens=limit, seed=seed, stop=stop, logprobs=logprobs, **given)
        except ValueError as problem:
            raise ApiError(400, str(problem)) from None

    async def submit(
        self, name: str, prompt: list[int], params: SamplingParams, constraint: Callable[[], Constraint] | None = None
    ) -> DeltaStream:
        if len(prompt) >= self.context:
            message = f"the prompt has {len(prompt):,} tokens, the context {self.context:,}, one of them for an answer"
            raise ApiError(400, message, code="context_length_exceeded")
        if params.max_new_tokens is None or params.max_new_tokens >= self.context:
            room = max(1, min(self.context, self._cache_tokens + 1) - len(prompt))
            params = replace(params, max_new_tokens=min(params.max_new_tokens or self.default_max_tokens, room))
        return await self.worker.submit(Request(prompt, params, name, constraint))

    async def encode(self, text: str) -> list[int]:
        """A raw prompt, behind the bos token. ApiError 400 if it is too long."""
        self.check_length(len(text))
        # of a batch of one: `encode` itself would keep Python's lock, and stop every other answer, for as long
        (found,) = await asyncio.to_thread(self.tokenizer.encode_batch, [text])
        ids, bos = found.tolist(), self.tokenizer.bos_token_id
        return ids if ids[:1] == [bos] else [bos, *ids]

    def token_text(self, token_id: int) -> str:
        """A token for a reader: a control token's name, U+FFFD for part of a character."""
        return self.token_bytes[token_id].decode("utf-8", "replace") or self.tokenizer.token_of(token_id)
