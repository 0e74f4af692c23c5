"""The calls in a reply, as the chat template writes them: <tool_call>{"name": ..., "arguments": {...}}</tool_call>."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from minimind.rewards.rules import misfit, parse_json

Problem = Literal["malformed", "unknown", "arguments", "raised", "timeout", "died"]
OPEN, CLOSE = "<tool_call>", "</tool_call>"
_CALL = re.compile(f"{OPEN}(.*?){CLOSE}", re.DOTALL)
_LONGEST = 60  # characters of what the model wrote that an error repeats


@dataclass(frozen=True)
class ParsedCall:
    """problem: why it cannot be run, and `error` that in words; None where it can."""

    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    problem: Problem | None = None
    error: str = ""


def read_calls(text: str, offered: Mapping[str, Mapping[str, Any]]) -> list[ParsedCall]:
    """The calls behind a reply's reasoning, in their order. offered: the JSON schema of each tool's arguments by its
    name. A mark that has no partner is a malformed call."""
    said = text.rpartition("</think>")[2]
    calls = [_read(found, offered) for found in _CALL.findall(said)]
    rest = _CALL.sub("", said)
    if OPEN in rest or CLOSE in rest:
        calls.append(_wrong("malformed", "a call that is not closed, or not opened"))
    return calls


def without_calls(text: str) -> str:
    """What a reply says beside its calls."""
    return _CALL.sub("", text).strip()


def _read(text: str, offered: Mapping[str, Mapping[str, Any]]) -> ParsedCall:
    try:
        value = parse_json(text)
    except ValueError:
        return _wrong("malformed", f"the call is not JSON: {_shown(text)}")
    if not isinstance(value, dict) or not isinstance(value.get("name"), str) or set(value) - {"name", "arguments"}:
        return _wrong("malformed", 'a call is {"name": ..., "arguments": {...}}')
    name, arguments = value["name"], value.get("arguments", {})
    if name not in offered:
        return _wrong("unknown", f"there is no tool {_shown(name)}; choose from {', '.join(offered) or 'none'}", name)
    wrong = misfit(arguments, {"type": "object"} | dict(offered[name]), "arguments")
    if wrong is not None:
        return _wrong("arguments", wrong, name)
    return ParsedCall(name, arguments)


def _wrong(problem: Problem, error: str, name: str = "") -> ParsedCall:
    return ParsedCall(name, {}, problem, f"error: {error}")


def _shown(text: str) -> str:
    plain = " ".join(text.split())
    return plain if len(plain) <= _LONGEST else f"{plain[:_LONGEST]}..."
