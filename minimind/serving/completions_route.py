"""POST /v1/completions: a text, or token ids, continued."""

from __future__ import annotations

import time
import uuid
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from minimind.inference.requests import Delta
from minimind.serving.errors import ApiError, documented_stream
from minimind.serving.logprobs import completion_logprobs
from minimind.serving.protocol import CompletionRequest
from minimind.serving.service import Service
from minimind.serving.streaming import EventStream, merged, unless_disconnected
from minimind.serving.usage import Usage
from minimind.serving.worker import DeltaStream

DEFAULT_TOKENS = 16  # as OpenAI's


def completions_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", responses=documented_stream(400, 401, 404, 413, 415, 422, 429, 500, 503))
    async def completions(asked: CompletionRequest, request: Request) -> Response:
        service.check_model(asked.model)
        answer = await Continuation.begin(service, asked)
        if asked.stream:
            return EventStream(answer.events(), answer.generations)
        return JSONResponse(await unless_disconnected(request, answer.whole(), answer.generations))

    return router


class Continuation:
    """n choices for each prompt, numbered through."""

    def __init__(self, service: Service, asked: CompletionRequest, generations: list[DeltaStream]) -> None:
        self.generations = generations
        self._service, self._asked, self._n = service, asked, asked.n or 1
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._usage = Usage()

    @classmethod
    async def begin(cls, service: Service, asked: CompletionRequest) -> Continuation:
        for name, neutral in (("echo", False), ("suffix", ""), ("best_of", asked.n or 1)):
            if getattr(asked, name) not in (None, neutral):
                raise ApiError(400, f"{name}: not served", param=name)
        params = service.params(asked, asked.max_tokens or DEFAULT_TOKENS, asked.logprobs)
        prompts = [
            await service.encode(prompt) if isinstance(prompt, str) else prompt for prompt in several(asked.prompt)
        ]
        generations: list[DeltaStream] = []
        try:
            for prompt in prompts:
                generations.append(await service.submit("completion", prompt, params))
        except BaseException:
            for generation in generations:
                generation.cancel()
            raise
        return cls(service, asked, generations)

    async def whole(self) -> dict[str, Any]:
        deltas: list[list[Delta]] = [[] for _ in range(self._n * len(self.generations))]
        async for number, delta in merged(self.generations):
            deltas[self._n * number + delta.index].append(delta)
            self._usage.take(delta)
        choices = [
            {
                "index": index,
                "text": "".join(delta.text for delta in own),
                "finish_reason": own[-1].finish_reason,
                "logprobs": self._logprobs(own, 0)[0],
            }
            for index, own in enumerate(deltas)
        ]
        return {**self._head(), "choices": choices, "usage": self._usage.body()}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        options = self._asked.stream_options
        with_usage = options is not None and options.include_usage
        head = {**self._head(), **({"usage": None} if with_usage else {})}
        offsets: dict[int, int] = {}
        async for number, delta in merged(self.generations):
            self._usage.take(delta)
            index = self._n * number + delta.index
            log, offsets[index] = self._logprobs([delta], offsets.get(index, 0))
            if delta.text or delta.finish_reason is not None or log is not None:
                choice = {"index": index, "text": delta.text, "finish_reason": delta.finish_reason, "logprobs": log}
                yield {**head, "choices": [choice]}
        if with_usage:
            yield {**head, "choices": [], "usage": self._usage.body()}

    def _head(self) -> dict[str, Any]:
        model = self._service.model
        return {"id": self._id, "object": "text_completion", "created": int(time.time()), "model": model}

    def _logprobs(self, deltas: list[Delta], offset: int) -> tuple[dict[str, Any] | None, int]:
        if self._asked.logprobs is None:
            return None, 0
        return completion_logprobs(self._service, deltas, offset)


def several(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """One prompt or many, as many."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt
