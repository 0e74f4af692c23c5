"""Tools of an MCP server: in this process, and a real one that is started over stdio."""

from __future__ import annotations

import shlex
import sys
from contextlib import ExitStack

import pytest

pytest.importorskip("mcp", reason="needs the mcp package: pip install 'minimind[mcp]'")

from minimind.environments import mcp
from minimind.environments.builtin import named_tools
from minimind.environments.mcp import connected
from minimind.environments.running import ToolLimits, ToolRunner
from minimind.environments.tools import by_name
from minimind.environments.turns import ParsedCall, read_calls
from minimind.environments.worker import run
from tests.environments import mcp_server

WORD = f"mcp:{shlex.quote(sys.executable)} {shlex.quote(mcp_server.__file__)}"


@pytest.fixture(scope="module")
def tools():
    """The tools of a server in this process."""
    with ExitStack() as stack:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(mcp, "_server", lambda word: mcp_server.server)
            found = stack.enter_context(connected("mcp:here", 0.3))
        yield by_name(found)


def test_tools_are_described_as_others_are(tools):
    assert set(tools) == {"add", "fails", "forever", "leaves", "megabyte", "counts", "picture"}
    assert tools["add"].description == "The sum of two numbers." and tools["add"].path == "mcp:here"
    offered = {name: tool.parameters for name, tool in tools.items()}
    (call,) = read_calls('<tool_call>{"name": "add", "arguments": {"a": 2, "b": "3"}}</tool_call>', offered)
    assert (call.problem, call.error) == ("arguments", "error: b must be of type integer")


@pytest.mark.parametrize(
    ("name", "arguments", "text", "problem", "cut"),
    [
        ("add", {"a": 2, "b": 3}, "5", None, False),
        ("fails", {"what": "it"}, "error: Error executing tool fails", "raised", False),
        ("forever", {}, "error: the tool took more than 0.3 s", "timeout", False),
        ("megabyte", {}, "x" * 100, None, True),
        ("picture", {}, "a picture:\n[image]", None, False),
    ],
)
def test_calls_have_a_result(tools, name, arguments, text, problem, cut):
    first = int(tools["counts"]({}, {}))
    result = run(tools[name], arguments, {}, 100, 0.3)
    assert result["text"].startswith(text) and (result["problem"], result["cut"]) == (problem, cut)
    assert int(tools["counts"]({}, {})) == first + 1, "the same server goes on"


@pytest.fixture(scope="module")
def runner():
    with ToolRunner(named_tools([WORD]), ToolLimits(seconds=20.0, characters=100, workers=1)) as running:
        yield running


def test_a_server_over_stdio(runner):
    assert runner.tools["add"].parameters["required"] == ["a", "b"]
    assert runner.run(ParsedCall("add", {"a": 2, "b": 3}), {}).text == "5"
    assert runner.run(ParsedCall("fails", {"what": "it"}), {}).problem == "raised"
    assert [runner.run(ParsedCall("counts"), {}).text for _ in range(2)] == ["1", "2"]


@pytest.mark.heavy
def test_a_server_that_ends_is_started_again(runner):
    runner.run(ParsedCall("counts"), {})
    result = runner.run(ParsedCall("leaves"), {})
    assert (result.text, result.problem) == ("error: the tool ended its process", "died")
    assert runner.run(ParsedCall("counts"), {}).text == "1"


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("mcp:no-such-command", "--tools mcp:no-such-command: no MCP server answers (FileNotFoundError"),
        ("mcp:true", "--tools mcp:true: no MCP server answers ("),
        ("mcp:http://127.0.0.1:9/mcp", "--tools mcp:http://127.0.0.1:9/mcp: no MCP server answers ("),
        ("mcp:", "--tools mcp:: write mcp:COMMAND or mcp:http://..."),
        ("mcp:'a", "--tools mcp:'a: write mcp:COMMAND or mcp:http://..."),
    ],
)
def test_errors_are_one_line(word, message):
    with pytest.raises(ValueError) as caught:
        named_tools([word])
    assert str(caught.value).startswith(message) and "\n" not in str(caught.value)


def test_without_the_package_it_is_one_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mcp", None)
    with pytest.raises(ValueError, match=r"--tools mcp:any: needs the mcp package.*minimind\[mcp\]"):
        named_tools(["mcp:any"])
