"""Rewards that judge an answer by rules."""

import json
from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.rewards import parse_rewards
from minimind.rewards.rules import final_answer, fits, last_number, parse_json
from tests.rewards.samples import sample


def score(word: str, *samples) -> list[float]:
    return parse_rewards([word], on_error="stop")(samples).total.tolist()


@pytest.mark.parametrize(
    ("kind", "text", "expected"),
    [
        ("think", "<think>so</think>\nyes", 1.0),
        ("think", "<think>so</think>\n<answer>yes</answer>", 1.0),
        ("think", "<think>\n</think>\nyes", 0.5),  # no reasoning in it
        ("think", "<think>so</think>\n", 0.5),
        ("think", "first <think>so</think>\nyes", 0.5),
        ("think", "<think>so", 0.25),
        ("think", "<think><think>so</think>yes", 0.25),
        ("think", "yes", 0.0),
        ("answer", "<think>so</think>\n<answer>yes</answer>", 1.0),
        ("answer", "<think>so</think>\n<answer>yes</answer>\n", 1.0),
        ("answer", "<think>so</think>\nyes", 0.25),
        ("answer", "<think>so</think>\n<answer>yes</answer> or so", 0.5),
        ("answer", "<answer>yes</answer>", 0.25),
    ],
)
def test_format(kind, text, expected):
    assert score(f"format={kind}", sample(text)) == [expected]


@pytest.mark.parametrize("kind", ["think", "answer"])
def test_without_reasoning_the_form_is_an_answer_alone(kind):
    texts = {"yes": 1.0, "<think>so</think>yes": 0.0, "<answer>yes</answer>": 0.0, "": 0.0}
    for text, expected in texts.items():
        assert score(f"format={kind}", sample(text, thinking=False)) == [expected]
    assert score("format", sample("<think>\nso</think>yes", thinking=True)) == [1.0]


def test_format_is_think_by_default():
    assert score("format", sample("<think>so</think>yes")) == [1.0]


def test_length_has_soft_bounds():
    lengths = [0, 5, 10, 20, 25, 30, 40, 50]
    expected = [0.0, 0.5, 1.0, 1.0, 0.75, 0.5, 0.0, 0.0]
    assert score("length=10..20", *(sample("", tokens=n) for n in lengths)) == expected
    assert score("length=..20", sample("", tokens=0)) == [1.0]


def test_overlong_is_dapos_penalty():
    lengths = [0, 100, 150, 200, 300]
    expected = [0.0, 0.0, -0.5, -1.0, -1.0]
    assert score("overlong=100..200", *(sample("", tokens=n) for n in lengths)) == expected


def test_repetition_counts_n_grams():
    ids = [[], [1, 2], [1, 2, 3, 4], [1, 2, 3, 1, 2, 3], [7] * 10]
    assert score("repetition", *(sample("", tokens=i) for i in ids)) == [1.0, 1.0, 1.0, 0.75, 1 / 8]
    assert score("repetition=1", sample("", tokens=[7] * 10)) == [0.1]


def test_regex():
    assert score(r"regex=^\d+:$:2", sample("12:"), sample("x12:")) == [2.0, 0.0]
    assert score("regex=a:7:1", sample("a:7"), sample("a")) == [1.0, 0.0]
    assert score("regex=a:7", sample("a"), sample("b")) == [7.0, 0.0]  # a number behind the last colon is a weight


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("format=xml", "--reward format=xml: choose think or answer"),
        ("length=20", "--reward length=20: write LOW..HIGH with numbers of tokens"),
        ("length=20..10", "--reward length=20..10: write LOW..HIGH"),
        ("repetition=0", "--reward repetition=0: give the length of the n-grams"),
        ("regex=(", r"--reward regex=\(: not a regular expression"),
    ],
)
def test_errors_are_one_line(word, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_rewards([word])
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "number"),
    [
        ("It is 42.", 42), ("-7", -7), ("x = −7", -7), ("7-3", 3), ("7 - 3", 3), ("5 minus -3", -3), ("+4", 4),
        ("1,234.50", "1234.5"), ("$1,000,000", 1000000), ("12,34", 34), ("3/4", "3/4"), ("3 / 4 of it", "3/4"),
        ("-1/2", "-1/2"), ("50%", "1/2"), ("0.1", "1/10"), ("x2", 2), ("2 and 3", 3), ("3.", 3), ("007", 7),
        ("1/0", None), ("none", None), ("", None), ("答案是-31。", -31), ("等于−7", -7), ("一-二3-5", 5), ("km-4", 4),
    ],
)  # fmt: skip
def test_last_number(text, number):
    assert last_number(text) == (None if number is None else Fraction(number))


