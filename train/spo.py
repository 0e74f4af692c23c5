"""Teach a chat model by rewards, one answer to each prompt: `python train/spo.py` works as it is, on built-in sums.

Single-stream policy optimisation (Xu & Ding 2025, arXiv 2509.13232; minimind/objectives/advantages.py). Every prompt
has a running estimate of the model's success on it, kept between rollouts. An answer's advantage is its reward minus
that estimate, normalised over the whole rollout. No prompt needs a group of answers, no answer is wasted because its
group got equal rewards, and prompts of uncertain outcome are drawn most often. After an interruption the same command
continues from the last checkpoint. A run leaves its metrics, curves, answers and weights in a folder under runs/.

Departures from the paper, besides those of the tracker: the policy's drift between two rollouts is measured on up to 64
answers of the first one, as mean |log p - log mu| per token, which includes the engine's rounding in bf16. All prompts
start at an estimate of 1/2, without answers sampled for it. The loss is PPO's clip as a mean over all tokens; a KL in
the loss is optional.

Success is a position in a range of rewards (--reward-range), by default the bounds of all rewards. A reward model has
none; then rewards are normalised and the range is three standard deviations to either side. Rewards outside the range
are clipped.
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

from minimind.objectives.advantages import ValueTracker, whiten
from minimind.objectives.policy import policy_loss
from minimind.objectives.surrogates import clip, with_terms
from minimind.rewards import Rewards
from minimind.training.job import run_script
from minimind.training.rl.arguments import NormName, RolloutArgs
from minimind.training.rl.rollouts import Answer, DrawnPrompt
from minimind.training.rl.stage import RolloutStage
from minimind.utils.display import say

NANO_LR = 5e-5  # nano's peak learning rate, the best of a few; rl.stage.scaled_lr has the others
DEVIATIONS = 3.0  # range of rewards without bounds, to either side of the mean
_DRIFT_ANSWERS = 64  # answers that measure the policy's drift


@dataclass(frozen=True)
class Args(RolloutArgs):
    """Learn from single answers. All defaults work."""

    rollouts: int = 80
    """Number of rollouts, each sampled from the current model."""
    prompts: int = 256
    """Prompts in a rollout, all different."""
    samples: int = 1
    """Always 1: --prompts sets the number of answers in a rollout."""
    minibatches: int | None = 4
    """Optimizer steps in each pass over a rollout, each on a part of its answers; with a single step the ratio is 1 and
    the clip has no effect."""
    reward_range: tuple[float, float] | None = None
    """Rewards that count as failure and as success, with weights and --reward-norm applied; those outside are clipped
    and counted. None: --reward-clip, or the bounds of the rewards, or -3 to 3 with normalised rewards if one has no
    bounds."""
    clip_low: float = 0.2
    """Below 1 - clip_low, a token's probability ratio is not lowered further."""
    clip_high: float = 0.28
    """Above 1 + clip_high, a token's probability ratio is not raised further."""
    beta: float = 0.0
    """Weight of the KL (k3, per token) to the initial model; 0 keeps no copy of it."""
    entropy: float = 0.0
    """Weight of an entropy bonus, which keeps answers varied; 0: none."""
    half: float = 0.06
    """Drift of the policy, in nats per token since it last answered a prompt, at which half of that prompt's history is
    forgotten."""

    def check(self) -> None:
        super().check()
        ValueTracker(0, *(self.reward_range or (0.0, 1.0)), half=self.half)


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when training was interrupted. Raises ValueError, in one line, for bad input."""
    if args.samples != 1:
        raise ValueError(f"--samples {args.samples}: there is one answer to a prompt; set --prompts instead")
    objective = with_terms(partial(clip, low=args.clip_low, high=args.clip_high), args.beta, args.entropy)
    run = RolloutStage.begin("spo", args, "token", console)
    if args.prompts > len(run.train):
        say(console, f"--prompts {args.prompts}: there are only {len(run.train)}; every rollout uses all of them")
        run.args = dataclasses.replace(run.args, prompts=len(run.train))
    (low, high), norm, reason = range_of(args, run.rewards)
    run.args = dataclasses.replace(run.args, reward_norm=norm)
    tracker = ValueTracker(len(run.train), low, high, half=args.half)
    run.build(
        partial(advantages, tracker, console),
        stream=UncertainPrompts(tracker, args.seed),
        keepers={"tracker": TrackerState(tracker)},
        with_reference=args.beta > 0,
        before=lambda answers: tracker.advance(float(run.collector.policy_change(answers, _DRIFT_ANSWERS).mean())),
    )
    loss = partial(policy_loss, run.trained, objective=objective, entropy=args.entropy != 0)
    line = f"success: rewards from {low:g} to {high:g}, {reason}"
    return run.fit(loss, NANO_LR, [line])


def range_of(args: Args, rewards: Rewards) -> tuple[tuple[float, float], NormName, str]:
    """(the rewards of failure and success, the --reward-norm to use, the reason)."""
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
    """Set every token's advantage to the answer's score minus the tracked value, normalised; update the tracker."""
    prompts = np.array([a.prompt for a in answers])
    scores = np.array([a.score for a in answers])
    values, clamped = tracker.values(prompts), tracker.clamped
    whitened = whiten(torch.from_numpy(tracker.observe(prompts, scores)))
    for answer, value in zip(answers, whitened.tolist(), strict=True):
        answer.advantages = np.full(len(answer.ids), value, np.float32)
    outside = tracker.clamped - clamped
    if outside and not clamped:
        say(
            console,
            f"{outside} of {len(answers)} rewards, {scores.min():g} to {scores.max():g}, lie outside --reward-range "
            f"{tracker.low:g} {tracker.high:g} and are clipped to it (reward_clamped in metrics.jsonl)",
        )
    clipped = np.clip(scores, tracker.low, tracker.high)
    return {
        "value": float(values.mean()),
        "value_error": float(np.square(clipped - values).mean()),
        "reward_clamped": outside / len(answers),
    }


@dataclass(frozen=True)
class UncertainPrompts:
    """A stream that draws prompts by the tracker's weights."""

    tracker: ValueTracker
    seed: int

    def draw(self, first: int, count: int) -> list[DrawnPrompt]:
        generator = np.random.default_rng([self.seed & (1 << 64) - 1, first])
        return [DrawnPrompt(first + i, int(p)) for i, p in enumerate(self.tracker.draw(count, generator))]


@dataclass(frozen=True)
class TrackerState:
    """The tracker's state as a checkpoint stores it: plain values and tensors."""

    tracker: ValueTracker

    def state_dict(self) -> dict[str, Any]:
        state = self.tracker.state_dict().items()
        return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
