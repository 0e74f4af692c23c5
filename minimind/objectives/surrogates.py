"""Surrogate objectives of policy gradients: PPO's clip, GRPO, DAPO, Dr. GRPO, GSPO, CISPO.

For each sampled token: log p is its log-probability under the model, log mu that under the policy that sampled it, A
its advantage.

    log r = log p - log mu            the importance ratio clip      -min(r A, clip(r, 1 - low, 1 + high) A)
    Schulman et al., 1707.06347 gspo      -min(s A, clip(s, 1 - low, 1 + high) A)     log s = the answer's mean log r
    Zheng et al., 2507.18071 cispo     -sg(min(r, 1 + high)) A log p               sg: stop gradient
    MiniMax, 2506.13585

`Aggregation` says how token losses become one number: "token" is the mean over all tokens; "sample" is the mean over
answers of each answer's token mean; "constant" divides each answer's sum by the longest allowed length and takes the
mean over answers. ALGORITHMS lists the combinations that papers use:

    grpo      clip, sample mean, advantages / the group's standard deviation, k3 KL in the loss      2402.03300
    dapo      clip with high > low, token mean, no KL                                                2503.14476
    dr_grpo   clip, constant, no standard deviation, no KL                                           2503.20783
    gspo      gspo, sample mean, no KL
    cispo     cispo, token mean, no KL

Departures from the papers:
- gspo is the token form, log s = sg(mean log r) + log p - sg(log p). Its value and gradient equal those of the sequence
  form when an answer's advantages are equal, and it also accepts one advantage per token.
- The clip bounds log r instead of r. Values and gradients are the same, but a ratio that overflows float64 on the
  clipped side gives the bound instead of 0 x inf. On the other side the loss is infinite and stops the run, as it
  should.
- cispo has a lower bound only if one is given, as in the paper's experiments.
- DAPO's dynamic sampling and its penalty for long answers are not losses: the sampler and minimind.rewards do them.

All functions are pure and take one float64 number per sampled token: log r is a small difference, and the arrays are
short. Nothing here waits for the device.
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


@dataclass(frozen=True)
class SampledTokens:
    """The positions of a batch's sampled tokens: places int64 [M], ascending, in the flattened batch; samples int64
    [M], the document of each, in 0..num_samples-1."""

    places: Tensor
    samples: Tensor
    num_samples: int

    def take(self, per_token: Tensor) -> Tensor:
        """Values of the sampled tokens: [B, T] -> float64 [M]."""
        return per_token.flatten().index_select(0, self.places).double()

    def sums(self, per_token: Tensor) -> Tensor:
        """Sum over each sample's tokens: float64 [M] -> float64 [num_samples]."""
        return per_token.new_zeros(self.num_samples).index_add(0, self.samples, per_token)

    def lengths(self) -> Tensor:
        """Number of sampled tokens in each sample: float64 [num_samples]."""
        return self.sums(torch.ones(self.samples.shape, dtype=torch.float64, device=self.samples.device))

    def spread(self, per_sample: Tensor) -> Tensor:
        """Repeat each sample's value for its tokens: [num_samples] -> [M]."""
        return per_sample.index_select(0, self.samples)


@dataclass(frozen=True)
class PolicyTokens:
    """The input of a surrogate: one number per sampled token of a batch, float64 [M].

    log_probs and entropy are differentiable. entropy is that of the whole next-token distribution; None: not computed.
    """

    at: SampledTokens
    log_probs: Tensor
    old_log_probs: Tensor
    advantages: Tensor
    reference: Tensor | None = None
    entropy: Tensor | None = None

    @property
    def log_ratio(self) -> Tensor:
        """log r = log p - log mu."""
        return self.log_probs - self.old_log_probs

    @staticmethod
    def empty() -> PolicyTokens:
        """A batch without tokens, for checking an objective's settings."""
        numbers, places = torch.zeros(0, dtype=torch.float64), torch.zeros(0, dtype=torch.int64)
        return PolicyTokens(SampledTokens(places, places, 0), numbers, numbers, numbers, numbers, numbers)


@dataclass(frozen=True)
class PolicyLosses:
    """The output of a surrogate. losses: float64 [M], differentiable. clipped: bool [M], tokens whose ratio was
    bounded. figures: further metrics, one detached number per token."""

    losses: Tensor
    clipped: Tensor
    figures: dict[str, Tensor] = field(default_factory=dict)


PolicyObjective = Callable[[PolicyTokens], PolicyLosses]


def clip(tokens: PolicyTokens, low: float = 0.2, high: float | None = None) -> PolicyLosses:
    """PPO's objective, which GRPO, DAPO and Dr. GRPO share. The ratio is bounded below by 1 - low if A < 0, and above
    by 1 + high if A > 0. high None: the same as low."""
    return _clipped(tokens, tokens.log_ratio, *_bounds(low, low if high is None else high))


