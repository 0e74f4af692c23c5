"""Teach a chat model by rewards with a critic beside it: `python train/ppo.py` works as it is, on made sums.

Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) as it is done for language models (Ouyang et al.
2022, 2203.02155): a critic estimates at every token what the answer will be worth, generalised advantage estimation
(1506.02438) turns that and the reward into advantages of single tokens, and both learn from every rollout in a few
passes over parts of it. Run the same command again after any interruption and it continues where the last checkpoint
was. Every run leaves a folder under runs/ with its metrics, curves, answers and weights; the critic lies beside the
policy in every checkpoint.

Choices where implementations differ: the KL to the model the run began with is taken off the reward of every token
(k1, as Ziegler et al. 2019, 1909.08593, do) or, with --kl-in loss, added to the loss (k3); advantages are normalised
over the rollout; the value's clip is that of OpenAI's baselines, its width a share of what the critic is off by; an
answer that was cut off has the score of what stands there, and nothing is expected behind it; the ratio is to the
engine's log-probabilities at the time of sampling.

A critic knows nothing at first. With values of 0, advantages say how near the end a token stood, and the end token wins
whatever its answer was worth; therefore the values are shifted by what those of the answers' first states miss of the
rewards on average (advantages.value_shift). The gradients of actor and critic are clipped apart: the critic's norm is
the larger one, and would decide how far the actor goes.

A low explained_variance in metrics.jsonl need not be the critic's fault. Of the built-in sums' reward as the weak model
answers them, the prompt decides 1% of the variance and the answer's first token 20%; the rest is known when the answer
stands, and then to those alone who can check a sum (estimated from 64 answers to each of 64 prompts).
"""

from __future__ import annotations

if __name__ == "__main__":
    from minimind.utils.startup import leave_on_interrupt

    leave_on_interrupt()  # during the imports below

import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal, cast

import numpy as np
import torch
from rich.console import Console
from torch import Tensor

from minimind.objectives.advantages import gae, token_rewards, value_shift, whiten
from minimind.objectives.policy import PolicyBatch, policy_loss
from minimind.objectives.surrogates import Objective, clip, with_terms
from minimind.objectives.values import actor_critic_loss, explained_variance, value_loss, value_room
from minimind.training.adapters import saver
from minimind.training.rl.actor_critic import (
    ActorCritic,
    critic_of,
    critic_parameters,
    load_both,
    save_both,
    with_value_head,
)
from minimind.training.rl.arguments import RolloutArgs
from minimind.training.rl.collector import parts, per_answer
from minimind.training.rl.loader import pack
from minimind.training.rl.rollouts import Answer
from minimind.training.rl.stage import Rollouts
from minimind.training.script import run_script
from minimind.training.trainer import ClipGroup, StageLoss
from minimind.value_head import ValueModel, ValueOutput

NANO_LR = 2e-4  # peak rate of nano, of a few that were tried; others' by rl.stage.peak_lr


