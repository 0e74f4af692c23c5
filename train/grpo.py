"""Teach a chat model by rewards for its answers: `python train/grpo.py` works as it is, on sums made by the program.

Group-relative policy optimisation and its relatives (docstring of minimind/objectives/surrogates.py). Several answers
to each prompt are sampled from the model as it is; an answer is better or worse than the others to the same prompt, and
its tokens become likelier or less likely by that. Run the same command again after any interruption and it continues
where the last checkpoint was. Every run leaves a folder under runs/ with its metrics, curves, answers and weights.

What one --loss stands for, each part of which has a flag of its own:

    grpo      PPO's clip; advantages over the group's standard deviation; mean of every answer's mean; KL to the model
              the run began with in the loss (k3, per token)                                       arXiv 2402.03300
    dapo      a higher upper clip; mean over all tokens; no KL; prompts whose answers all have one reward are replaced
              by others (--refills); answers that were cut off are not learnt from                 arXiv 2503.14476
    dr_grpo   no standard deviation and no division by an answer's length; no KL                   arXiv 2503.20783
    gspo      the ratio and the clip of whole answers; no KL                                       arXiv 2507.18071
    cispo     the clip bounds a token's weight, not its gradient; mean over all tokens; no KL      arXiv 2506.13585

How many steps are taken on a rollout (--minibatches) belongs to it: after a single one the ratio is 1 and no clip acts,
so that grpo, dapo and cispo were one algorithm but for their means. The papers take 16 (dapo, cispo, and GRPO as
DeepSeek-R1 was trained, 2501.12948), 8 (dr_grpo) and 4 (gspo), of 512 to 8,192 answers. Here as many, but no fewer than
SMALLEST answers in each. GRPO's first paper takes one step; four at a third of the rate learnt more (docs/LOG.md).

Departures: the ratio is to the engine's log-probabilities at the time of sampling, so that no old policy is scored
again (gspo excepted: --rescore); on CPUs and GPUs that compute in bf16 it differs from 1 a little before the first
update (drift_mean and drift_max in metrics.jsonl). DAPO's penalty for long answers is a reward like others. Refilling
is bounded: what is missing then is missing.
"""

from __future__ import annotations

if __name__ == "__main__":
    from minimind.utils.startup import leave_on_interrupt

    leave_on_interrupt()  # during the imports below

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from rich.console import Console

from minimind.objectives.advantages import group_advantages, leave_one_out
from minimind.objectives.policy import policy_loss
from minimind.objectives.surrogates import ALGORITHMS, Algorithm, Objective, with_terms
from minimind.training.rl.arguments import RolloutArgs
from minimind.training.rl.rollouts import Answer
from minimind.training.rl.stage import Rollouts
from minimind.training.script import run_script
from minimind.utils.display import say

NANO_LR = 5e-5  # peak rate of nano, of a few that were tried; others' by rl.stage.peak_lr
SMALLEST = 32  # answers of a step, where --minibatches does not say


