"""SPO's tracker against its formulas, what it converges to, and that it goes on exactly."""

import io

import numpy as np
import pytest
import torch

from minimind.objectives.value_tracker import ValueTracker


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
    tracker.begin(np.array([0, 0, 0, 0]), np.array([3.0, 3.0, 3.0, -1.0]))
    assert tracker.values()[0] == 2.0


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
    with pytest.raises(ValueError, match="4 different prompts were asked for, but there are 3"):
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


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ValueError, match=r"a reward is NaN"):
        ValueTracker(2).observe(np.array([0]), np.array([np.nan]))
    with pytest.raises(ValueError, match=r"rho_min=0\.9, rho_max=0\.8"):
        ValueTracker(2, rho_min=0.9, rho_max=0.8)
    with pytest.raises(ValueError, match=r"rewards from 1 to 0"):
        ValueTracker(2, low=1, high=0)
    with pytest.raises(ValueError, match=r"drift nan: the policy's log-probabilities moved by no finite number"):
        ValueTracker(2).advance(float("nan"))