def gspo(tokens: PolicyTokens, low: float = 3e-4, high: float | None = 4e-4) -> PolicyLosses:
    """Group sequence policy optimisation: the ratio is the geometric mean over the answer's tokens. The default bounds
    are the paper's, a thousandth of those for single tokens. high None: the same as low."""
    at, log_ratio = tokens.at, tokens.log_ratio.detach()
    means = at.sums(log_ratio) / at.lengths().clamp(min=1)
    sequence = at.spread(means) + (tokens.log_probs - tokens.log_probs.detach())
    return _clipped(tokens, sequence, *_bounds(low, low if high is None else high))


def cispo(tokens: PolicyTokens, high: float = 4.0, low: float | None = None) -> PolicyLosses:
    """Clipped importance sampling: every token keeps its gradient, weighted by its ratio, which is held within 1 - low
    and 1 + high. The paper tunes high and gives no number; 4 comes from Khatri et al., 2510.13786."""
    low_bound, high_bound = _bounds(0.5 if low is None else low, high)
    log_ratio = tokens.log_ratio.detach()
    bounded = log_ratio.clamp(min=None if low is None else low_bound, max=high_bound)
    return PolicyLosses(-bounded.exp() * tokens.advantages * tokens.log_probs, bounded != log_ratio)


def kl_estimates(log_probs: Tensor, reference: Tensor) -> Tensor:
    """Schulman's k3 estimate of KL(p || q) at tokens drawn from p: e^x - 1 - x with x = log q - log p
    (joschu.net/blog/kl-approx.html). It is unbiased and never negative.

    As a loss, its expected gradient is that of KL(q || p), which agrees with KL(p || q) near p = q.
    """
    x = reference - log_probs
    return torch.expm1(x) - x


def with_kl(objective: PolicyObjective, coefficient: float) -> PolicyObjective:
    """objective + coefficient * the k3 estimate of the KL to the reference, per token, as in GRPO."""
    if not 0 <= coefficient < math.inf:
        raise ValueError(f"kl coefficient {coefficient}: must be 0 or more")

    def loss(tokens: PolicyTokens) -> PolicyLosses:
        if tokens.reference is None:
            raise ValueError("the KL term needs reference log-probabilities; add them to the batch, or set the KL to 0")
        result = objective(tokens)
        kl = kl_estimates(tokens.log_probs, tokens.reference)
        return replace(result, losses=result.losses + coefficient * kl)

    return loss


def with_entropy(objective: PolicyObjective, weight: float) -> PolicyObjective:
    """objective - weight * the entropy of each token's distribution; call policy_loss with entropy=True."""
    if not math.isfinite(weight):
        raise ValueError(f"entropy weight {weight}: must be a finite number")

    def loss(tokens: PolicyTokens) -> PolicyLosses:
        if tokens.entropy is None:
            raise ValueError("the entropy was not computed; call policy_loss with entropy=True")
        result = objective(tokens)
        return replace(result, losses=result.losses - weight * tokens.entropy)

    return loss


def with_terms(objective: PolicyObjective, kl: float = 0.0, entropy: float = 0.0) -> PolicyObjective:
    """Add the KL and entropy terms whose weights are not 0. ValueError for bad weights or bad settings of
    `objective`."""
    if kl:
        objective = with_kl(objective, kl)
    if entropy:
        objective = with_entropy(objective, entropy)
    objective(PolicyTokens.empty())
    return objective


@dataclass(frozen=True)
class Algorithm:
    """A paper's recipe. std: the argument of group_advantages; kl: the coefficient of the KL in the loss; minibatches:
    optimizer steps per pass over a rollout. grpo follows DeepSeek-R1 (2501.12948), scaled down to the size of our
    rollouts; the first GRPO paper takes 1."""

    objective: PolicyObjective
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
    """(log(1 - low), log(1 + high))."""
    if not 0 < low < 1:
        raise ValueError(f"low={low}: the ratio's lower bound is 1 - low, so low must lie between 0 and 1")
    if not 0 < high < math.inf:
        raise ValueError(f"high={high}: the ratio's upper bound is 1 + high, so high must be above 0")
    return math.log1p(-low), math.log1p(high)


def _clipped(tokens: PolicyTokens, log_ratio: Tensor, low: float, high: float) -> PolicyLosses:
    """-min(r A, clip(r) A), with low and high as bounds of log r."""
    bounded = torch.where(tokens.advantages >= 0, log_ratio.clamp(max=high), log_ratio.clamp(min=low))
    clipped = (bounded != log_ratio).detach() & tokens.advantages.ne(0)
    return PolicyLosses(-tokens.advantages * bounded.exp(), clipped)
