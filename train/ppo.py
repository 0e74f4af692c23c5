"""Teach a chat model by rewards, with a critic: `python train/ppo.py` works as it is, on built-in sums.

Proximal policy optimisation (Schulman et al. 2017, arXiv 1707.06347) as used for language models (Ouyang et al. 2022,
2203.02155): a critic estimates the reward of the answer at every token, generalised advantage estimation (1506.02438)
turns these values and the reward into an advantage for every token, and both models learn from each rollout in a few
passes over parts of it. After an interruption the same command continues from the last checkpoint. A run leaves its
metrics, curves, answers and weights in a folder under runs/; every checkpoint has the critic beside the policy.

Choices where implementations differ: the KL to the initial model is subtracted from the reward of every token (k1, as
in Ziegler et al. 2019, 1909.08593) or, with --kl-in loss, added to the loss (k3); advantages are normalised over the
rollout; values are clipped as in OpenAI's baselines, within a share of the critic's error; an answer that was cut off
is scored as it is, with no value expected after it; the ratio is to the engine's log-probabilities at the time of
sampling.

A new critic knows nothing. With values of 0, advantages would only show how close to the end a token is, and the end
token would win in every answer; therefore the values are shifted by the mean difference between rewards and values of
the first states (advantages.value_shift). The gradients of actor and critic are clipped separately: the critic's norm
is larger and would determine the actor's step.

A low explained_variance in metrics.jsonl need not be the critic's fault. For the built-in sums and the weak model, the
prompt explains 1% of the reward's variance and the first token of the answer 20%; the rest depends on the finished
answer, and on being able to check a sum (estimated from 64 answers to each of 64 prompts).
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
from minimind.objectives.policy import (
    PolicyBatch,
    actor_critic_loss,
    explained_variance,
    policy_loss,
    value_loss,
    value_room,
)
from minimind.objectives.surrogates import PolicyObjective, clip, with_terms
from minimind.training.adapters import adapter_saver
from minimind.training.job import run_script
from minimind.training.optim import ClipGroup
from minimind.training.rl.actor_critic import (
    ActorCritic,
    critic_of,
    critic_parameters,
    load_both,
    save_both,
    with_value_head,
)
from minimind.training.rl.arguments import RolloutArgs
from minimind.training.rl.collector import chunks, per_answer
from minimind.training.rl.loader import pack
from minimind.training.rl.rollouts import Answer
from minimind.training.rl.stage import RolloutStage
from minimind.training.trainer import StageLoss
from minimind.value_head import ValueModel, ValueOutput

NANO_LR = 2e-4  # nano's peak learning rate, the best of a few; rl.stage.scaled_lr has the others


@dataclass(frozen=True)
class Args(RolloutArgs):
    """Learn from answers, with a critic. All defaults work."""

    rollouts: int = 40
    """Number of rollouts, each sampled from the current model."""
    prompts: int = 256
    """Prompts in a rollout."""
    samples: int = 1
    """Answers to each prompt."""
    minibatches: int = 2
    """Optimizer steps in each pass over a rollout, each on a part of its answers."""
    inner_epochs: int = 2
    """Passes over each rollout."""
    critic: Literal["own", "shared"] = "own"
    """own: a second model that starts with the policy's weights, or with --lora-rank a second adapter on them; shared:
    a head on the policy."""
    clip_range: float = 0.2
    """Outside 1 +- clip_range, a token's probability ratio is not moved further away from 1."""
    critic_lr: float | None = None
    """Peak learning rate of the critic, or of its head with --critic shared. None: that of the policy."""
    value_clip: float | None = 0.2
    """Largest change of a value within a rollout, as a share of the root mean square of the values' errors."""
    value_weight: float = 0.5
    """Weight of the critic's loss; with --critic own it has no effect where its gradients are clipped."""
    gamma: float = 1.0
    """Factor by which a reward counts less for each token before it; 1: no discount."""
    lam: float = 0.95
    """GAE's lambda: 1 trusts the rewards alone, 0 the critic."""
    beta: float = 0.02
    """Weight of the KL to the initial model; 0 keeps no copy of it."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Subtract the KL from the reward, or add it to the loss."""
    entropy: float = 0.0
    """Weight of an entropy bonus, which keeps answers varied; 0: none."""

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
    """Run the stage; False when training was interrupted. Raises ValueError, in one line, for bad input."""
    kl = args.beta if args.kl_in == "loss" else 0.0
    objective = with_terms(partial(clip, low=args.clip_range), kl, args.entropy)
    run = RolloutStage.begin("ppo", args, "token", console)
    make = ActorCritic.from_policy if args.critic == "own" else with_value_head
    run.build(
        partial(advantages, args),
        make=make,
        with_reference=args.beta > 0,
        annotate=lambda answers: estimate(critic_of(run.model), answers, run),
    )
    loss = partial(both_losses, args, objective, run)
    lr = args.lr or run.peak_lr(NANO_LR)
    critic = ClipGroup("critic", critic_parameters(run.model), (args.critic_lr or lr) / lr)
    return run.fit(
        loss,
        NANO_LR,
        [describe(args, critic.rate * lr)],
        save_model=partial(save_both, save=adapter_saver(run.job)) if args.lora_rank else save_both,
        load_model=load_both,
        clip_groups=[critic],
    )


