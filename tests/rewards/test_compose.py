"""Rewards as a command line composes them, and handling of failures."""

import math
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest
import torch

from minimind.rewards import RewardError, parse_rewards
from minimind.rewards.compose import Spec
from tests.rewards import samples
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
        ("model=/no/such/folder:1", "--reward model=/no/such/folder: no such folder; name a run of train/reward.py"),
    ],
)
def test_bad_words_are_refused_in_one_line(word, message):
    with pytest.raises(ValueError, match=message) as caught:
        parse_rewards([word])
    assert "\n" not in str(caught.value)


def test_no_word_and_a_bad_policy_are_refused():
    with pytest.raises(ValueError, match="--reward: name at least one, such as number:1"):
        parse_rewards([])
    with pytest.raises(ValueError, match="--on-reward-error skip: choose stop, drop"):
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
    (tmp_path / "my_rewards.py").write_text("def shouting(samples):\n    return [s.text.isupper() for s in samples]\n")
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


def test_a_number_replaces_a_missing_reward():
    scores = parse_rewards([f"function={HERE}:boom:2", "regex=e"], on_error="-1")(SAMPLES)
    assert scores.total.tolist() == [7, -2, 11, -2]
    assert scores.failures["function"].count == 2
    assert math.isnan(scores.parts["function"][1])  # the replacement is not recorded as its value


def test_a_run_may_stop_instead():
    rewards = parse_rewards([f"function={HERE}:boom"], on_error="stop")
    with pytest.raises(RewardError, match=r"reward function failed on 2 samples: KeyError: .*go on with") as caught:
        rewards(SAMPLES)
    assert "\n" not in str(caught.value)
    assert rewards(SAMPLES[:1]).total.tolist() == [3]


@pytest.mark.parametrize("on_error", ["drop", "stop", "-1"])
@pytest.mark.parametrize(
    ("returned", "named"),
    [
        ([1.0], "returned 1 value for 4 samples"),
        ([], "returned 0 values"),
        ((1.0,) * 5, "returned 5 values"),
        (0.5, "returned float 0.5, no list,"),
        (np.float32(0.5), r"returned float32 .*, no list,"),
        (torch.tensor(0.5), r"returned Tensor tensor\(0.5000\), no list,"),
        (None, "returned None, no list,"),
        ("1234", "returned str '1234', no list,"),
        ({0: 1.0, 1: 1.0, 2: 1.0, 3: 1.0}, "returned dict"),
        ((x for x in (1.0, 2.0, 3.0, 4.0)), "returned generator"),
        (["1", "2", "3", "4"], "returned str '1', no number,"),
        (np.array(["1", "2", "3", "4"]), "returned str '1', no number,"),
        ([1.0, 2.0, [3.0], 4.0], r"returned list \[3.0\], no number,"),
        (np.ones((4, 1)), r"returned list \[1.0\], no number,"),
        (torch.ones(4, 1), r"returned list \[1.0\], no number,"),
        ([1.0, 2.0, 3.0, 1j], "returned complex 1j, no number,"),
        ([10**400, 1, 1, 1], r"returned int 1000\S+\.\.\., no number,"),
    ],
)
def test_wrong_return_values_are_refused_at_once(returned, named, on_error, monkeypatch):
    """The function is not called again sample by sample: it is wrong whatever the samples are."""
    calls = []
    monkeypatch.setattr(samples, "short", lambda s: (calls.append(len(s)), returned)[1])
    message = rf"^--reward function={HERE}:short {named}.*: it must return a list of 4 numbers, one for each$"
    with pytest.raises(RewardError, match=message) as caught:
        parse_rewards(["regex=e", f"function={HERE}:short:2"], on_error)(SAMPLES)
    assert calls == [4] and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "returned",
    [
        (1, 0, 1, True),
        [np.float16(1), np.int64(0), np.bool_(True), torch.tensor(1)],
        np.array([1, 0, 1, 1], bool),
        torch.tensor([1.0, 0, 1, 1], dtype=torch.bfloat16, requires_grad=True),
        [1, None, 1, Fraction(1)],
    ],
)
def test_numbers_of_any_kind_are_rewards(returned, monkeypatch):
    monkeypatch.setattr(samples, "short", lambda s: returned)
    scores = parse_rewards([f"function={HERE}:short"], "0")(SAMPLES)
    assert scores.total.tolist() == [1, 0, 1, 1]
    failed = {name: (f.count, f.first) for name, f in scores.failures.items()}
    assert failed == ({"function": (1, "it gave nan")} if None in list(returned) else {})


def test_a_reward_that_raises_for_a_batch_and_then_gives_a_number_alone(monkeypatch):
    monkeypatch.setattr(samples, "short", lambda s: 1.0 if len(s) == 1 else 1 / 0)
    message = "returned float 1.0, no list, for 1 sample: it must return a list of one number"
    with pytest.raises(RewardError, match=message):
        parse_rewards([f"function={HERE}:short"])(SAMPLES)
