"""Rewards of an answer's form."""

import pytest

from minimind.rewards import parse_rewards
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
def test_where_no_reasoning_was_asked_for_the_form_is_an_answer_alone(kind):
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
        ("repetition=0", "--reward repetition=0: the length of the n-grams"),
        ("regex=(", r"--reward regex=\(: not a regular expression"),
    ],
)
def test_errors_are_one_line(word, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_rewards([word])
    assert "\n" not in str(caught.value)
