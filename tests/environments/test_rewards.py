"""Rewards of a conversation, and figures of many."""

from __future__ import annotations

import math

import pytest

from minimind.environments.episodes import Episode, Start, Turn
from minimind.environments.rewards import WEIGHTS, EpisodeSample, agent_rewards, figures, is_done
from minimind.environments.running import ToolResult
from minimind.environments.turns import ParsedCall

RIGHT, WRONG = ParsedCall("f"), ParsedCall("", {}, "malformed", "error: no")


def sample(text: str, made: list[ParsedCall] = [], reference: str | None = None, **metadata: object) -> EpisodeSample:  # noqa: B006
    turns = [Turn("", [call], [ToolResult("", call.problem)]) for call in made]
    episode = Episode(Start(0, [1]), 0, turns=[*turns, Turn(text)])
    return EpisodeSample([], text, [], "stop", reference, metadata, None, episode)


def rewards(each: EpisodeSample) -> dict[str, float]:
    return {part.name: float(part.reward([each])[0]) for part in agent_rewards(WEIGHTS)}


@pytest.mark.parametrize(
    ("text", "reference", "right"),
    [
        ("The answer is 12.", "12", 1),
        ("It was 3, and is 12.0", "12", 1),
        ("12 or 13", "12", 0),
        ("-12", "12", 0),
        ("It is 1,200.", "1200", 1),
        ("答案是Monday。", "Monday", 1),
        ("monday", "Monday", 1),
        ("Sunday", "Monday", 0),
        ("The date is 2024-03-05.", "2024-03-05", 1),
        ("2024-03-06", "2024-03-05", 0),
        (" ".join(["Monday Tuesday Wednesday Thursday Friday Saturday Sunday"] * 2), "Monday", 0),
        ("", "12", 0),
    ],
)
def test_an_answer_is_right_or_not(text, reference, right):
    assert rewards(sample(text, [RIGHT], reference, calls=1))["answer"] == right


@pytest.mark.parametrize(
    ("text", "gt", "share"),
    [
        ("28°C, 晴", ["28", "晴"], 1),
        ("28°C", ["28", "晴"], 0.5),
        ("It is 1,200.5 km", [1200.5], 1),
        ("It is 120", ["12"], 1),  # upstream's rule: a text that holds the value
        ("It is 13", ["12"], 0),
        ("12", "12", 1),
    ],
)
def test_rows_of_upstream_are_worth_the_share_of_their_values(text, gt, share):
    found = sample(text, [RIGHT] * len(gt), gt=gt)
    assert rewards(found)["answer"] == share and is_done(found) == (share == 1)


def test_calls_are_worth_their_valid_share_and_needed_ones_are_not_left_out():
    assert rewards(sample("", [RIGHT, WRONG], "1", calls=1))["calls"] == 0.5
    assert rewards(sample("", [], "1", calls=1))["calls"] == 0
    assert rewards(sample("", [], "1", calls=0))["calls"] == 1


def test_needless_calls_cost_and_none_saved_pays():
    assert rewards(sample("1", [RIGHT] * 4, "1", calls=2))["frugal"] == 0.5
    assert rewards(sample("1", [RIGHT], "1", calls=2))["frugal"] == 1
    assert rewards(sample("2", [RIGHT], "1", calls=1))["frugal"] == 0


def test_an_answer_that_cannot_be_checked_is_left_out():
    assert math.isnan(rewards(sample("1"))["answer"])


def test_figures_of_conversations():
    told = figures([
        sample("1", [RIGHT], "1", calls=1),
        sample("2", [RIGHT, WRONG], "1", calls=2, new_wording=True),
        sample("1", [RIGHT], "1", calls=2),
        sample("anything"),
    ])  # fmt: skip
    assert told == {
        "success": pytest.approx(2 / 3), "success_1": 1, "success_2": 0.5, "success_new_wording": 0, "calls": 1,
        "turns": 2, "malformed_calls": 0.25, "call_malformed": 1, "ended_by_answer": 4,
    }  # fmt: skip
