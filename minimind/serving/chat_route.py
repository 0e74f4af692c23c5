"""POST /v1/chat/completions."""

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
from minimind.serving.errors import ApiError, documented_stream
from minimind.serving.logprobs import chat_logprobs
from minimind.serving.prompts import offered
from minimind.serving.protocol import ChatRequest, JsonFormat, JsonSchemaFormat, NamedTool
from minimind.serving.reply import END_CALL, Reply, ReplyParser, ReplyPart
from minimind.serving.service import Service
from minimind.serving.streaming import EventStream, unless_disconnected
from minimind.serving.usage import Usage
from minimind.serving.worker import DeltaStream


def chat_router(service: Service) -> APIRouter:
    router = APIRouter()

    @router.post("/v1/chat/completions", responses=documented_stream(400, 401, 404, 413, 415, 422, 429, 500, 503))
    async def chat_completions(asked: ChatRequest, request: Request) -> Response:
        service.check_model(asked.model)
        answer = await ChatAnswer.begin(service, asked)
        if asked.stream:
            return EventStream(answer.events(), [answer.generation])
        return JSONResponse(await unless_disconnected(request, answer.whole(), [answer.generation]))

    return router


@dataclass
class Choice:
    """One of the n answers while it comes."""

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
        """tool_calls where the answer ends with them, rather than being cut."""
        return "tool_calls" if self.reply.calls and delta.finish_reason == "stop" else delta.finish_reason


class ChatAnswer:
    def __init__(self, service: Service, asked: ChatRequest, generation: DeltaStream, reasoning: bool) -> None:
        self.generation = generation
        self._service, self._asked = service, asked
        self._id = f"chatcmpl-{uuid.uuid4().hex}"
        self._usage = Usage()
        tools = bool(asked.tools) and asked.tool_choice != "none"
        self._choices = [Choice(ReplyParser(reasoning=reasoning, tools=tools)) for _ in range(asked.n or 1)]

    @classmethod
    async def begin(cls, service: Service, asked: ChatRequest) -> ChatAnswer:
        limits = {asked.max_tokens, asked.max_completion_tokens} - {None}
        if len(limits) > 1:
            raise ApiError(400, "max_tokens and max_completion_tokens are one limit: give one of them")
        if asked.top_logprobs and not asked.logprobs:
            raise ApiError(400, "top_logprobs: only with logprobs", param="top_logprobs")
        limit = next(iter(limits), None)
        params = service.params(asked, limit, (asked.top_logprobs or 0) if asked.logprobs else None)
        if asked.parallel_tool_calls is False and asked.tools:
            params = replace(params, stop=(*params.stop, END_CALL))
        ids, reasoning = await asyncio.to_thread(service.prompts.prompt, asked)
        constraint = await asyncio.to_thread(constraint_of, service, asked, reasoning)
        generation = await service.submit("chat", ids, params, constraint)
        return cls(service, asked, generation, reasoning)

    async def whole(self) -> dict[str, Any]:
        """The answer when it is complete."""
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
        """The chunks of a stream."""
        options = self._asked.stream_options
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
        return chat_logprobs(self._service, deltas) if self._asked.logprobs else None


def constraint_of(service: Service, asked: ChatRequest, reasoning: bool) -> Callable[[], Constraint] | None:
    """What response_format and tool_choice ask for; ApiError 400 where both do."""
    form, choice = asked.response_format, asked.tool_choice
    if isinstance(form, JsonFormat | JsonSchemaFormat):
        if asked.tools and choice != "none":
            raise ApiError(400, f"response_format {form.type} and tools: give one of them, or tool_choice none")
        if isinstance(form, JsonFormat):
            return service.grammars.json_object(reasoning)
        return service.grammars.json_schema(form.json_schema.schema_, reasoning)
    if choice == "required" or isinstance(choice, NamedTool):
        functions = [tool["function"] for tool in offered(asked)]
        several = choice == "required" and asked.parallel_tool_calls is not False
        return service.grammars.tool_calls(functions, several, reasoning)
    return None


def _call_id() -> str:
    return f"call_{uuid.uuid4().hex[:24]}"


def _delta(part: ReplyPart) -> dict[str, Any]:
    """The part as a chunk of a stream says it."""
    if part.kind == "content":
        return {"content": part.text}
    if part.kind == "reasoning":
        return {"reasoning_content": part.text}
    if part.kind == "arguments":
        return {"tool_calls": [{"index": part.call, "function": {"arguments": part.text}}]}
    function = {"name": part.text, "arguments": ""}
    return {"tool_calls": [{"index": part.call, "id": _call_id(), "type": "function", "function": function}]}
