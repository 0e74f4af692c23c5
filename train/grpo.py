"""Teach a chat model by rewards for its answers: `python train/grpo.py` works as it is, on built-in sums.

Group-relative policy optimisation and its relatives (minimind/objectives/surrogates.py). Several answers to each prompt
are sampled from the current model; the tokens of an answer become likelier or less likely as its reward is above or
below that of the others to the same prompt. After an interruption the same command continues from the last checkpoint.
A run leaves its metrics, curves, answers and weights in a folder under runs/.

The parts of each --loss, which flags of their own can replace:

    grpo      PPO's clip; advantages divided by the group's standard deviation; mean of every answer's mean; KL to the
              initial model in the loss (k3, per token)                                       arXiv 2402.03300
    dapo      a higher upper clip; mean over all tokens; no KL; prompts whose answers all have one reward are replaced
              by others (--refills); answers that were cut off are not learnt from                 arXiv 2503.14476
    dr_grpo   no standard deviation and no division by an answer's length; no KL                   arXiv 2503.20783
    gspo      the ratio and the clip of whole answers; no KL                                       arXiv 2507.18071
    cispo     the clip bounds a token's weight, not its gradient; mean over all tokens; no KL      arXiv 2506.13585

The number of steps on a rollout (--minibatches) matters too: with a single one the ratio is 1 and no clip acts, so that
grpo, dapo and cispo differ only in their means. The papers take 16 (dapo, cispo, and GRPO in DeepSeek-R1, 2501.12948),
8 (dr_grpo) and 4 (gspo), of 512 to 8,192 answers. The defaults here are the same, with at least 32 answers in
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

from rich.console import Console

from minimind.objectives.policy import policy_loss
from minimind.training.job import run_script
from minimind.training.rl.arguments import GroupArgs, chosen_algorithm, default_minibatches, describe_algorithm
from minimind.training.rl.stage import RolloutStage
from minimind.utils.display import say

NANO_LR = 5e-5  # nano's peak learning rate, the best of a few; rl.stage.scaled_lr has the others


@dataclass(frozen=True)
class Args(GroupArgs):
    """Learn from groups of answers. All defaults work."""


def main(args: Args, console: Console) -> bool:
    """Run the stage; False when training was interrupted. Raises ValueError, in one line, for bad input."""
    args.check()
    if args.minibatches is None:
        args = dataclasses.replace(args, minibatches=default_minibatches(args))
    algorithm, beta = chosen_algorithm(args)
    run = RolloutStage.begin("grpo", args, algorithm.aggregation, console)
    if args.reward_norm == "running" and args.std in ("group", "batch"):
        say(console, "--reward-norm running: has no effect, as advantages are divided by their own deviation")
    run.build(**args.parts)
    loss = partial(policy_loss, run.trained, objective=algorithm.objective, entropy=args.entropy != 0)
    return run.fit(loss, NANO_LR, [describe_algorithm(args, algorithm, beta)])


if __name__ == "__main__":
    run_script(main, Args, __doc__)
