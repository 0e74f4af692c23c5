"""Surrogate objectives of policy gradients: PPO's clip, GRPO, DAPO, Dr. GRPO, GSPO, CISPO.

Per sampled token t of answer i: log p under the model, log mu under the policy that sampled it, advantage A, and

    log r = log p - log mu            the importance ratio
    clip      -min(r A, clip(r, 1 - low, 1 + high) A)                                  Schulman et al., 1707.06347
    gspo      -min(s A, clip(s, 1 - low, 1 + high) A)     log s = mean over i of log r    Zheng et al., 2507.18071
    cispo     -sg(min(r, 1 + high)) A log p               sg: without gradient         MiniMax, 2506.13585
    reinforce -A log p                                                                 Williams 1992

and what they add up to (`Aggregation`): a mean over the tokens of all answers ("token"), over answers of the mean of
their tokens ("sample"), or over answers of the sum divided by the longest allowed length ("constant"). ALGORITHMS
names what papers made of these parts:

    grpo      clip, sample mean, advantages over the group's standard deviation, k3 KL in the loss   2402.03300
    dapo      clip with high > low, token mean, no KL                                                2503.14476
    dr_grpo   clip, constant, no standard deviation, no KL                                           2503.20783
    gspo      gspo, sample mean, no KL
    cispo     cispo, token mean, no KL

Departures: gspo is its token form, log s = sg(mean log r) + log p - sg(log p), whose value and gradient are those of
the sequence form where an answer's advantages are equal, and whose tokens may differ in them. The clip is written on
log r, -A exp(log r bounded on the side where A would gain): the same numbers and gradients, but a ratio beyond float64
on the clipped side gives the bound and not 0 x inf; on the other side the loss is infinite, as it should be, and stops
the run. cispo has no lower bound unless given one, as in the paper's experiments. DAPO's dynamic sampling and its
penalty for long answers are not losses: the sampler and minimind.rewards have them.

Pure functions of one number per sampled token, in float64: log r is a small difference, and there are only as many
numbers as sampled tokens. Nothing here waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Literal

import torch
from torch import Tensor

Aggregation = Literal["token", "sample", "constant"]
Estimator = Literal["k1", "k2", "k3"]


@dataclass(frozen=True)
class SampledTokens:
    """places int64 [M]: of the sampled tokens in the flattened batch, ascending; samples int64 [M]: the document that
    each belongs to, of num_samples."""

    places: Tensor
    samples: Tensor
    num_samples: int

    def take(self, per_token: Tensor) -> Tensor:
        """[B, T] -> float64 [M]"""
        return per_token.flatten().index_select(0, self.places).double()

    def sums(self, per_token: Tensor) -> Tensor:
        """Of each sample: float64 [M] -> float64 [num_samples]."""
        return per_token.new_zeros(self.num_samples).index_add(0, self.samples, per_token)

    def lengths(self) -> Tensor:
        """Sampled tokens of each sample: float64 [num_samples]."""
        return self.sums(torch.ones(self.samples.shape, dtype=torch.float64, device=self.samples.device))

    def spread(self, per_sample: Tensor) -> Tensor:
        """[num_samples] -> [M]"""
        return per_sample.index_select(0, self.samples)


@dataclass(frozen=True)
class PolicyTokens:
    """The sampled tokens of a batch, one number each: float64 [M]. log_probs is differentiable, and entropy, the exact
    one of the distribution that each token was drawn from, where it was asked for."""

    at: SampledTokens
    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    reference: Tensor | None = None
    entropy: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """log p / mu"""
        return self.log_probs - self.old_log_probs

    @staticmethod
    def none() -> PolicyTokens:
        """Those of an empty batch."""
        numbers, places = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
        return PolicyTokens(SampledTokens(places, places, 0), numbers, numbers, numbers, numbers, numbers)


@dataclass(frozen=True)
class PolicyLosses:
    """losses float64 [M], differentiable; clipped bool [M]: where the ratio's bound took the gradient (cispo: where it
    held the weight). figures: more numbers per token that tell how training goes, detached."""

    losses: Tensor
    clipped: Tensor
    figures: dict[str, Tensor] = field(default_factory=dict)


Objective = Callable[[PolicyTokens], PolicyLosses]


def clip(tokens: PolicyTokens, low: float = 0.2, high: float | None = None, dual: float | None = None) -> PolicyLosses:
    """PPO's objective, which GRPO, DAPO and Dr. GRPO share. The ratio is bounded by 1 - low where A < 0 and by 1 + high
    where A > 0; high None: as low. dual > 1: where A < 0 a ratio above it has no gradient either (Ye et al.,
    1912.09729, take 3), which keeps tokens that the policy has come to find far likelier from ruling the step."""
    low_bound, high_bound = _bounds(low, low if high is None else high)
    if dual is not None and not dual > 1:
        raise ValueError(f"dual={dual}: a bound of the ratio where A < 0, above 1; 3 is usual")
    return _clipped(tokens, tokens.log_ratio, low_bound, high_bound, None if dual is None else math.log(dual))


def gspo(tokens: PolicyTokens, low: float = 3e-4, high: float | None = 4e-4) -> PolicyLosses:
    """Group sequence policy optimisation: the ratio of a whole answer, its length's root. The bounds are the paper's,
    a thousandth of what suits single tokens. high None: as low."""
    low_bound, high_bound = _bounds(low, low if high is None else high)
    at, log_ratio = tokens.at, tokens.log_ratio.detach()
    means = at.sums(log_ratio) / at.lengths().clamp(min=1)
    sequence = at.spread(means) + (tokens.log_probs - tokens.log_probs.detach())
    return _clipped(tokens, sequence, low_bound, high_bound, None)


def cispo(tokens: PolicyTokens, high: float = 4.0, low: float | None = None) -> PolicyLosses:
    """Clipped importance sampling: every token keeps its gradient, weighed by its ratio, no more than 1 + high and no
    less than 1 - low. The paper tunes high and gives no number; 4 is that of Khatri et al., 2510.13786."""
    low_bound, high_bound = _bounds(0.5 if low is None else low, high)
    log_ratio = tokens.log_ratio.detach()
    bounded = log_ratio.clamp(min=None if low is None else low_bound, max=high_bound)
    return PolicyLosses(-bounded.exp() * tokens.advantages * tokens.log_probs, bounded != log_ratio)


def reinforce(tokens: PolicyTokens) -> PolicyLosses:
    """Without a ratio: right on samples of the very policy that is trained, and nowhere else."""
    losses = -tokens.advantages * tokens.log_probs
    return PolicyLosses(losses, torch.zeros_like(losses, dtype=torch.bool))


def kl_estimates(log_probs: Tensor, reference: Tensor, estimator: Estimator) -> Tensor:
    """KL(p || q) at tokens drawn from p, with x = log q - log p of each (Schulman, joschu.net/blog/kl-approx.html):

        k1 = -x                 unbiased, of either sign, and the noisiest near p = q
        k2 = x^2 / 2            biased, to second order right
        k3 = e^x - 1 - x        unbiased, never negative

    As a LOSS on tokens drawn from p they are other things: the expected gradient of k1 is 0, that of k2 is the gradient
    of KL(p || q), and that of k3 the gradient of KL(q || p), which agrees near p = q.
    """
    x = reference - log_probs
    if estimator == "k1":
        return -x
    if estimator == "k2":
        return x.square() / 2
    if estimator == "k3":
        return torch.expm1(x) - x
    raise ValueError(f"KL estimator {estimator!r}: choose k1, k2 or k3")


def with_kl(objective: Objective, coefficient: float, estimator: Estimator = "k3") -> Objective:
    """objective + coefficient * KL to the reference, per token: with k3, GRPO's. k1 is refused, its gradient being
    noise; it belongs in the reward (advantages.token_rewards)."""
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"kl coefficient {coefficient}: must be 0 or more")
    if estimator == "k1":
        raise ValueError("KL estimator k1 as a loss has a gradient of 0 on average; take k2 or k3")

    def loss(tokens: PolicyTokens) -> PolicyLosses:
        if tokens.reference is None:
            raise ValueError(
                "the batch has no reference log-probabilities, which the KL needs; set it to 0 or give them"
            )
        result = objective(tokens)
        kl = kl_estimates(tokens.log_probs, tokens.reference, estimator)
        return replace(result, losses=result.losses + coefficient * kl)

    return loss


def with_entropy(objective: Objective, weight: float) -> Objective:
    """objective - weight * the exact entropy of every token's distribution; policy_loss needs entropy=True."""
    if not math.isfinite(weight):
        raise ValueError(f"entropy weight {weight}: must be a finite number")

    def loss(tokens: PolicyTokens) -> PolicyLosses:
        if tokens.entropy is None:
            raise ValueError("the entropy was not computed; call policy_loss with entropy=True")
        result = objective(tokens)
        return replace(result, losses=result.losses - weight * tokens.entropy)

    return loss


