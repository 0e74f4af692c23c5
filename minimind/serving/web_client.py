"""The web chat without its page: turns of a conversation, and answers that fill one while they come."""

from __future__ import annotations

import ipaddress
import json
import time
from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal
from urllib.parse import urlsplit

import openai

SAMPLE_TOOLS = [
    {
        "type": "function",
        "function": {
            "name": name,
            "description": description,
            "parameters": {"type": "object", "properties": {"city": {"type": "string"}}, "required": ["city"]},
        },
    }
    for name, description in (("weather", "Weather in a city"), ("clock", "Time in a city"))
]


@dataclass
class Settings:
    """thinking: None leaves it to the model. seed: None for another answer each time."""

    model: str
    system: str = ""
    thinking: bool | None = None
    temperature: float = 0.7
    top_p: float = 0.9
    repetition_penalty: float = 1.0
    max_tokens: int = 512
    seed: int | None = None
    tools: list[dict[str, Any]] = field(default_factory=list)


@dataclass
class Call:
    id: str
    name: str
    arguments: str


@dataclass
class ChatTurn:
    """What one side said. call_id: of a tool's result. stopped: before its end. dropped: how many of the oldest rounds
    the context had no room for. Seconds since the question: to the first token, of thinking, of all."""

    role: Literal["user", "assistant", "tool"]
    content: str = ""
    reasoning: str = ""
    calls: list[Call] = field(default_factory=list)
    call_id: str = ""
    stopped: bool = False
    cut: bool = False
    error: str = ""
    tokens: int = 0
    dropped: int = 0
    first_after: float = 0.0
    thought_for: float = 0.0
    seconds: float = 0.0

    @property
    def tokens_per_second(self) -> float:
        writing = self.seconds - self.first_after
        return (self.tokens - 1) / writing if self.tokens > 1 and writing > 0 else 0.0

    def message(self) -> dict[str, Any] | None:
        """As the server wants it; None for an answer that never came."""
        if self.role == "user":
            return {"role": "user", "content": self.content}
        if self.role == "tool":
            return {"role": "tool", "content": self.content, "tool_call_id": self.call_id}
        if not self.content and not self.calls:
            return None
        message: dict[str, Any] = {"role": "assistant", "content": self.content}
        if self.reasoning:
            message["reasoning_content"] = self.reasoning
        if self.calls:
            message["tool_calls"] = [
                {"id": c.id, "type": "function", "function": {"name": c.name, "arguments": c.arguments}}
                for c in self.calls
            ]
        return message


def connect(url: str, api_key: str | None) -> openai.OpenAI:
    """A client of the server at `url`. A server on this machine is not asked for through the environment's proxy.
    ValueError, one line, for a proxy that cannot be used."""
    try:
        http = openai.DefaultHttpxClient(trust_env=not _is_local(urlsplit(url).hostname or ""))
    except (ImportError, ValueError) as problem:  # SOCKS needs a package of its own
        raise ValueError(
            f"{url}: the environment's proxy: {problem}; name the server's host in NO_PROXY where it needs none"
        ) from None
    return openai.OpenAI(base_url=url, api_key=api_key or "none", max_retries=0, http_client=http)


def _is_local(host: str) -> bool:
    try:
        address = ipaddress.ip_address(host)
    except ValueError:
        return f".{host.lower().rstrip('.')}".endswith(".localhost")
    return address.is_loopback or address.is_unspecified  # 0.0.0.0, as servers say where they listen


def parse_tools(text: str) -> list[dict[str, Any]]:
    """Tools as a JSON list in OpenAI's form. ValueError, one line, for anything else."""
    try:
        value = json.loads(text) if text.strip() else []
    except ValueError as problem:
        raise ValueError(f"not JSON: {problem}") from None
    if not isinstance(value, list) or not all(isinstance(tool, dict) for tool in value):
        raise ValueError("not a list of objects")
    return value


def fill(
    client: openai.OpenAI, settings: Settings, turns: Sequence[ChatTurn], turn: ChatTurn
) -> Generator[None, None, None]:
    """Ask for the answer to `turns` and write it into `turn`, yielding whenever there is more of it. Closed early, it
    closes the connection, and the server stops. A failure becomes the turn's error; a conversation that the context
    cannot hold loses its oldest rounds."""
    start = time.perf_counter()
    turn.stopped = True
    kept = list(turns)
    while True:
        try:
            yield from _stream(client, _request(settings, kept), turn, start)
        except openai.BadRequestError as problem:
            rest = _without_oldest(kept) if problem.code == "context_length_exceeded" else []
            if rest:
                kept, turn.dropped = rest, turn.dropped + 1
                continue
            turn.error = problem.message
        except openai.OpenAIError as problem:
            turn.error = str(problem)
        turn.stopped = False
        turn.seconds = time.perf_counter() - start
        return


def _request(settings: Settings, turns: Sequence[ChatTurn]) -> dict[str, Any]:
    extra: dict[str, Any] = {"repetition_penalty": settings.repetition_penalty}
    if settings.thinking is not None:
        extra["chat_template_kwargs"] = {"enable_thinking": settings.thinking}
    system = [{"role": "system", "content": settings.system}] if settings.system.strip() else []
    request = {
        "model": settings.model,
        "messages": [*system, *(message for turn in turns if (message := turn.message()) is not None)],
        "temperature": settings.temperature,
        "top_p": settings.top_p,
        "max_tokens": settings.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        "extra_body": extra,
    }
    if settings.seed is not None:
        request["seed"] = settings.seed
    if settings.tools:
        request["tools"] = settings.tools
    return request


def _stream(client: openai.OpenAI, request: dict[str, Any], turn: ChatTurn, start: float) -> Iterator[None]:
    with client.chat.completions.create(**request) as stream:
        for chunk in stream:
            now = time.perf_counter() - start
            if chunk.usage is not None:
                turn.tokens = chunk.usage.completion_tokens
            for choice in chunk.choices:
                if _take(turn, choice.delta):
                    turn.first_after = turn.first_after or now
                if turn.reasoning and not turn.content and not turn.calls:
                    turn.thought_for = now
                turn.cut = turn.cut or choice.finish_reason == "length"
            yield


def _take(turn: ChatTurn, delta: Any) -> bool:
    """Add a delta to the turn; whether it held anything."""
    reasoning = getattr(delta, "reasoning_content", None) or ""
    turn.reasoning += reasoning
    turn.content += delta.content or ""
    for call in delta.tool_calls or []:
        if call.id:
            turn.calls.append(Call(call.id, call.function.name or "", ""))
        turn.calls[call.index].arguments += call.function.arguments or ""
    return bool(reasoning or delta.content or delta.tool_calls)


def _without_oldest(turns: list[ChatTurn]) -> list[ChatTurn]:
    """Without the first question and all that belongs to it; [] if it is the only one."""
    later = [i for i, turn in enumerate(turns) if turn.role == "user" and i > 0]
    return turns[later[0] :] if later else []
