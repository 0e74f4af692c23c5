"""Render conversations with the Jinja2 template of a tokenizer folder, as transformers does.

A template may be untrusted, so it runs in Jinja2's sandbox, where it can neither reach Python's internals nor change
its arguments.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

Message = Mapping[str, Any]
MARKS = ("\ufdee", "\ufdef")  # noncharacters: no text should hold them


def render_chat(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Any] | str | None = None,
    add_generation_prompt: bool = False,
    mark_generation: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation.

    messages: mappings with "role" and "content" and possibly "reasoning_content", "tool_calls" and (in a system
    message) "tools". Tools and tool calls may also be JSON strings, as in upstream's data.
    tools: available functions, as JSON schemas; None takes those of a leading system message.
    add_generation_prompt: end with the header of the assistant's next turn.
    mark_generation: put MARKS around the text between {% generation %} and {% endgeneration %}.
    variables: further variables of the template, such as bos_token or enable_thinking.
    Raises ValueError if a message is malformed or the template fails or refuses the conversation.
    """
    parsed = parse_messages(messages)
    parsed_tools = parse_list(tools, "tools")
    if parsed_tools is None and parsed and parsed[0]["role"] == "system":
        parsed_tools = parsed[0].get("tools")
    try:
        return _compiled(template, mark_generation).render(
            messages=parsed, tools=parsed_tools or None, add_generation_prompt=add_generation_prompt, **variables
        )
    except Exception as error:  # a template is foreign code: it may fail in any way
        raise ValueError(f"chat template: {error}") from None


def parse_messages(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """The messages, with tools and tool calls as lists. Raises ValueError for a malformed message."""
    return [_parsed_message(index, message) for index, message in enumerate(messages)]


def marks_generation(template: str) -> bool:
    """Whether the template marks the assistant's words with {% generation %}."""
    try:
        tree = _environment(True).parse(template)
    except Exception as error:
        raise ValueError(f"chat template: {error}") from None
    return any(data.data == MARKS[0] for data in tree.find_all(nodes.TemplateData))


def _parsed_message(index: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f'message {index} of the conversation is not an object with a "role"')
    parsed = dict(message)
    for name in ("tools", "tool_calls"):
        if name in parsed:
            parsed[name] = parse_list(parsed[name], f"message {index}: {name}")
    return parsed


def parse_list(value: Any, name: str) -> list[Any] | None:
    """Tools or tool calls as a list; `value` may also be a JSON string or one object. Raises ValueError naming
    `name`."""
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            raise ValueError(f"{name} is a string but not JSON ({reason})") from None
    if value is None:
        return None
    if isinstance(value, Mapping):
        return [value]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name} is neither a list nor an object, but {json.dumps(value)[:40]}")
    return list(value)


@lru_cache(maxsize=16)
def _compiled(template: str, mark_generation: bool) -> Any:
    return _environment(mark_generation).from_string(template)


@lru_cache(maxsize=2)
def _environment(mark_generation: bool) -> Environment:
    generation = _MarkedGeneration if mark_generation else _Generation
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, generation]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """Plain JSON: Jinja2's own filter escapes HTML and sorts keys."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Generation(Extension):
    """Ignores `{% generation %}`, which marks the assistant's words for transformers' masks."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _MarkedGeneration(_Generation):
    """Puts MARKS around the body of `{% generation %}`."""

    def parse(self, parser: Parser) -> list[nodes.Node]:
        opening, closing = (nodes.Output([nodes.TemplateData(mark)]) for mark in MARKS)
        return [opening, *super().parse(parser), closing]
