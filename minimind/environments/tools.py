"""A tool: a typed Python function, and what a model is told of it.

    def weather(city: str, days: int = 1) -> str:
        \"\"\"Weather in a city.

        city: its English name
        \"\"\"

The JSON schema comes from the signature, the description from the docstring's first paragraph, that of a parameter from
a line "name: text" behind it. Annotations are str, int, float, bool, list, list[...], dict, Literal[...], and any of
these or None. What the function returns is shown to the model: text as it is, else as JSON. What it raises is shown as
"error: ...".

A parameter `state` of type dict is not the model's: it is the conversation's own memory, JSON values by name, which
the function may read and change.
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

from minimind.utils.importing import named_object

STATE = "state"
_KINDS = {str: "string", int: "integer", float: "number", bool: "boolean", list: "array", dict: "object"}
_NAME = re.compile(r"[A-Za-z_][A-Za-z0-9_-]{0,63}")


@dataclass(frozen=True)
class ToolFunction:
    """parameters: the JSON schema of the arguments, an object's. stateful: whether the function takes the state. path:
    "module:name" of the user's object that it is of, None for one of ours."""

    name: str
    description: str
    parameters: Mapping[str, Any]
    function: Callable[..., Any]
    stateful: bool = False
    path: str | None = None

    @property
    def schema(self) -> dict[str, Any]:
        """What a prompt says of it."""
        return {"name": self.name, "description": self.description, "parameters": dict(self.parameters)}

    def __call__(self, arguments: Mapping[str, Any], state: dict[str, Any]) -> str:
        """Run it here and now; raises what the function raises."""
        given = dict(arguments, **({STATE: state} if self.stateful else {}))
        return as_text(self.function(**given))


def tool_of(function: Callable[..., Any], path: str | None = None) -> ToolFunction:
    """ValueError, one line, for a function that a model cannot be told how to call."""
    name = getattr(function, "__name__", "")
    if not _NAME.fullmatch(name):
        raise ValueError(f"tool {function!r}: it has no plain name; give a function made with def")
    try:
        hints = typing.get_type_hints(function)
        parameters = inspect.signature(function).parameters
    except (NameError, TypeError, ValueError) as error:
        raise ValueError(f"tool {name}: its signature cannot be read ({error})") from None
    described, notes = _documented(function)
    if not described:
        raise ValueError(f"tool {name}: it has no docstring; say in one what it does, for the model reads that")
    properties, required = {}, []
    for parameter in parameters.values():
        if parameter.name == STATE and hints.get(STATE) is dict:
            continue
        if parameter.kind not in (parameter.POSITIONAL_OR_KEYWORD, parameter.KEYWORD_ONLY):
            raise ValueError(f"tool {name}: {parameter} cannot be named in a call; take plain parameters")
        if parameter.name not in hints:
            raise ValueError(f"tool {name}: parameter {parameter.name} has no type; annotate it, such as : str")
        schema = _schema(hints[parameter.name], f"tool {name}: parameter {parameter.name}")
        if parameter.name in notes:
            schema["description"] = notes[parameter.name]
        properties[parameter.name] = schema
        if parameter.default is parameter.empty:
            required.append(parameter.name)
    accepted = {"type": "object", "properties": properties, "required": required}
    return ToolFunction(name, described, accepted, function, hints.get(STATE) is dict and STATE in parameters, path)


def user_tools(path: str) -> list[ToolFunction]:
    """The tools of "package.module:name": a function, or a list or tuple of them. ValueError, one line, else."""
    found = named_object(path, "tool")
    functions = list(found) if isinstance(found, (list, tuple)) else [found]
    if not functions or not all(callable(function) for function in functions):
        raise ValueError(f"{path}: neither a function nor a list of functions")
    try:
        return [tool_of(function, path) for function in functions]
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from None


def by_name(tools: Sequence[ToolFunction]) -> dict[str, ToolFunction]:
    """ValueError where two tools have one name."""
    found: dict[str, ToolFunction] = {}
    for tool in tools:
        if tool.name in found:
            raise ValueError(f"two tools are called {tool.name}; rename one")
        found[tool.name] = tool
    return found


def as_text(value: Any) -> str:
    """What a model reads of a returned value."""
    if isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False, default=str)


def _documented(function: Callable[..., Any]) -> tuple[str, dict[str, str]]:
    """The docstring's first paragraph, and what its lines "name: text" say of parameters."""
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
    raise ValueError(f"{where} has the type {annotation}; take str, int, float, bool, list, dict or Literal[...]")
