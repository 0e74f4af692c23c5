"""Clipping and running normalisation of rewards."""

from __future__ import annotations

import numpy as np
import pytest

from minimind.rewards import RewardScale


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


def test_equal_rewards_are_worth_nothing():
    scores, _ = RewardScale(running=True)(np.full(5, 0.1))
    assert np.abs(scores).max() < 1e-6  # a rounding of 0.1 over the deviation's 1e-8


def test_what_lies_outside_counts_as_the_nearer_end():
    scores, figures = RewardScale((-1.0, 2.0))(np.array([-5.0, 0.5, 2.0, 7.0]))
    assert scores.tolist() == [-1.0, 0.5, 2.0, 2.0] and figures == {"reward_clipped": 0.5}
    rewards = np.array([-5.0, 7.0])
    plain, none = RewardScale()(rewards)
    assert plain.tolist() == rewards.tolist() and none == {}
    with pytest.raises(ValueError, match="--reward-clip 1 0: the first must be the lower one"):
        RewardScale((1.0, 0.0))
