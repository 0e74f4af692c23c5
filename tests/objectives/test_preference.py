"""Preference losses against trl's numbers, gradients by hand, and float64 PyTorch over whole logits; Bradley-Terry."""

import math
from functools import lru_cache, partial
from itertools import pairwise

import pytest
import torch
from torch._subclasses.fake_tensor import FakeTensorMode

from minimind import ModelConfig, ops
from minimind.modeling import Model
from minimind.objectives.preference import (
    NEED_REFERENCE,
    OBJECTIVES,
    Pairs,
    PreferenceBatch,
    RewardBatch,
    bradley_terry,
    dpo,
    ipo,
    orpo,
    preference_loss,
    reward_loss,
    sequence_log_probs,
    simpo,
    with_sft,
)
from minimind.value_head import ValueModel
from tests.conftest import documents_batch
from tests.kernels.contract import EPS, assert_within, versions

TINY = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16,
            intermediate_size=96, vocab_size=97)  # fmt: skip
MOE = dict(num_experts=4, num_experts_per_tok=2, moe_intermediate_size=48, router_aux_loss_coef=0.1)
DOCUMENTS = [[1, 99, 28], [63, 65], [128], [17, 1, 1, 50, 59]]
CHOSEN, REJECTED = [2, 3, 9, 4], [1, 4, 8, 0]  # in other rows, one answer twice

C, R = [-12.5, -30.25, -3.0, -50.0], [-14.0, -28.0, -9.5, -50.5]
C_TOKENS, R_TOKENS = [5, 11, 3, 20], [7, 9, 4, 25]
C_REF, R_REF = [-13.0, -29.0, -3.5, -45.0], [-13.25, -29.5, -8.0, -52.0]


def pairs(grad: bool = False) -> Pairs:
    def column(numbers):
        return torch.tensor(numbers, dtype=torch.float64)

    columns = [column(n) for n in (C, R, C_TOKENS, R_TOKENS, C_REF, R_REF)]
    for policy in columns[:2]:
        policy.requires_grad_(grad)
    return Pairs(*columns)


# Of trl 1.16.0: DPOTrainer, CPOTrainer.cpo_loss and ORPOTrainer.odds_ratio_loss, in float64, for the pairs above.
TRL = {
    ("dpo", 0.1): [0.6325990353171691, 0.8400706676896001, 0.5981388693815918, 1.0700553357027158],
    ("dpo", 0.5): [0.42870067827651864, 1.600412651601648, 0.31326168751822286, 3.2880413716877865],
    ("ipo", 0.1): [22.971479591836733, 27.881600091827366, 19.876736111111107, 28.196100000000005],
    ("simpo", 0.0): [1.952977610526074, 0.7327920517660511, 0.13302107507286726, 1.9187499701346717],
    ("simpo", 0.1): [1.7729776105260742, 0.7250142739882733, 0.32802107507286726, 1.7427499701346718],
    ("orpo", 0.1): [-0.10116945952177048, -0.05204403027892113, -0.016230227425694466, -0.09970591962337494],
}


@pytest.mark.parametrize(("name", "number"), TRL)
def test_losses_are_trls(name, number):
    settings = {"gamma": 0.8, "label_smoothing": number} if name == "simpo" else {"beta": number}
    given = pairs()
    losses, rtol = OBJECTIVES[name](given, **settings).losses, 1e-12
    if name == "orpo":  # trl's is the odds ratio's term with the sign turned, apart from the SFT loss, in float32
        losses, rtol = -(losses + given.chosen / given.chosen_tokens), 4 * EPS
    torch.testing.assert_close(losses.tolist(), TRL[name, number], rtol=rtol, atol=0)


def sigmoid(x: float) -> float:
    return 1 / (1 + math.exp(-x))


