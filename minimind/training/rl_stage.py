"""What the reinforcement learning stages share: their flags, prompts, rewards, held-out figures, and the run itself."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
import tyro
from rich.console import Console

from minimind.data.builtin_arithmetic import NAME, arithmetic_prompts
from minimind.data.progress import say
from minimind.data.prompts import PromptSet, open_prompts
from minimind.inference.replica import Replica
from minimind.inference.tracking import mix
from minimind.modeling import Model
from minimind.objectives.policy import Aggregation
from minimind.objectives.surrogates import PolicyTokens, Sampled
from minimind.rewards import Rewards, parse_rewards
from minimind.tokenization import ChatEncoder
from minimind.training.arguments import FromFlag, StageArgs
from minimind.training.collector import Collector, Stream, score
from minimind.training.job import Job, Objective, Plan
from minimind.training.loop import News, StageLoss
from minimind.training.parallel import world_size
from minimind.training.rl_loader import RolloutLoader, Shape, passes
from minimind.training.rl_view import draw_curves, show_groups, transcript
from minimind.training.rollouts import Answer, Drawn, PromptStream, Sampler, Sampling
from minimind.training.run_folder import newest_finished

_TOGETHER = 256  # answers that decode together, at most
_HELD_OUT_SEED = 0x5EED  # apart from the rollouts' seeds
# What teaches a model the weak version of the built-in task, as flags of train/sft.py.
WEAK = ("--data", NAME, "--epochs", "1", "--seq-len", "256", "--batch-tokens", "1024", "--evals", "2")


@dataclass(frozen=True)
class RolloutArgs(StageArgs):
    """Flags of a stage that learns from its own answers."""

    from_: FromFlag = None
    """The model to go on from: a run folder, a Hugging Face folder, or an upstream .pth (with --preset and
    --tokenizer). None: the newest finished run of train/sft.py; with the built-in --data, one that was taught the weak
    version of that task, which is trained first if there is none (a minute or two)."""
    data: tuple[str, ...] = ()
    """Files, folders or globs of .jsonl, plain, .gz or .zst, with {"conversations": [..., {"role": "assistant",
    "content": ""}]} rows: the last turn is the one to write. What stands in it, or in "reference" beside it, is the
    answer that some rewards compare with. None: sums and differences that come with the program."""
    heldout_data: tuple[str, ...] = ()
    """Prompts to measure on, instead of --heldout."""
    reward: tuple[str, ...] = ()
    """Rewards to add up, each NAME[=ARGUMENT][:WEIGHT]: number exact json[=KEY,KEY] tools format[=think|answer]
    length=LOW..HIGH overlong=LOW..HIGH repetition[=N] regex=PATTERN function=PACKAGE.MODULE:FUNCTION model=FOLDER (what
    each is: docstring of minimind/rewards/__init__.py). None: number, whether the answer's last number is the
    reference's."""
    on_reward_error: str = "drop"
    """What becomes of an answer that a reward cannot score: drop leaves it out, stop ends the run, a number is taken
    for what that reward did not say."""
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
    minibatches: int = 1
    """Optimizer steps on each rollout, each on a part of its answers."""
    inner_epochs: int = 1
    """Passes over each rollout."""
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
    """Share of the prompts, the last ones and at most 256, that is never trained on."""
    log_every: int = 1
    """Steps between reads of the loss from the device."""
    tokens: tyro.conf.Suppress[int | None] = None
    epochs: tyro.conf.Suppress[float] = 1.0
    seq_len: tyro.conf.Suppress[int] = 512
    batch_tokens: tyro.conf.Suppress[int | None] = None
    micro_tokens: tyro.conf.Suppress[int | None] = None
    eval_tokens: tyro.conf.Suppress[int] = 65536

    def check(self) -> None:
        super().check()
        for name in ("rollouts", "prompts", "samples", "max_prompt", "max_new_tokens", "temperature", "minibatches",
                     "inner_epochs", "micro_batches", "eval_prompts"):  # fmt: skip
            value = getattr(self, name)
            if value is not None and value <= 0:
                raise ValueError(f"--{name.replace('_', '-')} {value}: must be above 0")
        if self.parallel == "fsdp":
            raise ValueError("--parallel fsdp: answers are sampled from whole weights; take ddp")
        if self.prompts < world_size():
            raise ValueError(
                f"--prompts {self.prompts}: fewer than the {world_size()} processes that share them"
            )

    @property
    def longest_answer(self) -> int:
        return self.max_new_tokens or (256 if self.data else 8)


