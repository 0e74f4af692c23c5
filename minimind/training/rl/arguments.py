"""The flags that the reinforcement learning stages share."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import tyro

from minimind.data.formats import FormatName
from minimind.rewards import RewardScale
from minimind.training.adapters import AdapterArgs
from minimind.training.arguments import FromFlag
from minimind.training.parallel import ParallelName, world_size

NormName = Literal["none", "running"]


@dataclass(frozen=True)
class RolloutArgs(AdapterArgs):
    """Flags of a stage that learns from its own answers."""

    from_: FromFlag = None
    """The model to go on from: a run folder, a Hugging Face folder, or an upstream .pth (with --preset and
    --tokenizer). None: the newest finished run of train/sft.py; with the built-in --data, one that was taught the weak
    version of that task, which is trained first if there is none (a minute or two)."""
    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"conversations": [..., {"role": "assistant",
    "content": ""}]} rows: the last turn is the one to write. What stands in it, or in "reference" beside it, is the
    answer that some rewards compare with. None: sums and differences that come with the program."""
    format: FormatName = "auto"
    """The form of --data's rows: auto, ours and upstream's; messages, OpenAI's and trl's; sharegpt and alpaca, as
    LLaMA-Factory has them (docs/data.md)."""
    heldout_data: tuple[str, ...] = ()
    """Prompts to measure on, instead of --heldout."""
    reward: tuple[str, ...] = ()
    """Rewards to add up, each NAME[=ARGUMENT][:WEIGHT]: number exact json[=KEY,KEY] tools format[=think|answer]
    length=LOW..HIGH overlong=LOW..HIGH repetition[=N] regex=PATTERN function=PACKAGE.MODULE:FUNCTION model=FOLDER
    answer_model=FOLDER (what each is: docstring of minimind/rewards/__init__.py). None: number, whether the answer's
    last number is the reference's."""
    on_reward_error: str = "drop"
    """What becomes of an answer that a reward cannot score: drop leaves it out, stop ends the run, a number is taken
    for what that reward did not say."""
    reward_clip: tuple[float, float] | None = None
    """The lowest and the highest reward to learn from: what lies outside counts as the nearer end. None: no bounds."""
    reward_norm: NormName = "none"
    """running: learn from rewards less the mean of all so far, divided by their standard deviation; after the clip."""
    truncation_penalty: float = 0.0
    """Taken off the reward of an answer that was cut off at --max-new-tokens."""
    mask_truncated: bool | None = None
    """Leave answers that were cut off out of the loss; they still count where rewards are compared. None: as the
    algorithm has it, which is no, but for train/grpo.py --loss dapo."""
    thinking: float | None = None
    """Share of the prompts that ask for reasoning, by a hash of the prompt; the others ask for none. None: none says,
    and the model decides."""
    trust_remote_code: bool = False
    """Let a reward model's folder bring code of its own."""
    rollouts: int = 120
    """How often answers are sampled from the model as it then is."""
    prompts: int = 64
    """Prompts of a rollout."""
    samples: int = 4
    """Answers to each prompt."""
    max_prompt: int = 512
    """Tokens of the longest prompt; longer ones are an error, or with --on-bad-row skip left out."""
    max_new_tokens: int | None = None
    """Tokens of the longest answer; what is longer is cut off. None: 8 for the built-in prompts, else 256."""
    temperature: float = 1.0
    """Of sampling, and of the distribution that is trained."""
    minibatches: int | None = None
    """Optimizer steps on each pass over a rollout, each on a part of its answers. None: as the algorithm has it."""
    inner_epochs: int = 1
    """Passes over each rollout."""
    target_kl: float | None = None
    """Mean KL per token between what sampled a rollout and the policy, above which the rest of the rollout is left;
    0.05 is much. None: learn from all of it."""
    micro_batches: int | None = None
    """Forward and backward passes that a step adds up. None: as few as keep the longest answers to the longest prompts
    within 4096 tokens of minimind2-small a pass, or 16384 on a GPU; other models by their size."""
    eval_prompts: int = 256
    """Held-out prompts answered on the way; at the end all are."""
    show: int = 0
    """Print so many prompts of every rollout, with their answers, rewards and advantages."""
    optimizer: Literal["adamw", "muon"] = "adamw"
    """adamw: AdamW for all; muon: Muon for the matrices and AdamW for the rest."""
    schedule: Literal["cosine", "wsd", "constant"] = "constant"
    """How the rate falls after the warm-up."""
    warmup: float = 0.1
    """Share of the steps over which the rate rises."""
    weight_decay: float = 0.0
    """For matrices; norm gains never decay."""
    heldout: float = 0.1
    """Share of the prompts, at most 256, that is never trained on; a hash of each decides."""
    parallel: ParallelName = "auto"
    """How the processes of torchrun share the work: ddp, a model each, or auto, which is ddp where there are several.
    fsdp is refused: answers are sampled from whole weights."""
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
                f"--lora-dropout {self.lora_dropout:g}: answers are sampled without, and what is learnt would be "
                "another policy; drop the flag"
            )
        if self.parallel == "fsdp":
            raise ValueError("--parallel fsdp: answers are sampled from whole weights; take ddp")
        if self.prompts < world_size():
            raise ValueError(f"--prompts {self.prompts}: fewer than the {world_size()} processes that share them")

    @property
    def row_flags(self) -> str:
        return "--max-prompt and --max-new-tokens, together"

    @property
    def longest_answer(self) -> int:
        return self.max_new_tokens or (256 if self.data else 8)
