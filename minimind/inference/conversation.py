"""A conversation with a model: history, chat template, one streamed answer at a time. Knows no terminal."""

from __future__ import annotations

import time
from collections.abc import Generator
from dataclasses import dataclass, field
from typing import Any

from minimind.inference.engine import Engine
from minimind.inference.requests import Request, RequestOutput, SamplingParams
from minimind.tokenization import Tokenizer

THINK, END_THINK = "<think>", "</think>"


@dataclass
class ChatSession:
    """engine and tokenizer of one model; context: positions for prompt and answer together.

    system: None for no system message. thinking: the template's enable_thinking; None leaves it out. rounds: of
    question and answer that are kept, None for as many as fit. raw: no template and no history: the text is continued.
    After an answer, `last` is its output (None if it was closed early), `first_after` the seconds from the question to
    the first token, and `dropped` how many of the oldest rounds had to go to make room for it.
    """

    engine: Engine
    tokenizer: Tokenizer
    params: SamplingParams
    context: int
    system: str | None = None
    thinking: bool | None = None
    rounds: int | None = None
    raw: bool = False
    messages: list[dict[str, Any]] = field(default_factory=list)
    last: RequestOutput | None = None
    first_after: float = 0.0
    dropped: int = 0

    def reset(self) -> None:
        self.messages.clear()

    def answer(self, text: str) -> Generator[str]:
        """Pieces of the answer as they come, reasoning included (it ends with </think>). Closed early, what came so far
        is the answer. Raises ValueError when the question is too long or the engine refuses it."""
        self.last, self.dropped, self.first_after = None, 0, 0.0
        start = time.perf_counter()
        prompt = self._prompt(text)
        parts: list[str] = []
        deltas = self.engine.stream([Request(prompt, self.params)])
        try:
            if self._opens_reasoning:
                parts.append(f"{THINK}\n")  # stands at the end of the prompt
                yield parts[0]
            for delta in deltas:
                self.last = delta.output or self.last
                self.first_after = self.first_after or time.perf_counter() - start
                if delta.finish_reason == "error":
                    parts.clear()
                    raise ValueError(self.last.error if self.last else "the engine refused the request")
                if delta.text:
                    parts.append(delta.text)
                    yield delta.text
        finally:
            deltas.close()  # type: ignore[attr-defined]
            if parts and not self.raw:
                self._remember(text, "".join(parts))

    @property
    def _opens_reasoning(self) -> bool:
        return self.thinking is True and not self.raw

    def _remember(self, question: str, answer: str) -> None:
        reply: dict[str, Any] = {"role": "assistant", "content": answer}
        if answer.startswith(THINK):
            reasoning, _, content = answer.removeprefix(THINK).partition(END_THINK)
            reply = {"role": "assistant", "content": content.lstrip("\n"), "reasoning_content": reasoning.strip("\n")}
        self.messages += [{"role": "user", "content": question}, reply]

    def _prompt(self, text: str) -> list[int]:
        """Token ids; the oldest rounds are left out where the context has no room for them and an answer."""
        if self.raw:
            return self._fitting([self.tokenizer.bos_token_id, *self.tokenizer.encode(text, allow_special=False)])
        if self.rounds is not None:
            del self.messages[: max(0, len(self.messages) - 2 * self.rounds)]
        wanted = self.context - (self.params.max_new_tokens or 1)
        ids = self._render(text)
        while len(ids) > wanted and self.messages:
            del self.messages[:2]
            self.dropped += 1
            ids = self._render(text)
        return self._fitting(ids)

    def _render(self, text: str) -> list[int]:
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        messages = [*system, *self.messages, {"role": "user", "content": text}]
        variables: dict[str, Any] = {} if self.thinking is None else {"enable_thinking": self.thinking}
        rendered = self.tokenizer.apply_chat_template(messages, add_generation_prompt=True, **variables)
        return self.tokenizer.encode(rendered)

    def _fitting(self, ids: list[int]) -> list[int]:
        if len(ids) >= self.context:
            raise ValueError(
                f"the text is {len(ids):,} tokens, the context has {self.context:,}; shorten it or stretch with --yarn"
            )
        return ids
