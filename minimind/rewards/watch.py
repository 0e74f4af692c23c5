"""Whether rewards still teach anything."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from minimind.rewards.compose import Scores


def degenerate(total: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Whether all rewards of a group are equal: bool, for each different number in `groups`, ascending. Samples left
    out (NaN) do not count; a group with fewer than two others is degenerate, too."""
    kept = ~np.isnan(total)
    out = []
    for group in np.unique(groups):
        rewards = total[kept & (groups == group)]
        out.append(len(rewards) < 2 or rewards.min() == rewards.max())
    return np.array(out, bool)


def summary(scores: Scores, groups: np.ndarray | None = None) -> dict[str, float]:
    """Figures for metrics.jsonl: reward, reward_std (over samples), reward_NAME of each part unweighted,
    reward_failed_NAME, the samples that it failed on if there are any, reward_dropped, the samples left out, and
    degenerate_groups, the share. A mean over no sample is left out."""
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
    """Says when the rewards of `patience` steps in a row were all equal where they are compared, once for as long as
    that lasts."""

    patience: int = 3
    silent: int = 0

    def see(self, scores: Scores, groups: np.ndarray | None = None) -> str | None:
        """A warning line, or None. groups: what a sample is compared with; None: with the whole batch."""
        total = scores.total
        if len(total) == 0:
            return None
        gone = bool(degenerate(total, np.zeros(len(total), np.int64) if groups is None else groups).all())
        self.silent = self.silent + 1 if gone else 0
        if self.silent != self.patience:
            return None
        kept = total[scores.kept]
        if not len(kept):
            return f"warning: for {self.patience} steps no reward could judge a sample; there is nothing to learn from"
        compared = "all samples have one reward" if groups is None else "in every group all rewards are equal"
        return (
            f"warning: for {self.patience} steps {compared} (now {kept.mean():.3g} on average): there is nothing to "
            "learn from; take easier or harder prompts, more samples or a higher temperature"
        )

    def state_dict(self) -> dict[str, int]:
        return {"silent": self.silent}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.silent = state["silent"]
