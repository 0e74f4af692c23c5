"""Teach a chat model by rewards, one answer to each prompt: `python train/spo.py` works as it is, on made sums.

Single-stream policy optimisation (Xu & Ding 2025, arXiv 2509.13232; docstring of minimind/objectives/value_tracker.py).
Every prompt has a running estimate of how well the model does on it, which outlives the rollout; an answer is better or
worse than that, and advantages are normalised over the whole rollout. No prompt needs a group of answers, no rollout is
lost to groups that agree, and prompts whose outcome is least certain are asked most often. Run the same command again
after any interruption and it continues where the last checkpoint was. Every run leaves a folder under runs/ with its
metrics, curves, answers and weights.

Departures from the paper, besides those of the tracker: the policy's drift between two rollouts is measured on the
answers of the first of them, up to 64, as mean |log p - log mu| per token; where the engine computes in bf16 its
rounding is part of that. The prompts' first estimates are 1/2, not those of answers sampled for the purpose. The loss
is PPO's clip as a mean over all tokens; a KL in the loss is optional.

Success is a share of a range of rewards (--reward-range). Where every reward has bounds these are it; a reward model
has none, and there the rewards are normalised and three standard deviations to either side are the range. What lies
outside counts as the nearer end.
"""

from __future__ import annotations

if __name__ == "__main__":
    from minimind.utils.startup import leave_on_interrupt

    leave_on_interrupt()  # during the imports below

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console

from minimind.objectives.advantages import whiten
from minimind.objectives.policy import policy_loss
from minimind.objectives.surrogates import clip, with_terms
from minimind.objectives.value_tracker import ValueTracker
from minimind.rewards import Rewards
from minimind.training.rl.arguments import NormName, RolloutArgs
from minimind.training.rl.rollouts import Answer, DrawnPrompt
from minimind.training.rl.stage import Rollouts
from minimind.training.script import run_script
from minimind.utils.display import say

NANO_LR = 5e-5  # peak rate of nano, of a few that were tried; others' by rl.stage.peak_lr
DEVIATIONS = 3.0  # to either side of the mean: the range of rewards without bounds
_MEASURED = 64  # answers by which the drift is measured


@dataclass(frozen=True)
class Args(RolloutArgs):
    """Learn from single answers. Every default works."""

    rollouts: int = 80
    """How often answers are sampled from the model as it then is."""
    prompts: int = 256
    """Prompts of a rollout, all different."""
    samples: int = 1
    """One: --prompts says how many answers a rollout has."""
    minibatches: int | None = 4
    """Optimizer steps on each pass over a rollout, each on a part of its answers: with one alone the ratio is 1 and the
    clip does nothing."""
    reward_range: tuple[float, float] | None = None
    """The rewards that count as failure and as success, weights included and normalised where --reward-norm says so;
    what lies outside is counted and taken for the nearer one. None: the bounds of the rewards, or where one of them has
    none, --reward-clip, or else -3 to 3 of rewards that are normalised."""
    clip_low: float = 0.2
    """The ratio has no gradient below 1 - clip_low where it would fall."""
    clip_high: float = 0.28
    """The ratio has no gradient above 1 + clip_high where it would rise."""
    beta: float = 0.0
    """Weight of the KL (k3, per token) to the model that the run began with; 0 keeps no such model."""
    entropy: float = 0.0
    """Weight of the entropy, which keeps answers varied."""
    half: float = 0.06
    """The drift of the policy at which half of what was seen of a prompt is forgotten."""

    def check(self) -> None:
        super().check()
        ValueTracker(0, *(self.reward_range or (0.0, 1.0)), half=self.half)


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when it was interrupted. Bad input raises ValueError with one clear line."""
    if args.samples != 1:
        raise ValueError(f"--samples {args.samples}: there is one answer to a prompt; set --prompts instead")
    objective = with_terms(partial(clip, low=args.clip_low, high=args.clip_high), args.beta, args.entropy)
    run = Rollouts.begin("spo", args, "token", console)
    if args.prompts > len(run.train):
        say(console, f"--prompts {args.prompts}: there are {len(run.train)}, all of which every rollout asks")
        run.args = dataclasses.replace(run.args, prompts=len(run.train))
    (low, high), norm, reason = range_of(args, run.rewards)
    run.args = dataclasses.replace(run.args, reward_norm=norm)
    tracker = ValueTracker(len(run.train), low, high, half=args.half)
    run.build(
        partial(advantages, tracker, console),
        stream=UncertainPrompts(tracker, args.seed),
        keepers={"tracker": TrackerState(tracker)},
        with_reference=args.beta > 0,
        before=lambda answers: tracker.advance(float(run.collector.moved(answers, _MEASURED).mean())),
    )
    loss = partial(policy_loss, run.trained, objective=objective, entropy=args.entropy != 0)
    line = f"success: rewards from {low:g} to {high:g}, {reason}"
    return run.fit(loss, NANO_LR, [line])


def range_of(args: Args, rewards: Rewards) -> tuple[tuple[float, float], NormName, str]:
    """(the range that success is a share of, --reward-norm as it is to be, why)."""
    norm = args.reward_norm
    if args.reward_range is not None:
        return args.reward_range, norm, "as --reward-range says"
    if norm == "none" and args.reward_clip is not None:
        return args.reward_clip, norm, "as --reward-clip says"
    bounds = rewards.bounds
    if norm == "none" and bounds is not None:
        return (bounds[0] - args.truncation_penalty, bounds[1]), norm, "the bounds of --reward"
    reason = "--reward-norm running" if norm == "running" else "normalised, as not every --reward has bounds"
    return (-DEVIATIONS, DEVIATIONS), "running", f"in standard deviations from the mean so far: {reason}"


def advantages(tracker: ValueTracker, console: Console, answers: list[Answer]) -> dict[str, float]:
    """Give every token of an answer how much better than the tracked value it is, and take the rewards in."""
    prompts = np.array([a.prompt for a in answers])
    scores = np.array([a.score for a in answers])
    values, clamped = tracker.values(prompts), tracker.clamped
    found = whiten(torch.from_numpy(tracker.observe(prompts, scores)))
    for answer, value in zip(answers, found.tolist(), strict=True):
        answer.advantages = np.full(len(answer.ids), value, np.float32)
    outside = tracker.clamped - clamped
    if outside and not clamped:
        say(
            console,
            f"{outside} of {len(answers)} rewards, {scores.min():g} to {scores.max():g}, lie outside --reward-range "
            f"{tracker.low:g} {tracker.high:g} and count as the nearer end (reward_clamped in metrics.jsonl)",
        )
    held = np.clip(scores, tracker.low, tracker.high)
    return {
        "value": float(values.mean()),
        "value_error": float(np.square(held - values).mean()),
        "reward_clamped": outside / len(answers),
    }


@dataclass(frozen=True)
class UncertainPrompts:
    """Prompts drawn by the tracker's weights."""

    tracker: ValueTracker
    seed: int

    def draw(self, first: int, count: int) -> list[DrawnPrompt]:
        generator = np.random.default_rng([self.seed & (1 << 64) - 1, first])
        return [DrawnPrompt(first + i, int(p)) for i, p in enumerate(self.tracker.draw(count, generator))]


@dataclass(frozen=True)
class TrackerState:
    """The tracker as a checkpoint keeps it: plain values and tensors."""

    tracker: ValueTracker

    def state_dict(self) -> dict[str, Any]:
        state = self.tracker.state_dict().items()
        return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
