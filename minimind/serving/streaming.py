"""Sending while it comes, and noticing that nobody listens any more."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Coroutine, Sequence
from typing import Any, TypeVar

from starlette.requests import Request
from starlette.responses import StreamingResponse
from starlette.types import Receive, Scope, Send

from minimind.serving.errors import ApiError
from minimind.serving.worker import DeltaStream

T = TypeVar("T")


def event(data: Any) -> bytes:
    """One server-sent event. JSON has no line break in it, which would end a data field."""
    return b"data: " + json.dumps(data, ensure_ascii=False, separators=(",", ":")).encode() + b"\n\n"


class EventStream(StreamingResponse):
    """Server-sent events of `generations`, which are cancelled as soon as the client has gone, sending or not.

    An ApiError on the way becomes an event of its own, as OpenAI's clients expect; "data: [DONE]" ends the stream.
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
    """The result of `work`; the generations are cancelled when the client goes before it is there."""
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
    """(number of the generation, delta) as they come."""
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