def slopes(name: str, i: int, beta: float, smoothing: float, gamma: float) -> tuple[float, float]:
    """(d loss / d log p(c), d loss / d log p(r)) of pair i, by hand."""
    n_c, n_r = C_TOKENS[i], R_TOKENS[i]
    mean_c, mean_r = C[i] / n_c, R[i] / n_r
    ratio_c, ratio_r = C[i] - C_REF[i], R[i] - R_REF[i]
    if name == "ipo":
        slope = 2 * (ratio_c / n_c - ratio_r / n_r - 1 / (2 * beta))
        return slope / n_c, -slope / n_r
    if name == "orpo":
        odds_c, odds_r = (math.exp(m) / (1 - math.exp(m)) for m in (mean_c, mean_r))
        wrong = odds_r / (odds_c + odds_r)  # 1 - sigma(log odds_c - log odds_r)
        return (-1 / n_c - beta * wrong / (1 - math.exp(mean_c)) / n_c, beta * wrong / (1 - math.exp(mean_r)) / n_r)
    logit = beta * (ratio_c - ratio_r) if name == "dpo" else beta * (mean_c - mean_r) - gamma
    slope = beta * (sigmoid(logit) - (1 - smoothing))  # of the cross-entropy against the smoothed label
    return (slope, -slope) if name == "dpo" else (slope / n_c, -slope / n_r)


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("dpo", dict(beta=0.3)),
        ("dpo", dict(beta=0.3, label_smoothing=0.2)),
        ("ipo", dict(beta=0.7)),
        ("simpo", dict(beta=2.5, gamma=1.2)),
        ("simpo", dict(beta=2.5, gamma=1.2, label_smoothing=0.1)),
        ("orpo", dict(beta=0.4)),
    ],
)
def test_gradients_are_those_derived_by_hand(name, settings):
    given = pairs(grad=True)
    gradients = torch.autograd.grad(OBJECTIVES[name](given, **settings).losses.sum(), [given.chosen, given.rejected])
    beta, smoothing, gamma = (settings.get(k, 0.0) for k in ("beta", "label_smoothing", "gamma"))
    expected = [slopes(name, i, beta, smoothing, gamma) for i in range(4)]
    torch.testing.assert_close(torch.stack(gradients, 1).tolist(), [list(e) for e in expected], rtol=1e-12, atol=0)


