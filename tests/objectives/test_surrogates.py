"""Surrogate objectives against trl's numbers and gradients by hand, and the properties of the KL estimate."""

import math
from functools import partial

import pytest
import torch

from minimind.objectives.policy import aggregate
from minimind.objectives.surrogates import (
    ALGORITHMS,
    PolicyTokens,
    SampledTokens,
    cispo,
    clip,
    gspo,
    kl_estimates,
    with_entropy,
    with_kl,
)

LENGTHS = [3, 1, 4]
SAMPLES = [0, 0, 0, 1, 3, 3, 3, 3]  # sample 2 has no token
LOG_P = [-0.5, -2.0, -0.1, -1.25, -3.0, -0.75, -0.2, -1.5]
OLD = [-0.9, -1.9, -0.35, -1.0, -2.8, -1.5, -0.25, -0.4]
REFERENCE = [-0.6, -2.5, -0.1, -1.5, -2.0, -0.8, -0.9, -1.4]
ADVANTAGES = [1.5] * 3 + [-0.75] + [-1.25] * 4
ENTROPY = [0.5, 1.0, 0.2, 0.7, 2.0, 0.9, 0.1, 1.1]


def column(numbers) -> torch.Tensor:
    return torch.tensor(numbers, dtype=torch.float64)


def tokens(log_p=LOG_P, advantages=ADVANTAGES, old_log_probs=OLD, samples=SAMPLES) -> PolicyTokens:
    at = SampledTokens(torch.arange(len(log_p)), torch.tensor(samples), 4)
    entropy = column(ENTROPY[: len(log_p)]).requires_grad_()
    return PolicyTokens(at, column(log_p).requires_grad_(), column(old_log_probs), column(advantages),
                        column(REFERENCE[: len(log_p)]), entropy)  # fmt: skip


# Of trl 1.16.0, GRPOTrainer._compute_loss in float64 on the three samples with tokens: (loss, its gradient by log p).
# They are its numbers for conversations too: with two tokens of a tool's result behind each sample's first token, which
# its tool_mask leaves out, loss and gradient are these, and the gradient of the tool's tokens is 0.
TRL = {
    "grpo": (0.15178966263409896, [0.0004229448087290687, -0.14905748371582717, 0.0, 0.0029493228923812686,
             0.0795568473507596, 0.2206834036488179, 0.11118545485986447, -0.0003505697269188257]),
    "dapo": (0.17331202569117646, [0.0, -0.16965701588174242, 0.0, 0.0, 0.12792668016843464, 0.33078125259573044,
             0.16426110880875378, 0.0]),
    "dr_grpo": (0.09036090030718955, [0.0, -0.07540311816966329, 0.0, 0.0, 0.056856302297082065, 0.14701389004254686,
                0.07300493724833501, 0.0]),
    "gspo": (0.16626666666666678, [0.0] * 8),
    "gspo, wide": (-0.03290033039117642, [-0.20020245771158596] * 3 + [0.0] + [0.09192676068589534] * 4),
    "cispo": (-0.25245998251148744, [-0.234375, -0.16965701588174242, -0.234375, 0.0730125734129442,
              0.12792668016843464, 0.1953125, 0.16426110880875378, 0.05201110682782493]),
}  # fmt: skip
SETTINGS = {
    "grpo": with_kl(ALGORITHMS["grpo"].objective, ALGORITHMS["grpo"].kl),
    "gspo, wide": partial(gspo, low=0.2, high=0.3),
    "cispo": partial(cispo, high=0.25),
}
DIVISORS = {"token": 8, "sample": 3, "constant": 3 * 6}


@pytest.mark.parametrize("name", TRL)
def test_losses_and_gradients_are_trls(name):
    base = {"gspo, wide": "gspo"}.get(name, name)
    algorithm, given = ALGORITHMS[base], tokens()
    losses = SETTINGS.get(name, algorithm.objective)(given).losses
    loss = aggregate(losses, given.at, algorithm.aggregation) / DIVISORS[algorithm.aggregation]
    (gradient,) = torch.autograd.grad(loss, given.log_probs)
    value, slopes = TRL[name]
    assert loss.item() == pytest.approx(value, rel=1e-12)
    torch.testing.assert_close(gradient.tolist(), slopes, rtol=1e-12, atol=1e-15)


