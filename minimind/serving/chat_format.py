"""The chat format in both directions: messages become a prompt, and the model's text becomes a reply.

    <think> reasoning </think> content <tool_call> {"name": ..., "arguments": {...}} </tool_call>

ReplyParser takes pieces of text and returns ReplyParts. Joined by kind, the parts do not depend on where the text was
cut, so a streamed answer and a whole one are the same.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from minimind.inference.request_state import overlap
from minimind.serving.protocol import (
    ApiError,
    AssistantContent,
    AssistantMessage,
    ChatRequest,
    Content,
    Message,
    NamedTool,
    TemplateOptions,
    Tool,
    ToolMessage,
    limit_depth,
)
from minimind.tokenization import ChatEncoder, Tokenizer
from minimind.tokenization.chat_encoder import ANSWER, END_ANSWER, END_THINK, THINK
from minimind.tokenization.reasoning import prompt_endings


class ChatPrompts:
    """Renders requests with the tokenizer's chat template. Names of control tokens in messages are ordinary text.

    check_length: called with the number of characters of a text before it is encoded; raises if there are too many.
    """

    def __init__(self, tokenizer: Tokenizer, check_length: Callable[[int], None] = lambda characters: None) -> None:
        self._tokenizer, self._check_length = tokenizer, check_length
        self._encoders: dict[bool | None, ChatEncoder] = {}

    def prompt(self, request: ChatRequest) -> tuple[list[int], bool]:
        """The prompt's token ids, and whether it ends within reasoning. ApiError 400 if the template refuses it."""
        try:
            encoder = self._encoder(thinking_switch(request))
            pieces = encoder.prompt_pieces(
                [template_message(m) for m in request.messages], selected_tools(request) or None
            )
        except ValueError as problem:
            raise ApiError(400, str(problem), param="messages") from None
        self._check_length(sum(len(piece.text) for piece in pieces))
        ids = encoder.encode([pieces])[0].ids.tolist()
        return ids, self._tokenizer.decode(ids[-8:]).rstrip().endswith(THINK)

    def _encoder(self, thinking: bool | None) -> ChatEncoder:
        if thinking not in self._encoders:
            if thinking is not None and ("on" if thinking else "off") not in prompt_endings(self._tokenizer):
                raise ValueError("this model's chat template does not support enable_thinking; leave it out")
            variables = {} if thinking is None else {"enable_thinking": thinking}
            self._encoders[thinking] = ChatEncoder(self._tokenizer, **variables)
        return self._encoders[thinking]


def thinking_switch(request: ChatRequest) -> bool | None:
    """Whether to reason before answering; None if the request does not say. ApiError 400 if its fields disagree."""
    options = request.chat_template_kwargs or TemplateOptions()
    values = {request.open_thinking, options.enable_thinking, options.open_thinking} - {None}
    if len(values) > 1:
        raise ApiError(400, "enable_thinking and open_thinking are the same switch and contradict each other")
    return values.pop() if values else None


def selected_tools(request: ChatRequest) -> list[dict[str, Any]]:
    """The tools to show the model, in OpenAI's form: none for tool_choice none, one if tool_choice names it."""
    tools, choice = request.tools or [], request.tool_choice
    names = [tool.function.name for tool in tools]
    if len(set(names)) < len(names):
        raise ApiError(400, "tools: two functions have the same name", param="tools")
    if choice == "required" and not tools:
        raise ApiError(400, "tool_choice required: there are no tools", param="tool_choice")
    if isinstance(choice, NamedTool):
        tools = [tool for tool in tools if tool.function.name == choice.function.name]
        if not tools:
            message = f"tool_choice: there is no tool {choice.function.name[:100]!r}"
            raise ApiError(400, message, param="tool_choice")
    return [] if choice == "none" else [_schema(tool) for tool in tools]


def _schema(tool: Tool) -> dict[str, Any]:
    function = tool.function.model_dump(exclude_none=True, exclude={"strict"})
    return {"type": "function", "function": function}


def template_message(message: Message) -> dict[str, Any]:
    """A message in the form that chat templates take."""
    if isinstance(message, ToolMessage):
        return {"role": "tool", "content": content_text(message.content), "tool_call_id": message.tool_call_id}
    if not isinstance(message, AssistantMessage):
        role = "system" if message.role == "developer" else message.role
        return {"role": role, "content": content_text(message.content)}
    out: dict[str, Any] = {"role": "assistant", "content": content_text(message.content)}
    if message.reasoning_content:
        out["reasoning_content"] = message.reasoning_content
    if message.tool_calls:
        out["tool_calls"] = [
            {
                "type": "function",
                "function": {"name": call.function.name, "arguments": _arguments(call.function.arguments)},
            }
            for call in message.tool_calls
        ]
    return out


def _arguments(text: str | dict[str, Any]) -> Any:
    """Arguments as an object, which every template can render. Text that is not a JSON object stays text: an answer
    that was cut inside its arguments may still be part of a conversation."""
    if isinstance(text, dict):
        return text
    try:
        value = json.loads(text or "{}")
        return limit_depth(value) if isinstance(value, dict) else text
    except (ValueError, RecursionError):
        return text


def content_text(content: Content | AssistantContent | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)


