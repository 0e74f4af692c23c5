"""Tools that hang, raise, leave, die or say too much; and the built-in ones."""

from __future__ import annotations

import time

import pytest

from minimind.environments.builtin import builtin_tools, named_tools
from minimind.environments.running import ToolLimits, ToolRunner
from minimind.environments.tools import user_tools
from minimind.environments.turns import ParsedCall
from tests.environments import hostile

LIMITS = ToolLimits(seconds=0.5, characters=100)


@pytest.fixture(scope="module")
def strangers():
    with ToolRunner(user_tools(hostile.PATH), LIMITS) as runner:
        yield runner


@pytest.mark.parametrize(
    ("name", "arguments", "text", "problem", "cut"),
    [
        ("fails", {"what": "it"}, "error: KeyError: 'it'", "raised", False),
        ("forever", {}, "error: the tool took more than 0.5 s", "timeout", False),
        ("leaves", {}, "error: SystemExit: 3", "raised", False),
        ("dies", {}, "error: the tool ended its process", "died", False),
        ("megabyte", {}, "x" * 100, None, True),
        ("prints", {"text": "this"}, "this", None, False),
        ("slow", {"seconds": 0.0}, "done", None, False),
    ],
)
def test_hostile_tools_have_a_result(strangers, name, arguments, text, problem, cut):
    result = strangers.run(ParsedCall(name, arguments), {})
    assert (result.text, result.problem, result.cut) == (text, problem, cut)
    assert result.seconds < 5


def test_calls_that_are_none_have_a_result(strangers):
    result = strangers.run(ParsedCall("gone", {}, "unknown", "error: there is no tool gone"), {})
    assert (result.text, result.problem) == ("error: there is no tool gone", "unknown")


def test_the_state_is_kept_where_the_tool_ends_well(strangers):
    state: dict = {}
    assert [strangers.run(ParsedCall("counts", {}), state).text for _ in range(2)] == ["1", "2"]
    strangers.run(ParsedCall("dies", {}), state)
    assert state == {"calls": 2}


def test_two_calls_run_at_a_time(strangers):
    strangers.run(ParsedCall("slow", {"seconds": 0.0}), {})
    while not all(worker.ready for worker in strangers._workers):
        strangers._wait(1.0)
    start = time.monotonic()
    for ticket in range(2):
        strangers.submit(ticket, ParsedCall("slow", {"seconds": 0.4}), {})
    done: list = []
    while strangers.busy:
        done += strangers.poll(1.0)
    assert sorted(ticket for ticket, _ in done) == [0, 1] and time.monotonic() - start < 0.75


def test_what_is_stopped_is_never_told(strangers):
    strangers.submit("old", ParsedCall("slow", {"seconds": 0.2}), {})
    strangers.submit("older", ParsedCall("slow", {"seconds": 0.2}), {})
    strangers.submit("oldest", ParsedCall("slow", {"seconds": 0.2}), {})
    strangers.stop()
    assert not strangers.busy and strangers.run(ParsedCall("slow", {"seconds": 0.0}), {}).text == "done"


def test_tools_that_cannot_be_imported_are_one_line():
    path = "tests.environments.no_such:tool"
    with pytest.raises(ValueError, match=f"--tools {path}: cannot import"):
        named_tools([path])
    with pytest.raises(ValueError, match="--tools two tools are called calculate"):
        named_tools(["builtin", "builtin"])


KIT = ToolRunner(builtin_tools())


@pytest.mark.parametrize(
    ("name", "arguments", "text"),
    [
        ("calculate", {"expression": "2+3*4"}, "14"),
        ("calculate", {"expression": "(1,000 − 1) × 2 ÷ 4"}, "499.5"),
        ("calculate", {"expression": "1/3"}, "0.3333333333"),
        ("calculate", {"expression": "-2^10"}, "-1024"),
        ("calculate", {"expression": "7//2 + 7%4"}, "6"),
        ("calculate", {"expression": "0.1+0.2"}, "0.3"),
        ("calculate", {"expression": "1/0"}, "error: division by zero"),
        ("calculate", {"expression": "0**-1"}, "error: division by zero"),
        ("calculate", {"expression": "9**9**9"}, "error: the number is too large"),
        ("calculate", {"expression": "1e400"}, "error: "),
        ("calculate", {"expression": "2**0.5"}, "error: an exponent must be a whole number"),
        ("calculate", {"expression": "__import__('os')"}, "error: only numbers, brackets"),
        ("calculate", {"expression": "[1][0]"}, "error: only numbers"),
        ("calculate", {"expression": "True+1"}, "error: only numbers"),
        ("calculate", {"expression": "((((" * 40}, "error: not an arithmetic expression"),
        ("calculate", {"expression": "1" * 201}, "error: the expression is longer than 200"),
        ("convert", {"value": 2.5, "unit": "km", "to": "m"}, "2500"),
        ("convert", {"value": 3, "unit": "小时", "to": "分钟"}, "180"),
        ("convert", {"value": 98.6, "unit": "F", "to": "C"}, "37"),
        ("convert", {"value": 1, "unit": "mile", "to": "km"}, "1.609344"),
        ("convert", {"value": 1, "unit": "kg", "to": "m"}, "error: kg cannot be turned into m"),
        ("convert", {"value": 1, "unit": "kg", "to": "C"}, "error: kg cannot be turned into c"),
        ("convert", {"value": 1, "unit": "ell", "to": "m"}, "error: the unit ell is not known"),
        ("convert", {"value": 1e308, "unit": "km", "to": "inch"}, "error: "),
        ("add_days", {"date": "2024-02-28", "days": 2}, "2024-03-01"),
        ("add_days", {"date": "2024-02-28", "days": 10**9}, "error: the calendar"),
        ("add_days", {"date": "28.2.2024", "days": 2}, "error: not a date YYYY-MM-DD: 28.2.2024"),
        ("days_between", {"start": "2024-02-28", "end": "2023-02-28"}, "-365"),
        ("weekday", {"date": "2026-11-30"}, "Monday"),
        ("add_minutes", {"time": "23:50", "minutes": 15}, "00:05"),
        ("add_minutes", {"time": "24:00", "minutes": 15}, "error: not a time HH:MM: 24:00"),
        ("look_up", {"item": "苹果", "column": "价格"}, "4"),
        ("look_up", {"item": "unicorn", "column": "price"}, "error: the table has no item unicorn"),
        ("search", {"query": "atomic number of gold"}, "The atomic number of gold is 79."),
        ("search", {"query": "金的原子序数"}, "金的原子序数是79。"),
        ("search", {"query": "zzz"}, "error: nothing was found"),
        ("recall", {"name": "nobody"}, "error: nothing is kept under nobody"),
    ],
)  # fmt: skip
def test_builtin_tools(name, arguments, text):
    said = KIT.run(ParsedCall(name, arguments), {}).text
    assert said == text or (text.startswith("error: ") and said.startswith(text))


def test_the_memory_is_the_conversations():
    state: dict = {}
    assert KIT.run(ParsedCall("remember", {"name": "Anna", "value": "7"}), state).text == "kept"
    assert KIT.run(ParsedCall("recall", {"name": "Anna"}), state).text == "7" and state == {"memory": {"Anna": "7"}}
    assert KIT.run(ParsedCall("recall", {"name": "Anna"}), {}).problem == "raised"
