"""The engine in a thread of its own. The event loop submits requests and receives their deltas.

event loop   submit, cancel, stats --> commands --> engine thread: step, step, step
             DeltaStream.__anext__ <-- one call_soon_threadsafe per step, with all its deltas
"""

from __future__ import annotations

import asyncio
import itertools
import logging
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import replace
from queue import Empty, SimpleQueue
from threading import Thread
from typing import Any, TypeVar

from minimind.inference.engine import Engine
from minimind.inference.requests import Delta, EngineStats, Request
from minimind.serving.protocol import ApiError

log = logging.getLogger("minimind.serving")
T = TypeVar("T")


class DeltaStream:
    """The deltas of one request, as an asynchronous iterator.

    Raises ApiError 500 if the engine failed, 503 if the request was cancelled or the server shuts down.
    """

    def __init__(self, worker: EngineWorker, request: Request) -> None:
        assert request.id is not None
        self.id, self.samples = request.id, request.params.n
        self.submitted = time.perf_counter()
        self.first_token: float | None = None
        self._worker, self._running = worker, self.samples
        self._items: asyncio.Queue[Delta | ApiError] = asyncio.Queue()

    def cancel(self) -> None:
        """End the request and free its pages. Does nothing if it has finished."""
        if self._running:
            self._worker.cancel(self.id)

    def put(self, item: Delta | ApiError) -> int:
        """Add a delta, or the error that ends the request. Returns how many of its samples this ended."""
        ended = self._running if isinstance(item, ApiError) else int(item.finish_reason is not None)
        self._running -= ended
        self._items.put_nowait(item)
        return ended

    def __aiter__(self) -> DeltaStream:
        return self

    async def __anext__(self) -> Delta:
        if not self._running and self._items.empty():
            raise StopAsyncIteration
        item = await self._items.get()
        if isinstance(item, ApiError):
            raise item
        if item.finish_reason == "cancelled":
            raise ApiError(503, "the request was cancelled before its answer was complete", code="cancelled")
        if item.finish_reason == "error":
            reason = item.output.error if item.output is not None else None
            raise ApiError(500, reason or "the engine failed in this request")
        return item


class EngineWorker:
    """Runs an engine in a thread. Its methods must be called from the event loop in which `start` was called.

    max_queue: samples that may wait beyond the engine's max_batch; both together are `capacity`.
    on_first_token: called with the seconds from a request's submission to its first token.
    """

    def __init__(
        self, engine: Engine, max_queue: int, on_first_token: Callable[[float], None] = lambda seconds: None
    ) -> None:
        self.engine = engine
        self.max_queue, self.capacity = max_queue, engine.stats().max_batch + max_queue
        self.in_flight = 0
        self.draining = False
        self._on_first_token = on_first_token
        self._generations: dict[str, DeltaStream] = {}
        self._commands: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._numbers = itertools.count()
        self._admitted: set[str] = set()  # unfinished requests; for the engine thread alone

    def start(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._thread.start()

    @property
    def alive(self) -> bool:
        return self._thread.is_alive()

    async def stop(self) -> None:
        """Cancel all requests and end the thread."""
        self.cancel_all()
        self._commands.put(None)
        await asyncio.to_thread(self._thread.join)

    def drain(self, seconds: float) -> None:
        """Refuse new requests, and cancel those that still run after `seconds`."""
        self.draining = True
        self._loop.call_later(seconds, self.cancel_all)

    async def submit(self, request: Request) -> DeltaStream:
        """Queue a request. ApiError 400 if it is invalid, 429 if the queue is full, 503 during a shutdown."""
        samples = request.params.n
        if self.draining or not self.alive:
            raise ApiError(503, "the server is shutting down", code="shutting_down")
        if samples > self.capacity:
            raise ApiError(400, f"n={samples}: this server holds at most {self.capacity} samples", param="n")
        if self.in_flight + samples > self.capacity:
            message = f"{self.in_flight} of at most {self.capacity} samples run or wait already; try again later"
            raise ApiError(429, message, code="queue_full", headers={"Retry-After": "1"})
        request = replace(request, id=f"{request.id or 'request'}-{next(self._numbers)}")
        generation = DeltaStream(self, request)
        self._generations[generation.id] = generation
        self.in_flight += samples
        try:
            await self._call(lambda: self._admitted.add(self.engine.submit(request)))
        except asyncio.CancelledError:
            generation.cancel()
            raise
        except ValueError as problem:
            del self._generations[generation.id]
            self.in_flight -= samples
            raise ApiError(400, str(problem)) from None
        return generation

    def cancel(self, request_id: str) -> None:
        self._commands.put(lambda: self._cancel(request_id))

    def cancel_all(self) -> None:
        for name in list(self._generations):
            self.cancel(name)

    async def stats(self) -> EngineStats:
        return await self._call(self.engine.stats)

    def _call(self, function: Callable[[], T]) -> asyncio.Future[T]:
        """Run `function` in the engine thread, between two steps."""
        future: asyncio.Future[T] = self._loop.create_future()

        def command() -> None:
            try:
                result = function()
            except Exception as problem:
                self._on_loop(_settle, future.set_exception, problem, future)
            else:
                self._on_loop(_settle, future.set_result, result, future)

        self._commands.put(command)
        return future

    def _cancel(self, request_id: str) -> None:
        self.engine.cancel(request_id)

    def _run(self) -> None:
        while self._take_commands():
            try:
                deltas = self.engine.step()
            except Exception as problem:  # out of memory, for example; the running requests cannot continue
                log.exception("the engine failed; its requests are cancelled")
                self._give_up(problem)
            else:
                self._deliver(deltas)
        self._deliver(self.engine.step())  # the deltas of the requests that the end cancelled

    def _deliver(self, deltas: list[Delta]) -> None:
        self._admitted.difference_update(delta.id for delta in deltas if delta.output is not None)
        if deltas:
            self._on_loop(self._dispatch, deltas, time.perf_counter())

    def _take_commands(self) -> bool:
        """Execute the queued commands, waiting for one if the engine is idle. False: end the thread."""
        while True:
            try:
                command = self._commands.get(block=not self.engine.has_work)
            except Empty:
                return True
            if command is None:
                return False
            command()

    def _give_up(self, problem: Exception) -> None:
        names = list(self._admitted)
        self._admitted.clear()
        for name in names:
            self.engine.cancel(name)
        self._on_loop(self._dispatch_failure, names, f"the engine failed: {type(problem).__name__}")

    def _on_loop(self, function: Callable[..., None], *arguments: Any) -> None:
        with suppress(RuntimeError):  # the loop is closed
            self._loop.call_soon_threadsafe(function, *arguments)

    def _dispatch(self, deltas: list[Delta], now: float) -> None:
        for delta in deltas:
            generation = self._generations.get(delta.id)
            if generation is None:
                continue
            if generation.first_token is None and delta.token_ids:
                generation.first_token = now
                self._on_first_token(now - generation.submitted)
            self._put(generation, delta)

    def _dispatch_failure(self, names: list[str], reason: str) -> None:
        for name in names:
            if name in self._generations:
                self._put(self._generations[name], ApiError(500, reason))

    def _put(self, generation: DeltaStream, item: Delta | ApiError) -> None:
        self.in_flight -= generation.put(item)
        if isinstance(item, ApiError) or item.output is not None:
            del self._generations[generation.id]


def _settle(setter: Callable[[Any], None], value: Any, future: asyncio.Future[Any]) -> None:
    if not future.done():  # the caller may have been cancelled
        setter(value)
