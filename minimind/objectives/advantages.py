"""Advantages: of samples within their group, against a tracked baseline (SPO), and of tokens (GAE).

Group and token advantages are float64, have no gradient and never wait for the device. Samples are float64 [n] with the
group of each, int64 [n] in 0..num_groups-1, in any order. Tokens are the sampled ones only, [M], with the sample of
each, int64 [M] ascending (`surrogates.SampledTokens`).

ValueTracker is SPO's baseline, one number per prompt that outlives the batch (Xu & Ding, 2509.13232). It tracks the
policy's success rate at a prompt x by a Beta distribution, and forgets as the policy drifts away:

    v(x) = a / (a + b)      a <- rho a + r      b <- rho b + 1 - r      rho = clamp(2^(-D / D_half), rho_min, rho_max)

D is how far the policy has moved since it last answered x. The advantage is r - v(x), with the v BEFORE this answer,
normalised over the batch (`whiten`) instead of a group, so one answer per prompt is enough. Prompts are drawn with
weights sqrt(v (1 - v)) + eps, so the least certain outcomes come up most often. The prior counts as
N0 = 1 / (1 - rho_min) answers.

Departures from the SPO paper:
- Rewards need not be 0 or 1: a reward between `low` and `high` counts as its share of the range. A reward outside
  counts as the nearer end, in the advantage too, and is counted.
- D is the mean |log p_new - log p_old| per token, as in the authors' code, instead of a KL divergence. It is not
  measured on old answers, which would have to be kept and scored again, but summed over the updates in between
  (`advance`). A sum of distances is an upper bound, so we forget rather more than less.
- The prior's mean is 1/2; the paper samples a few answers to each prompt first.
- Several answers to one prompt in a batch update the tracker one after the other, the later ones with D = 0. All have
  the v from before the batch as their baseline.
"""

from __future__ import annotations

import math
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

Std = Literal["group", "batch", "none"]
_EPS = 1e-4


def group_advantages(rewards: Tensor, groups: Tensor, num_groups: int, std: Std = "group") -> Tensor:
    """GRPO's advantages, (r - mean of its group) / (standard deviation + 1e-4): float64 [n].

    std: "group" divides by the group's own deviation (Shao et al., 2402.03300); "batch" by that of all centred rewards,
    which does not amplify groups that differ little; "none" does not divide (Dr. GRPO, Liu et al., 2503.20783). The
    deviation is the sample's, with n - 1, since the paper does not say; 1e-4 is trl's. If all rewards of a group are
    equal, or it has one sample, the advantage is exactly 0: a rounded mean must not be divided by 1e-4.
    """
    rewards = rewards.double()
    sizes, means = _sizes_and_means(rewards, groups, num_groups)
    centred = (rewards - means[groups]).masked_fill(degenerate_groups(rewards, groups, num_groups)[groups], 0)
    if std == "none":
        return centred
    if std == "batch":
        return centred / ((centred.square().sum() / max(1, rewards.numel() - 1)).sqrt() + _EPS)
    if std != "group":
        raise ValueError(f"std={std!r}: choose group, batch or none")
    squares = _sums(centred.square(), groups, num_groups)
    return centred / ((squares / (sizes - 1).clamp(min=1)).sqrt() + _EPS)[groups]


