"""The parts that chat and completion answers share: server-sent events, disconnects, token usage, log-probabilities."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from minimind.inference.requests import Delta, TopLogProbs
from minimind.serving.protocol import ApiError
from minimind.serving.worker import DeltaStream

T = TypeVar("T")


def event(data: Any) -> bytes:
    """`data` as one server-sent event. JSON contains no line break, which would end the data field."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """A stream of server-sent events. `generations` are cancelled as soon as the client disconnects.

    An ApiError becomes an event of its own, as OpenAI's clients expect; "data: [DONE]" ends the stream.
    """

    def __init__(self, events: AsyncIterator[Any], generations: Sequence[DeltaStream]) -> None:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        super().__init__(_framed(events), media_type="text/event-stream", headers=headers)
        self._generations = generations

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        watcher = asyncio.create_task(_on_disconnect(receive, lambda: _cancel(self._generations)))
        try:
            await self.stream_response(send)
        finally:
            watcher.cancel()
            _cancel(self._generations)


async def _framed(events: AsyncIterator[Any]) -> AsyncIterator[bytes]:
    try:
        async for data in events:
            yield event(data)
    except ApiError as problem:
        yield event(problem.body())
    yield b"data: [DONE]\n\n"


async def unless_disconnected(request: Request, work: Coroutine[Any, Any, T], generations: Sequence[DeltaStream]) -> T:
    """The result of `work`. If the client disconnects first, the generations are cancelled."""
    watcher = asyncio.create_task(_on_disconnect(request.receive, lambda: _cancel(generations)))
    try:
        return await work
    finally:
        watcher.cancel()
        _cancel(generations)


async def _on_disconnect(receive: Receive, action: Callable[[], None]) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass
    action()


def _cancel(generations: Sequence[DeltaStream]) -> None:
    for generation in generations:
        generation.cancel()


async def merged(generations: Sequence[DeltaStream]) -> AsyncIterator[tuple[int, Any]]:
    """(number of the generation, delta), in the order in which the deltas arrive."""
    if len(generations) == 1:
        async for delta in generations[0]:
            yield 0, delta
        return
    pending = {asyncio.ensure_future(anext(g)): (i, g) for i, g in enumerate(generations)}
    try:
        while pending:
            done, _ = await asyncio.wait(pending, return_when=asyncio.FIRST_COMPLETED)
            for task in done:
                number, generation = pending.pop(task)
                try:
                    delta = task.result()
                except StopAsyncIteration:
                    continue
                yield number, delta
                pending[asyncio.ensure_future(anext(generation))] = (number, generation)
    finally:
        for task in pending:
            task.cancel()


class Usage:
    """Token counts of finished requests: each prompt once, and all sampled tokens, end tokens included."""

    def __init__(self) -> None:
        self._prompt = self._cached = self._completion = 0

    def take(self, delta: Delta) -> None:
        if delta.output is not None:
            self._prompt += len(delta.output.prompt_token_ids)
            self._cached += delta.output.cached_tokens
            self._completion += delta.output.completion_tokens

    def body(self) -> dict[str, Any]:
        return {
            "prompt_tokens": self._prompt,
            "completion_tokens": self._completion,
            "total_tokens": self._prompt + self._completion,
            "prompt_tokens_details": {"cached_tokens": self._cached},
        }


if TYPE_CHECKING:
    from minimind.serving.service import Service


def chat_logprobs(service: Service, deltas: Sequence[Delta]) -> dict[str, Any] | None:
    """The `logprobs` object of a chat choice; None if the deltas contain no token to report."""

    def entry(token: int, log_prob: float) -> dict[str, Any]:
        raw = service.token_bytes[token] or service.token_text(token).encode()
        return {"token": service.token_text(token), "logprob": log_prob, "bytes": list(raw)}

    content = [
        {**entry(token, log_prob), "top_logprobs": [entry(*pair) for pair in top]}
        for token, log_prob, top in _tokens(deltas)
    ]
    return {"content": content, "refusal": None} if content else None


def completion_logprobs(service: Service, deltas: Sequence[Delta], offset: int) -> tuple[dict[str, Any], int]:
    """The `logprobs` object of a completion choice, and the offset in the text at which the next token begins.

    offset: the offset of the first token.
    """
    tokens, log_probs, tops, offsets = [], [], [], []
    for token, log_prob, top in _tokens(deltas):
        tokens.append(service.token_text(token))
        log_probs.append(log_prob)
        tops.append({service.token_text(other): value for other, value in top})
        offsets.append(offset)
        offset += len(tokens[-1])
    return {"tokens": tokens, "token_logprobs": log_probs, "top_logprobs": tops, "text_offset": offsets}, offset


def _tokens(deltas: Iterable[Delta]) -> Iterator[tuple[int, float, TopLogProbs]]:
    for delta in deltas:
        pairs = list(zip(delta.token_ids, delta.log_probs, strict=True))
        tops = delta.top_logprobs or ((),) * len(pairs)
        ended = delta.finish_reason == "stop" and isinstance(delta.stop, int)
        for (token, log_prob), top in list(zip(pairs, tops, strict=True))[: len(pairs) - ended]:
            yield token, log_prob, top
