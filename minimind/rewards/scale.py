"""What answers are learnt from, made of their rewards: clipped, then brought to a mean of 0 and a deviation of 1."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

_EPS = 1e-8  # beside a deviation


@dataclass
class RewardScale:
    """clip: (lowest, highest) reward, in its own units; None: none. running: whether to take off the mean of all
    rewards so far, this batch's among them, and divide by their standard deviation (Welford 1962; Chan et al. 1983).

    count, mean and squares, the sum of squared distances from the mean, are what has been seen. Raises ValueError on a
    clip that is no range.
    """

    clip: tuple[float, float] | None = None
    running: bool = False
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"--reward-clip {self.clip[0]:g} {self.clip[1]:g}: the first must be the lower one")

    @property
    def deviation(self) -> float:
        """Of the rewards so far; 0 before there are any."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def __call__(self, rewards: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        """float64 [n], without NaN -> (what is learnt from, figures: reward_clipped, the share; reward_mean and
        reward_deviation, those it was normalised by)."""
        figures: dict[str, float] = {}
        if self.clip is not None and len(rewards):
            held = np.clip(rewards, *self.clip)
            figures["reward_clipped"] = float((held != rewards).mean())
            rewards = held
        if not self.running or not len(rewards):
            return rewards, figures
        self._see(rewards)
        figures |= {"reward_mean": self.mean, "reward_deviation": self.deviation}
        return (rewards - self.mean) / (self.deviation + _EPS), figures

    def _see(self, rewards: np.ndarray) -> None:
        total = self.count + len(rewards)
        apart = float(rewards.mean()) - self.mean
        self.squares += float(np.square(rewards - rewards.mean()).sum())
        self.squares += apart * apart * self.count * len(rewards) / total
        self.mean += apart * len(rewards) / total
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
