"""Messages of a chat request to the token ids of a prompt."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from minimind.serving.errors import ApiError
from minimind.serving.protocol import (
    AssistantMessage,
    ChatRequest,
    Content,
    Message,
    NamedTool,
    Said,
    TemplateOptions,
    Tool,
    ToolMessage,
    shallow,
)
from minimind.serving.reply import THINK
from minimind.tokenization import ChatEncoder, Tokenizer
from minimind.tokenization.reasoning import prompt_endings


class ChatPrompts:
    """Renders with the tokenizer's chat template. Names of control tokens in what clients send are ordinary text.

    check_length: called with the characters of a text before it is encoded; raises where they are too many.
    """

    def __init__(self, tokenizer: Tokenizer, check_length: Callable[[int], None] = lambda characters: None) -> None:
        self._tokenizer, self._check_length = tokenizer, check_length
        self._encoders: dict[bool | None, ChatEncoder] = {}

    def prompt(self, asked: ChatRequest) -> tuple[list[int], bool]:
        """(token ids, whether they end within reasoning). ApiError 400 for what the template refuses."""
        try:
            encoder = self._encoder(thinking(asked))
            pieces = encoder.prompt_pieces([plain(m) for m in asked.messages], offered(asked) or None)
        except ValueError as problem:
            raise ApiError(400, str(problem), param="messages") from None
        self._check_length(sum(len(piece.text) for piece in pieces))
        ids = encoder.encode([pieces])[0].ids.tolist()
        return ids, self._tokenizer.decode(ids[-8:]).rstrip().endswith(THINK)

    def _encoder(self, thinking: bool | None) -> ChatEncoder:
        if thinking not in self._encoders:
            if thinking is not None and ("on" if thinking else "off") not in prompt_endings(self._tokenizer):
                raise ValueError("this model's chat template does not know enable_thinking; leave it out")
            variables = {} if thinking is None else {"enable_thinking": thinking}
            self._encoders[thinking] = ChatEncoder(self._tokenizer, **variables)
        return self._encoders[thinking]


def thinking(asked: ChatRequest) -> bool | None:
    """The switch, by whichever of its names; None leaves it to the model. ApiError 400 where they contradict."""
    options = asked.chat_template_kwargs or TemplateOptions()
    named = (asked.open_thinking, options.enable_thinking, options.open_thinking)
    said = {value for value in named if value is not None}
    if len(said) > 1:
        raise ApiError(400, "enable_thinking and open_thinking are one switch and contradict each other")
    return said.pop() if said else None


def offered(asked: ChatRequest) -> list[dict[str, Any]]:
    """The tools to tell the model about, in OpenAI's form: none with tool_choice none, one where it names one."""
    tools, choice = asked.tools or [], asked.tool_choice
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


def plain(message: Message) -> dict[str, Any]:
    """A message as chat templates know it."""
    if isinstance(message, ToolMessage):
        return {"role": "tool", "content": text(message.content), "tool_call_id": message.tool_call_id}
    if not isinstance(message, AssistantMessage):
        role = "system" if message.role == "developer" else message.role
        return {"role": role, "content": text(message.content)}
    out: dict[str, Any] = {"role": "assistant", "content": text(message.content)}
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
    """As an object, which every template can write. What is none stays as the model wrote it: an answer that was cut
    within its arguments is part of a conversation that may go on."""
    if isinstance(text, dict):
        return text
    try:
        value = json.loads(text or "{}")
        return shallow(value) if isinstance(value, dict) else text
    except (ValueError, RecursionError):
        return text


def text(content: Content | Said | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text for part in content)
