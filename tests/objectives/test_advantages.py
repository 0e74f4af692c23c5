"""Advantages against loops as the papers write them."""

import math
import random
import statistics

import pytest
import torch

from minimind.objectives.advantages import (
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
    """Answers of 3, 1 and 2 tokens; a critic that is right has none, whatever the other states' values."""
    samples = torch.tensor([0, 0, 0, 1, 2, 2])
    rewards, values = column([0.1, 0.2, 2.0, 1.0, -0.3, 5.0]), column([4.0, 7.0, 7.0, 1.0, -2.0, 9.0])
    told = [0.1 + 0.2 * gamma + 2 * gamma**2, 1.0, -0.3 + 5 * gamma]
    shift = value_shift(rewards, values, samples, gamma)
    assert shift.item() == pytest.approx(sum(told) / 3 - (4.0 + 1.0 - 2.0) / 3, rel=1e-14)
    assert value_shift(rewards, values + shift, samples, gamma).item() == pytest.approx(0, abs=1e-14)
    assert value_shift(column([]), column([]), samples[:0], gamma) == 0


def test_shifted_advantages_of_a_new_critic_are_of_quality_and_not_of_place():
    """Values of 0: unshifted, an answer's last token is better than its first whatever it was worth."""
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
    with pytest.raises(ValueError, match=r"kl_coef=0\.1 needs the log-probabilities"):
        token_rewards(scores, samples, kl_coef=0.1)


def test_whitened_numbers_are_those_of_all_ranks():
    """Ranks of different size, one without numbers; the sums over all of them come from elsewhere."""
    parts = [column([1.0, 5.0, -2.0]), column([0.5]), column([])]
    whole = torch.cat(parts)
    squares = (whole - whole.mean()).square().sum().reshape(1)
    expected = (whole - whole.mean()) / (whole.var(correction=0) + 1e-8).sqrt()
    sent: list[torch.Tensor] = []

    def all_reduce(figures: torch.Tensor) -> torch.Tensor:
        sent.append(figures)
        return column([4.0, 4.5]) if len(figures) == 2 else squares

    found = torch.cat([whiten(part, all_reduce=all_reduce) for part in parts])
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)
    assert torch.stack(sent[::2]).sum(0).tolist() == [4.0, 4.5]  # what the ranks say of themselves adds up
    torch.testing.assert_close(torch.stack(sent[1::2]).sum(0), squares, rtol=1e-12, atol=0)
    kept = torch.cat([whiten(part, shift_mean=False, all_reduce=all_reduce) for part in parts])
    torch.testing.assert_close(kept, expected + whole.mean(), rtol=1e-12, atol=0)
    torch.testing.assert_close(whiten(whole), expected, rtol=1e-12, atol=0)


def test_equal_numbers_whiten_to_zero():
    assert whiten(column([0.1, 0.1, 0.1])).abs().max() < 1e-11
