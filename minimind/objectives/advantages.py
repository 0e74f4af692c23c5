"""Advantages: of samples within their group, of single samples, and of tokens by generalised advantage estimation.

All are float64, need no gradient, and wait for no device. Samples are float64 [n] with the group of each, int64 [n] in
0..num_groups-1, in any order; tokens are the sampled ones alone, [M] with the sample of each, int64 [M] ascending
(`surrogates.Sampled`).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from minimind.objectives.surrogates import Estimator, kl_estimates

Std = Literal["group", "batch", "none"]


def group_advantages(rewards: Tensor, groups: Tensor, num_groups: int, std: Std = "group", eps: float = 1e-4) -> Tensor:
    """GRPO's advantages: (r - mean of its group) / (standard deviation + eps): float64 [n].

    std: "group", the group's own (Shao et al., 2402.03300); "batch", that of all centred rewards, so that a group in
    which little differs is not blown up; "none", undivided (Dr. GRPO, Liu et al., 2503.20783). The standard deviation
    is the sample's, with n - 1, where the paper does not say, and eps is trl's. In a group in which all rewards are
    equal, one of a single sample among them, the advantage is exactly 0: a rounded mean must not be divided by eps.
    """
    rewards = rewards.double()
    sizes, means = _sizes_and_means(rewards, groups, num_groups)
    centred = (rewards - means[groups]).masked_fill(degenerate_groups(rewards, groups, num_groups)[groups], 0)
    if std == "none":
        return centred
    if std == "batch":
        return centred / ((centred.square().sum() / max(1, rewards.numel() - 1)).sqrt() + eps)
    if std != "group":
        raise ValueError(f"std={std!r}: choose group, batch or none")
    squares = _sums(centred.square(), groups, num_groups)
    return centred / ((squares / (sizes - 1).clamp(min=1)).sqrt() + eps)[groups]


def leave_one_out(rewards: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """RLOO's advantages, r less the mean of the OTHERS of its group: float64 [n], 0 for one alone. Unbiased, as a mean
    that holds r is not (Kool et al. 2019; Ahmadian et al., 2402.14740)."""
    rewards = rewards.double()
    sizes, means = _sizes_and_means(rewards, groups, num_groups)
    scale = sizes / (sizes - 1).clamp(min=1)
    equal = degenerate_groups(rewards, groups, num_groups)[groups]
    return ((rewards - means[groups]) * scale[groups]).masked_fill(equal, 0)


def degenerate_groups(rewards: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Whether all rewards of a group are equal, so that it teaches nothing: bool [num_groups]; an empty one is, too."""
    rewards = rewards.double()
    none = rewards.new_zeros(num_groups)
    highest = none.scatter_reduce(0, groups, rewards, "amax", include_self=False)
    lowest = none.scatter_reduce(0, groups, rewards, "amin", include_self=False)
    return highest == lowest


def gae(
    rewards: Tensor,
    values: Tensor,
    samples: Tensor,
    gamma: float = 1.0,
    lam: float = 0.95,
    bootstrap: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """(advantages, returns) of all tokens of all samples at once (Schulman et al., 1506.02438): float64 [M] each.

        delta_t = r_t + gamma V_t+1 - V_t        A_t = delta_t + gamma lam A_t+1        return_t = A_t + V_t

    rewards, values [M]: V_t belongs to the state BEFORE token t, the one that it was drawn from. After a sample's last
    token V and A are 0. bootstrap [samples]: V of the state after the last token, for episodes that were cut off before
    their rewards were all given, 0 for the others; None: there are none. An answer that was cut off is not one of them:
    its score is for the text as it stands, and a value behind it would count that once more.

    The recurrence runs backwards in ceil(log2 M) steps over all tokens: each doubles how far a token sees (Hillis &
    Steele 1986).
    """
    if not 0 <= gamma <= 1 or not 0 <= lam <= 1:
        raise ValueError(f"gamma={gamma}, lam={lam}: both must lie in [0, 1]")
    rewards, values = rewards.double(), values.double()
    last = _last(samples)
    following = torch.cat((values[1:], values[:0].new_zeros(min(1, len(values)))))
    after = 0.0 if bootstrap is None else bootstrap.double()[samples]
    advantages = rewards + gamma * torch.where(last, after, following) - values
    reach = torch.full_like(values, gamma * lam).masked_fill(last, 0)
    step = 1
    while step < len(values):
        seen = torch.cat((reach[:-step] * advantages[step:], advantages.new_zeros(step)))
        reach = torch.cat((reach[:-step] * reach[step:], reach[-step:]))
        advantages = advantages + seen
        step *= 2
    return advantages, advantages + values


def value_shift(rewards: Tensor, values: Tensor, samples: Tensor, gamma: float = 1.0) -> Tensor:
    """What the values of the first states miss of the discounted rewards that followed, on average: a scalar, 0 for no
    tokens. It is 0 but for chance where the critic is right, and all of the level where it still knows nothing: added
    to the values, advantages say how good a token was from the first rollout on, and not how near the end it stood."""
    if not len(values):
        return values.new_zeros((), dtype=torch.float64)
    first = _last(samples.flip(0)).flip(0)
    places = torch.arange(len(values), device=values.device)
    age = places - places[first][first.cumsum(0) - 1]
    discounted = rewards.double() * gamma ** age.double()
    return discounted.sum() / first.sum() - values.double()[first].mean()


def token_rewards(
    scores: Tensor,
    samples: Tensor,
    log_probs: Tensor | None = None,
    reference: Tensor | None = None,
    kl_coef: float = 0.0,
    estimator: Estimator = "k1",
) -> Tensor:
    """PPO's rewards of tokens: a sample's score on its last token, less kl_coef times the KL at every token between
    what sampled it and the reference (Ziegler et al., 1909.08593): float64 [M]. scores [samples]; the log-probabilities
    [M] are needed where kl_coef is above 0."""
    scores = scores.double()
    rewards = torch.where(_last(samples), scores[samples], scores.new_zeros(()))
    if not kl_coef:
        return rewards
    if log_probs is None or reference is None:
        raise ValueError(f"kl_coef={kl_coef} needs the log-probabilities of sampler and reference; or set it to 0")
    return rewards - kl_coef * kl_estimates(log_probs.double(), reference.double(), estimator)


def whiten(
    x: Tensor,
    shift_mean: bool = True,
    eps: float = 1e-8,
    all_reduce: Callable[[Tensor], Tensor] = lambda figures: figures,
) -> Tensor:
    """(x - mean) / sqrt(variance + eps) over the numbers of all ranks: float64 [M]. all_reduce adds tensors up over the
    ranks (Parallel.sum); all call it, a rank without numbers too. shift_mean=False keeps the mean, as for rewards."""
    x = x.double()
    count, total = all_reduce(torch.stack((x.new_tensor(float(x.numel())), x.sum())))
    mean = total / count.clamp(min=1)
    (squares,) = all_reduce((x - mean).square().sum().reshape(1))
    whitened = (x - mean) / (squares / count.clamp(min=1) + eps).sqrt()
    return whitened if shift_mean else whitened + mean


def _last(samples: Tensor) -> Tensor:
    """Whether a token is the last of its sample: bool [M]."""
    return torch.cat((samples[1:] != samples[:-1], samples.new_ones(min(1, len(samples)), dtype=torch.bool)))


def _sizes_and_means(rewards: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    sizes = _sums(torch.ones_like(rewards), groups, num_groups)
    return sizes, _sums(rewards, groups, num_groups) / sizes.clamp(min=1)


def _sums(per_sample: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    return per_sample.new_zeros(num_groups).index_add(0, groups, per_sample)
