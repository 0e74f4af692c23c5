"""SPO's baseline, one number per prompt that outlives the batch (Xu & Ding, 2509.13232).

The chance that the policy succeeds at a prompt x is tracked by a Beta distribution, whose past fades as the policy
leaves the one that it was seen with:

    v(x) = a / (a + b)      a <- rho a + r      b <- rho b + 1 - r      rho = clamp(2^(-D / D_half), rho_min, rho_max)

D is how far the policy has moved since it last answered x. The advantage is r - v(x), with the v BEFORE this answer,
normalised over the batch (`advantages.whiten`), not over a group: one answer per prompt is enough. Prompts are drawn
with weights sqrt(v (1 - v)) + eps, most often those whose outcome is least certain. A prior of N0 = 1 / (1 - rho_min)
answers stands at the beginning.

Departures from the paper:
- Rewards need not be 0 or 1: those between `low` and `high` count as the share of the way; what lies outside counts as
  the nearer end, in the advantage too, and is counted.
- D is the mean of |log p_new - log p_old| per token, as in the authors' code, where the paper has a KL divergence; and
  it is not measured on the answers of old, which would have to be kept and scored again, but added up over the updates
  in between (`advance`). Distances add up at most: rather more is forgotten than less.
- The prior's mean is 1/2, or that of a few answers if `begin` is given them; the paper always samples those first.
- Several answers to one prompt in a batch are taken one after the other, the later ones with D = 0; all have the v from
  before the batch as their baseline.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np


class ValueTracker:
    """Success rates of prompts 0..num_prompts-1, as float64 arrays of the host.

    rho_min, rho_max: no more than about 1 / (1 - rho) answers are remembered, 8 to 25 of them. half: the drift D at
    which half is forgotten (the authors' 0.06). exploration: eps of the weights. clamped: how many rewards lay outside
    low..high so far. Raises ValueError on settings without meaning, and on
    rewards that are NaN.
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
            raise ValueError(f"rewards from {low} to {high}: the first must be the lower one")
        if not half > 0 or not exploration > 0:
            raise ValueError(f"half={half}, exploration={exploration}: both must be above 0")
        self.low, self.high, self.half, self.exploration = low, high, half, exploration
        self.rho_min, self.rho_max = rho_min, rho_max
        self.prior = 1 / (1 - rho_min)
        self.successes = np.full(num_prompts, self.prior / 2)
        self.failures = np.full(num_prompts, self.prior / 2)
        self.seen_at = np.zeros(num_prompts)  # the drift when the prompt was last answered
        self.drift = 0.0  # of the policy, since the beginning
        self.clamped = 0

    def begin(self, prompts: np.ndarray, rewards: np.ndarray) -> None:
        """Take the means of a few answers of the policy to each of `prompts` as the prior's. int64, float64 [n]."""
        shares = self._shares(rewards)
        for prompt in np.unique(prompts):
            mean = shares[prompts == prompt].mean()
            self.successes[prompt], self.failures[prompt] = self.prior * mean, self.prior * (1 - mean)
            self.seen_at[prompt] = self.drift

    def values(self, prompts: np.ndarray | None = None) -> np.ndarray:
        """The baseline, in units of the reward: float64, of `prompts` or of all."""
        return self.low + (self.high - self.low) * self._chances(prompts)

    def observe(self, prompts: np.ndarray, rewards: np.ndarray) -> np.ndarray:
        """Take in answers of the policy as it is now: int64 and float64 [n] -> their advantages, float64 [n]."""
        shares = self._shares(rewards)
        advantages = self.low + (self.high - self.low) * shares - self.values(prompts)
        for prompt, share in zip(prompts, shares, strict=True):
            rho = self.remembered(prompt)
            self.successes[prompt] = rho * self.successes[prompt] + share
            self.failures[prompt] = rho * self.failures[prompt] + (1 - share)
            self.seen_at[prompt] = self.drift
        return advantages

    def remembered(self, prompt: int) -> float:
        """rho: what share of what was seen of `prompt` still counts."""
        moved = self.drift - self.seen_at[prompt]
        return float(np.clip(2 ** (-moved / self.half), self.rho_min, self.rho_max))

    def advance(self, drift: float) -> None:
        """Tell that the policy moved: mean |log p_new - log p_old| per token over an update."""
        if not 0 <= drift < math.inf:
            raise ValueError(f"drift {drift}: the policy's log-probabilities moved by no finite number; lower --lr")
        self.drift += drift

    def weights(self) -> np.ndarray:
        """Chance of each prompt to be drawn next: float64 [num_prompts], of sum 1."""
        chances = self._chances(None)
        weights = np.sqrt(chances * (1 - chances)) + self.exploration
        return weights / weights.sum()

    def draw(self, count: int, generator: np.random.Generator) -> np.ndarray:
        """`count` different prompts by their weights: int64. ValueError if there are fewer."""
        if count > len(self.successes):
            raise ValueError(f"{count} different prompts were asked for, but there are {len(self.successes)}")
        return generator.choice(len(self.successes), count, replace=False, p=self.weights())

    def state_dict(self) -> dict[str, Any]:
        """All that changes, as copies."""
        arrays = {name: getattr(self, name).copy() for name in ("successes", "failures", "seen_at")}
        return arrays | {"drift": self.drift, "clamped": self.clamped}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on, to the bit, from what `state_dict` gave. Raises ValueError where the number of prompts differs."""
        if len(state["successes"]) != len(self.successes):
            raise ValueError(
                f"the checkpoint tracks {len(state['successes'])} prompts, the data has {len(self.successes)}; "
                "put the data back or start anew with --resume never"
            )
        for name in ("successes", "failures", "seen_at"):
            setattr(self, name, np.asarray(state[name], np.float64).copy())
        self.drift, self.clamped = float(state["drift"]), int(state["clamped"])

    def _chances(self, prompts: np.ndarray | None) -> np.ndarray:
        which = slice(None) if prompts is None else prompts
        return self.successes[which] / (self.successes[which] + self.failures[which])

    def _shares(self, rewards: np.ndarray) -> np.ndarray:
        if np.isnan(rewards).any():
            raise ValueError("a reward is NaN; leave out answers that could not be judged")
        held = np.clip(rewards, self.low, self.high)
        self.clamped += int((held != rewards).sum())
        return (held - self.low) / (self.high - self.low)