def with_terms(objective: Objective, kl: float = 0.0, entropy: float = 0.0) -> Objective:
    """with_kl and with_entropy of these weights, where they are not 0. Raises ValueError at once for numbers that mean
    nothing, `objective`'s own among them."""
    if kl:
        objective = with_kl(objective, kl)
    if entropy:
        objective = with_entropy(objective, entropy)
    objective(PolicyTokens.none())
    return objective


@dataclass(frozen=True)
class Algorithm:
    """What one name of a paper stands for; `std` is group_advantages' (advantages.py), `kl` the loss's coefficient,
    `minibatches` the steps that its recipe takes on each pass over a rollout; grpo's is that of DeepSeek-R1
    (2501.12948) cut to what a rollout here can feed, the first paper's being 1."""

    objective: Objective
    aggregation: Aggregation
    std: Literal["group", "batch", "none"]
    kl: float = 0.0
    minibatches: int = 1


ALGORITHMS: dict[str, Algorithm] = {
    "grpo": Algorithm(clip, "sample", "group", kl=0.04, minibatches=4),
    "dapo": Algorithm(partial(clip, low=0.2, high=0.28), "token", "group", minibatches=16),
    "dr_grpo": Algorithm(clip, "constant", "none", minibatches=8),
    "gspo": Algorithm(gspo, "sample", "group", minibatches=4),
    "cispo": Algorithm(cispo, "token", "group", minibatches=16),
}


def _bounds(low: float, high: float) -> tuple[float, float]:
    """(log(1 - low), log(1 + high))"""
    if not 0 < low < 1:
        raise ValueError(f"low={low}: the ratio's lower bound is 1 - low, so that low must lie between 0 and 1")
    if not 0 < high < math.inf:
        raise ValueError(f"high={high}: the ratio's upper bound is 1 + high, so that high must be above 0")
    return math.log1p(-low), math.log1p(high)


def _clipped(tokens: PolicyTokens, log_ratio: Tensor, low: float, high: float, dual: float | None) -> PolicyLosses:
    """-min(r A, clip(r) A), low and high being bounds of log r."""
    gains = tokens.advantages >= 0
    bounded = torch.where(gains, log_ratio.clamp(max=high), log_ratio.clamp(min=low, max=dual))
    clipped = (bounded != log_ratio).detach() & tokens.advantages.ne(0)
    return PolicyLosses(-tokens.advantages * bounded.exp(), clipped)