def by_hand(name: str, log_p: float, mu: float, a: float, low: float, high: float) -> tuple[float, float]:
    """(loss, d loss / d log p) of one token, as the papers write it."""
    r = math.exp(log_p - mu)
    if name == "cispo":
        weight = min(max(r, 1 - low), 1 + high)
        return -weight * a * log_p, -weight * a
    plain, bound = r * a, min(max(r, 1 - low), 1 + high) * a
    return (-plain, -r * a) if plain <= bound else (-bound, 0.0)


OBJECTIVES = {"clip": clip, "cispo": cispo}


@pytest.mark.parametrize("name", OBJECTIVES)
def test_objectives_of_single_tokens_by_hand(name):
    """Ratios well below, within and well above the bounds, with advantages of both signs and none."""
    old_log_probs = [-1.0] * 15
    log_p = [-1.0 + d for d in (-1.5, -0.2, 0.0, 0.2, 1.5) for _ in range(3)]
    advantages = [2.0, -0.5, 0.0] * 5
    given = tokens(log_p, advantages, old_log_probs, [0] * 15)
    result = OBJECTIVES[name](given, low=0.3, high=0.6)
    (gradient,) = torch.autograd.grad(result.losses.sum(), given.log_probs)
    expected = [by_hand(name, *token, 0.3, 0.6) for token in zip(log_p, old_log_probs, advantages, strict=True)]
    torch.testing.assert_close(result.losses.tolist(), [loss for loss, _ in expected], rtol=1e-14, atol=0)
    torch.testing.assert_close(gradient.tolist(), [slope for _, slope in expected], rtol=1e-14, atol=0)
    if name == "clip":  # the share that is logged is that of tokens which lost their gradient
        lost = [slope == 0 and a != 0 for (_, slope), a in zip(expected, advantages, strict=True)]
        assert result.clipped.tolist() == lost and sum(lost) == 2


def test_gspo_is_the_sequence_form():
    """-min(s A, clip(s) A) of whole answers, s = (p(y) / mu(y))^(1 / n), differentiated as it stands."""
    given, leaf = tokens(), column(LOG_P).requires_grad_()
    mine = aggregate(gspo(given, 0.2, 0.3).losses, given.at, "sample")
    truth, place = torch.zeros((), dtype=torch.float64), 0
    for length in LENGTHS:
        part = slice(place, place + length)
        s = ((leaf[part] - column(OLD[part])).sum() / length).exp()
        a = ADVANTAGES[place]
        truth = truth - torch.minimum(s * a, s.clamp(0.8, 1.3) * a)
        place += length
    assert mine.item() == pytest.approx(truth.item(), rel=1e-14)
    torch.testing.assert_close(
        torch.autograd.grad(mine, given.log_probs)[0], torch.autograd.grad(truth, leaf)[0], rtol=1e-14, atol=0
    )


def test_aggregations_by_hand():
    losses = column([1.0, 2.0, 4.0, 8.0, 16.0, 32.0, 64.0, 128.0])
    at = tokens().at
    assert aggregate(losses, at, "token") == aggregate(losses, at, "constant") == 255
    assert aggregate(losses, at, "sample").item() == pytest.approx(7 / 3 + 8 + 240 / 4)


def test_kl_and_entropy_terms_by_hand():
    given = tokens()
    losses = with_kl(clip, 0.3)(given).losses - clip(given).losses
    expected = [0.3 * (math.exp(q - p) - 1 - (q - p)) for p, q in zip(LOG_P, REFERENCE, strict=True)]
    torch.testing.assert_close(losses.tolist(), expected, rtol=1e-12, atol=1e-15)
    bonus = with_entropy(clip, 0.2)(given).losses - clip(given).losses
    torch.testing.assert_close(bonus.tolist(), [-0.2 * h for h in ENTROPY], rtol=1e-12, atol=0)
    (slope,) = torch.autograd.grad(bonus.sum(), given.entropy)
    torch.testing.assert_close(slope.tolist(), [-0.2] * 8)


