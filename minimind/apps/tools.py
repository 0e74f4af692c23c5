"""A chat in which the model's tool calls are run: `minimind chat --tools builtin`.

As in training (minimind/environments/episodes.py), tokens are only appended to the conversation, so that the model sees
exactly what it wrote, and a tool's output never turns into special tokens.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Generator
from dataclasses import dataclass, field, fields
from typing import Any, TextIO

from minimind.apps.chat import THINK, ChatSession, printable
from minimind.environments.running import ToolResult, ToolRunner
from minimind.environments.turns import ParsedCall, ToolTurns, read_calls
from minimind.inference.requests import Request

TURNS = 8  # most turns of the model for one question


@dataclass
class ToolSession(ChatSession):
    """A chat session with tools. runner: runs them; all are on offer. allow(call): whether the call may run."""

    runner: ToolRunner = field(kw_only=True)
    allow: Callable[[ParsedCall], bool] = field(kw_only=True)
    _rounds: list[list[int]] = field(default_factory=list)  # token ids of each question and all turns that followed
    _state: dict[str, Any] = field(default_factory=dict)

    def reset(self) -> None:
        super().reset()
        self._rounds.clear()
        self._state.clear()

    def answer(self, text: str) -> Generator[str]:
        """As ChatSession.answer, but over several turns; the pieces include calls and their results."""
        self.last, self.dropped, self.first_after = None, 0, 0.0
        start = time.perf_counter()
        turns = ToolTurns(self.tokenizer, self.thinking)
        here = turns.question(text)
        before = self._before(turns, len(here))
        ended = False
        try:
            for _ in range(TURNS):
                if self._opens_reasoning:
                    yield f"{THINK}\n"
                first, ended = len(here), False
                yield from self._turn([*before, *here], here, start)
                ended = self.last is not None and self.last.finish_reason == "stop"
                said = self.tokenizer.decode(here[first:], skip_special_tokens=True)
                calls = read_calls(said, self._offered) if ended else []
                if not calls:
                    break
                results = []
                for call in calls:
                    results.append(self._run(call))
                    yield f"\n[{results[-1].text}]\n"
                here += turns.ids([result.text for result in results])
                ended = False
        except ValueError:
            here.clear()
            raise
        finally:
            if here:
                self._rounds.append([*here, *turns.closing(ended)])

    @property
    def _offered(self) -> dict[str, Any]:
        return {name: tool.parameters for name, tool in self.runner.tools.items()}

    def _run(self, call: ParsedCall) -> ToolResult:
        if call.problem is None and not self.allow(call):
            return ToolResult("error: the user does not allow this call")
        return self.runner.run(call, self._state)

    def _turn(self, prompt: list[int], here: list[int], start: float) -> Generator[str]:
        """Yield the pieces of one turn, and append its tokens to `here`."""
        deltas = self.engine.stream([Request(self._check_fits(prompt), self.params)])
        try:
            for delta in deltas:
                self.last = delta.output or self.last
                self.first_after = self.first_after or time.perf_counter() - start
                if delta.finish_reason == "error":
                    raise ValueError(self.last.error if self.last else "the engine refused the request")
                here += delta.token_ids
                if delta.text:
                    yield delta.text
        finally:
            deltas.close()  # type: ignore[attr-defined]

    def _before(self, turns: ToolTurns, question: int) -> list[int]:
        """Token ids of the system message and of the newest rounds that leave room for a question of `question` tokens
        and an answer."""
        opening = turns.opening(self.system or "", [tool.schema for tool in self.runner.tools.values()])
        if self.rounds is not None:
            del self._rounds[: max(0, len(self._rounds) - self.rounds)]
        longest = self.context - (self.params.max_new_tokens or 1) - len(opening) - question
        while self._rounds and sum(map(len, self._rounds)) > longest:
            self._rounds.pop(0)
            self.dropped += 1
        return [*opening, *(token for each in self._rounds for token in each)]


def with_tools(session: ChatSession, runner: ToolRunner, allow: Callable[[ParsedCall], bool]) -> ToolSession:
    """A session like `session`, which must not have begun, with tools. Raises ValueError if the model only continues
    text."""
    if session.raw:
        raise ValueError("--tools: this model only continues text; name a model that was trained on conversations")
    given = {each.name: getattr(session, each.name) for each in fields(ChatSession)}
    return ToolSession(**given, runner=runner, allow=allow)


def asks(notices: TextIO) -> Callable[[ParsedCall], bool]:
    """A function that asks at the terminal whether a call may run. Without a terminal the answer is no."""

    def ask(call: ParsedCall) -> bool:
        print(f"\nrun {printable(shown(call))}? [y/N] ", end="", file=notices, flush=True)
        try:
            return input().strip().lower() in ("y", "yes")
        except EOFError:
            print("no terminal to ask at: not run; --yes runs all calls", file=notices, flush=True)
            return False

    return ask


def shown(call: ParsedCall) -> str:
    """A call in the form name(argument=value, ...)."""
    arguments = ", ".join(f"{k}={json.dumps(v, ensure_ascii=False)}" for k, v in call.arguments.items())
    return f"{call.name}({arguments})"
