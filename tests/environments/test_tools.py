"""Schemas of functions, and calls read from replies."""

from __future__ import annotations

import json
from typing import Literal

import pytest

from minimind.environments.tools import as_text, by_name, tool_of, user_tools
from minimind.environments.turns import read_calls, without_calls


def sample(city: str, days: int = 1, unit: Literal["C", "F"] = "C", tags: list[str] | None = None) -> str:
    """Weather in
    a city.

    city: its English name
    Not a parameter.
    """
    return f"{city} {days} {unit} {tags}"


def kept(name: str, state: dict) -> str:
    """What is kept."""
    state["seen"] = name
    return name


def test_a_schema_comes_from_signature_and_docstring():
    tool = tool_of(sample)
    assert tool.schema == {
        "name": "sample",
        "description": "Weather in a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"type": "string", "description": "its English name"},
                "days": {"type": "integer"},
                "unit": {"type": "string", "enum": ["C", "F"]},
                "tags": {"type": ["array", "null"], "items": {"type": "string"}},
            },
            "required": ["city"],
        },
    }
    assert tool({"city": "Rome", "days": 2}, {}) == "Rome 2 C None"


def test_the_state_is_the_conversations_and_not_the_models():
    tool, state = tool_of(kept), {}
    assert list(tool.parameters["properties"]) == ["name"] and tool({"name": "a"}, state) == "a"
    assert state == {"seen": "a"}


def undocumented(x: int) -> int:
    return x


def untyped(x) -> int:
    """Something."""
    return x


def starred(*x: int) -> int:
    """Something."""
    return len(x)


def odd(x: complex) -> int:
    """Something."""
    return 0


@pytest.mark.parametrize(
    ("function", "message"),
    [
        (undocumented, "tool undocumented: it has no docstring"),
        (untyped, "tool untyped: parameter x has no type"),
        (starred, r"tool starred: \*x: .* cannot be named in a call"),
        (odd, "tool odd: parameter x has the type <class 'complex'>; use str"),
        (lambda x: x, "it has no plain name"),
    ],
)
def test_functions_that_a_model_cannot_be_told_of(function, message):
    with pytest.raises(ValueError, match=message) as error:
        tool_of(function)
    assert "\n" not in str(error.value)


def test_user_tools_by_path():
    path = "tests.environments.hostile"
    assert "forever" in by_name(user_tools(f"{path}:TOOLS")) and user_tools(f"{path}:slow")[0].path == f"{path}:slow"
    for wrong, message in (
        (path, "write package.module:tool"),
        ("no.such:f", "no.such:f: cannot import no.such"),
        (f"{path}:gone", "has no tool 'gone'"),
        (f"{path}:PATH", "neither a function nor a list of functions"),
    ):
        with pytest.raises(ValueError, match=message):
            user_tools(wrong)
    with pytest.raises(ValueError, match="two tools are called slow"):
        by_name(user_tools(f"{path}:slow") * 2)


def test_returned_values_as_text():
    assert [as_text(v) for v in ("a", 3, {"名": 1}, [None, True])] == ["a", "3", '{"名": 1}', "[null, true]"]


OFFERED = {"sample": tool_of(sample).parameters, "kept": tool_of(kept).parameters}


def call(name: str, arguments: object) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.mark.parametrize(
    ("text", "problem", "error"),
    [
        (call("sample", {"city": "Rome"}), None, ""),
        (call("gone", {}), "unknown", "error: there is no tool gone; choose from sample, kept"),
        (call("sample", {}), "arguments", "error: arguments lack city"),
        (call("sample", {"city": 3}), "arguments", "error: city must be of type string"),
        (call("sample", {"city": "Rome", "unit": "K"}), "arguments", "error: unit must be one of C, F"),
        (call("sample", {"city": "Rome", "tags": [1]}), "arguments", "error: each of tags must be of type string"),
        (call("sample", {"city": "Rome", "made": "up"}), "arguments", "error: arguments may only hold city, days"),
        (call("sample", "city=Rome"), "arguments", "error: arguments must be of type object"),
        ("<tool_call>sample(Rome)</tool_call>", "malformed", "error: the call is not JSON: sample(Rome)"),
        ('<tool_call>["sample"]</tool_call>', "malformed", 'error: a call is {"name": ..., "arguments": {...}}'),
        ("<tool_call>" + "[" * 100_000 + "</tool_call>", "malformed", "error: the call is not JSON: [[["),
        ('<tool_call>{"name": "sample", "arguments": {"city": NaN}}</tool_call>', "malformed", "not JSON"),
        ('<tool_call>{"name": "sample"', "malformed", "error: a call that is not closed, or not opened"),
        ("</tool_call>", "malformed", "error: a call that is not closed, or not opened"),
    ],
)
def test_a_call_is_right_or_says_what_is_wrong(text, problem, error):
    (found,) = read_calls(text, OFFERED)
    assert found.problem == problem and error in found.error and "\n" not in found.error


def test_calls_are_those_behind_the_reasoning():
    text = f"<think>{call('gone', {})}</think>Both: {call('kept', {'name': 'a'})}{call('kept', {'name': 'b'})}."
    assert [found.arguments for found in read_calls(text, OFFERED)] == [{"name": "a"}, {"name": "b"}]
    assert without_calls(call("gone", {}) + "\nIt is 3.") == "It is 3."
    assert read_calls("It is 3.", OFFERED) == []
