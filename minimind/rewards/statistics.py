"""Reward statistics: figures for metrics.jsonl, a warning when rewards teach nothing, clipping and normalisation."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np

from minimind.rewards.compose import Scores


def degenerate(total: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Whether all rewards of a group are equal, or fewer than two: bool, one per group in ascending order. Samples left
    out (NaN) do not count."""
    kept = ~np.isnan(total)
    equal = []
    for group in np.unique(groups):
        rewards = total[kept & (groups == group)]
        equal.append(len(rewards) < 2 or rewards.min() == rewards.max())
    return np.array(equal, bool)


def summary(scores: Scores, groups: np.ndarray | None = None) -> dict[str, float]:
    """Figures for metrics.jsonl: reward and reward_std over samples; reward_NAME, the unweighted mean of each part;
    reward_failed_NAME, the number of samples it failed on, if any; reward_dropped, the number of samples left out; and
    degenerate_groups, the share of groups that are degenerate. Means over no samples are omitted."""
    kept = scores.total[scores.kept]
    figures: dict[str, float] = {}
    if len(kept):
        figures |= {"reward": float(kept.mean()), "reward_std": float(kept.std())}
    for name, values in scores.parts.items():
        judged = values[~np.isnan(values)]
        if len(judged):
            figures[f"reward_{name}"] = float(judged.mean())
        if len(judged) < len(values):
            figures[f"reward_failed_{name}"] = float(len(values) - len(judged))
    figures["reward_dropped"] = float(len(scores.total) - len(kept))
    if groups is not None:
        figures["degenerate_groups"] = float(degenerate(scores.total, groups).mean())
    return figures


@dataclass
class SignalWatch:
    """Warns once when rewards that are compared with each other have been equal for `patience` steps in a row."""

    patience: int = 3
    silent: int = 0

    def see(self, scores: Scores, groups: np.ndarray | None = None) -> str | None:
        """Return a warning line, or None. groups: samples are compared within these; None: within the whole batch."""
        total = scores.total
        if len(total) == 0:
            return None
        equal = bool(degenerate(total, np.zeros(len(total), np.int64) if groups is None else groups).all())
        self.silent = self.silent + 1 if equal else 0
        if self.silent != self.patience:
            return None
        kept = total[scores.kept]
        if not len(kept):
            return f"warning: for {self.patience} steps no reward could judge a sample; there is nothing to learn from"
        compared = "all samples have the same reward" if groups is None else "in every group all rewards are equal"
        return (
            f"warning: for {self.patience} steps {compared} (now {kept.mean():.3g} on average): there is nothing to "
            "learn from; use easier or harder prompts, more samples or a higher temperature"
        )

    def state_dict(self) -> dict[str, int]:
        return {"silent": self.silent}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.silent = state["silent"]


_EPS = 1e-8  # added to a standard deviation


@dataclass
class RewardScale:
    """Clips rewards and normalises them by running statistics.

    clip: (lowest, highest) reward; None: no clipping. running: subtract the mean of all rewards so far, this batch
    included, and divide by their standard deviation (Welford 1962; Chan et al. 1983). count, mean and squares (the sum
    of squared distances from the mean) are the running state. ValueError for an empty clip range.
    """

    clip: tuple[float, float] | None = None
    running: bool = False
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"--reward-clip {self.clip[0]:g} {self.clip[1]:g}: give the lower end first")

    @property
    def deviation(self) -> float:
        """Standard deviation of all rewards so far; 0 before there are any."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def __call__(self, rewards: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        """float64 [n], without NaN -> (scaled rewards, figures): reward_clipped, the share that was clipped;
        reward_mean and reward_deviation, the running statistics."""
        figures: dict[str, float] = {}
        if self.clip is not None and len(rewards):
            clipped = np.clip(rewards, *self.clip)
            figures["reward_clipped"] = float((clipped != rewards).mean())
            rewards = clipped
        if not self.running or not len(rewards):
            return rewards, figures
        self._update(rewards)
        figures |= {"reward_mean": self.mean, "reward_deviation": self.deviation}
        return (rewards - self.mean) / (self.deviation + _EPS), figures

    def _update(self, rewards: np.ndarray) -> None:
        total = self.count + len(rewards)
        shift = float(rewards.mean()) - self.mean
        self.squares += float(np.square(rewards - rewards.mean()).sum())
        self.squares += shift * shift * self.count * len(rewards) / total
        self.mean += shift * len(rewards) / total
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
