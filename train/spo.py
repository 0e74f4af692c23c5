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
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console

from minimind.data.progress import say
from minimind.objectives.advantages import whiten
from minimind.objectives.policy import policy_loss
from minimind.objectives.surrogates import clip, with_terms
from minimind.objectives.value_tracker import ValueTracker
from minimind.training.rl_arguments import RolloutArgs
from minimind.training.rl_stage import Rollouts
from minimind.training.rollouts import Answer, Drawn
from minimind.training.script import run_script

# Peak rates by preset; nano has the best of a few that were tried.
PEAK_LR = {"nano": 2e-4}
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
    reward_range: tuple[float, float] = (0.0, 1.0)
    """The lowest and the highest reward that there can be, weights included."""
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
        ValueTracker(0, *self.reward_range, half=self.half)


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when it was interrupted. Bad input raises ValueError with one clear line."""
    if args.samples != 1:
        raise ValueError(f"--samples {args.samples}: there is one answer to a prompt; set --prompts instead")
    objective = with_terms(partial(clip, low=args.clip_low, high=args.clip_high), args.beta, args.entropy)
    run = Rollouts.begin("spo", args, "token", console)
    if args.prompts > len(run.train):
        say(console, f"--prompts {args.prompts}: there are {len(run.train)}, all of which every rollout asks")
        run.args = dataclasses.replace(run.args, prompts=len(run.train))
    tracker = ValueTracker(len(run.train), *args.reward_range, half=args.half)
    run.build(
        partial(advantages, tracker),
        stream=Uncertain(tracker, args.seed),
        keeper=Kept(tracker),
        with_reference=args.beta > 0,
        before=lambda answers: tracker.advance(float(run.collector.moved(answers, _MEASURED).mean())),
    )
    loss = partial(policy_loss, run.trained, objective=objective, entropy=args.entropy != 0)
    return run.fit(loss, PEAK_LR.get(run.job.origin.preset, 1e-5))


def advantages(tracker: ValueTracker, answers: list[Answer]) -> dict[str, float]:
    """Give every token of an answer how much better than the tracked value it is, and take the rewards in."""
    prompts = np.array([a.prompt for a in answers])
    rewards = np.array([a.reward for a in answers])
    values = tracker.values(prompts)
    found = whiten(torch.from_numpy(tracker.observe(prompts, rewards)))
    for answer, value in zip(answers, found.tolist(), strict=True):
        answer.advantages = np.full(len(answer.ids), value, np.float32)
    return {"value": float(values.mean()), "value_error": float(np.square(rewards - values).mean())}


@dataclass(frozen=True)
class Uncertain:
    """Prompts drawn by the tracker's weights."""

    tracker: ValueTracker
    seed: int

    def draw(self, first: int, count: int) -> list[Drawn]:
        generator = np.random.default_rng([self.seed & (1 << 64) - 1, first])
        return [Drawn(first + i, int(p)) for i, p in enumerate(self.tracker.draw(count, generator))]


@dataclass(frozen=True)
class Kept:
    """The tracker as a checkpoint keeps it: plain values and tensors."""

    tracker: ValueTracker

    def state_dict(self) -> dict[str, Any]:
        state = self.tracker.state_dict().items()
        return {k: torch.from_numpy(v) if isinstance(v, np.ndarray) else v for k, v in state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.tracker.load_state_dict(state)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