def leave_one_out(rewards: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """RLOO's advantages, r minus the mean of the OTHER samples of its group: float64 [n], 0 for a single sample. Unlike
    a mean that includes r this is unbiased (Kool et al. 2019; Ahmadian et al., 2402.14740)."""
    rewards = rewards.double()
    sizes, means = _sizes_and_means(rewards, groups, num_groups)
    scale = sizes / (sizes - 1).clamp(min=1)
    equal = degenerate_groups(rewards, groups, num_groups)[groups]
    return ((rewards - means[groups]) * scale[groups]).masked_fill(equal, 0)


def degenerate_groups(rewards: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    """Groups whose rewards are all equal, or that are empty, and so teach nothing: bool [num_groups]."""
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

    rewards, values [M]: V_t is the value of the state BEFORE token t, which the token was drawn from. After a sample's
    last token V and A are 0. bootstrap [samples]: V of the state after the last token, for episodes that were cut off
    before all their rewards were given, 0 for the others; None: all 0. A truncated answer does not count as cut off:
    its score already judges the text as it stands.

    The recurrence takes ceil(log2 M) steps over all tokens; each step doubles how far ahead a token sees (Hillis &
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
    """Mean difference between the discounted rewards of a sample and the value of its first state: a float64 scalar, 0
    without tokens. For a good critic it is 0 up to chance; for an untrained one it is the whole level of the rewards.
    Adding it to the values makes advantages judge a token's quality instead of its distance from the end, from the
    first rollout on."""
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
) -> Tensor:
    """PPO's token rewards, float64 [M]: the sample's score on its last token, minus kl_coef * (log p - log p_reference)
    on every token (Ziegler et al., 1909.08593). scores [samples]; both log-probabilities are [M], needed if kl_coef is
    above 0."""
    scores = scores.double()
    rewards = torch.where(_last(samples), scores[samples], scores.new_zeros(()))
    if not kl_coef:
        return rewards
    if log_probs is None or reference is None:
        raise ValueError(f"kl_coef={kl_coef} needs log_probs and reference; give them, or set it to 0")
    return rewards - kl_coef * (log_probs.double() - reference.double())


def whiten(x: Tensor) -> Tensor:
    """(x - mean) / sqrt(variance + 1e-8): float64 [M]."""
    x = x.double()
    count = max(1, x.numel())
    centred = x - x.sum() / count
    return centred / (centred.square().sum() / count + 1e-8).sqrt()


def _last(samples: Tensor) -> Tensor:
    """True at the last token of each sample: bool [M]."""
    return torch.cat((samples[1:] != samples[:-1], samples.new_ones(min(1, len(samples)), dtype=torch.bool)))


def _sizes_and_means(rewards: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    sizes = _sums(torch.ones_like(rewards), groups, num_groups)
    return sizes, _sums(rewards, groups, num_groups) / sizes.clamp(min=1)


def _sums(per_sample: Tensor, groups: Tensor, num_groups: int) -> Tensor:
    return per_sample.new_zeros(num_groups).index_add(0, groups, per_sample)


class ValueTracker:
    """Success rates of prompts 0..num_prompts-1, in float64 NumPy arrays (see the module's docstring).

    low, high: the range of the reward. rho_min, rho_max: about 1 / (1 - rho) answers are remembered, here 8 to 25.
    half: D_half, the drift at which half is forgotten; 0.06 is the authors'. exploration: eps of the drawing weights.
    clamped counts the rewards outside low..high so far. ValueError for bad settings and NaN rewards.
    """

    def __init__(
        self,
        num_prompts: int,
        low: float = 0.0,
        high: float = 1.0,
        rho_min: float = 0.875,
        rho_max: float = 0.96,
        half: float = 0.06,
        exploration: float = 0.05,
    ) -> None:
        if not 0 <= rho_min <= rho_max < 1:
            raise ValueError(f"rho_min={rho_min}, rho_max={rho_max}: need 0 <= rho_min <= rho_max < 1")
        if not low < high:
            raise ValueError(f"rewards from {low} to {high}: give the lower end first")
        if not half > 0 or not exploration > 0:
            raise ValueError(f"half={half}, exploration={exploration}: both must be above 0")
        self.low, self.high, self.half, self.exploration = low, high, half, exploration
        self.rho_min, self.rho_max = rho_min, rho_max
        self.prior = 1 / (1 - rho_min)
        self.successes = np.full(num_prompts, self.prior / 2)
        self.failures = np.full(num_prompts, self.prior / 2)
        self.seen_at = np.zeros(num_prompts)  # the drift when the prompt was last answered
        self.drift = 0.0  # how far the policy has moved since the start
        self.clamped = 0

    def values(self, prompts: np.ndarray | None = None) -> np.ndarray:
        """The baseline of `prompts` (None: of all), in units of the reward: float64."""
        return self.low + (self.high - self.low) * self._chances(prompts)

    def observe(self, prompts: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """Update with rewards of the current policy's answers: int64 and float64 [n] -> advantages, float64 [n]."""
        shares = self._shares(rewards)
        advantages = self.low + (self.high - self.low) * shares - self.values(prompts)
        for prompt, share in zip(prompts, shares, strict=True):
            rho = self.remembered(prompt)
            self.successes[prompt] = rho * self.successes[prompt] + share
            self.failures[prompt] = rho * self.failures[prompt] + (1 - share)
            self.seen_at[prompt] = self.drift
        return advantages

    def remembered(self, prompt: int) -> float:
        """rho: how much the past answers to `prompt` still count."""
        moved = self.drift - self.seen_at[prompt]
        return float(np.clip(2 ** (-moved / self.half), self.rho_min, self.rho_max))

    def advance(self, drift: float) -> None:
        """Record that the policy moved, by the mean |log p_new - log p_old| per token over an update."""
        if not 0 <= drift < math.inf:
            raise ValueError(f"drift {drift}: the policy's log-probabilities are no longer finite; lower --lr")
        self.drift += drift

    def weights(self) -> np.ndarray:
        """Probability of drawing each prompt next: float64 [num_prompts], summing to 1."""
        chances = self._chances(None)
        weights = np.sqrt(chances * (1 - chances)) + self.exploration
        return weights / weights.sum()

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """Draw `count` different prompts by their weights: int64 [count]. ValueError if there are fewer prompts."""
        if count > len(self.successes):
            raise ValueError(f"cannot draw {count} different prompts: there are only {len(self.successes)}")
        return generator.choice(len(self.successes), count, replace=False, p=self.weights())

    def state_dict(self) -> dict[str, Any]:
        """Copies of everything that changes."""
        arrays = {name: getattr(self, name).copy() for name in ("successes", "failures", "seen_at")}
        return arrays | {"drift": self.drift, "clamped": self.clamped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore a `state_dict`, exactly. ValueError if it is for another number of prompts."""
        if len(state["successes"]) != len(self.successes):
            raise ValueError(
                f"the checkpoint tracks {len(state['successes'])} prompts, the data has {len(self.successes)}; "
                "restore the data, or start anew with --resume never"
            )
        for name in ("successes", "failures", "seen_at"):
            setattr(self, name, np.asarray(state[name], np.float64).copy())
        self.drift, self.clamped = float(state["drift"]), int(state["clamped"])

    def _chances(self, prompts: np.ndarray | None) -> np.ndarray:
        selected = slice(None) if prompts is None else prompts
        return self.successes[selected] / (self.successes[selected] + self.failures[selected])

    def _shares(self, rewards: np.ndarray) -> np.ndarray:
        if np.isnan(rewards).any():
            raise ValueError("a reward is NaN; leave out the answers that could not be judged")
        clamped = np.clip(rewards, self.low, self.high)
        self.clamped += int((clamped != rewards).sum())
        return (clamped - self.low) / (self.high - self.low)
