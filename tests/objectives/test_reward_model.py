"""The Bradley-Terry loss by hand and on packed pairs."""

import math

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minimind import ModelConfig
from minimind.objectives.reward_model import RewardBatch, bradley_terry, reward_loss
from minimind.value_head import ValueModel
from tests.conftest import documents_batch
from tests.objectives.test_policy import DOCUMENTS, TINY, make

CHOSEN, REJECTED = [1.5, -0.25, 0.0, 30.0], [0.5, 1.0, 0.0, -40.0]


def column(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("centering", [0.0, 0.01, 1.0])
def test_losses_and_gradients_by_hand(centering):
    chosen, rejected = column(CHOSEN), column(REJECTED)
    losses = bradley_terry(chosen, rejected, centering)
    expected, slopes = [], []
    for c, r in zip(CHOSEN, REJECTED, strict=True):
        expected.append(math.log1p(math.exp(r - c)) + centering * (c + r) ** 2)
        wrong = 1 / (1 + math.exp(c - r))
        slopes.append([-wrong + 2 * centering * (c + r), wrong + 2 * centering * (c + r)])
    torch.testing.assert_close(losses.tolist(), expected, rtol=1e-12, atol=1e-15)
    found = torch.stack(torch.autograd.grad(losses.sum(), [chosen, rejected]), 1)
    torch.testing.assert_close(found.tolist(), slopes, rtol=1e-12, atol=1e-15)


def batch() -> RewardBatch:
    """Two pairs, one answer in both; the ends are of documents 2, 4 and 10, behind which prompts go on."""
    ids, cu = documents_batch(DOCUMENTS, 128, 97)
    targets = ids.roll(-1).masked_fill(torch.arange(512).view(4, 128) % 3 == 0, -100)
    ends = torch.tensor([126, 250, 510])
    return RewardBatch(ids, targets, cu, ends[[0, 1]], ends[[2, 2]], int(targets.ne(-100).sum()), 512, 2)


def test_scores_are_the_values_at_the_last_tokens():
    given, model = batch(), make(ValueModel)
    loss, aux, figures = reward_loss(model, given, 0.1)
    flat = given.input_ids.flatten()
    scores = {
        end: model(flat[start : end + 1][None]).values[0, -1].item()
        for start, end in ((100, 126), (191, 250), (453, 510))
    }
    c, r = [scores[126], scores[250]], [scores[510]] * 2
    assert loss.item() == pytest.approx(bradley_terry(column(c), column(r), 0.1).sum().item(), rel=1e-5)
    assert loss.dtype == torch.float32 and aux == 0
    expected = {
        "accuracy": sum(a > b for a, b in zip(c, r, strict=True)),
        "margin": sum(c) - sum(r),
        "chosen_score": sum(c),
        "rejected_score": sum(r),
    }
    assert {k: v.item() for k, v in figures.items()} == pytest.approx(expected, rel=1e-4, abs=1e-5)
    loss.backward()
    assert all(p.grad is not None for p in model.parameters())


def test_equal_scores_are_half_right():
    model = ValueModel(ModelConfig(**TINY))  # all values are 0
    loss, _, figures = reward_loss(model, batch())
    assert loss.item() == pytest.approx(2 * math.log(2)) and figures["accuracy"] == 1


def test_nothing_waits_for_the_device():
    with FakeTensorMode():
        ids, ends = torch.zeros(4, 128, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        given = RewardBatch(ids, ids, torch.zeros(15, dtype=torch.int32), ends, ends, 512, 512, 3)
        loss, _, _ = reward_loss(ValueModel(ModelConfig(**TINY)), given, 0.1)
        loss.backward()


def test_what_has_no_meaning_is_refused():
    with pytest.raises(ValueError, match=r"centering=-0\.1: must be 0 or more"):
        bradley_terry(column([1.0]), column([0.0]), -0.1)
