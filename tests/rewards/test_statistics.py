"""Figures, normalisation and the watch over rewards."""

import math

import numpy as np
import pytest

from minimind.rewards import RewardScale, Scores, SignalWatch, degenerate, summary


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


def test_a_lost_signal_is_reported_once():
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


def test_the_running_figures_are_those_of_all_rewards_so_far():
    """Within the rounding of sums of 900 numbers near 1000."""
    rng = np.random.default_rng(0)
    scale, seen = RewardScale(running=True), np.zeros(0)
    for size in (1, 7, 400, 3, 489):
        rewards = 1000 + 3 * rng.normal(size=size)
        seen = np.concatenate((seen, rewards))
        scores, figures = scale(rewards)
        assert scale.mean == pytest.approx(seen.mean(), rel=1e-14)
        assert scale.deviation == pytest.approx(seen.std(), rel=1e-10)
        assert figures == {"reward_mean": scale.mean, "reward_deviation": scale.deviation}
        if size > 1:
            assert scores == pytest.approx((rewards - seen.mean()) / seen.std(), rel=1e-6, abs=1e-9)
    again = RewardScale(running=True)
    again.load_state_dict(scale.state_dict())
    assert again(rewards)[0].tolist() == scale(rewards)[0].tolist()


def test_equal_rewards_are_scaled_to_zero():
    scores, _ = RewardScale(running=True)(np.full(5, 0.1))
    assert np.abs(scores).max() < 1e-6  # a rounding of 0.1 over the deviation's 1e-8


def test_rewards_outside_the_clip_count_as_its_nearer_end():
    scores, figures = RewardScale((-1.0, 2.0))(np.array([-5.0, 0.5, 2.0, 7.0]))
    assert scores.tolist() == [-1.0, 0.5, 2.0, 2.0] and figures == {"reward_clipped": 0.5}
    rewards = np.array([-5.0, 7.0])
    plain, none = RewardScale()(rewards)
    assert plain.tolist() == rewards.tolist() and none == {}
    with pytest.raises(ValueError, match="--reward-clip 1 0: give the lower end first"):
        RewardScale((1.0, 0.0))
