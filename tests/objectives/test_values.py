"""The critic's loss by hand, on its own trunk and on the policy's."""

import dataclasses
from functools import partial

import pytest
import torch

from minimind.objectives.policy import policy_loss
from minimind.objectives.surrogates import clip
from minimind.objectives.values import actor_critic_loss, explained_variance, value_loss, value_losses, value_room
from minimind.value_head import ValueModel
from tests.objectives.test_policy import batch, make

EPS = torch.finfo(torch.float32).eps


def column(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def test_losses_and_gradients_by_hand():
    """(V, V old, return): within the bound; beyond it and past the return; beyond it on the way there."""
    values, old, returns = column([0.1, 0.9, 0.9, -0.9]), column([0.0] * 4), column([1.0, 0.0, 2.0, -2.0])
    values.requires_grad_()
    losses, clipped = value_losses(values, old, returns, column([0.2] * 4))
    expected = [0.9**2 / 2, 0.9**2 / 2, 1.8**2 / 2, 1.8**2 / 2]
    torch.testing.assert_close(losses.tolist(), expected, rtol=1e-14, atol=0)
    (slopes,) = torch.autograd.grad(losses.sum(), values)
    torch.testing.assert_close(slopes.tolist(), [-0.9, 0.9, 0.0, 0.0], rtol=1e-14, atol=0)
    assert clipped.tolist() == [False, False, True, True]
    plain, _ = value_losses(values, None, returns, None)
    torch.testing.assert_close(plain.tolist(), [0.9**2 / 2, 0.9**2 / 2, 1.1**2 / 2, 1.1**2 / 2])


@pytest.mark.parametrize("aggregation", ["token", "sample", "constant"])
def test_a_critic_on_packed_rows(aggregation):
    given, critic = batch(aggregation=aggregation), make(ValueModel)
    given = dataclasses.replace(given, value_room=torch.full_like(given.returns, 0.2))
    loss, aux, figures = value_loss(critic, given)
    assert aux == 0 and loss.dtype == torch.float32
    at = given.sampled()
    values = critic(given.input_ids, cu_seqlens=given.cu_seqlens).values
    losses, clipped = value_losses(
        at.take(values), at.take(given.old_values), at.take(given.returns), at.take(given.value_room)
    )
    if aggregation == "sample":
        losses = losses / at.lengths()[at.samples]
    assert loss.item() == pytest.approx(losses.sum().item(), rel=1e-5)
    means = {k: v.item() / given.global_weight for k, v in figures.items()}
    assert means["value"] == pytest.approx(at.take(values).mean().item(), rel=1e-5)
    assert means["return"] == pytest.approx(at.take(given.returns).mean().item(), rel=1e-5)
    assert means["value_clipped"] == pytest.approx(clipped.double().mean().item(), rel=1e-5)
    loss.backward()
    assert critic.value_head.weight.grad.any()


def test_a_shared_trunk_learns_from_both():
    given, model = batch(), make(ValueModel)
    total, _, figures = actor_critic_loss(model, given, clip, value_weight=0.3, entropy=True)
    policy, _, policy_figures = policy_loss(model, given, clip, entropy=True)
    value, _, value_figures = value_loss(model, given)
    assert total.item() == pytest.approx((policy + 0.3 * value).item(), rel=1e-5)
    assert figures.keys() == policy_figures.keys() | value_figures.keys()
    whole = torch.autograd.grad(total, list(model.parameters()))
    parts = torch.autograd.grad(policy + 0.3 * value, list(model.parameters()))
    for mine, truth in zip(whole, parts, strict=True):
        torch.testing.assert_close(mine, truth, rtol=1e-4, atol=1e-5)


def test_the_room_of_values_is_in_units_of_what_they_are_off_by():
    """Rewards ten times as large move values ten times as far; a clip in units of 1 would hold them back."""
    values, returns = column([0.0, 1.0, 0.0]), column([3.0, 1.0, -4.0])
    room = value_room(values, returns, 0.2)
    assert room.item() == pytest.approx(0.2 * (25 / 3) ** 0.5, rel=1e-14)
    assert value_room(10 * values, 10 * returns, 0.2) == pytest.approx(10 * room.item(), rel=1e-14)
    assert value_room(values + 7, returns + 7, 0.2) == pytest.approx(room.item(), rel=1e-14)


def test_explained_variance():
    returns = column([1.0, 2.0, 4.0])
    assert explained_variance(returns, returns) == 1
    assert explained_variance(column([0.0, 0.0, 0.0]), returns) == 0
    assert explained_variance(-returns, returns) == -3
    assert explained_variance(returns, column([2.0, 2.0, 2.0])) == 0


def test_what_has_no_meaning_is_refused():
    given, model = batch(), make(ValueModel)
    given = dataclasses.replace(given, value_room=torch.full_like(given.returns, 0.2))
    for change, message in (({"returns": None}, "no returns"), ({"old_values": None}, "no old_values")):
        with pytest.raises(ValueError, match=message):
            value_loss(model, dataclasses.replace(given, **change))
    with pytest.raises(ValueError, match=r"--value-clip 0: must be above 0"):
        value_room(column([1.0]), column([2.0]), 0)
    with pytest.raises(ValueError, match="value_weight=0"):
        actor_critic_loss(model, given, partial(clip, low=0.1), value_weight=0)
