"""Advantages against loops written as in the papers, and the value tracker."""

import io
import math
import random
import statistics

import numpy as np
import pytest
import torch

from minimind.objectives.advantages import (
    ValueTracker,
    degenerate_groups,
    gae,
    group_advantages,
    leave_one_out,
    token_rewards,
    value_shift,
    whiten,
)


def column(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


# Groups in any order: 0 has three samples, 1 equal ones, 2 a single one, 3 none, 4 two.
REWARDS = [1.0, 0.1, 0.5, 0.25, 0.1, 3.0, -2.0, 0.1, 4.0]
GROUPS = [0, 1, 0, 2, 1, 4, 0, 1, 4]


def rewards_of(group: int) -> list[float]:
    return [r for r, g in zip(REWARDS, GROUPS, strict=True) if g == group]


def by_hand(std: str) -> list[float]:
    out = []
    centred = []
    for r, g in zip(REWARDS, GROUPS, strict=True):
        mine = rewards_of(g)
        centred.append(0.0 if len(set(mine)) == 1 else r - statistics.fmean(mine))
    batch = math.sqrt(sum(c * c for c in centred) / (len(centred) - 1))
    for c, g in zip(centred, GROUPS, strict=True):
        mine = rewards_of(g)
        own = statistics.stdev(mine) if len(mine) > 1 else 0.0
        out.append(c / {"group": own + 1e-4, "batch": batch + 1e-4, "none": 1.0}[std])
    return out


@pytest.mark.parametrize("std", ["group", "batch", "none"])
def test_group_advantages(std):
    found = group_advantages(column(REWARDS), torch.tensor(GROUPS), 5, std)
    torch.testing.assert_close(found.tolist(), by_hand(std), rtol=1e-12, atol=1e-15)
    for place, group in enumerate(GROUPS):
        if group in (1, 2):  # the mean of three 0.1 is not 0.1: divided by eps that would be an advantage
            assert found[place] == 0


def test_trls_numbers():
    """Of trl 1.16.0: GRPOTrainer's (r - mean) / (nanstd + 1e-4) in groups of four."""
    rewards = column([0.0, 1.0, 1.0, 0.25, 2.0, 2.5, -1.0, 0.0])
    expected = [-1.0911985727810622, 0.8487100010519373, 0.8487100010519373, -0.6062214293228123,
                0.6809436885869574, 0.9835853279589385, -1.134906147644929, -0.5296228689009669]  # fmt: skip
    found = group_advantages(rewards, torch.arange(8) // 4, 2)
    torch.testing.assert_close(found.tolist(), expected, rtol=5e-8, atol=0)  # its counts are float32


def test_leave_one_out_compares_with_the_others():
    found = leave_one_out(column(REWARDS), torch.tensor(GROUPS), 5).tolist()
    for value, r, g in zip(found, REWARDS, GROUPS, strict=True):
        others = rewards_of(g)
        others.remove(r)
        expected = r - statistics.fmean(others) if others and len(set(rewards_of(g))) > 1 else 0.0
        assert value == pytest.approx(expected, abs=1e-15)


def test_degenerate_groups():
    assert degenerate_groups(column(REWARDS), torch.tensor(GROUPS), 5).tolist() == [False, True, True, True, False]


def gae_by_loop(rewards, values, samples, gamma, lam, bootstrap):
    advantages = [0.0] * len(rewards)
    for t in reversed(range(len(rewards))):
        last = t + 1 == len(rewards) or samples[t + 1] != samples[t]
        following = bootstrap[samples[t]] if last else values[t + 1]
        advantages[t] = rewards[t] + gamma * following - values[t]
        if not last:
            advantages[t] += gamma * lam * advantages[t + 1]
    return advantages


@pytest.mark.parametrize("lengths", [[1], [1, 1, 1], [5, 1, 63, 2, 123], [507]], ids=str)
@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 1.0), (0.9, 0.8), (1.0, 0.0), (0.0, 0.95)])
def test_gae_is_the_loop_backwards(lengths, gamma, lam):
    rng = random.Random(0)
    samples = [2 * i for i, n in enumerate(lengths) for _ in range(n)]  # every second has no token
    rewards = [rng.gauss(0, 1) for _ in samples]
    values = [rng.gauss(0, 1) for _ in samples]
    bootstrap = [rng.gauss(0, 1) if i % 4 == 0 else 0.0 for i in range(2 * len(lengths))]
    columns = column(rewards), column(values), torch.tensor(samples), gamma, lam
    advantages, returns = gae(*columns, column(bootstrap))
    truth = gae_by_loop(rewards, values, samples, gamma, lam, bootstrap)
    torch.testing.assert_close(advantages.tolist(), truth, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(returns, advantages + column(values), rtol=0, atol=0)
    ended, _ = gae(*columns)
    torch.testing.assert_close(
        ended.tolist(),
        gae_by_loop(rewards, values, samples, gamma, lam, [0.0] * 2 * len(lengths)),
        rtol=1e-12,
        atol=1e-12,
    )


def test_gae_takes_float32_and_nothing():
    none = torch.empty(0)
    advantages, returns = gae(none, none, torch.empty(0, dtype=torch.int64))
    assert advantages.shape == returns.shape == (0,) and advantages.dtype == torch.float64
    one, _ = gae(torch.tensor([0.5]), torch.tensor([0.25]), torch.tensor([3]))
    assert one.tolist() == [0.25]
    with pytest.raises(ValueError, match=r"gamma=1\.5, lam=0\.95: both must lie in \[0, 1\]"):
        gae(none, none, torch.empty(0, dtype=torch.int64), gamma=1.5)


@pytest.mark.parametrize("gamma", [1.0, 0.9])
def test_the_shift_is_what_the_first_states_miss(gamma):
    """Answers of 3, 1 and 2 tokens. The shift of a correct critic is 0, whatever the values of other states."""
    samples = torch.tensor([0, 0, 0, 1, 2, 2])
    rewards, values = column([0.1, 0.2, 2.0, 1.0, -0.3, 5.0]), column([4.0, 7.0, 7.0, 1.0, -2.0, 9.0])
    rewards_to_go = [0.1 + 0.2 * gamma + 2 * gamma**2, 1.0, -0.3 + 5 * gamma]
    shift = value_shift(rewards, values, samples, gamma)
    assert shift.item() == pytest.approx(sum(rewards_to_go) / 3 - (4.0 + 1.0 - 2.0) / 3, rel=1e-14)
    assert value_shift(rewards, values + shift, samples, gamma).item() == pytest.approx(0, abs=1e-14)
    assert value_shift(column([]), column([]), samples[:0], gamma) == 0


def test_shifted_advantages_of_a_new_critic_are_of_quality_and_not_of_place():
    """With values of 0 and no shift, an answer's last token looks better than its first, whatever its quality."""
    samples, scores = torch.tensor([0] * 40 + [1] * 40), column([1.4, 1.2])
    rewards, values = token_rewards(scores, samples), column([0.0] * 80)
    plain, _ = gae(rewards, values, samples)
    assert (plain[[39, 79]] > 1).all() and (plain[[0, 40]] < 0.2).all()
    shifted, returns = gae(rewards, values + value_shift(rewards, values, samples), samples)
    assert (shifted[:40] > 0).all() and (shifted[40:] < 0).all()
    assert returns.min() > 1.19 and returns.max() < 1.41  # and not near 0 at the beginning


def test_rewards_of_tokens():
    samples, scores = torch.tensor([0, 0, 2, 3, 3, 3]), column([1.0, 99.0, -2.0, 0.5])
    assert token_rewards(scores, samples).tolist() == [0, 1.0, -2.0, 0, 0, 0.5]
    log_p, reference = (column([-1.0, -2.0, -0.5, -1.0, -1.0, -3.0]), column([-1.5, -1.0, -0.5, -1.0, -2.0, -1.0]))
    found = token_rewards(scores, samples, log_p, reference, 0.1)
    expected = [-0.05, 1.0 + 0.1, -2.0, 0.0, -0.1, 0.5 + 0.2]
    torch.testing.assert_close(found.tolist(), expected, rtol=1e-12, atol=1e-15)
    with pytest.raises(ValueError, match=r"kl_coef=0\.1 needs log_probs and reference"):
        token_rewards(scores, samples, kl_coef=0.1)


def test_whitened_numbers_have_mean_0_and_variance_1():
    x = column([1.0, 5.0, -2.0, 0.5])
    expected = (x - x.mean()) / (x.var(correction=0) + 1e-8).sqrt()
    torch.testing.assert_close(whiten(x), expected, rtol=1e-12, atol=0)
    assert whiten(column([])).shape == (0,)


def test_equal_numbers_whiten_to_zero():
    assert whiten(column([0.1, 0.1, 0.1])).abs().max() < 1e-11


def test_by_hand():
    """Prior of 8 answers at 1/2; rho falls with the drift between its bounds."""
    tracker = ValueTracker(3)
    assert tracker.prior == 8 and tracker.values().tolist() == [0.5, 0.5, 0.5]
    advantages = tracker.observe(np.array([0, 2]), np.array([1.0, 0.0]))
    assert advantages.tolist() == [0.5, -0.5]  # against the value from before
    a, b = 0.96 * 4 + 1, 0.96 * 4  # no drift: no more is kept than rho_max
    assert tracker.values() == pytest.approx([a / (a + b), 0.5, b / (a + b)], rel=1e-14)
    tracker.advance(0.004)
    rho = 2 ** (-0.004 / 0.06)
    assert tracker.remembered(0) == pytest.approx(rho) and 0.875 < rho < 0.96
    tracker.observe(np.array([0]), np.array([0.5]))
    a, b = rho * a + 0.5, rho * b + 0.5
    assert tracker.values()[0] == pytest.approx(a / (a + b), rel=1e-14)
    tracker.advance(1.0)
    assert tracker.remembered(0) == tracker.remembered(1) == 0.875


def test_rewards_of_another_range_and_several_answers_at_once():
    tracker = ValueTracker(2, low=-1.0, high=3.0)
    assert tracker.values().tolist() == [1.0, 1.0]
    advantages = tracker.observe(np.array([1, 1]), np.array([3.0, -1.0]))
    assert advantages.tolist() == [2.0, -2.0]
    first = 0.96 * 4 + 1, 0.96 * 4
    a, b = 0.96 * first[0], 0.96 * first[1] + 1
    assert tracker.values()[1] == pytest.approx(-1 + 4 * a / (a + b), rel=1e-14)


def test_rewards_outside_the_range_count_as_its_ends_and_are_counted():
    tracker, held = ValueTracker(3, low=-1.0, high=1.0), ValueTracker(3, low=-1.0, high=1.0)
    everyone = np.arange(3)
    found = tracker.observe(everyone, np.array([7.5, -3.0, 0.5]))
    assert found.tolist() == held.observe(everyone, np.array([1.0, -1.0, 0.5])).tolist() == [1.0, -1.0, 0.5]
    assert tracker.values().tolist() == held.values().tolist()
    assert (tracker.clamped, held.clamped) == (2, 0)
    again = ValueTracker(3)
    again.load_state_dict(tracker.state_dict())
    assert again.clamped == 2


def test_it_follows_a_success_rate_that_changes():
    """Within the noise of the some 25 answers that it remembers (standard error 0.09)."""
    rng, tracker = np.random.default_rng(0), ValueTracker(200)
    everyone = np.arange(200)
    for rate in (0.9, 0.2):
        for _ in range(100):
            tracker.observe(everyone, (rng.random(200) < rate).astype(float))
        values = tracker.values()
        assert abs(values.mean() - rate) < 0.02 and values.std() < 0.1
    still = ValueTracker(1, rho_max=0.999)
    for _ in range(5000):
        still.observe(np.array([0]), np.array([0.3]))
    assert still.values()[0] == pytest.approx(0.3, abs=1e-3)


def test_uncertain_prompts_are_drawn_most_often():
    tracker = ValueTracker(3)
    for _ in range(100):
        tracker.observe(np.array([0, 1, 1]), np.array([1.0, 1.0, 0.0]))
    weights = tracker.weights()
    values = tracker.values()
    expected = np.sqrt(values * (1 - values)) + 0.05
    assert weights == pytest.approx(expected / expected.sum(), rel=1e-14)
    assert weights[0] < 0.25 * weights[1]
    rng = np.random.default_rng(0)
    drawn = np.bincount([tracker.draw(1, rng)[0] for _ in range(4000)], minlength=3) / 4000
    assert drawn == pytest.approx(weights, abs=4 * 0.5 / 4000**0.5)
    assert sorted(tracker.draw(3, rng)) == [0, 1, 2]
    with pytest.raises(ValueError, match="cannot draw 4 different prompts: there are only 3"):
        tracker.draw(4, rng)


def test_it_goes_on_to_the_bit():
    def steps(tracker: ValueTracker, rng: np.random.Generator) -> list[float]:
        for _ in range(20):
            prompts = tracker.draw(4, rng)
            tracker.observe(prompts, rng.random(4))
            tracker.advance(rng.random() * 0.02)
        return tracker.values().tolist()

    whole, first = ValueTracker(10), ValueTracker(10)
    rng = np.random.default_rng(1)
    steps(whole, rng)
    steps(first, np.random.default_rng(1))
    state = first.state_dict()
    steps(first, np.random.default_rng(5))  # what was handed out is a copy
    # as a checkpoint keeps it: tensors, loaded with weights_only
    file = io.BytesIO()
    torch.save({k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state.items()}, file)
    file.seek(0)
    second = ValueTracker(10)
    second.load_state_dict(torch.load(file, weights_only=True))
    later = np.random.default_rng(2)
    assert steps(second, later) == steps(whole, np.random.default_rng(2))
    with pytest.raises(ValueError, match="the checkpoint tracks 10 prompts, the data has 11"):
        ValueTracker(11).load_state_dict(state)


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match=r"a reward is NaN"):
        ValueTracker(2).observe(np.array([0]), np.array([np.nan]))
    with pytest.raises(ValueError, match=r"rho_min=0\.9, rho_max=0\.8"):
        ValueTracker(2, rho_min=0.9, rho_max=0.8)
    with pytest.raises(ValueError, match=r"rewards from 1 to 0"):
        ValueTracker(2, low=1, high=0)
    with pytest.raises(ValueError, match=r"drift nan: the policy's log-probabilities are no longer finite"):
        ValueTracker(2).advance(float("nan"))