@dataclass(frozen=True)
class Args(RolloutArgs):
    """Learn from groups of answers. Every default works."""

    loss: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "grpo"
    """Which algorithm; the flags below replace parts of it."""
    advantage: Literal["group", "batch", "none", "loo"] | None = None
    """What an answer's reward less its group's mean is divided by: the standard deviation of the group or the batch, or
    nothing; loo: nothing, and the mean is of the others (RLOO). None: as the algorithm has it."""
    aggregation: Literal["token", "sample", "constant"] | None = None
    """How token losses add up: a mean over all tokens, over answers of their mean, or over answers of their sum divided
    by --max-new-tokens. None: as the algorithm has it."""
    clip_low: float | None = None
    """The ratio has no gradient below 1 - clip_low where it would fall. None: as the algorithm has it."""
    clip_high: float | None = None
    """The ratio has no gradient above 1 + clip_high where it would rise. None: as the algorithm has it."""
    beta: float | None = None
    """Weight of the KL to the model that the run began with; 0 keeps no such model. None: as the algorithm has it."""
    entropy: float = 0.0
    """Weight of the entropy, which keeps answers varied."""
    rescore: bool | None = None
    """Take the trainer's own log-probabilities of the answers for the old ones, by one more forward, not the engine's.
    None: for gspo, whose clip is finer than what the two differ by in bf16."""
    refills: int | None = None
    """Draw up to so many times --prompts more prompts in place of those whose answers all have one reward. None: 3 for
    dapo, else 0."""


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when it was interrupted. Bad input raises ValueError with one clear line."""
    if args.samples < 2:
        raise ValueError(f"--samples {args.samples}: an answer is compared with others to its prompt; take 2 or more")
    if args.minibatches is None:
        args = dataclasses.replace(args, minibatches=steps(args))
    algorithm, beta = bundle(args)
    refills = args.refills if args.refills is not None else 3 if args.loss == "dapo" else 0
    run = Rollouts.begin("grpo", args, algorithm.aggregation, console)
    if args.reward_norm == "running" and (args.advantage or algorithm.std) in ("group", "batch"):
        say(console, "--reward-norm running: changes nothing, as advantages are divided by a deviation of their own")
    run.build(
        partial(advantages, how=args.advantage or algorithm.std),
        with_reference=beta > 0,
        refills=refills,
        rescore=args.loss == "gspo" if args.rescore is None else args.rescore,
        mask=args.loss == "dapo",
    )
    loss = partial(policy_loss, run.trained, objective=algorithm.objective, entropy=args.entropy != 0)
    return run.fit(loss, NANO_LR, [describe(args, algorithm, beta)])


def steps(args: Args) -> int:
    """On each pass over a rollout: as many as the paper takes, or as leave SMALLEST answers for each."""
    return max(1, min(ALGORITHMS[args.loss].minibatches, args.prompts * args.samples // SMALLEST))


def bundle(args: Args) -> tuple[Algorithm, float]:
    """(the algorithm with the flags' parts in place of its own, the KL's weight)."""
    known = ALGORITHMS[args.loss]
    bounds: dict[str, Any] = {"low": args.clip_low, "high": args.clip_high}
    objective: Objective = partial(known.objective, **{k: v for k, v in bounds.items() if v is not None})
    beta = known.kl if args.beta is None else args.beta
    objective = with_terms(objective, beta, args.entropy)
    return dataclasses.replace(
        known, objective=objective, aggregation=args.aggregation or known.aggregation, kl=beta
    ), beta


def advantages(answers: list[Answer], how: Any) -> dict[str, float]:
    """Give every token of an answer the answer's advantage in its group."""
    rewards = torch.tensor([a.score for a in answers], dtype=torch.float64)
    groups = torch.from_numpy(np.unique([a.number for a in answers], return_inverse=True)[1])
    count = int(groups.max()) + 1
    loo = how == "loo"
    found = (leave_one_out if loo else partial(group_advantages, std=how))(rewards, groups, count)
    for answer, value in zip(answers, found.tolist(), strict=True):
        answer.advantages = np.full(len(answer.ids), value, np.float32)
    return {}


def describe(args: Args, algorithm: Algorithm, beta: float) -> str:
    parts = [f"{args.loss}: advantages over {args.advantage or algorithm.std}, mean by {algorithm.aggregation}"]
    parts.append(f"KL {beta:g}" if beta else "no reference model")
    answers = args.prompts * args.samples // (args.minibatches or 1)
    alone = args.minibatches == args.inner_epochs == 1
    acts = "which the clip does not act on" if alone else "so that the clip acts"
    parts.append(
        f"{args.minibatches} steps on each pass, of {answers} answers each, {acts} "
        f"(of itself at most {algorithm.minibatches} steps, and {SMALLEST} answers or more)"
    )
    return ", ".join(parts)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
