"""Rewards as a command line composes them, what becomes of failures, and whether a signal is left."""

import math
import sys
from collections import Counter

import numpy as np
import pytest

from minimind.rewards import RewardError, Scores, SignalWatch, degenerate, parse_rewards, summary
from minimind.rewards.compose import Spec
from tests.rewards.samples import sample

HERE = "tests.rewards.samples"


@pytest.mark.parametrize(
    ("word", "expected"),
    [
        ("number", Spec("number", None, 1.0)),
        ("number:0.5", Spec("number", None, 0.5)),
        ("number:-2e-1", Spec("number", None, -0.2)),
        ("length=1..9:0.1", Spec("length", "1..9", 0.1)),
        ("function=a.b:c", Spec("function", "a.b:c", 1.0)),
        ("function=a.b:c:3", Spec("function", "a.b:c", 3.0)),
        ("model=runs/reward-x:1", Spec("model", "runs/reward-x", 1.0)),
        (r"model=C:\runs\reward", Spec("model", r"C:\runs\reward", 1.0)),
        ("regex=a=b:2", Spec("regex", "a=b", 2.0)),
    ],
)
def test_words(word, expected):
    assert Spec.parse(word) == expected


@pytest.mark.parametrize(
    ("word", "message"),
    [
        ("speed:1", "--reward speed:1: there is no reward 'speed'; choose from format, length"),
        ("length:1", r"--reward length:1: write length=20\.\.200:WEIGHT"),
        ("format=:1", "--reward format=:1: write format=ARGUMENT:WEIGHT"),
        ("number=3", "--reward number=3: number takes no argument; write number:WEIGHT"),
        ("number:0", "--reward number:0: the weight must be a finite number other than 0"),
        ("number:inf", "--reward number:inf: the weight must be a finite number"),
        ("function=os", "--reward function=os: write function=package.module:function"),
        ("function=no.such:f", "--reward function=no.such:f: cannot import no.such"),
        (f"function={HERE}:gone", f"--reward function={HERE}:gone: {HERE} has no function 'gone'"),
        (f"function={HERE}:not_a_function", "has no function 'not_a_function'"),
        (
            "model=/no/such/folder:1",
            "--reward model=/no/such/folder: no such folder; name a run of train/reward.py",
        ),
    ],
)
def test_bad_words_are_refused_in_one_line(word, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_rewards([word])
    assert "\n" not in str(caught.value)


def test_no_word_and_a_bad_policy_are_refused():
    with pytest.raises(ValueError, match="--reward: name at least one, such as number:1"):
        parse_rewards([])
    with pytest.raises(ValueError, match="--on-reward-error skip: stop, drop"):
        parse_rewards(["number"], on_error="skip")


def test_the_sum_is_weighted_and_keeps_its_parts():
    rewards = parse_rewards(["number:2", "regex=a:0.5", "regex=b:0.25", "overlong=1..3:4"])
    assert str(rewards) == "2 number + 0.5 regex + 0.25 regex-2 + 4 overlong"
    scores = rewards([sample("a 1", "1", 1), sample("b 2", "1", 2)])
    assert scores.total.dtype == np.float64
    assert scores.total.tolist() == [2.5, 0.25 - 2]
    parts = {name: values.tolist() for name, values in scores.parts.items()}
    assert parts == {"number": [1, 0], "regex": [1, 0], "regex-2": [0, 1], "overlong": [0, -0.5]}
    assert not scores.failures and scores.kept.all()
    assert rewards([]).total.shape == (0,)


@pytest.mark.parametrize(
    ("words", "on_error", "bounds"),
    [
        (["number"], "drop", (0.0, 1.0)),
        (["number:2", "overlong=1..3:4", "regex=a:-0.5"], "drop", (-4.5, 2.0)),
        (["number:2"], "-1", (-2.0, 2.0)),
        (["number", f"function={HERE}:boom"], "drop", None),
    ],
)
def test_bounds_of_the_sum(words, on_error, bounds):
    assert parse_rewards(words, on_error).bounds == bounds


def test_a_function_from_the_working_directory(tmp_path, monkeypatch):
    (tmp_path / "my_rewards.py").write_text(
        "def shouting(samples):\n    return [s.text.isupper() for s in samples]\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    scores = parse_rewards(["function=my_rewards:shouting:2"])([sample("HEY"), sample("hey")])
    assert scores.total.tolist() == [2, 0]


SAMPLES = [sample("one"), sample("bad"), sample("three"), sample("bad too")]


@pytest.mark.parametrize("name", ["boom", "unwell"])
def test_a_failing_reward_drops_its_samples_alone(name):
    rewards = parse_rewards([f"function={HERE}:{name}:2", "regex=e"])
    scores = rewards(SAMPLES)
    assert scores.kept.tolist() == [True, False, True, False]
    failure = scores.failures["function"]
    assert failure.count == 2 and failure.first in ("KeyError: 'bad\\nin two lines'", "it gave inf")
    assert scores.parts["regex"].tolist() == [1, 0, 1, 0]
    rewards(SAMPLES)
    assert rewards.failed == Counter(function=4)


def test_a_number_stands_in_for_what_a_reward_did_not_say():
    scores = parse_rewards([f"function={HERE}:boom:2", "regex=e"], on_error="-1")(SAMPLES)
    assert scores.total.tolist() == [7, -2, 11, -2]
    assert scores.failures["function"].count == 2
    assert math.isnan(scores.parts["function"][1])  # what was said in its place is not the reward's


def test_a_run_may_stop_instead():
    rewards = parse_rewards([f"function={HERE}:boom"], on_error="stop")
    with pytest.raises(
        RewardError, match=r"reward function failed on 2 samples: KeyError: .*go on with"
    ) as caught:
        rewards(SAMPLES)
    assert "\n" not in str(caught.value)
    assert rewards(SAMPLES[:1]).total.tolist() == [3]


def test_a_reward_that_loses_samples_has_failed():
    scores = parse_rewards([f"function={HERE}:short"])(SAMPLES)
    assert not scores.kept.any()
    assert scores.failures["function"].first == "it gave an array of shape [0] for 1 samples"


def scores_of(total: list[float]) -> Scores:
    return Scores(np.array(total), {"number": np.array(total)}, {})


def test_summary():
    nan = math.nan
    parts = {"a": np.array([1.0, nan, nan, 0.0, 0.0]), "b": np.full(5, nan)}
    scores = Scores(np.array([1.0, 3.0, nan, 2.0, 2.0]), parts, {})
    figures = summary(scores, np.array([7, 7, 7, 9, 9]))
    assert figures == pytest.approx(
        {
            "reward": 2.0,
            "reward_std": np.std([1, 3, 2, 2]),
            "reward_a": 1 / 3,
            "reward_failed_a": 2.0,
            "reward_failed_b": 5.0,
            "reward_dropped": 1.0,
            "degenerate_groups": 0.5,
        }
    )
    assert "degenerate_groups" not in summary(scores)
    assert summary(scores_of([nan]))["reward_dropped"] == 1 and "reward" not in summary(scores_of([nan]))


def test_degenerate_groups_leave_out_what_was_dropped():
    nan = math.nan
    total, groups = np.array([1, 2, 1, nan, 3, 3, nan, nan]), np.array([0, 0, 1, 1, 2, 2, 3, 3])
    assert degenerate(total, groups).tolist() == [False, True, True, True]


def test_a_lost_signal_is_said_once():
    watch, groups = SignalWatch(patience=3), np.array([0, 0, 1, 1])
    equal, mixed = scores_of([1, 1, 0, 0]), scores_of([1, 0, 0, 0])
    lines = [watch.see(s, groups) for s in (equal, equal, mixed, equal, equal, equal, equal, equal)]
    assert [line is not None for line in lines] == [False] * 5 + [True] + [False] * 2
    assert "for 3 steps in every group all rewards are equal (now 0.5 on average)" in lines[5]
    assert SignalWatch(1).see(equal) is None  # compared with the whole batch there is a signal
    assert "no reward could judge" in SignalWatch(1).see(scores_of([math.nan] * 4), groups)
    assert SignalWatch(1).see(scores_of([])) is None
    again = SignalWatch(3)
    again.load_state_dict({"silent": 2})
    assert again.see(equal, groups) is not None and again.state_dict() == {"silent": 3}