def test_smoothed_dpo_is_the_mean_over_right_and_wrong_labels():
    swapped = Pairs(*(getattr(pairs(), n) for n in ("rejected", "chosen", "rejected_tokens", "chosen_tokens",
                                                    "reference_rejected", "reference_chosen")))  # fmt: skip
    expected = 0.8 * dpo(pairs()).losses + 0.2 * dpo(swapped).losses
    torch.testing.assert_close(dpo(pairs(), label_smoothing=0.2).losses, expected, rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", OBJECTIVES)
def test_an_sft_term_adds_the_chosen_answers_own_loss(name):
    plain, kept = OBJECTIVES[name](pairs()), with_sft(OBJECTIVES[name], 0.7)(pairs())
    own = [0.7 * -c / n for c, n in zip(C, C_TOKENS, strict=True)]
    torch.testing.assert_close((kept.losses - plain.losses).tolist(), own, rtol=1e-12, atol=1e-12)
    assert torch.equal(kept.chosen_rewards, plain.chosen_rewards)
    with pytest.raises(ValueError, match=r"sft_weight=-1: must be 0 or more"):
        with_sft(dpo, -1)


def make(kind: type[Model] = Model, **changes) -> Model:
    torch.manual_seed(0)
    model = kind(ModelConfig(**{**TINY, **changes}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.1)
    return model


def batch(reference: bool = True) -> PreferenceBatch:
    ids, cu = documents_batch(DOCUMENTS, 128, 97)
    generator = torch.Generator().manual_seed(1)
    targets = torch.randint(0, 97, ids.shape, generator=generator)
    targets.masked_fill_(torch.rand(ids.shape, generator=generator) < 0.4, -100)  # prompts
    targets[3, :17] = -100  # document 6, of no pair, has none
    scores = -torch.rand(2, 4, generator=generator, dtype=torch.float64) * 300 if reference else (None, None)
    count = int(targets.ne(-100).sum())
    return PreferenceBatch(ids, targets, cu, torch.tensor(CHOSEN), torch.tensor(REJECTED), count, count, 4, *scores)


@lru_cache(maxsize=3)
def by_whole_logits(version: str) -> tuple[list[torch.nn.Parameter], torch.Tensor, torch.Tensor]:
    """(parameters, log-probability of every document, its targets): one document at a time, all its logits."""
    given, model = batch(), versions(make(), terms=256)[version]
    ids, targets = given.input_ids.flatten(), given.targets.flatten()
    sums, tokens = [], []
    with ops.using("reference"):
        for start, end in pairwise(given.cu_seqlens.tolist()):
            log_p = model(ids[start:end][None]).logits[0].log_softmax(-1)
            kept = targets[start:end] != -100
            sums.append(log_p[kept].gather(1, targets[start:end][kept][:, None]).sum())
            tokens.append(kept.sum())
    return list(model.parameters()), torch.stack(sums), torch.stack(tokens)


def loss_of_whole_logits(version: str, name: str) -> list[torch.Tensor]:
    """[loss, its gradients]"""
    parameters, sums, tokens = by_whole_logits(version)
    dtype = parameters[0].dtype
    given = batch(name in NEED_REFERENCE)
    columns = [column[index] for column in (sums, tokens) for index in (given.chosen, given.rejected)]
    references = [None if r is None else r.to(dtype) for r in (given.reference_chosen, given.reference_rejected)]
    loss = OBJECTIVES[name](Pairs(*columns, *references)).losses.sum()
    return [loss, *torch.autograd.grad(loss, parameters, retain_graph=True)]


@pytest.mark.parametrize("name", OBJECTIVES)
def test_packed_rows_give_the_loss_and_gradients_of_whole_logits(name, ops_mode):
    others = [loss_of_whole_logits(version, name) for version in ("plain", "truth", "moved")]
    model = make()
    loss, aux, metrics = preference_loss(model, batch(name in NEED_REFERENCE), OBJECTIVES[name])
    assert loss.dtype == aux.dtype == torch.float32 and aux == 0
    mine = [loss, *torch.autograd.grad(loss, list(model.parameters()))]
    for value, plain, truth, moved in zip(mine, *others, strict=True):
        assert_within(value, plain, truth, moved=moved)
    assert metrics["margin"] == pytest.approx((metrics["chosen_reward"] - metrics["rejected_reward"]).item(), 1e-5)
    assert 0 <= metrics["accuracy"] <= 4 and not any(v.requires_grad for v in metrics.values())


def test_log_probabilities_of_documents():
    given, model = batch(), make()
    with torch.no_grad():
        log_probs, tokens, _ = sequence_log_probs(model, given.input_ids, given.targets, given.cu_seqlens)
    truth, plain = by_whole_logits("truth")[1].detach(), by_whole_logits("plain")[1].detach()
    assert log_probs.dtype == torch.float64 and tokens.sum() == given.num_targets
    assert_within(log_probs.to(plain.dtype), plain, truth)
    assert log_probs[6] == tokens[6] == 0
    padded = torch.cat((given.cu_seqlens, given.cu_seqlens[-1:].expand(5)))  # as batches of one shape are
    with torch.no_grad():
        more, _, _ = sequence_log_probs(model, given.input_ids, given.targets, padded)
    assert torch.equal(more[: len(log_probs)], log_probs) and not more[len(log_probs) :].any()


def test_a_model_that_is_its_reference_has_no_margin():
    given, model = batch(reference=False), make()
    with torch.no_grad():
        log_probs, _, _ = sequence_log_probs(model, given.input_ids, given.targets, given.cu_seqlens, given.num_targets)
    references = log_probs[given.chosen], log_probs[given.rejected]
    given = PreferenceBatch(given.input_ids, given.targets, given.cu_seqlens, given.chosen, given.rejected,
                            given.num_targets, given.num_targets, 4, *references)  # fmt: skip
    loss, _, metrics = preference_loss(model, given, dpo)
    assert loss.item() == pytest.approx(4 * math.log(2), rel=1e-7)
    assert metrics["margin"] == metrics["accuracy"] == 0


def test_metrics_are_sums_over_pairs():
    result = dpo(pairs(), beta=0.1)
    chosen = [0.1 * (c - ref) for c, ref in zip(C, C_REF, strict=True)]
    rejected = [0.1 * (r - ref) for r, ref in zip(R, R_REF, strict=True)]
    torch.testing.assert_close(result.chosen_rewards.tolist(), chosen)
    torch.testing.assert_close(result.rejected_rewards.tolist(), rejected)


def test_gradients_of_pairs_add_up_over_micro_batches():
    """Two halves add up to the whole, whichever pairs share a batch."""
    given, gradients = batch(), []
    for parts in ([slice(0, 4)], [slice(0, 2), slice(2, 4)]):
        model = make()
        for part in parts:
            half = PreferenceBatch(
                given.input_ids, given.targets, given.cu_seqlens, given.chosen[part], given.rejected[part],
                given.num_targets, given.num_targets, 4, given.reference_chosen[part], given.reference_rejected[part],
            )  # fmt: skip
            preference_loss(model, half, dpo)[0].backward()
        gradients.append([p.grad for p in model.parameters()])
    for whole, halves in zip(*gradients, strict=True):
        torch.testing.assert_close(halves, whole, rtol=1e-4, atol=1e-6)


def test_a_rank_without_pairs_takes_part():
    given, model = batch(), make()
    none = torch.empty(0, dtype=torch.int64)
    counts = given.num_targets, given.num_targets, 4
    empty = PreferenceBatch(given.input_ids, given.targets, given.cu_seqlens, none, none, *counts)
    loss, _, metrics = preference_loss(model, empty, simpo)
    loss.backward()
    assert loss == 0 and metrics["accuracy"] == 0
    assert all(p.grad is not None and not p.grad.any() for p in model.parameters())


@pytest.mark.parametrize("objective", [ipo, simpo, orpo])
def test_certain_answers_and_answers_without_tokens_stay_finite(objective):
    log_p = torch.tensor([0.0, -1e-9, -1e-3, -2000.0], dtype=torch.float64, requires_grad=True)
    tokens = torch.tensor([0.0, 5.0, 5.0, 5.0], dtype=torch.float64)
    for order in ([0, 1, 2, 3], [3, 2, 1, 0]):
        given = Pairs(log_p, log_p[order], tokens, tokens[order], torch.zeros(4), torch.zeros(4))
        losses = objective(given).losses
        assert losses.isfinite().all()
        assert torch.autograd.grad(losses.sum(), log_p)[0].isfinite().all()


def test_the_auxiliary_loss_comes_along():
    model = make(**MOE)
    loss, aux, _ = preference_loss(model, batch(), dpo)
    (loss + aux).backward()
    assert aux > 0 and all(layer.mlp.router.weight.grad.any() for layer in model.layers)


def test_nothing_waits_for_the_device_and_no_logits_are_kept():
    """Fake tensors have no values, so that reading one fails."""
    with FakeTensorMode():
        model = Model(ModelConfig(**TINY))
        ids = torch.zeros(4, 128, dtype=torch.int64)
        bounds, index = torch.zeros(15, dtype=torch.int32), torch.zeros(3, dtype=torch.int64)
        scores = torch.zeros(3, dtype=torch.float64)
        given = PreferenceBatch(ids, ids, bounds, index, index, 512, 512, 3, scores, scores)
        for objective in OBJECTIVES.values():
            kept: list[int] = []
            with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.numel()) or t, lambda t: t):  # noqa: B023
                loss, _, _ = preference_loss(model, given, objective)
            loss.backward()
            assert kept and 512 * 97 not in kept


