"""The routes that generate text: POST /v1/chat/completions and POST /v1/completions."""

from __future__ import annotations

import asyncio
import time
import uuid
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass, field, replace
from typing import Any

from fastapi import APIRouter
from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from minimind.inference.requests import Constraint, Delta
from minimind.serving.chat_format import END_CALL, Reply, ReplyParser, ReplyPart, selected_tools
from minimind.serving.grammar import ANY_OBJECT
from minimind.serving.protocol import (
    ApiError,
    ChatRequest,
    CompletionRequest,
    JsonFormat,
    JsonSchemaFormat,
    NamedTool,
    documented_stream,
)
from minimind.serving.responses import (
    EventStream,
    Usage,
    chat_logprobs,
    completion_logprobs,
    merged,
    unless_disconnected,
)
from minimind.serving.service import Service
from minimind.serving.worker import DeltaStream


def chat_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", responses=documented_stream(400, 401, 404, 413, 415, 422, 429, 500, 503))
    async def chat_completions(body: ChatRequest, request: Request) -> Response:
        service.check_model(body.model)
        answer = await ChatAnswer.start(service, body)
        if body.stream:
            return EventStream(answer.events(), [answer.generation])
        return JSONResponse(await unless_disconnected(request, answer.complete(), [answer.generation]))

    return router


@dataclass
class Choice:
    """One of the n answers of a chat request, as far as it has been generated."""

    parser: ReplyParser
    reply: Reply = field(default_factory=Reply)
    deltas: list[Delta] = field(default_factory=list)

    def take(self, delta: Delta) -> list[ReplyPart]:
        parts = self.parser.push(delta.text)
        if delta.finish_reason is not None:
            parts += self.parser.finish()
        for part in parts:
            self.reply.add(part)
        return parts

    def finish_reason(self, delta: Delta) -> str | None:
        """tool_calls if the answer is complete and calls tools, else the engine's reason."""
        return "tool_calls" if self.reply.calls and delta.finish_reason == "stop" else delta.finish_reason


class ChatAnswer:
    """The answer to a chat request, sent whole or as a stream of chunks."""

    def __init__(
        self, service: Service, body: ChatRequest, generation: DeltaStream, reasoning: bool, enforced: bool
    ) -> None:
        self.generation = generation
        self._service, self._body = service, body
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._usage = Usage()
        tools = bool(body.tools) and body.tool_choice != "none"
        options = {"reasoning": reasoning, "tools": tools, "enforced": enforced}
        self._choices = [Choice(ReplyParser(**options)) for _ in range(body.n or 1)]

    @classmethod
    async def start(cls, service: Service, body: ChatRequest) -> ChatAnswer:
        limits = {body.max_tokens, body.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ApiError(400, "max_tokens and max_completion_tokens are the same limit; give one of them")
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, "top_logprobs: needs logprobs: true", param="top_logprobs")
        limit = next(iter(limits), None)
        params = service.params(body, limit, (body.top_logprobs or 0) if body.logprobs else None)
        ids, reasoning = await asyncio.to_thread(service.prompts.prompt, body)
        constraint = await asyncio.to_thread(answer_constraint, service, body, reasoning)
        if body.parallel_tool_calls is False and body.tools and constraint is None:
            params = replace(params, stop=(*params.stop, END_CALL))
        generation = await service.submit("chat", ids, params, constraint)
        return cls(service, body, generation, reasoning, constraint is not None)

    async def complete(self) -> dict[str, Any]:
        """The whole answer in OpenAI's form, once all n choices are complete."""
        reasons: dict[int, str | None] = {}
        async for delta in self.generation:
            choice = self._choices[delta.index]
            choice.take(delta)
            choice.deltas.append(delta)
            self._usage.take(delta)
            reasons[delta.index] = choice.finish_reason(delta)
        choices = [
            {
                "index": index,
                "message": self._message(choice),
                "finish_reason": reasons[index],
                "logprobs": self._logprobs(choice.deltas),
            }
            for index, choice in enumerate(self._choices)
        ]
        return {**self._head("chat.completion"), "choices": choices, "usage": self._usage.body()}

    async def events(self) -> AsyncIterator[dict[str, Any]]:
        """The chunks of a streamed answer, in OpenAI's form."""
        options = self._body.stream_options
        with_usage = options is not None and options.include_usage
        head = {**self._head("chat.completion.chunk"), **({"usage": None} if with_usage else {})}

        def chunk(index: int, delta: dict[str, Any], reason: str | None = None, log: Any = None) -> dict[str, Any]:
            choice = {"index": index, "delta": delta, "finish_reason": reason, "logprobs": log}
            return {**head, "choices": [choice]}

        for index in range(len(self._choices)):
            yield chunk(index, {"role": "assistant", "content": ""})
        async for delta in self.generation:
            choice = self._choices[delta.index]
            self._usage.take(delta)
            log = self._logprobs([delta])
            for part in choice.take(delta):
                yield chunk(delta.index, _delta(part), log=log)
                log = None
            reason = choice.finish_reason(delta)
            if reason is not None or log is not None:
                yield chunk(delta.index, {}, reason, log)
        if with_usage:
            yield {**head, "choices": [], "usage": self._usage.body()}

    def _head(self, kind: str) -> dict[str, Any]:
        return {"id": self._id, "object": kind, "created": int(time.time()), "model": self._service.model}

    def _message(self, choice: Choice) -> dict[str, Any]:
        reply = choice.reply
        content = reply.content if reply.content is not None or reply.calls else ""
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if reply.calls:
            message["tool_calls"] = [
                {"id": _call_id(), "type": "function", "function": {"name": name, "arguments": arguments}}
                for name, arguments in reply.calls
            ]
        return message

    def _logprobs(self, deltas: list[Delta]) -> dict[str, Any] | None:
        return chat_logprobs(self._service, deltas) if self._body.logprobs else None


