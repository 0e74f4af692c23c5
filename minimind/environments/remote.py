"""Conversations with tools that a model behind an OpenAI-compatible address holds, several at a time.

As episodes.py, without tokens: the server renders the messages, so nothing here can be trained on. The server names
calls and the tools run here. A call that the model wrote as text, because it is malformed, is answered by a user's
message with the error, since a tool's message must name a call.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from typing import Any, cast

from minimind.environments.episodes import EndReason, Episode, EpisodeLimits, Start, Turn
from minimind.environments.running import ToolResult, ToolRunner
from minimind.environments.turns import CLOSE, OPEN, ParsedCall, read_call, read_calls
from minimind.rewards.rules import parse_json
from minimind.tokenization.chat_template import parse_messages

_WAIT = 0.05  # seconds to wait for answers while tools run, and for tools


@dataclass
class _Open:
    """An unfinished conversation. ids: of the turn's calls, "" for one written as text; results: of those run."""

    episode: Episode
    messages: list[dict[str, Any]]
    tools: list[dict[str, Any]]
    text: str = ""
    calls: list[ParsedCall] = field(default_factory=list)
    ids: list[str] = field(default_factory=list)
    results: list[ToolResult] = field(default_factory=list)
    tokens: int = 0


class RemoteRunner:
    """client: openai.OpenAI; model: its name at the server; tools: runs the calls; at_a_time: most requests at once."""

    def __init__(
        self, client: Any, model: str, tools: ToolRunner, limits: EpisodeLimits | None = None, at_a_time: int = 16
    ) -> None:
        self.client, self.model, self.tools, self.limits = client, model, tools, limits or EpisodeLimits()
        self._at_a_time = at_a_time
        self._asked: dict[Future[Any], int] = {}

    def run(
        self, starts: Sequence[Start], prompts: Sequence[Sequence[Mapping[str, Any]]], temperature: float = 0.0
    ) -> list[Episode]:
        """Run all conversations to their end, in the order of `starts`. prompts: their messages. Raises ValueError, in
        one line, if the server fails."""
        opened = [_opened(start, messages) for start, messages in zip(starts, prompts, strict=True)]
        with ThreadPoolExecutor(self._at_a_time) as pool:

            def ask(number: int) -> None:
                self._asked[pool.submit(self._answer, opened[number], temperature)] = number

            try:
                for number in range(len(opened)):
                    ask(number)
                while self._asked or self.tools.busy:
                    for future in self._answered():
                        number = self._asked.pop(future)
                        self._on_answer(number, opened[number], future.result())
                    for key, result in self.tools.poll(0.0 if self._asked else _WAIT):
                        if self._on_result(cast(int, key), opened[cast(int, key)], result):
                            ask(cast(int, key))
            finally:
                pool.shutdown(wait=False, cancel_futures=True)
                self.tools.stop()
                self._asked.clear()
        return [each.episode for each in opened]

    def _answered(self) -> list[Future[Any]]:
        """The requests that have been answered; waits for one, if no tool runs."""
        if not self._asked:
            return []
        return list(wait(self._asked, _WAIT if self.tools.busy else None, FIRST_COMPLETED).done)

    def _answer(self, conversation: _Open, temperature: float) -> Any:
        """The server's answer; None if the context has no room for one."""
        import openai

        request: dict[str, Any] = {"tools": conversation.tools} if conversation.tools else {}
        try:
            return self.client.chat.completions.create(
                model=self.model, messages=conversation.messages, temperature=temperature,
                max_tokens=self.limits.turn_tokens, **request,
            )  # fmt: skip
        except openai.BadRequestError as problem:
            if problem.code == "context_length_exceeded":
                return None
            raise ValueError(f"{self.client.base_url}: {problem.message}") from None
        except openai.OpenAIError as problem:
            raise ValueError(f"{self.client.base_url}: {' '.join(str(problem).split())}") from None

    def _on_answer(self, number: int, conversation: _Open, answer: Any) -> None:
        """Record a turn, and run its first call."""
        if answer is None or not answer.choices:
            return self._end(conversation, "tokens")
        choice, offered = answer.choices[0], conversation.episode.start.offered
        named = choice.message.tool_calls or []
        content = choice.message.content or ""
        written = read_calls(content, offered)
        conversation.tokens += answer.usage.completion_tokens if answer.usage else 0
        conversation.text = "\n".join([content, *map(_as_text, named)]).strip()
        conversation.calls = [read_call(call.function.name, call.function.arguments, offered) for call in named]
        conversation.ids = [call.id for call in named] + [""] * len(written)
        conversation.calls, conversation.results = conversation.calls + written, []
        conversation.messages.append(_message(choice.message))
        if choice.finish_reason == "length" or conversation.tokens >= self.limits.tokens:
            conversation.calls = []
            self._end(conversation, "tokens")
        elif not conversation.calls:
            self._end(conversation, "answer")
        elif len(conversation.episode.turns) + 1 >= self.limits.turns:
            self._end(conversation, "turns")
        else:
            self.tools.submit(number, conversation.calls[0], conversation.episode.state)

    def _on_result(self, number: int, conversation: _Open, result: ToolResult) -> bool:
        """Record a call's result, and run the turn's next call. Returns whether the model is to answer."""
        conversation.results.append(result)
        conversation.episode.tool_seconds += result.seconds
        if conversation.episode.tool_seconds > self.limits.tool_seconds:
            self._end(conversation, "tool time")
            return False
        if len(conversation.results) < len(conversation.calls):
            self.tools.submit(number, conversation.calls[len(conversation.results)], conversation.episode.state)
            return False
        for name, each in zip(conversation.ids, conversation.results, strict=True):
            role = {"role": "tool", "tool_call_id": name} if name else {"role": "user"}
            conversation.messages.append(role | {"content": each.text})
        self._close(conversation)
        return True

    def _end(self, conversation: _Open, reason: EndReason) -> None:
        conversation.episode.reason = reason
        self._close(conversation)

    def _close(self, conversation: _Open) -> None:
        """Add the finished turn to its episode."""
        turn = Turn(conversation.text, conversation.calls, conversation.results)
        conversation.episode.turns.append(turn)


def _opened(start: Start, prompt: Sequence[Mapping[str, Any]]) -> _Open:
    """A conversation at its start: the tools of the system message in OpenAI's form, the other messages as they are."""
    messages, tools = [], []
    for message in parse_messages(prompt):
        for tool in message.pop("tools", None) or []:
            tools.append(tool if "function" in tool else {"type": "function", "function": tool})
        if message["role"] != "system" or message.get("content"):
            messages.append(message)
    return _Open(Episode(start, 0, state=copy.deepcopy(dict(start.state))), messages, tools)


def _message(message: Any) -> dict[str, Any]:
    """An answer as a message of the next request."""
    found: dict[str, Any] = {"role": "assistant", "content": message.content or ""}
    if reasoning := getattr(message, "reasoning_content", None):
        found["reasoning_content"] = reasoning
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": call.id,
                "type": "function",
                "function": {"name": call.function.name, "arguments": _json(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return found


def _json(arguments: str) -> str:
    """The arguments, or an empty object for those that are not JSON, which servers refuse."""
    try:
        parse_json(arguments)
    except ValueError:
        return "{}"
    return arguments


def _as_text(call: Any) -> str:
    name = json.dumps(call.function.name, ensure_ascii=False)
    return f'{OPEN}\n{{"name": {name}, "arguments": {call.function.arguments}}}\n{CLOSE}'
