"""The flags of the reinforcement learning stages, and the algorithms that those of GRPO and its relatives describe."""

from __future__ import annotations

import dataclasses
import math
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import tyro

from minimind.data.formats import FormatName
from minimind.inference.decode.int8 import WeightsDTypeName
from minimind.objectives.advantages import group_advantages, leave_one_out
from minimind.objectives.surrogates import ALGORITHMS, Algorithm, PolicyObjective, with_terms
from minimind.rewards import RewardScale
from minimind.training.adapters import AdapterArgs
from minimind.training.arguments import FromFlag
from minimind.training.parallel import ParallelName, world_size
from minimind.training.rl.rollouts import Answer

NormName = Literal["none", "running"]


@dataclass(frozen=True)
class RolloutArgs(AdapterArgs):
    """Flags of a stage that learns from its own answers."""

    from_: FromFlag = None
    """The initial model: a run folder, a Hugging Face folder, or an upstream .pth (with --preset and --tokenizer).
    None: the newest finished run of train/sft.py. With the built-in --data: a model that was taught a weak version of
    that task; if there is none, it is trained first (a minute or two)."""
    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"conversations": [..., {"role": "assistant",
    "content": ""}]} rows; the model writes the last turn. Its content, or "reference" beside it, is the answer that
    some rewards compare with. Empty: built-in sums and differences."""
    format: FormatName = "auto"
    """Form of the rows of --data: auto (ours and upstream's), messages (OpenAI's and trl's), sharegpt or alpaca (as
    LLaMA-Factory has them; docs/data.md)."""
    heldout_data: tuple[str, ...] = ()
    """Prompts to evaluate on, instead of --heldout."""
    reward: tuple[str, ...] = ()
    """Rewards to sum, each NAME[=ARGUMENT][:WEIGHT]: number exact json[=KEY,KEY] tools format[=think|answer]
    length=LOW..HIGH overlong=LOW..HIGH repetition[=N] regex=PATTERN function=PACKAGE.MODULE:FUNCTION model=FOLDER
    answer_model=FOLDER (minimind/rewards/__init__.py explains them). Empty: number, whether the answer's last number is
    the reference's."""
    on_reward_error: str = "drop"
    """For an answer that a reward cannot score: drop leaves the answer out, stop ends the run, a number is used as that
    reward."""
    reward_clip: tuple[float, float] | None = None
    """Lowest and highest reward; those outside are clipped. None: no bounds."""
    reward_norm: NormName = "none"
    """none: rewards as they are. running: subtract the mean of all rewards so far and divide by their standard
    deviation, after --reward-clip."""
    truncation_penalty: float = 0.0
    """Subtracted from the reward of an answer that was cut off at --max-new-tokens."""
    mask_truncated: bool | None = None
    """Leave answers that were cut off out of the loss; they still count where rewards are compared. None: only with
    train/grpo.py --loss dapo."""
    thinking: float | None = None
    """Share of the prompts that request reasoning, chosen by a hash; the others request none. None: all leave it to the
    model."""
    trust_remote_code: bool = False
    """Allow a reward model's folder to run its own code."""
    rollouts: int = 120
    """Number of rollouts, each sampled from the current model."""
    prompts: int = 64
    """Prompts in a rollout."""
    samples: int = 4
    """Answers to each prompt."""
    max_prompt: int = 512
    """Most tokens of a prompt; longer ones are an error, or left out with --on-bad-row skip."""
    max_new_tokens: int | None = None
    """Most tokens of an answer; longer ones are cut off. None: 8 for the built-in prompts, else 256."""
    temperature: float = 1.0
    """Temperature of sampling and of the trained distribution."""
    weights_dtype: WeightsDTypeName = "auto"
    """Data type of the weights when answers are decoded; auto: that of the computation; int8 is faster on a CPU. A GPU
    computes more than eight answers at a time from rounded weights in the wider type, which gains nothing. The answers'
    probabilities are then those of the rounded weights; the metric drift_mean shows the difference."""
    minibatches: int | None = None
    """Optimizer steps in each pass over a rollout, each on a part of its answers. None: the algorithm's number."""
    inner_epochs: int = 1
    """Passes over each rollout."""
    target_kl: float | None = None
    """Mean KL per token, from the policy that sampled a rollout to the current one, above which the rest of the rollout
    is skipped; 0.05 is large. None: learn from whole rollouts."""
    micro_batches: int | None = None
    """Forward and backward passes that a step accumulates. None: as few as hold the longest answers to the longest
    prompts, with at most 4096 tokens of minimind2-small a pass, or 16384 on a GPU; other models by their size."""
    eval_prompts: int = 256
    """Held-out prompts answered during training; at the end all are."""
    show: int = 0
    """Number of prompts of every rollout to print, with their answers, rewards and advantages."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW for all; muon: Muon for matrices and AdamW for the rest."""
    schedule: Literal["cosine", "wsd", "constant"] = "constant"
    """Learning rate after the warm-up: cosine, wsd (flat, then a cooldown) or constant."""
    warmup: float = 0.1
    """Share of the steps over which the learning rate rises."""
    weight_decay: float = 0.0
    """Weight decay of matrices; norm gains never decay."""
    heldout: float = 0.1
    """Share of the prompts that is held out from training, at most 256; a hash of each decides."""
    parallel: ParallelName = "auto"
    """How the processes of torchrun share the work: ddp (each holds the whole model), or auto, which is ddp if there
    are several. fsdp is refused: sampling needs whole weights."""
    log_every: int = 1
    """Steps between reads of the loss from the device."""
    tokens: tyro.conf.Suppress[int | None] = None
    epochs: tyro.conf.Suppress[float] = 1.0
    seq_len: tyro.conf.Suppress[int] = 512
    batch_tokens: tyro.conf.Suppress[int | None] = None
    micro_tokens: tyro.conf.Suppress[int | None] = None
    eval_tokens: tyro.conf.Suppress[int] = 65536
    ema: tyro.conf.Suppress[float | None] = None

    def check(self) -> None:
        super().check()
        if self.batch_warmup:
            raise ValueError(f"--batch-warmup {self.batch_warmup}: steps after rollouts have one size; drop the flag")
        for name in ("rollouts", "prompts", "samples", "max_prompt", "max_new_tokens", "temperature", "minibatches",
                     "inner_epochs", "micro_batches", "eval_prompts", "target_kl"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
        if not 0 <= self.truncation_penalty < math.inf:
            raise ValueError(f"--truncation-penalty {self.truncation_penalty}: must be 0 or more")
        if self.thinking is not None and not 0 <= self.thinking <= 1:
            raise ValueError(f"--thinking {self.thinking:g}: must be a share from 0 to 1")
        RewardScale(self.reward_clip)
        if self.lora_dropout:
            raise ValueError(
                f"--lora-dropout {self.lora_dropout:g}: answers are sampled without dropout, so that another policy "
                "would be trained; drop the flag"
            )
        if self.parallel == "fsdp":
            raise ValueError("--parallel fsdp: answers are sampled from whole weights; take ddp")
        if self.prompts < world_size():
            raise ValueError(f"--prompts {self.prompts}: fewer than the {world_size()} processes that share them")

    @property
    def shared_rewards(self) -> tuple[str, ...]:
        """The words of --reward that `parse_rewards` knows; a stage may have words of its own."""
        return self.reward

    @property
    def row_flags(self) -> str:
        return "--max-prompt and --max-new-tokens, together"

    @property
    def longest_answer(self) -> int:
        return self.max_new_tokens or (256 if self.data else 8)


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
    """Below 1 - clip_low, the probability ratio of a token, with gspo of an answer, is not lowered further. None: the
    algorithm's."""
    clip_high: float | None = None
    """Above 1 + clip_high, the probability ratio of a token, with gspo of an answer, is not raised further. None: the
    algorithm's."""
    beta: float | None = None
    """Weight of the KL to the initial model; 0 keeps no copy of it. None: the algorithm's."""
    entropy: float = 0.0
    """Weight of an entropy bonus, which keeps answers varied; 0: none."""
    rescore: bool | None = None
    """Compute the old log-probabilities with the trainer, in one more forward pass, instead of using the engine's.
    None: only for gspo, whose clip range is narrower than the difference of the two in bf16."""
    refills: int | None = None
    """Replace prompts whose answers all have the same reward by other prompts, at most this many times --prompts. None:
    3 for dapo, else 0."""

    def check(self) -> None:
        super().check()
        if self.samples < 2:
            raise ValueError(
                f"--samples {self.samples}: an answer is compared with others to its prompt; take 2 or more"
            )

    @property
    def std(self) -> Any:
        """How advantages are normalised: --advantage, or the algorithm's way."""
        return self.advantage or ALGORITHMS[self.loss].std

    @property
    def parts(self) -> dict[str, Any]:
        """The arguments of RolloutStage.build that depend on the algorithm."""
        return {
            "advantages": partial(set_advantages, how=self.std),
            "with_reference": chosen_algorithm(self)[1] > 0,
            "refills": self.refills if self.refills is not None else 3 if self.loss == "dapo" else 0,
            "rescore": self.loss == "gspo" if self.rescore is None else self.rescore,
            "mask": self.loss == "dapo",
        }


def default_minibatches(args: GroupArgs) -> int:
    """Optimizer steps in each pass over a rollout: as many as in the paper, with at least SMALLEST answers each."""
    return max(1, min(ALGORITHMS[args.loss].minibatches, args.prompts * args.samples // SMALLEST))


def chosen_algorithm(args: GroupArgs) -> tuple[Algorithm, float]:
    """(the algorithm of --loss with the parts that other flags replace, the weight of the KL)."""
    paper = ALGORITHMS[args.loss]
    bounds: dict[str, Any] = {"low": args.clip_low, "high": args.clip_high}
    objective: PolicyObjective = partial(paper.objective, **{k: v for k, v in bounds.items() if v is not None})
    beta = paper.kl if args.beta is None else args.beta
    objective = with_terms(objective, beta, args.entropy)
    return dataclasses.replace(
        paper, objective=objective, aggregation=args.aggregation or paper.aggregation, kl=beta
    ), beta


def set_advantages(answers: list[Answer], how: Any) -> dict[str, float]:
    """Set the advantage of every token to that of its answer within its group."""
    rewards = torch.tensor([a.score for a in answers], dtype=torch.float64)
    groups = torch.from_numpy(np.unique([a.number for a in answers], return_inverse=True)[1])
    count = int(groups.max()) + 1
    loo = how == "loo"
    values = (leave_one_out if loo else partial(group_advantages, std=how))(rewards, groups, count)
    for answer, value in zip(answers, values.tolist(), strict=True):
        answer.advantages = np.full(answer.written, value, np.float32)
    return {}


def describe_algorithm(args: GroupArgs, algorithm: Algorithm, beta: float) -> str:
    """One line about the algorithm and its steps, printed at start."""
    parts = [f"{args.loss}: advantages normalised by {args.std}, losses averaged by {algorithm.aggregation}"]
    parts.append(f"KL {beta:g}" if beta else "no reference model")
    answers = args.prompts * args.samples // (args.minibatches or 1)
    single = args.minibatches == args.inner_epochs == 1
    acts = "which the clip does not act on" if single else "so that the clip acts"
    parts.append(
        f"{args.minibatches} steps on each pass, of {answers} answers each, {acts} "
        f"(by default at most {algorithm.minibatches} steps, of {SMALLEST} answers or more)"
    )
    return ", ".join(parts)