def describe(args: Args, critic_lr: float) -> str:
    clipping = "not clipped" if args.value_clip is None else f"clipped at {args.value_clip:g} of their error"
    return (
        f"critic: {args.critic}, peak rate {critic_lr:.2g}; values shifted to the rewards' level, {clipping}; "
        "its gradients are clipped separately from the policy's"
    )


@torch.no_grad()
def estimate(critic: ValueModel, answers: list[Answer], run: RolloutStage) -> None:
    """Set the critic's values of the states before the answers' tokens."""
    critic.eval()
    for part in chunks(answers):
        batch = pack(part, run.job.device, 0, 0, run.shape)
        values = cast(ValueOutput, critic(batch.input_ids, cu_seqlens=batch.cu_seqlens)).values
        for a, answer_values in zip(part, per_answer(values, batch.targets, part), strict=True):
            a.values = answer_values


def advantages(args: Args, answers: list[Answer]) -> dict[str, float]:
    """Set advantages by generalised advantage estimation, normalised over the rollout, and the critic's returns."""
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
    raw, returns = gae(rewards, values + shift, samples, args.gamma, args.lam)
    learnt = torch.tensor([not a.masked for a in answers])[samples]
    whitened = torch.zeros_like(raw).masked_scatter(learnt, whiten(raw[learnt]))
    room = None if args.value_clip is None else value_room(values, returns, args.value_clip)
    for a, advantages_of, returns_of in zip(answers, whitened.split(lengths), returns.split(lengths), strict=True):
        a.advantages, a.returns = advantages_of.float().numpy(), returns_of.float().numpy()
        a.room = None if room is None else np.full(len(a.ids), float(room), np.float32)
    explained = explained_variance(values, returns)
    return {"value": float(values.mean()), "value_shift": float(shift), "explained_variance": float(explained)}


def both_losses(args: Args, objective: PolicyObjective, run: RolloutStage, batch: PolicyBatch) -> StageLoss:
    """The sum of the policy's loss and the critic's."""
    settings: dict[str, Any] = {"entropy": args.entropy != 0}
    if args.critic == "shared":
        settings["value_weight"] = args.value_weight
        return actor_critic_loss(cast(ValueModel, run.trained), batch, objective, **settings)
    loss, aux, figures = policy_loss(run.trained, batch, objective, **settings)
    error, critic_aux, critic_figures = value_loss(critic_of(run.model), batch)
    return loss + args.value_weight * error, aux + critic_aux, figures | critic_figures


if __name__ == "__main__":
    run_script(main, Args, __doc__)