def answer_constraint(service: Service, body: ChatRequest, reasoning: bool) -> Callable[[], Constraint] | None:
    """The grammar that response_format and tool_choice require, or None. With both, calls that are not required may
    take the place of the JSON; calls that are required leave no room for it."""
    schema = answer_schema(body)
    tools = [tool["function"] for tool in selected_tools(body)]
    required = body.tool_choice == "required" or isinstance(body.tool_choice, NamedTool)
    if tools and (required or schema is not None):
        several = not isinstance(body.tool_choice, NamedTool) and body.parallel_tool_calls is not False
        return service.grammars.tool_calls(tools, several, reasoning, None if required else schema)
    return None if schema is None else service.grammars.json_schema(schema, reasoning)


def answer_schema(body: ChatRequest) -> dict[str, Any] | None:
    """The JSON schema of response_format; None: free text."""
    form = body.response_format
    if isinstance(form, JsonSchemaFormat):
        return form.json_schema.schema_
    return ANY_OBJECT if isinstance(form, JsonFormat) else None


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _delta(part: ReplyPart) -> dict[str, Any]:
    """The `delta` object of a stream's chunk for this part."""
    if part.kind == "content":
        return {"content": part.text}
    if part.kind == "reasoning":
        return {"reasoning_content": part.text}
    if part.kind == "arguments":
        return {"tool_calls": [{"index": part.call, "function": {"arguments": part.text}}]}
    function = {"name": part.text, "arguments": ""}
    return {"tool_calls": [{"index": part.call, "id": _call_id(), "type": "function", "function": function}]}


DEFAULT_TOKENS = 16  # as in OpenAI's API


def completions_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/completions", responses=documented_stream(400, 401, 404, 413, 415, 422, 429, 500, 503))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        service.check_model(body.model)
        answer = await CompletionAnswer.start(service, body)
        if body.stream:
            return EventStream(answer.events(), answer.generations)
        return JSONResponse(await unless_disconnected(request, answer.complete(), answer.generations))

    return router


class CompletionAnswer:
    """The answer to a completion request: n choices for each prompt, numbered consecutively."""

    def __init__(self, service: Service, body: CompletionRequest, generations: list[DeltaStream]) -> None:
        self.generations = generations
        self._service, self._body, self._n = service, body, body.n or 1
        self._id = f"cmpl-{uuid.uuid4().hex}"
        self._usage = Usage()

    @classmethod
    async def start(cls, service: Service, body: CompletionRequest) -> CompletionAnswer:
        for name, neutral in (("echo", False), ("suffix", ""), ("best_of", body.n or 1)):
            if getattr(body, name) not in (None, neutral):
                raise ApiError(400, f"{name}: not supported", param=name)
        params = service.params(body, body.max_tokens or DEFAULT_TOKENS, body.logprobs)
        prompts = [
            await service.encode(prompt) if isinstance(prompt, str) else prompt for prompt in prompt_list(body.prompt)
        ]
        generations: list[DeltaStream] = []
        try:
            for prompt in prompts:
                generations.append(await service.submit("completion", prompt, params))
        except BaseException:
            for generation in generations:
                generation.cancel()
            raise
        return cls(service, body, generations)

    async def complete(self) -> dict[str, Any]:
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
        options = self._body.stream_options
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
        if self._body.logprobs is None:
            return None, 0
        return completion_logprobs(self._service, deltas, offset)


def prompt_list(prompt: str | list[str] | list[int] | list[list[int]]) -> list[str] | list[list[int]]:
    """A list of prompts, from one prompt or several."""
    if isinstance(prompt, str):
        return [prompt]
    if isinstance(prompt[0], int):
        return [prompt]
    return prompt