def test_bad_settings_are_refused():
    given = batch(reference=False)
    for objective in (dpo, ipo):
        with pytest.raises(ValueError, match="no reference log-probabilities; compute them with pair_log_probs"):
            preference_loss(make(), given, objective)
    for objective in OBJECTIVES.values():
        with pytest.raises(ValueError, match="beta=0: must be above 0"):
            preference_loss(make(), batch(), partial(objective, beta=0))
    with pytest.raises(ValueError, match=r"label_smoothing=0\.5"):
        dpo(pairs(), label_smoothing=0.5)


CHOSEN_SCORES, REJECTED_SCORES = [1.5, -0.25, 0.0, 30.0], [0.5, 1.0, 0.0, -40.0]


def column(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64, requires_grad=True)


@pytest.mark.parametrize("centering", [0.0, 0.01, 1.0])
def test_bradley_terry_and_its_gradient_by_hand(centering):
    chosen, rejected = column(CHOSEN_SCORES), column(REJECTED_SCORES)
    losses = bradley_terry(chosen, rejected, centering)
    expected, slopes = [], []
    for c, r in zip(CHOSEN_SCORES, REJECTED_SCORES, strict=True):
        expected.append(math.log1p(math.exp(r - c)) + centering * (c + r) ** 2)
        wrong = 1 / (1 + math.exp(c - r))
        slopes.append([-wrong + 2 * centering * (c + r), wrong + 2 * centering * (c + r)])
    torch.testing.assert_close(losses.tolist(), expected, rtol=1e-12, atol=1e-15)
    found = torch.stack(torch.autograd.grad(losses.sum(), [chosen, rejected]), 1)
    torch.testing.assert_close(found.tolist(), slopes, rtol=1e-12, atol=1e-15)


def scored_pairs() -> RewardBatch:
    """Two pairs, one answer in both; the answers end within documents 2, 4 and 10."""
    ids, cu = documents_batch(DOCUMENTS, 128, 97)
    targets = ids.roll(-1).masked_fill(torch.arange(512).view(4, 128) % 3 == 0, -100)
    ends = torch.tensor([126, 250, 510])
    return RewardBatch(ids, targets, cu, ends[[0, 1]], ends[[2, 2]], int(targets.ne(-100).sum()), 512, 2)


def test_scores_are_the_values_at_the_last_tokens():
    given, model = scored_pairs(), make(ValueModel)
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
    loss, _, figures = reward_loss(model, scored_pairs())
    assert loss.item() == pytest.approx(2 * math.log(2)) and figures["accuracy"] == 1


def test_no_reward_loss_waits_for_the_device():
    with FakeTensorMode():
        ids, ends = torch.zeros(4, 128, dtype=torch.int64), torch.zeros(3, dtype=torch.int64)
        given = RewardBatch(ids, ids, torch.zeros(15, dtype=torch.int32), ends, ends, 512, 512, 3)
        loss, _, _ = reward_loss(ValueModel(ModelConfig(**TINY)), given, 0.1)
        loss.backward()


def test_a_negative_centering_is_refused():
    with pytest.raises(ValueError, match=r"centering=-0\.1: must be 0 or more"):
        bradley_terry(column([1.0]), column([0.0]), -0.1)
