"""What a model wrote, taken apart while it comes: reasoning, content, tool calls.

    <think> reasoning </think> content <tool_call> {"name": ..., "arguments": {...}} </tool_call>

Pieces of text go in, Parts come out. Joined by kind, these do not depend on where the text was cut, so that a streamed
answer and one that was waited for are the same.
"""

from __future__ import annotations

import json
import re
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

from minimind.inference.detokenize import overlap

THINK, END_THINK = "<think>", "</think>"
CALL, END_CALL = "<tool_call>", "</tool_call>"
ANSWER, END_ANSWER = "<answer>", "</answer>"  # around the answer behind reasoning, in upstream's data
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')

Kind = Literal["reasoning", "content", "call", "arguments"]


class ReplyPart(NamedTuple):
    """text: more reasoning or content; the name of the function that is called; more of its arguments, JSON text.
    call: number of the call, for the last two."""

    kind: Kind
    text: str
    call: int = 0


@dataclass
class Reply:
    """All parts. content: None where the model only reasoned or called. calls: [name, arguments] each."""

    reasoning: str = ""
    content: str | None = None
    calls: list[list[str]] = field(default_factory=list)

    def add(self, part: ReplyPart) -> None:
        if part.kind == "reasoning":
            self.reasoning += part.text
        elif part.kind == "content":
            self.content = (self.content or "") + part.text
        elif part.kind == "call":
            self.calls.append([part.text, ""])
        else:
            self.calls[part.call][1] += part.text


class ReplyParser:
    """reasoning: the prompt has already opened it. tools: <tool_call> is markup, not text.

    A call whose text is not JSON with a name and arguments is passed on as content, as the model wrote it; one that is
    cut short, or whose arguments break off, comes as far as it goes. Newlines next to the markers belong to them.
    """

    def __init__(self, *, reasoning: bool = False, tools: bool = False) -> None:
        self._tools, self._reasoned = tools, reasoning
        self._state = self._reasoning if reasoning else self._start
        self._held = ""
        self._fresh = True  # nothing of the present section came yet: newlines there are the marker's
        self._calls = 0
        self._scan = _JsonScan()
        self._parts: list[ReplyPart] = []

    def push(self, text: str) -> list[ReplyPart]:
        return self._run(text, last=False)

    def finish(self) -> list[ReplyPart]:
        """What was held back, at the end of the text."""
        return self._run("", last=True)

    def _run(self, text: str, last: bool) -> list[ReplyPart]:
        self._held += text
        self._parts = []
        while self._state(last):
            pass
        return self._parts

    # Each state consumes what it can of the held text; True: another one has taken over.

    def _start(self, last: bool) -> bool:
        text = self._held.lstrip()
        if text.startswith(THINK):
            self._held, self._reasoned = text[len(THINK) :], True
            return self._enter(self._reasoning)
        if text.startswith(END_THINK):  # the end of reasoning that never began
            self._held, self._reasoned = text[len(END_THINK) :], True
            return self._enter(self._content)
        if not last and (THINK.startswith(text) or END_THINK.startswith(text)):
            return False
        self._fresh = False  # where nothing was thought, the text begins as the model began it
        self._state = self._content
        return True

    def _reasoning(self, last: bool) -> bool:
        before, tag, after = self._until((END_THINK,), last)
        self._emit("reasoning", before, trim=bool(tag) or last, hold=not tag and not last)
        if tag:
            self._held = after
            return self._enter(self._content)
        return False

    def _content(self, last: bool) -> bool:
        tags = ((CALL,) if self._tools else ()) + ((ANSWER, END_ANSWER) if self._reasoned else ())
        before, tag, after = self._until(tags, last)
        self._emit("content", before, trim=bool(tag), hold=bool(tags) and not tag and not last)
        if tag:
            self._held = after
            return self._enter(self._call_head if tag == CALL else self._content)
        return False

    def _call_head(self, last: bool) -> bool:
        """A call of the usual form is passed on while it is written, another when it is complete."""
        end = self._held.find(END_CALL)
        body = self._held if end < 0 else self._held[:end]
        head = _HEAD.match(body)
        name = _parsed(head[1]) if head else None
        if head and isinstance(name, str):
            self._begin_call(name)
            self._held, self._scan = self._held[head.end() :], _JsonScan()
            self._state = self._arguments
            return True
        if end < 0 and not last:
            return False
        self._whole_call(body, closed=end >= 0)
        self._held = self._held[end + len(END_CALL) :] if end >= 0 else ""
        return self._enter(self._content)

    def _arguments(self, last: bool) -> bool:
        before, tag, after = self._until((END_CALL,), last)
        if text := self._scan.take(before):
            self._parts.append(ReplyPart("arguments", text, self._calls - 1))
        if tag:
            self._held = after
            return self._enter(self._content)
        return False

    def _whole_call(self, body: str, closed: bool) -> None:
        call = _parsed(body)
        if isinstance(call, dict) and isinstance(call.get("name"), str):
            arguments = call.get("arguments", {})
            self._begin_call(call["name"])
            text = arguments if isinstance(arguments, str) else json.dumps(arguments, ensure_ascii=False)
            self._parts.append(ReplyPart("arguments", text, self._calls - 1))
        else:
            self._parts.append(ReplyPart("content", CALL + body + END_CALL * closed))

    def _begin_call(self, name: str) -> None:
        self._parts.append(ReplyPart("call", name, self._calls))
        self._calls += 1

    def _enter(self, state: object) -> bool:
        self._state, self._fresh = state, True  # type: ignore[assignment]
        return True

    def _until(self, tags: tuple[str, ...], last: bool) -> tuple[str, str, str]:
        """(text before the first tag, tag, text behind it); without one, what may become one is held back."""
        found = [(at, tag) for tag in tags if (at := self._held.find(tag)) >= 0]
        if found:
            at, tag = min(found)
            return self._held[:at], tag, self._held[at + len(tag) :]
        keep = overlap(self._held, tags) if tags and not last else 0
        cut = len(self._held) - keep
        before, self._held = self._held[:cut], self._held[cut:]
        return before, "", ""

    def _emit(self, kind: Kind, text: str, *, trim: bool, hold: bool) -> None:
        """trim: the marker that follows takes the newlines before it. hold: whether one follows is not known yet."""
        if self._fresh:
            text = text.lstrip("\n")
        kept = text.rstrip("\n") if trim or hold else text
        if hold:
            self._held = text[len(kept) :] + self._held
        if kept:
            self._parts.append(ReplyPart(kind, kept))
            self._fresh = False


class _JsonScan:
    """Finds where a JSON object ends."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False
        self._begun = False

    def take(self, text: str) -> str:
        """As much of `text` as belongs to the object."""
        if self._begun and not self._depth:
            return ""
        for place, character in enumerate(text):
            if self._in_string:
                closes = character == '"' and not self._escaped
                self._in_string = not closes
                self._escaped = character == "\\" and not self._escaped
            elif character == '"':
                self._in_string = True
            elif character in "{[":
                self._depth, self._begun = self._depth + 1, True
            elif character in "}]":
                self._depth -= 1
                if self._depth <= 0:
                    self._depth = 0
                    return text[: place + 1]
        return text


def _parsed(text: str) -> object:
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return None