@given(
    st.integers(-(10**9), 10**9), st.sampled_from(["{}", "The answer is {}.", "= {}\n", "${}", "({})", "答案是{}。"])
)
def test_any_whole_number_is_found_as_it_is_printed(number, wording):
    assert last_number(wording.format(number)) == last_number(wording.format(f"{number:,}")) == number


@given(st.text())
def test_no_text_breaks_the_parsers(text):
    last_number(text)
    final_answer(text)
    score("tools", sample(text))
    score("json", sample(text))


def test_only_the_answer_counts():
    assert final_answer("<think>1</think>\n2") == "2"
    assert final_answer("<think>1</think><answer> 3 </answer> 4") == "3"
    assert final_answer("<answer>1</answer><answer>2</answer>") == "2"
    assert final_answer("<think>cut off at 5") == ""
    assert final_answer(" plain ") == "plain"


def test_number():
    texts = ["<think>7</think>8", "<think>8</think>7", "8", "the sum of 5 and 3 is 8.", "16/2", "800%", "", "8 or 9"]
    assert score("number", *(sample(t, "= 8") for t in texts)) == [1, 0, 1, 1, 1, 1, 0, 0]


def test_exact():
    texts = ["Paris", " paris. ", "<think>hm</think>Paris", "Paris, France", "巴黎。"]
    assert score("exact", *(sample(t, "Paris") for t in texts)) == [1, 1, 1, 0, 0]
    assert score("exact", sample("巴黎。", "巴黎")) == [1]


@pytest.mark.parametrize("word", ["number", "exact"])
def test_without_a_reference_there_is_nothing_to_check(word):
    scores = parse_rewards([word])([sample("1", "1"), sample("1")])
    assert scores.kept.tolist() == [True, False]
    assert scores.failures[word].first == "the prompt has no reference answer"


def test_json():
    texts = [
        '{"a": 1}',
        "<think>x</think>[1]",
        'Here:\n```json\n{"a": 1, "b": 2}\n```',
        "NaN",
        "{'a': 1}",
        "",
        "[" * 10**5,
    ]
    assert score("json", *map(sample, texts)) == [1, 1, 1, 0, 0, 0, 0]
    assert score("json=a,b", *map(sample, texts)) == [0.5, 0, 1, 0, 0, 0, 0]
    with pytest.raises(ValueError, match="Infinity is not JSON"):
        parse_json("[Infinity]")


WEATHER = {"name": "weather", "parameters": {
    "type": "object", "required": ["city"], "properties": {
        "city": {"type": "string"}, "days": {"type": "integer"}, "unit": {"enum": ["C", "F"]},
        "hours": {"type": "array", "items": {"type": "number"}}}}}  # fmt: skip


def call(arguments, name: str = "weather") -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


@pytest.mark.parametrize(
    "tools",
    [[WEATHER], json.dumps([WEATHER]), [{"type": "function", "function": WEATHER}]],
    ids=["list", "string", "wrapped"],
)
def test_tool_calls(tools):
    prompt = [{"role": "system", "content": "", "tools": tools}, {"role": "user", "content": "?"}]
    right, wrong = call({"city": "Rome"}), call({"town": "Rome"})
    cases = {
        right: 1,
        "<think>I should call <tool_call>.</think>" + right: 1,
        call({"city": "Rome", "days": 3, "unit": "C", "hours": [1, 2.5]}): 1,
        call({"city": "Rome", "days": 3.0}): 1,  # JSON has no other integers
        call({"city": "Rome", "days": 3.5}): 0,
        call({"city": "Rome", "days": True}): 0,
        call({"city": "Rome", "unit": "K"}): 0,
        call({"city": "Rome", "hours": ["1"]}): 0,
        call({"city": None}): 0,
        call({}): 0,
        wrong: 0,
        right + wrong: 0.5,
        right + right: 1,
        call({"city": "Rome"}, "other"): 0,
        call("Rome"): 0,
        "<tool_call>{not json}</tool_call>": 0,
        "<tool_call>[1]</tool_call>": 0,
        right + "<tool_call>": 0,
        right.removesuffix("</tool_call>"): 0,
        "No call.": 0,
    }
    found = score("tools", *(sample(text, prompt=prompt) for text in cases))
    assert dict(zip(cases, found, strict=True)) == cases


def test_without_tools_a_call_is_wrong():
    assert score("tools", sample("Hello."), sample(call({"city": "Rome"}))) == [1, 0]


def test_schemas_allow_what_they_do_not_know():
    assert fits({"a": 1}, {}) and fits({"a": 1}, {"type": "object"}) and fits("x", {"type": ["string", "null"]})
    assert fits({"a": 1}, {"properties": {}, "additionalProperties": True})
    assert not fits({"a": 1}, {"properties": {}}) and not fits({}, {"required": ["a"]})
    assert fits(1, {"type": "made up"})