P = torch.tensor([0.5, 0.3, 0.15, 0.05], dtype=torch.float64)
NEAR = torch.tensor([0.45, 0.35, 0.14, 0.06], dtype=torch.float64)
FAR = torch.tensor([0.05, 0.15, 0.3, 0.5], dtype=torch.float64)


@pytest.mark.parametrize("q", [NEAR, FAR], ids=["near", "far"])
def test_the_kl_estimate_is_unbiased_and_never_negative(q):
    values = kl_estimates(P.log(), q.log())
    assert (P * values).sum().item() == pytest.approx((P * (P / q).log()).sum().item(), abs=1e-15)
    assert (values >= 0).all()


def test_near_the_reference_the_kl_estimate_is_less_noisy_than_the_log_ratio():
    """By a factor of a hundred in variance, for distributions 1% of a nat apart."""

    def variance(values: torch.Tensor) -> torch.Tensor:
        return (P * (values - (P * values).sum()).square()).sum()

    assert variance(P.log() - NEAR.log()) > 100 * variance(kl_estimates(P.log(), NEAR.log()))


def test_expected_gradient_of_the_kl_loss():
    """On draws from the policy p it is the gradient of KL(q || p)."""
    logits = torch.tensor([0.3, -1.0, 0.5, 0.2], dtype=torch.float64, requires_grad=True)
    log_p = logits.log_softmax(0)
    p, q = log_p.exp(), FAR

    def gradient(of):
        return torch.autograd.grad(of, logits, retain_graph=True)[0]

    expected = gradient(-(q * log_p).sum())
    actual = gradient((p.detach() * kl_estimates(log_p, q.log())).sum())
    torch.testing.assert_close(actual, expected, rtol=1e-12, atol=1e-15)


@pytest.mark.parametrize("objective", [clip, gspo, cispo])
def test_a_ratio_beyond_any_number_is_never_nan(objective):
    """exp overflows at 710. If A > 0 the bound applies; if A < 0 the loss is infinite, except in cispo."""
    given = tokens([0.0, 0.0, 0.0], [1.0, -1.0, 0.0], [-5000.0] * 3, [0, 1, 3])
    result = objective(given)
    losses = result.losses.tolist()
    assert not result.losses.isnan().any() and losses[2] == 0
    assert math.isfinite(losses[0]) and math.isinf(losses[1]) != (objective is cispo)
    (gradient,) = torch.autograd.grad(result.losses.sum(), given.log_probs)
    assert not gradient.isnan().any()
    if objective is not cispo:
        assert gradient[0] == 0 and result.clipped.tolist()[0]
    vanished = objective(tokens([-5000.0] * 3, [1.0, -1.0, 0.0], [0.0] * 3, [0, 1, 3]))
    assert vanished.losses.isfinite().all()


def test_bad_settings_are_refused():
    given = tokens()
    with pytest.raises(ValueError, match=r"low=1\.0: the ratio's lower bound is 1 - low"):
        clip(given, low=1.0)
    with pytest.raises(ValueError, match=r"high=-0\.1: the ratio's upper bound is 1 \+ high"):
        clip(given, high=-0.1)
    with pytest.raises(ValueError, match="kl coefficient -1"):
        with_kl(clip, -1)
    bare = PolicyTokens(given.at, given.log_probs, given.old_log_probs, given.advantages)
    with pytest.raises(ValueError, match="the KL term needs reference log-probabilities"):
        with_kl(clip, 0.1)(bare)
    with pytest.raises(ValueError, match="call policy_loss with entropy=True"):
        with_entropy(clip, 0.1)(bare)
