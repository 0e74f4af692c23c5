"""Turn a typed Python function into a tool that a model can call.

    def weather(city: str, days: int = 1) -> str:
        \"\"\"Weather in a city.

        city: its English name
        \"\"\"

The JSON schema comes from the signature, the description from the docstring's first paragraph, a parameter's
description from a later line "name: text". Annotations are str, int, float, bool, list, list[...], dict, Literal[...],
and any of these or None. The model sees the returned value, a str as it is and anything else as JSON, or an exception
as "error: ...".

The model does not see a parameter `state` of type dict: it is the conversation's memory, JSON values by name, which the
function may read and change.
"""

from __future__ import annotations

import inspect
import json
import re
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from minimind.utils.startup import named_object

STATE = "state"
_KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


class ToolTimeoutError(Exception):
    """A tool ended itself because its time was over."""


@dataclass(frozen=True)
class ToolFunction:
    """parameters: a JSON schema of type object. stateful: whether the function takes `state`. path: the "module:name"
    that a user's tool was loaded from, None for a built-in tool."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]
    stateful: bool = False
    path: str | None = None

    @property
    def schema(self) -> dict[str, Any]:
        """The tool as the prompt lists it."""
        return {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}

    def __call__(self, arguments: Mapping[str, Any], state: dict[str, Any]) -> str:
        """Run the function in this process. Raises what the function raises."""
        keywords = dict(arguments, **({STATE: state} if self.stateful else {}))
        return as_text(self.function(**keywords))


def tool_of(function: Callable[..., Any], path: str | None = None) -> ToolFunction:
    """Make a tool of `function`. Raises ValueError, in one line, if its name, docstring or types do not allow it."""
    name = getattr(function, "__name__", "")
    if not _NAME.fullmatch(name):
        raise ValueError(f"tool {function!r}: it has no plain name; give a function made with def")
    try:
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(f"tool {name}: its signature cannot be read ({error})") from None
    description, notes = _documented(function)
    if not description:
        raise ValueError(f"tool {name}: it has no docstring; add one that tells the model what the tool does")
    properties, required = {}, []
    for parameter in parameters.values():
        if parameter.name == STATE and hints.get(STATE) is dict:
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"tool {name}: {parameter} cannot be named in a call; use plain parameters")
        if parameter.name not in hints:
            raise ValueError(f"tool {name}: parameter {parameter.name} has no type; annotate it, as in x: str")
        schema = _schema(hints[parameter.name], f"tool {name}: parameter {parameter.name}")
        if parameter.name in notes:
            schema["description"] = notes[parameter.name]
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    arguments = {"type": "object", "properties": properties, "required": required}
    return ToolFunction(name, description, arguments, function, hints.get(STATE) is dict and STATE in parameters, path)


def user_tools(path: str) -> list[ToolFunction]:
    """Load the tools at "package.module:name": a function, or a list or tuple of functions. Raises ValueError, in one
    line, for anything else."""
    loaded = named_object(path, "tool")
    functions = list(loaded) if isinstance(loaded, (list, tuple)) else [loaded]
    if not functions or not all(callable(function) for function in functions):
        raise ValueError(f"{path}: neither a function nor a list of functions")
    try:
        return [tool_of(function, path) for function in functions]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def by_name(tools: Sequence[ToolFunction]) -> dict[str, ToolFunction]:
    """The tools by name. Raises ValueError if two have the same name."""
    named: dict[str, ToolFunction] = {}
    for tool in tools:
        if tool.name in named:
            raise ValueError(f"two tools are called {tool.name}; rename one")
        named[tool.name] = tool
    return named


def as_text(value: Any) -> str:
    """A returned value as the model sees it."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _documented(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """(the docstring's first paragraph, the parameter descriptions in its lines "name: text")."""
    first, _, rest = (inspect.getdoc(function) or "").partition("\n\n")
    notes = {}
    for line in rest.splitlines():
        name, colon, text = line.partition(":")
        if colon and name.strip().isidentifier():
            notes[name.strip()] = text.strip()
    return " ".join(first.split()), notes


def _schema(annotation: Any, where: str) -> dict[str, Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation in _KINDS:
        return {"type": _KINDS[annotation]}
    if origin is typing.Literal:
        kinds = sorted({_KINDS[type(value)] for value in arguments if type(value) in _KINDS})
        return {"type": kinds[0] if len(kinds) == 1 else kinds, "enum": list(arguments)}
    if origin is list:
        return {"type": "array", "items": _schema(arguments[0], where)}
    if origin is dict:
        return {"type": "object"}
    if origin in (typing.Union, types.UnionType):
        parts = [_schema(each, where) for each in arguments if each is not type(None)]
        if len(parts) == 1:
            kind = parts[0]["type"]
            return parts[0] | {"type": [*([kind] if isinstance(kind, str) else kind), "null"]}
    raise ValueError(f"{where} has the type {annotation}; use str, int, float, bool, list, dict or Literal[...]")
