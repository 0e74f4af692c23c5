"""The state that all routes share: the engine's worker, the tokenizer, limits, and metrics for Prometheus."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from functools import cached_property

from prometheus_client import CollectorRegistry, Counter, Histogram, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, Metric

from minimind.inference.requests import MAX_SEED, Constraint, EngineStats, Request, SamplingParams
from minimind.serving.chat_format import ChatPrompts
from minimind.serving.grammar import Grammars
from minimind.serving.protocol import ApiError, SamplingFields
from minimind.serving.worker import DeltaStream, EngineWorker
from minimind.tokenization import Tokenizer

LEAST_TEMPERATURE = 1e-5  # above 0
LEAST_TOP_P = 1e-6  # replaces 0: the likeliest token alone


@dataclass
class Service:
    """model: the model's name in the API. default_max_tokens: limit of answers whose request has none. max_body: bytes
    of a request body. api_key: None for no key. allow_origins: origins of web pages that may call the API, besides
    those on this machine."""

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
        """The most characters that one token can stand for."""
        return max(map(len, [*self.token_bytes, *self.tokenizer.special_tokens]))

    def check_length(self, characters: int) -> None:
        """ApiError 400 for a text that is too long for the context whatever its tokens are. Encoding megabytes only to
        refuse them would take seconds on all cores."""
        if characters > self.context * self._longest_token:
            message = f"the prompt has {characters:,} characters, too many for a context of {self.context:,} tokens"
            raise ApiError(400, message, code="context_length_exceeded")

    def check_model(self, name: str) -> None:
        if name != self.model:
            message = f"there is no model {name[:100]!r} here; this server has {self.model!r}"
            raise ApiError(404, message, param="model", code="model_not_found")

    def params(self, fields: SamplingFields, max_tokens: int | None, logprobs: int | None) -> SamplingParams:
        """The engine's sampling parameters for a request. max_tokens: -1 for as many as fit the context.

        ApiError 400 for parameters that the engine does not support.
        """
        if fields.frequency_penalty:
            message = "frequency_penalty: not supported; use presence_penalty or repetition_penalty"
            raise ApiError(400, message, param="frequency_penalty")
        if fields.logit_bias:
            raise ApiError(400, "logit_bias: not supported", param="logit_bias")
        options = fields.model_dump(
            include={"temperature", "top_p", "top_k", "min_p", "presence_penalty", "repetition_penalty", "n"},
            exclude_none=True,
        )
        if options.get("temperature", 1.0) < LEAST_TEMPERATURE:
            options["temperature"] = 0.0
        if options.get("top_p") == 0:
            options["top_p"] = LEAST_TOP_P
        if options.get("top_k") == -1:
            options["top_k"] = 0
        seed = None if fields.seed is None else fields.seed & MAX_SEED
        stops = [fields.stop] if isinstance(fields.stop, str) else fields.stop or []
        stop = tuple(text for text in stops if text)
        try:
            limit = self.context if max_tokens == -1 else max_tokens
            return SamplingParams(max_new_tokens=limit, seed=seed, stop=stop, logprobs=logprobs, **options)
        except ValueError as problem:
            raise ApiError(400, str(problem)) from None

    async def submit(
        self, name: str, prompt: list[int], params: SamplingParams, constraint: Callable[[], Constraint] | None = None
    ) -> DeltaStream:
        """Queue a prompt of token ids. name: the kind of request, for its id. ApiError 400 if it does not fit."""
        if len(prompt) >= self.context:
            message = f"the prompt has {len(prompt):,} tokens; with an answer it must fit a context of {self.context:,}"
            raise ApiError(400, message, code="context_length_exceeded")
        if params.max_new_tokens is None or params.max_new_tokens >= self.context:
            room = max(1, min(self.context, self._cache_tokens + 1) - len(prompt))
            params = replace(params, max_new_tokens=min(params.max_new_tokens or self.default_max_tokens, room))
        return await self.worker.submit(Request(prompt, params, name, constraint))

    async def encode(self, text: str) -> list[int]:
        """Token ids of a raw prompt, with the bos token in front. ApiError 400 if it is too long."""
        self.check_length(len(text))
        # a batch of one, because `encode` would hold Python's lock and stall every other answer
        (encoded,) = await asyncio.to_thread(self.tokenizer.encode_batch, [text])
        ids, bos = encoded.tolist(), self.tokenizer.bos_token_id
        return ids if ids[:1] == [bos] else [bos, *ids]

    def token_text(self, token_id: int) -> str:
        """The token as text: the name of a control token, U+FFFD for part of a character."""
        return self.token_bytes[token_id].decode("utf-8", "replace") or self.tokenizer.token_of(token_id)


SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0)


class Metrics:
    """The figures of one server in Prometheus' text format, in a registry of their own."""

    def __init__(self) -> None:
        self._registry = CollectorRegistry()
        self._stats: EngineStats | None = None
        self.first_token = Histogram(
            "minimind_time_to_first_token_seconds",
            "From the submission of a request to its first token",
            buckets=SECONDS,
            registry=self._registry,
        )
        self.responses = Counter(
            "minimind_http_responses", "Responses by route and status", ("route", "status"), registry=self._registry
        )
        self._registry.register(self)

    def render(self, stats: EngineStats) -> bytes:
        """All figures, with the engine's statistics."""
        self._stats = stats
        return generate_latest(self._registry)

    def collect(self) -> Iterator[Metric]:
        """The engine's figures. prometheus_client calls this method."""
        s = self._stats
        if s is None:
            return
        for name, text, value in (
            ("requests_waiting", "Sequences in the queue", s.waiting),
            ("requests_running", "Sequences in the batch, including those whose prompt is being computed", s.running),
            ("batch_limit", "Most sequences that the batch can hold", s.max_batch),
            ("tokens_per_second", "Tokens per second of the engine's last ten busy seconds", s.tokens_per_second),
            ("kv_cache_bytes", "Size of the key/value cache", s.kv_bytes),
            ("kv_cache_usage_ratio", "Share of the cache's pages that requests hold", s.pages_used / s.pages_total),
        ):
            yield GaugeMetricFamily(f"minimind_{name}", text, value)
        pages = GaugeMetricFamily("minimind_kv_cache_pages", "Pages of the key/value cache by state", labels=["state"])
        free = s.pages_total - s.pages_used - s.pages_cached
        for state, count in (("used", s.pages_used), ("reusable", s.pages_cached), ("free", free)):
            pages.add_metric([state], count)
        yield pages
        for name, text, value in (
            ("generated_tokens", "Sampled tokens", s.generated_tokens),
            ("prompt_tokens", "Tokens of prompts", s.prompt_tokens),
            ("cached_prompt_tokens", "Tokens of prompts that were found in the cache", s.cached_tokens),
            ("preemptions", "Sequences that gave their pages back to older ones", s.preemptions),
            ("engine_steps", "Steps of the engine", s.steps),
        ):
            yield CounterMetricFamily(f"minimind_{name}", text, value)
        finished = CounterMetricFamily("minimind_samples_finished", "Finished sequences by reason", labels=["reason"])
        for reason, count in sorted(s.finished.items()):
            finished.add_metric([reason], count)
        yield finished