@dataclass(frozen=True)
class Args(RolloutArgs):
    """Learn from answers and a critic of them. Every default works."""

    rollouts: int = 40
    """How often answers are sampled from the model as it then is."""
    prompts: int = 256
    """Prompts of a rollout."""
    samples: int = 1
    """Answers to each prompt."""
    minibatches: int = 2
    """Optimizer steps on each pass over a rollout, each on a part of its answers."""
    inner_epochs: int = 2
    """Passes over each rollout."""
    critic: Literal["own", "shared"] = "own"
    """own: a second model that begins with the policy's weights, with --lora-rank a second adapter on them; shared: a
    head on the policy."""
    clip_range: float = 0.2
    """The ratio has no gradient outside 1 +- clip_range where it would go on."""
    critic_lr: float | None = None
    """Peak rate of the critic, or with --critic shared of its head. None: as --lr."""
    value_clip: float | None = 0.2
    """Values move no further than this from the old ones in a rollout, as a share of the root mean square of what they
    are off by."""
    value_weight: float = 0.5
    """Weight of the critic's loss, which with --critic own changes nothing where its gradients are clipped."""
    gamma: float = 1.0
    """Discount of later rewards."""
    lam: float = 0.95
    """GAE's lambda: 1 trusts the rewards alone, 0 the critic."""
    beta: float = 0.02
    """Weight of the KL to the model that the run began with; 0 keeps no such model."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL stands."""
    entropy: float = 0.0
    """Weight of the entropy, which keeps answers varied."""

    def check(self) -> None:
        super().check()
        none = torch.zeros(0, dtype=torch.float64)
        gae(none, none, none.long(), self.gamma, self.lam)
        if self.value_clip is not None:
            value_room(none, none, self.value_clip)
        if self.critic_lr is not None and not 0 < self.critic_lr < math.inf:
            raise ValueError(f"--critic-lr {self.critic_lr}: must be above 0")
        if not 0 < self.value_weight < math.inf:
            raise ValueError(f"--value-weight {self.value_weight}: must be above 0")
        if not 0 <= self.beta < math.inf:
            raise ValueError(f"--beta {self.beta}: must be 0 or more")


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when it was interrupted. Bad input raises ValueError with one clear line."""
    kl = args.beta if args.kl_in == "loss" else 0.0
    objective = with_terms(partial(clip, low=args.clip_range), kl, args.entropy)
    run = Rollouts.begin("ppo", args, "token", console)
    make = ActorCritic.of if args.critic == "own" else with_value_head
    run.build(
        partial(advantages, args),
        make=make,
        with_reference=args.beta > 0,
        annotate=lambda answers: estimate(critic_of(run.model), answers, run),
    )
    loss = partial(both_losses, args, objective, run)
    lr = args.lr or run.rate(NANO_LR)
    apart = ClipGroup("critic", critic_parameters(run.model), (args.critic_lr or lr) / lr)
    return run.fit(
        loss,
        NANO_LR,
        [describe(args, apart.rate * lr)],
        save_model=partial(save_both, save=saver(run.job)) if args.lora_rank else save_both,
        load_model=load_both,
        apart=[apart],
    )


def describe(args: Args, critic_lr: float) -> str:
    held = "not clipped" if args.value_clip is None else f"clipped at {args.value_clip:g} of what they are off by"
    return (
        f"critic: {args.critic}, peak rate {critic_lr:.2g}; values shifted to the rewards' level, {held}; "
        "its gradients are clipped apart from the policy's"
    )


@torch.no_grad()
def estimate(critic: ValueModel, answers: list[Answer], run: Rollouts) -> None:
    """The critic's values of the states that tokens were drawn from."""
    critic.eval()
    for part in parts(answers):
        batch = pack(part, run.job.device, 0, 0, run.shape)
        values = cast(ValueOutput, critic(batch.input_ids, cu_seqlens=batch.cu_seqlens)).values
        for a, own in zip(part, per_answer(values, batch.targets, part), strict=True):
            a.values = own


def advantages(args: Args, answers: list[Answer]) -> dict[str, float]:
    """Of single tokens, by generalised advantage estimation, normalised over all; and what the critic learns."""
    lengths = [len(a.ids) for a in answers]
    samples = torch.repeat_interleave(torch.arange(len(answers)), torch.tensor(lengths))

    def tokens(name: str) -> Tensor:
        return torch.from_numpy(np.concatenate([getattr(a, name) for a in answers]))

    scores = torch.tensor([a.score for a in answers], dtype=torch.float64)
    kl = args.beta if args.kl_in == "reward" else 0.0
    reference = tokens("reference") if kl else None
    rewards = token_rewards(scores, samples, tokens("log_probs"), reference, kl)
    values = tokens("values")
    shift = value_shift(rewards, values, samples, args.gamma)
    found, returns = gae(rewards, values + shift, samples, args.gamma, args.lam)
    learnt = torch.tensor([not a.masked for a in answers])[samples]
    whitened = torch.zeros_like(found).masked_scatter(learnt, whiten(found[learnt]))
    room = None if args.value_clip is None else value_room(values, returns, args.value_clip)
    for a, own, goal in zip(answers, whitened.split(lengths), returns.split(lengths), strict=True):
        a.advantages, a.returns = own.float().numpy(), goal.float().numpy()
        a.room = None if room is None else np.full(len(a.ids), float(room), np.float32)
    explained = explained_variance(values, returns)
    return {"value": float(values.mean()), "value_shift": float(shift), "explained_variance": float(explained)}


def both_losses(args: Args, objective: Objective, run: Rollouts, batch: PolicyBatch) -> StageLoss:
    """The policy's loss and the critic's."""
    settings: dict[str, Any] = {"entropy": args.entropy != 0}
    if args.critic == "shared":
        settings["value_weight"] = args.value_weight
        return actor_critic_loss(cast(ValueModel, run.trained), batch, objective, **settings)
    loss, aux, told = policy_loss(run.trained, batch, objective, **settings)
    error, critic_aux, critic_told = value_loss(critic_of(run.model), batch)
    return loss + args.value_weight * error, aux + critic_aux, told | critic_told


if __name__ == "__main__":
    run_script(main, Args, __doc__)