CALL, END_CALL = "<tool_call>", "</tool_call>"
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*("(?:[^"\\]|\\.)*")\s*,\s*"arguments"\s*:\s*(?=\{)')

Kind = Literal["reasoning", "content", "call", "arguments"]


class ReplyPart(NamedTuple):
    """text: a piece of the reasoning or the content, the name of the called function, or a piece of its arguments (JSON
    text). call: the call's number, for kinds "call" and "arguments"."""

    kind: Kind
    text: str
    call: int = 0


@dataclass
class Reply:
    """All parts, joined. content: None if the model only reasoned or called tools. calls: [name, arguments] each."""

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
    """Splits the model's text into reasoning, content and tool calls while it is generated.

    reasoning: the prompt has already opened the reasoning. tools: <tool_call> is markup, not text. enforced: a grammar
    made the answer either JSON or calls, so markers inside JSON are text.

    A call that is not JSON with a name and arguments is passed on unchanged as content. A call that is cut short is
    passed on as far as it goes. Newlines next to a marker belong to the marker.
    """

    def __init__(self, *, reasoning: bool = False, tools: bool = False, enforced: bool = False) -> None:
        self._tools, self._reasoned, self._enforced = tools, reasoning, enforced
        self._state = self._reasoning if reasoning else self._start
        self._held = ""
        self._fresh = True  # the current section is still empty, so newlines belong to its marker
        self._calls = 0
        self._scan = _JsonScan()
        self._parts: list[ReplyPart] = []

    def push(self, text: str) -> list[ReplyPart]:
        return self._run(text, last=False)

    def finish(self) -> list[ReplyPart]:
        """The parts that were held back; call this at the end of the text."""
        return self._run("", last=True)

    def _run(self, text: str, last: bool) -> list[ReplyPart]:
        self._held += text
        self._parts = []
        while self._state(last):
            pass
        return self._parts

    # Each state consumes what it can of the held text and returns True if another state has taken over.

    def _start(self, last: bool) -> bool:
        text = self._held.lstrip()
        if text.startswith(THINK):
            self._held, self._reasoned = text[len(THINK) :], True
            return self._enter(self._reasoning)
        if text.startswith(END_THINK):  # reasoning that ends without having begun
            self._held, self._reasoned = text[len(END_THINK) :], True
            return self._enter(self._content)
        if not last and (THINK.startswith(text) or END_THINK.startswith(text)):
            return False
        self._fresh = False  # without reasoning, leading newlines are part of the text
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
        if self._enforced:
            text = self._held.lstrip()
            if not last and CALL.startswith(text):
                return False
            if not (self._tools and text.startswith(CALL)):
                self._state = self._json
                return True
        tags = ((CALL,) if self._tools else ()) + ((ANSWER, END_ANSWER) if self._reasoned else ())
        before, tag, after = self._until(tags, last)
        self._emit("content", before, trim=bool(tag), hold=bool(tags) and not tag and not last)
        if tag:
            self._held = after
            return self._enter(self._call_head if tag == CALL else self._content)
        return False

    def _json(self, last: bool) -> bool:
        self._emit("content", self._until((), last)[0], trim=False, hold=False)
        return False

    def _call_head(self, last: bool) -> bool:
        """A call in the usual form is passed on while it is generated, any other once it is complete."""
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
        if self._enforced and not self._scan.complete:
            self._held = self._held[self._pass_arguments(self._held) :]
            if not self._scan.complete:
                return False
        before, tag, after = self._until((END_CALL,), last)
        self._pass_arguments(before)
        if tag:
            self._held = after
            return self._enter(self._content)
        return False

    def _pass_arguments(self, text: str) -> int:
        """Pass on the beginning of `text` that belongs to the arguments; returns its number of characters."""
        if text := self._scan.take(text):
            self._parts.append(ReplyPart("arguments", text, self._calls - 1))
        return len(text)

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
        """(text before the first tag, tag, text after it). Without a tag, the beginning of one is held back."""
        matches = [(at, tag) for tag in tags if (at := self._held.find(tag)) >= 0]
        if matches:
            at, tag = min(matches)
            return self._held[:at], tag, self._held[at + len(tag) :]
        keep = overlap(self._held, tags) if tags and not last else 0
        cut = len(self._held) - keep
        before, self._held = self._held[:cut], self._held[cut:]
        return before, "", ""

    def _emit(self, kind: Kind, text: str, *, trim: bool, hold: bool) -> None:
        """trim: a marker follows and takes the newlines before it. hold: it is not known yet whether one follows."""
        if self._fresh:
            text = text.lstrip("\n")
        kept = text.rstrip("\n") if trim or hold else text
        if hold:
            self._held = text[len(kept) :] + self._held
        if kept:
            self._parts.append(ReplyPart(kind, kept))
            self._fresh = False


class _JsonScan:
    """Finds the end of a JSON object in text that arrives in pieces."""

    def __init__(self) -> None:
        self._depth, self._in_string, self._escaped = 0, False, False
        self._begun = False

    @property
    def complete(self) -> bool:
        return self._begun and not self._depth

    def take(self, text: str) -> str:
        """The beginning of `text` that belongs to the object."""
        if self.complete:
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