@dataclass
class Rollouts:
    """A run of such a stage: what is answered and how it is scored. `Job` is its frame."""

    job: Job
    args: RolloutArgs
    train: PromptSet
    heldout: PromptSet | None
    rewards: Rewards
    shape: Shape
    model: Model = field(init=False)
    trained: Model = field(init=False)
    collector: Collector = field(init=False)
    loader: RolloutLoader = field(init=False)

    @staticmethod
    def begin(stage: str, args: RolloutArgs, aggregation: Aggregation, console: Console) -> Rollouts:
        """Flags, data and rewards, then the run folder and the model."""
        args.check()
        args = dataclasses.replace(
            args,
            from_=args.from_ or find_origin(args, console),
            seq_len=args.max_prompt + args.longest_answer,
        )
        job = Job.begin(stage, args, console)
        encoder = ChatEncoder(job.tokenizer)
        train, heldout = open_data(args, encoder, console)
        if not args.reward and any(prompt.reference is None for prompt in train.prompts):
            raise ValueError(
                "--reward: not all prompts of --data have a reference answer; name what to reward, such as model=FOLDER"
            )
        rewards = parse_rewards(
            args.reward or ("number",), args.on_reward_error, job.device, args.trust_remote_code
        )
        job.open_run(args.data_name)
        longest = max(len(prompt.ids) for prompt in train.prompts) + args.longest_answer
        answers = -(-args.prompts * args.samples // args.minibatches)
        shape = Shape(
            args.minibatches, args.inner_epochs, args.micro_batches or passes(answers, longest, job.config, job.device),
            aggregation, args.longest_answer, args.temperature, args.seed,
        )  # fmt: skip
        return Rollouts(job, args, train, heldout, rewards, shape)

    def build(
        self,
        advantages: Callable[[list[Answer]], dict[str, float]],
        *,
        make: Callable[[Model], Model] | None = None,
        stream: Stream | None = None,
        keeper: Any = None,
        with_reference: bool = False,
        annotate: Callable[[list[Answer]], None] | None = None,
        before: Callable[[list[Answer]], None] | None = None,
        refills: int = 0,
        rescore: bool = False,
    ) -> None:
        """The model, the engine on its weights, and what makes batches of its answers. make: the model to train of the
        one that the run begins with; the rest as of Collector and RolloutLoader."""
        job, args = self.job, self.args
        self.model, self.trained = job.build_model(make=make)
        longest = max(len(p.ids) for s in (self.train, self.heldout) if s for p in s.prompts)
        share = -(-args.prompts // job.parallel.world_size)
        batch = min(_TOGETHER, share * args.samples)
        sampler = Sampler(self.model, job.tokenizer, longest, args.longest_answer, batch, args.samples)
        self.collector = Collector(
            model=self.model,
            sampler=sampler,
            data=self.train,
            stream=stream or PromptStream(len(self.train), args.seed),
            rewards=self.rewards,
            prompts=args.prompts,
            how=Sampling(args.samples, args.longest_answer, args.temperature, args.seed),
            shape=self.shape,
            parallel=job.parallel,
            advantages=advantages,
            reference=frozen(job) if with_reference else None,
            annotate=annotate,
            before=before,
            refills=refills,
            rescore=rescore,
            console=job.console,
        )
        self.loader = RolloutLoader(self.collector, self.shape, job.parallel, job.device, keeper)

    def fit(
        self, loss: Callable[[Any], StageLoss], peak_lr: float, lines: Sequence[str] = (), **more: Any
    ) -> bool:
        """Train to the last step; False when it was interrupted. more: of Objective."""
        job = self.job
        plan = Plan(self.loader, self.args.rollouts * self.shape.steps, self.shape.micro_batches, 0)
        objective = Objective(
            loss=loss,
            evaluate=self.evaluate,
            sample=self.sample,
            describe=lambda answers: [transcript(job.tokenizer, a) for a in answers],
            data_fingerprint=f"{self.train.identity:016x}",
            peak_lr=peak_lr,
            loss_unit="per answer" if self.shape.aggregation == "sample" else "per token",
            news=self.news,
            **more,
        )
        try:
            done = job.fit(plan, self.model, objective, [*self.describe(), *lines])
        finally:
            if job.parallel.main and job.run.metrics.exists():
                draw_curves(job.run.metrics, job.run.path / "rewards.png", job.run.path.name)
        return done

    def describe(self) -> list[str]:
        """What is printed about the data and the sampling at start."""
        args, held = self.args, f"; held out {len(self.heldout)}" if self.heldout else ""
        return [
            f"data: {len(self.train):,} prompts{held}; reward: {self.rewards}",
            f"rollouts: {args.prompts} prompts x {args.samples} answers of at most {args.longest_answer} tokens; "
            f"{self.shape.steps} steps on each",
            self.collector.sampler.engine.describe(),
        ]

    def news(self) -> News | None:
        """The newest rollout's row; says when there was nothing to learn from it."""
        rollout = self.loader.news()
        if rollout is None:
            return None
        figures = rollout.figures
        if self.args.show and self.job.parallel.main:
            show_groups(self.job.console, self.job.tokenizer, rollout.answers, self.args.show)
        return News("rollout", figures, rollout.seconds, f"reward {figures.get('reward', 0.0):.3f}  ")

    def evaluate(self, final: bool) -> dict[str, Any]:
        """Held-out rewards: of sampled answers, as those that are trained on, and of the likeliest ones."""
        self.loader.pause()
        if self.heldout is None:
            return {}
        count = len(self.heldout) if final else min(self.args.eval_prompts, len(self.heldout))
        sampled = self._heldout(count, self.args.temperature)
        greedy = self._heldout(count, 0.0)
        figures = {
            "heldout_reward": float(np.nanmean([a.reward for a in sampled])),
            "heldout_greedy_reward": float(np.nanmean([a.reward for a in greedy])),
            "heldout_length": float(np.mean([len(a.ids) for a in sampled])),
            "heldout_prompts": count,
            "heldout_all": final,
        }
        say(
            self.job.console,
            f"the likeliest answers' held-out reward is {figures['heldout_greedy_reward']:.4f}",
        )
        return figures

    def _heldout(self, count: int, temperature: float) -> list[Answer]:
        """An answer to each of the first `count` held-out prompts, scored; of all ranks."""
        assert self.heldout is not None
        parallel = self.job.parallel
        drawn = [Drawn(i, i) for i in range(count)][parallel.rank :: parallel.world_size]
        how = Sampling(1, self.args.longest_answer, temperature, mix(self.args.seed, _HELD_OUT_SEED))
        self.model.eval()
        answers = self.collector.sampler.sample(self.heldout, drawn, how)
        score(self.rewards, self.heldout, answers)
        return [a for part in parallel.gather(answers) for a in part]

    def sample(self) -> str:
        """Answers to prompts from all over the held-out ones, or the training ones."""
        self.loader.pause()
        if not self.job.parallel.main:
            return ""
        source = self.heldout or self.train
        picked = range(0, len(source), max(1, len(source) // 5))[:5]
        how = Sampling(
            1, self.args.longest_answer, self.args.temperature, mix(self.args.seed, _HELD_OUT_SEED)
        )
        self.model.eval()
        answers = self.collector.sampler.sample(source, [Drawn(i, i) for i in picked], how)
        score(self.rewards, source, answers)
        return "\n".join(transcript(self.job.tokenizer, a) for a in answers)


def no_tokens() -> PolicyTokens:
    """For asking an objective whether it could be trained with."""
    none = torch.zeros(0, dtype=torch.float64)
    places = torch.zeros(0, dtype=torch.int64)
    return PolicyTokens(Sampled(places, places, 0), none, none, none, none, none)


def frozen(job: Job) -> Model:
    """The model that the run began with, once, in the dtype that it computes in."""
    origin = job.place(job.origin.model())
    dtype = origin.compute_dtype or origin.head_weight.dtype
    return Replica(origin, dtype).model


def open_data(
    args: RolloutArgs, encoder: ChatEncoder, console: Console
) -> tuple[PromptSet, PromptSet | None]:
    """(training, held-out) prompts."""
    data, heldout = list(args.data), list(args.heldout_data)
    if not data:
        builtin = arithmetic_prompts(args.cache_dir, console)
        data, heldout = [str(builtin[0])], heldout or [str(builtin[1])]

    def read(paths: list[str]) -> PromptSet:
        return open_prompts(paths, encoder, args.max_prompt, args.on_bad_row, console)

    if heldout:
        return read(data), read(heldout)
    return read(data).split(args.heldout)


def find_origin(args: RolloutArgs, console: Console) -> str:
    """The newest finished SFT run; for the built-in task one on its weak version, made here where there is none."""
    if args.data:
        return newest_finished("sft")
    try:
        return newest_finished("sft", data=(NAME,))
    except ValueError:
        if world_size() > 1:
            raise ValueError(
                f"--from: no model was taught the built-in task yet; run `python train/sft.py {' '.join(WEAK)}` first"
            ) from None
    command = [sys.executable, str(Path(sys.argv[0]).with_name("sft.py")), *WEAK]
    command += [] if args.cache_dir is None else ["--cache-dir", args.cache_dir]
    command += ["--device", args.device, "--precision", args.precision]
    say(console, f"no model was taught the built-in task yet: {' '.join(command[1:])}")
    if subprocess.run(command).returncode:
        raise ValueError(f"--from: {' '.join(command[1:])} did not finish; run it, or name a model")
    return newest_finished("sft", data=(NAME,))
