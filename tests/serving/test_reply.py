"""Parsing an answer gives the same parts wherever the text was cut."""

import itertools
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.serving.chat_format import Reply, ReplyParser

CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "a}\\"b", "n": [1, {"x": "]"}]}}\n</tool_call>'
ARGUMENTS = '{"city": "a}\\"b", "n": [1, {"x": "]"}]}'
JSON = '{"a": "<tool_call>\\n{\\"name\\": \\"f\\", \\"arguments\\": {}}</tool_call><answer>"}'
QUOTING = '<tool_call>\n{"name": "f", "arguments": {"a": "</tool_call>"}}\n</tool_call>'
CASES = [
    ("Hello\n\nthere\n", {}, ("", "Hello\n\nthere\n", [])),
    ("<think>\nA\n\nB\n</think>\n\nC\n", {}, ("A\n\nB", "C\n", [])),
    ("A\n</think>\n\nC", {"reasoning": True}, ("A", "C", [])),
    ("<think>\n\n</think>\n\nC", {}, ("", "C", [])),
    (" \n<think>A", {}, ("A", None, [])),
    ("<think>A</think>\n<answer>\nB\n</answer>\n", {}, ("A", "B", [])),
    ("no <answer>B</answer>", {}, ("", "no <answer>B</answer>", [])),
    ("</think>\n\nA", {}, ("", "A", [])),
    ("</thin", {}, ("", "</thin", [])),
    ("<thin", {}, ("", "<thin", [])),
    ("a <think> b", {}, ("", "a <think> b", [])),
    (CALL, {}, ("", CALL, [])),
    (CALL, {"tools": True}, ("", None, [["weather", ARGUMENTS]])),
    (f"<think>\nA\n</think>\n\nB\n{CALL}\n{CALL}", {"tools": True}, ("A", "B", [["weather", ARGUMENTS]] * 2)),
    (f"{CALL}\nC", {"tools": True}, ("", "C", [["weather", ARGUMENTS]])),
    ('<tool_call>{"arguments": {"a": 1}, "name": "f"}</tool_call>', {"tools": True}, ("", None, [["f", '{"a": 1}']])),
    ('<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>', {"tools": True},
     ("", None, [["f", '{"a": 1}']])),
    ('<tool_call>{"name": "f"}</tool_call>', {"tools": True}, ("", None, [["f", "{}"]])),
    ("<tool_call>nonsense</tool_call> x", {"tools": True}, ("", "<tool_call>nonsense</tool_call> x", [])),
    ("<tool_call>nonsense", {"tools": True}, ("", "<tool_call>nonsense", [])),
    ('<tool_call>{"name": "f", "arguments": {"a": "b', {"tools": True}, ("", None, [["f", '{"a": "b']])),
    ('<tool_call>{"name": "f", "arguments": {"a</tool_call>b', {"tools": True}, ("", "b", [["f", '{"a']])),
    ('<tool_call>{"name": "f", "arguments": {}, "more": 1}</tool_call>', {"tools": True}, ("", None, [["f", "{}"]])),
    (JSON, {"tools": True, "enforced": True}, ("", JSON, [])),
    (f"<think>\nA\n</think>{JSON}", {"enforced": True}, ("A", JSON, [])),
    (JSON[:-20], {"tools": True, "enforced": True}, ("", JSON[:-20], [])),
    (f"{QUOTING}\n{CALL}", {"tools": True, "enforced": True},
     ("", None, [["f", '{"a": "</tool_call>"}'], ["weather", ARGUMENTS]])),
    (QUOTING[:-22], {"tools": True, "enforced": True}, ("", None, [["f", '{"a": "</tool']])),
    ("<tool_c", {"tools": True, "enforced": True}, ("", "<tool_c", [])),
    ("1 < 2 <", {"tools": True}, ("", "1 < 2 <", [])),
    ("<tool_call>" + "[" * 100_000 + "</tool_call>", {"tools": True},
     ("", "<tool_call>" + "[" * 100_000 + "</tool_call>", [])),
]  # fmt: skip


def parse(pieces, **options):
    parser, reply = ReplyParser(**options), Reply()
    for piece in pieces:
        for part in parser.push(piece):
            assert part.text or part.kind == "call"
            reply.add(part)
    for part in parser.finish():
        reply.add(part)
    return reply.reasoning, reply.content, reply.calls


@pytest.mark.parametrize(("text", "options", "expected"), CASES)
def test_parts(text, options, expected):
    assert parse([text], **options) == expected
    if len(text) < 1000:
        assert parse(text, **options) == expected, "one character at a time"


@given(
    st.lists(
        st.sampled_from(
            ["<think>", "</think>", "<tool_call>", "</tool_call>", "<answer>", "</answer>", "\n", "{", "}", '"', "\\",
             '{"name": "f", "arguments": {', "a", "好", "<", "t", ", "]
        ),
        max_size=14,
    ),
    st.lists(st.integers(0, 100), max_size=6),
    st.booleans(),
    st.booleans(),
)  # fmt: skip
def test_parts_do_not_depend_on_the_cuts(words, cuts, reasoning, tools):
    text = "".join(words)
    places = sorted({min(cut, len(text)) for cut in cuts} | {0, len(text)})
    pieces = [text[a:b] for a, b in itertools.pairwise(places)]
    whole = parse([text], reasoning=reasoning, tools=tools)
    assert parse(pieces, reasoning=reasoning, tools=tools) == whole == parse(text, reasoning=reasoning, tools=tools)


@given(st.dictionaries(st.text(max_size=5), st.text(max_size=9) | st.integers() | st.lists(st.none(), max_size=3)))
def test_arguments_come_through_as_they_are(arguments):
    written = json.dumps(arguments, ensure_ascii=False)
    text = f'<tool_call>\n{{"name": "f", "arguments": {written}}}\n</tool_call>'
    assert parse(text, tools=True, enforced=True) == ("", None, [["f", written]])
    if "</tool_call>" not in written:
        assert parse(text, tools=True) == ("", None, [["f", written]])
