"""Teach a chat model by rewards for its answers: `python train/grpo.py` works as it is, on built-in sums.

Group-relative policy optimisation and its relatives (minimind/objectives/surrogates.py). Several answers to each prompt
are sampled from the current model; the tokens of an answer become likelier or less likely as its reward is above or
below that of the others to the same prompt. After an interruption the same command continues from the last checkpoint.
A run leaves its metrics, curves, answers and weights in a folder under runs/.

The parts of each --loss, which flags of their own can replace:

    grpo      PPO's clip; advantages over the group's standard deviation; mean of every answer's mean; KL to the model
              the run began with in the loss (k3, per token)                                       arXiv 2402.03300
    dapo      a higher upper clip; mean over all tokens; no KL; prompts whose answers all have one reward are replaced
              by others (--refills); answers that were cut off are not learnt from                 arXiv 2503.14476
    dr_grpo   no standard deviation and no division by an answer's length; no KL                   arXiv 2503.20783
    gspo      the ratio and the clip of whole answers; no KL                                       arXiv 2507.18071
    cispo     the clip bounds a token's weight, not its gradient; mean over all tokens; no KL      arXiv 2506.13585

The number of steps on a rollout (--minibatches) matters too: with a single one the ratio is 1 and no clip acts, so that
grpo, dapo and cispo differ only in their means. The papers take 16 (dapo, cispo, and GRPO in DeepSeek-R1, 2501.12948),
8 (dr_grpo) and 4 (gspo), of 512 to 8,192 answers. The defaults here are the same, with at least SMALLEST answers in
each step. GRPO's first paper takes one step; four at a third of the rate learnt more (docs/LOG.md).

Departures: the ratio is to the engine's log-probabilities at the time of sampling, so that the old policy need not be
scored again (except for gspo: --rescore); on CPUs and GPUs that compute in bf16 it differs slightly from 1 before the
first update (drift_mean and drift_max in metrics.jsonl). DAPO's penalty for long answers is a reward like others.
Refilling is bounded, so that a rollout may have fewer prompts.
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
from minimind.training.job import run_script
from minimind.training.rl.arguments import RolloutArgs
from minimind.training.rl.rollouts import Answer
from minimind.training.rl.stage import RolloutStage
from minimind.utils.display import say

NANO_LR = 5e-5  # nano's peak learning rate, the best of a few; rl.stage.scaled_lr has the others
SMALLEST = 32  # fewest answers of a step by default


@dataclass(frozen=True)
class Args(RolloutArgs):
    """Learn from groups of answers. All defaults work."""

    loss: Literal["grpo", "dapo", "dr_grpo", "gspo", "cispo"] = "grpo"
    """The algorithm; the flags below replace parts of it."""
    advantage: Literal["group", "batch", "none", "loo"] | None = None
    """Divisor of an answer's reward minus its group's mean: the standard deviation of the group or the batch, or none;
    loo: none, with the mean of the other answers (RLOO). None: the algorithm's."""
    aggregation: Literal["token", "sample", "constant"] | None = None
    """Aggregation of token losses: the mean over all tokens (token), over the means of answers (sample), or over the
    sums of answers divided by --max-new-tokens (constant). None: the algorithm's."""
    clip_low: float | None = None
    """The ratio has no gradient below 1 - clip_low that would lower it. None: the algorithm's."""
    clip_high: float | None = None
    """The ratio has no gradient above 1 + clip_high that would raise it. None: the algorithm's."""
    beta: float | None = None
    """Weight of the KL to the initial model; 0 keeps no copy of it. None: the algorithm's."""
    entropy: float = 0.0
    """Weight of an entropy bonus, which keeps answers varied."""
    rescore: bool | None = None
    """Compute the old log-probabilities with the trainer, by one more forward, instead of using the engine's. None: for
    gspo, whose clip range is smaller than their difference in bf16."""
    refills: int | None = None
    """Replace prompts whose answers all have the same reward by others, up to this many times --prompts. None: 3 for
    dapo, else 0."""


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when training was interrupted. Raises ValueError, in one line, for bad input."""
    if args.samples < 2:
        raise ValueError(f"--samples {args.samples}: an answer is compared with others to its prompt; take 2 or more")
    if args.minibatches is None:
        args = dataclasses.replace(args, minibatches=steps(args))
    algorithm, beta = bundle(args)
    refills = args.refills if args.refills is not None else 3 if args.loss == "dapo" else 0
    run = RolloutStage.begin("grpo", args, algorithm.aggregation, console)
    if args.reward_norm == "running" and (args.advantage or algorithm.std) in ("group", "batch"):
        say(console, "--reward-norm running: has no effect, as advantages are divided by their own deviation")
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
    """Steps in each pass over a rollout: as many as the paper takes, with at least SMALLEST answers in each."""
    return max(1, min(ALGORITHMS[args.loss].minibatches, args.prompts * args.samples // SMALLEST))


def bundle(args: Args) -> tuple[Algorithm, float]:
    """(the algorithm, with the parts that flags replace; the weight of the KL)."""
    paper = ALGORITHMS[args.loss]
    bounds: dict[str, Any] = {"low": args.clip_low, "high": args.clip_high}
    objective: Objective = partial(paper.objective, **{k: v for k, v in bounds.items() if v is not None})
    beta = paper.kl if args.beta is None else args.beta
    objective = with_terms(objective, beta, args.entropy)
    return dataclasses.replace(
        paper, objective=objective, aggregation=args.aggregation or paper.aggregation, kl=beta
    ), beta


def advantages(answers: list[Answer], how: Any) -> dict[str, float]:
    """Give every token of an answer the answer's advantage over its group."""
    rewards = torch.tensor([a.score for a in answers], dtype=torch.float64)
    groups = torch.from_numpy(np.unique([a.number for a in answers], return_inverse=True)[1])
    count = int(groups.max()) + 1
    loo = how == "loo"
    values = (leave_one_out if loo else partial(group_advantages, std=how))(rewards, groups, count)
    for answer, value in zip(answers, values.tolist(), strict=True):
        answer.advantages = np.full(len(answer.ids), value, np.float32)
    return {}


def describe(args: Args, algorithm: Algorithm, beta: float) -> str:
    parts = [f"{args.loss}: advantages over {args.advantage or algorithm.std}, mean by {algorithm.aggregation}"]
    parts.append(f"KL {beta:g}" if beta else "no reference model")
    answers = args.prompts * args.samples // (args.minibatches or 1)
    single = args.minibatches == args.inner_epochs == 1
    acts = "which the clip does not act on" if single else "so that the clip acts"
    parts.append(
        f"{args.minibatches} steps on each pass, of {answers} answers each, {acts} "
        f"(by default at most {algorithm.minibatches} steps, of {SMALLEST} answers or more)"
    )
    return ", ".join(parts)


if __name__ == "__main__":
    run_script(main, Args, __doc__)
