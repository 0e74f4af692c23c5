"""What stages that compare the answers to one prompt share: GRPO and its relatives as flags, and their advantages."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch

from minimind.objectives.advantages import group_advantages, leave_one_out
from minimind.objectives.surrogates import ALGORITHMS, Algorithm, PolicyObjective, with_terms
from minimind.training.rl.arguments import RolloutArgs
from minimind.training.rl.rollouts import Answer

SMALLEST = 32  # fewest answers of a step by default


@dataclass(frozen=True)
class GroupArgs(RolloutArgs):
    """Flags of a stage that learns from groups of answers."""

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

    def check(self) -> None:
        super().check()
        if self.samples < 2:
            raise ValueError(
                f"--samples {self.samples}: an answer is compared with others to its prompt; take 2 or more"
            )

    @property
    def std(self) -> Any:
        """What `advantages` divides by."""
        return self.advantage or ALGORITHMS[self.loss].std

    @property
    def parts(self) -> dict[str, Any]:
        """What Rollouts.build needs to know of the algorithm."""
        return {
            "advantages": partial(advantages, how=self.std),
            "with_reference": bundle(self)[1] > 0,
            "refills": self.refills if self.refills is not None else 3 if self.loss == "dapo" else 0,
            "rescore": self.loss == "gspo" if self.rescore is None else self.rescore,
            "mask": self.loss == "dapo",
        }


def steps(args: GroupArgs) -> int:
    """Steps in each pass over a rollout: as many as the paper takes, with at least SMALLEST answers in each."""
    return max(1, min(ALGORITHMS[args.loss].minibatches, args.prompts * args.samples // SMALLEST))


def bundle(args: GroupArgs) -> tuple[Algorithm, float]:
    """(the algorithm, with the parts that flags replace; the weight of the KL)."""
    paper = ALGORITHMS[args.loss]
    bounds: dict[str, Any] = {"low": args.clip_low, "high": args.clip_high}
    objective: PolicyObjective = partial(paper.objective, **{k: v for k, v in bounds.items() if v is not None})
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
        answer.advantages = np.full(answer.written, value, np.float32)
    return {}


def describe(args: GroupArgs, algorithm: Algorithm, beta: float) -> str:
    parts = [f"{args.loss}: advantages over {args.std}, mean by {algorithm.aggregation}"]
    parts.append(f"KL {beta:g}" if beta else "no reference model")
    answers = args.prompts * args.samples // (args.minibatches or 1)
    single = args.minibatches == args.inner_epochs == 1
    acts = "which the clip does not act on" if single else "so that the clip acts"
    parts.append(
        f"{args.minibatches} steps on each pass, of {answers} answers each, {acts} "
        f"(by default at most {algorithm.minibatches} steps, of {SMALLEST} answers or more)"
    )
    return ", ".join(parts)
