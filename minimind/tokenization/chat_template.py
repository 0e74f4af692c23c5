"""Render conversations with the Jinja2 template of a tokenizer folder, as transformers does.

A template comes from whoever made the folder, so it runs in Jinja2's sandbox: it can neither reach Python's
internals nor change its arguments.
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


def render_chat(
    template: str,
    messages: Sequence[Message],
    tools: Sequence[Any] | str | None = None,
    add_generation_prompt: bool = False,
    **variables: Any,
) -> str:
    """The text of a conversation.

    messages: mappings with "role" and "content" and, where they apply, "reasoning_content", "tool_calls" and
        (in a system message) "tools". Tools and tool calls may also be JSON strings, as in upstream's data.
    tools: functions on offer, as JSON schemas; None takes those that a leading system message carries.
    add_generation_prompt: end with the header of the assistant's next turn.
    variables: whatever else the template knows, such as bos_token or enable_thinking.
    Raises ValueError if a message is malformed or the template fails or refuses the conversation.
    """
    parsed = [_parsed_message(index, message) for index, message in enumerate(messages)]
    offered = _parsed_list(tools, "tools")
    if offered is None and parsed and parsed[0]["role"] == "system":
        offered = parsed[0].get("tools")
    try:
        return _compiled(template).render(
            messages=parsed, tools=offered or None, add_generation_prompt=add_generation_prompt, **variables
        )
    except Exception as error:  # a template is foreign code: it may fail in any way
        raise ValueError(f"chat template: {error}") from None


def _parsed_message(index: int, message: Message) -> dict[str, Any]:
    if not isinstance(message, Mapping) or not isinstance(message.get("role"), str):
        raise ValueError(f'message {index} of the conversation is not an object with a "role"')
    parsed = dict(message)
    for name in ("tools", "tool_calls"):
        if name in parsed:
            parsed[name] = _parsed_list(parsed[name], f"message {index}: {name}")
    return parsed


def _parsed_list(value: Any, name: str) -> list[Any] | None:
    if isinstance(value, str):
        try:
            value = json.loads(value) if value.strip() else None
        except json.JSONDecodeError as error:
            reason = f"{error.msg} at column {error.colno}"
            raise ValueError(f"{name} is a string but not JSON ({reason})") from None
    if value is None:
        return None
    return [value] if isinstance(value, Mapping) else list(value)


@lru_cache(maxsize=16)
def _compiled(template: str) -> Any:
    return _environment().from_string(template)


@lru_cache(maxsize=1)
def _environment() -> Environment:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols, _Generation]
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
    """Jinja2's own filter escapes HTML and sorts keys; chat models see plain JSON."""
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


def _raise_exception(message: str) -> None:
    raise TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for transformers' masks; here the body passes as is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> list[nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)
