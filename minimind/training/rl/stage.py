"""Run a reinforcement learning stage: open prompts, model and rewards, then train, evaluate and sample."""

from __future__ import annotations

import dataclasses
import subprocess
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console

from minimind.config import ModelConfig
from minimind.data.builtin.problems import NAME, arithmetic_prompts
from minimind.data.prompts import PromptSet, open_prompts
from minimind.inference.decode.int8 import choose_weights_dtype
from minimind.inference.request_state import derive_seed
from minimind.inference.runner import Replica
from minimind.lora import adapters_off
from minimind.modeling import Model
from minimind.objectives.policy import Aggregation
from minimind.rewards import Rewards, RewardScale, model_weights, parse_rewards
from minimind.tokenization import Tokenizer
from minimind.tokenization.reasoning import ThinkingPrompts
from minimind.training.adapters import AdapterSetup
from minimind.training.batches import TrainingPlan
from minimind.training.data_split import named_form
from minimind.training.initial_model import from_newest
from minimind.training.job import Job
from minimind.training.metrics import Event, plot_rollouts
from minimind.training.parallel import world_size
from minimind.training.rl.actor_critic import CRITIC
from minimind.training.rl.arguments import RolloutArgs
from minimind.training.rl.collector import AnswerSource, Collector, Stream, log_probs_of, score
from minimind.training.rl.estimate import estimate_rollouts
from minimind.training.rl.loader import DriftStop, RolloutLoader, Shape, default_micro_batches
from minimind.training.rl.rollouts import (
    Answer,
    DrawnPrompt,
    PromptStream,
    RolloutOptions,
    Sampler,
    show_groups,
    transcript,
)
from minimind.training.run_folder import newest_finished
from minimind.training.trainer import Stage, StageLoss
from minimind.utils.display import say

_DECODE_BATCH = 256  # maximum number of answers decoded together
_HELD_OUT_SEED = 0x5EED  # different from the rollouts' seeds
NANO_WIDTH = 192


@dataclass(frozen=True)
class BuiltinTask:
    """The task of a stage without --data. name: the --data of train/sft.py with conversations of a weak model;
    prompts(cache folder, console): paths of the (training, held-out) prompts; flags: further flags of train/sft.py."""

    name: str
    prompts: Callable[[str | None, Console], tuple[Path, Path]]
    flags: tuple[str, ...]

    @property
    def weak_sft(self) -> list[str]:
        """Flags of train/sft.py that teach a model the weak version of the task."""
        return ["--data", self.name, *self.flags]


ARITHMETIC = BuiltinTask(
    NAME, arithmetic_prompts, ("--epochs", "1", "--seq-len", "256", "--batch-tokens", "1024", "--evals", "2")
)


@dataclass
class RolloutStage:
    """A run that trains on answers sampled from its model, on top of a `Job`; call begin, build, fit in this order.

    figures_of(answers, their prompts): further figures for metrics.jsonl; draw(metrics, run folder): further pictures.
    """

    job: Job
    args: RolloutArgs
    train: PromptSet
    heldout: PromptSet | None
    rewards: Rewards
    shape: Shape
    adapter: AdapterSetup
    model: Model = field(init=False)
    trained: Model = field(init=False)
    collector: Collector = field(init=False)
    stop: DriftStop | None = field(init=False, default=None)
    loader: RolloutLoader = field(init=False)
    figures_of: Callable[[Sequence[Answer], PromptSet], dict[str, float]] = lambda answers, prompts: {}
    draw: Callable[[Path, Path], Any] = lambda metrics, folder: None

    @staticmethod
    def begin(
        stage: str,
        args: RolloutArgs,
        aggregation: Aggregation,
        console: Console,
        task: BuiltinTask = ARITHMETIC,
        open_rewards: Callable[[RolloutArgs, PromptSet, torch.device], Rewards] | None = None,
    ) -> RolloutStage:
        """Check the flags and open the prompts, the rewards and the run folder. open_rewards: makes the rewards; None:
        those named by --reward, by default `number`."""
        args.check()
        initial, row = args.from_ or find_initial(args, console, task), args.max_prompt + args.longest_answer
        args = dataclasses.replace(args, from_=initial, seq_len=row)
        job = Job.begin(stage, args, console)
        for folder, weights in model_weights(args.shared_rewards).items():
            job.add_reference(f"reward {folder}", weights)
        by_tail = job.settle("split", lambda: ("hash", "")) == "tail"
        train, heldout = open_prompt_sets(args, job.tokenizer, console, by_tail, task)
        if len(train) < args.prompts:
            job.notes.append(
                f"little data: {len(train):,} prompts, fewer than the --prompts {args.prompts} of a rollout; "
                f"a rollout uses each {args.prompts / len(train):.1f} times"
            )
        rewards = (open_rewards or _named_rewards)(args, train, job.device)
        adapter = AdapterSetup.from_args(job, args)
        minibatches = args.minibatches or 1
        job.count_steps = lambda flags: flags["rollouts"] * minibatches * args.inner_epochs
        job.open_run()
        longest = max(len(prompt.ids) for prompt in train.prompts) + args.longest_answer
        answers = -(-args.prompts * args.samples // minibatches)
        micro_batches = default_micro_batches(answers, longest, job.config, torch.device(job.default_device))
        shape = Shape(
            minibatches, args.inner_epochs, args.micro_batches or micro_batches, aggregation, args.longest_answer,
            args.temperature, args.seed,
        )  # fmt: skip
        return RolloutStage(job, args, train, heldout, rewards, shape, adapter)

    def build(
        self,
        advantages: Callable[[list[Answer]], dict[str, float]],
        *,
        make: Callable[[Model], Model] | None = None,
        stream: Stream | None = None,
        make_sampler: Callable[..., AnswerSource] | None = None,
        keepers: Mapping[str, Any] | None = None,
        with_reference: bool = False,
        annotate: Callable[[list[Answer]], None] | None = None,
        before: Callable[[list[Answer]], None] | None = None,
        refills: int = 0,
        rescore: bool = False,
        mask: bool = False,
    ) -> None:
        """Build the model, the engine on its weights, and the rollout loader. make: builds the model to train from the
        initial one; make_sampler(model, longest, max_new_tokens, batch, samples, weights_dtype), as in rollout_engine:
        None for a Sampler; mask: the default for --mask-truncated; Collector and RolloutLoader document the rest.
        """
        job, args = self.job, self.args
        self.model, self.trained = job.build_model(self.adapter.prepare, make)
        scale = RewardScale(args.reward_clip, args.reward_norm == "running")
        policy = [p for n, p in self.model.named_parameters() if not n.startswith(CRITIC)]
        self.stop = DriftStop(args.target_kl, policy, job.parallel) if args.target_kl else None
        longest = max(len(p.ids) for s in (self.train, self.heldout) if s for p in s.prompts)
        share = -(-args.prompts // job.parallel.world_size)
        batch = min(_DECODE_BATCH, share * args.samples)
        weights_dtype = choose_weights_dtype(args.weights_dtype, job.device)
        size = (longest, args.longest_answer, batch, args.samples)
        sampler: AnswerSource
        if make_sampler is None:
            sampler = Sampler(self.model, job.tokenizer, *size, weights_dtype)
        else:
            sampler = make_sampler(self.model, *size, weights_dtype)
        self.collector = Collector(
            model=self.model,
            sampler=sampler,
            data=self.train,
            stream=stream or PromptStream(len(self.train), args.seed),
            rewards=self.rewards,
            prompts=args.prompts,
            options=RolloutOptions(args.samples, args.longest_answer, args.temperature, args.seed),
            shape=self.shape,
            parallel=job.parallel,
            advantages=advantages,
            reference=self._reference() if with_reference else None,
            annotate=annotate,
            before=before,
            scale=scale,
            stop=self.stop,
            penalty=args.truncation_penalty,
            mask=mask if args.mask_truncated is None else args.mask_truncated,
            figures_of=lambda answers: self.figures_of(answers, self.train),
            refills=refills,
            rescore=rescore,
            console=job.console,
        )
        all_keepers = {"scale": scale, **({"stop": self.stop} if self.stop else {}), **(keepers or {})}
        self.loader = RolloutLoader(self.collector, self.shape, job.parallel, job.device, all_keepers)

    def _reference(self) -> Callable[[Sequence[Answer]], list[np.ndarray]]:
        """A function that scores answers under the initial model: a frozen copy, or the base without the adapter."""
        if self.adapter.config is None:
            return partial(log_probs_of, frozen(self.job), shape=self.shape)

        def under_the_base(answers: Sequence[Answer]) -> list[np.ndarray]:
            with adapters_off(self.model):
                return log_probs_of(self.model, answers, self.shape)

        return under_the_base

    def fit(self, loss: Callable[[Any], StageLoss], nano_lr: float, lines: Sequence[str] = (), **more: Any) -> bool:
        """Train to the last step; False when training was interrupted. nano_lr: nano's peak learning rate; more:
        further fields of Stage."""
        job, rate = self.job, self.peak_lr(nano_lr)
        rate_line = f"peak rate: {rate:g}, by the width from nano's {nano_lr:g}; --lr sets another"
        if self.args.lr is not None:
            rate_line = f"peak rate: {self.args.lr:g}, as --lr says"
        plan = TrainingPlan(self.loader, self.args.rollouts * self.shape.steps, self.shape.micro_batches, 0)
        stage = Stage(
            loss=loss if self.stop is None else self._watched(loss, self.stop),
            before_update=self.stop.before_update if self.stop else lambda: None,
            evaluate=self.evaluate,
            sample=self.sample,
            describe=lambda answers: [transcript(job.tokenizer, a) for a in answers],
            data_fingerprint=f"{self.train.identity:016x}",
            peak_lr=rate,
            loss_unit="per answer" if self.shape.aggregation == "sample" else "per token",
            event=self.event,
            estimate=estimate_rollouts,
            **(self.adapter.checkpoint_functions() | more),
        )
        try:
            lines = [*self.describe(), *lines, *self.adapter.lines(self.model), rate_line]
            done = job.fit(plan, self.model, stage, lines)
        finally:
            for name, count in self.collector.failed.items():
                say(job.console, f"reward {name} failed on {count:,} answers in all")
            if job.parallel.main and job.run.metrics.exists():
                plot_rollouts(job.run.metrics, job.run.path / "rewards.png", job.run.path.name)
                self.draw(job.run.metrics, job.run.path)
        return done

    def peak_lr(self, nano_lr: float) -> float:
        """The peak learning rate without --lr."""
        return self.adapter.peak_lr(scaled_lr(nano_lr, self.job.config))

    @staticmethod
    def _watched(loss: Callable[[Any], StageLoss], stop: DriftStop) -> Callable[[Any], StageLoss]:
        """Wrap `loss` to also pass the figures of every batch to `stop`."""

        def watched(batch: Any) -> StageLoss:
            result = loss(batch)
            assert len(result) == 3
            stop.add(batch, result[2])
            return result

        return watched

    def describe(self) -> list[str]:
        """Lines about the data and the sampling, printed at start."""
        args, heldout = self.args, f"; held out {len(self.heldout)}" if self.heldout else ""
        return [
            f"data: {len(self.train):,} prompts{heldout}; reward: {self.rewards}",
            f"rollouts: {args.prompts} prompts x {args.samples} answers of at most {args.longest_answer} tokens; "
            f"{self.shape.steps} steps on each; {self._cut_off()}",
            self.collector.sampler.engine.describe(),
        ]

    def _cut_off(self) -> str:
        """How answers that were cut off are treated."""
        treatment = "left out of the loss" if self.collector.mask else "learnt from as it stands"
        penalty = self.args.truncation_penalty
        return f"cut-off answers are {treatment}" + (f", their reward is reduced by {penalty:g}" if penalty else "")

    def event(self) -> Event | None:
        """The event of a new rollout, or None; prints some of its answers with --show."""
        rollout = self.loader.new_rollout()
        if rollout is None:
            return None
        figures = rollout.figures
        if self.args.show and self.job.parallel.main:
            show_groups(self.job.console, self.job.tokenizer, rollout.answers, self.args.show)
        return Event("rollout", figures, rollout.seconds, f"reward {figures.get('reward', 0.0):.3f}  ")

    def evaluate(self, final: bool) -> dict[str, Any]:
        """Held-out rewards of answers sampled as in training, and of greedily decoded answers."""
        self.loader.pause()
        if self.heldout is None:
            return {}
        count = len(self.heldout) if final else min(self.args.eval_prompts, len(self.heldout))
        sampled = self._answer_heldout(count, self.args.temperature)
        greedy = self._answer_heldout(count, 0.0)
        figures = {
            "heldout_reward": mean_reward(sampled),
            "heldout_greedy_reward": mean_reward(greedy),
            "heldout_length": float(np.mean([a.written for a in sampled])),
            "heldout_prompts": count,
            "heldout_dropped": int(sum(np.isnan(a.reward) for a in sampled)),
            "heldout_all": final,
            **{f"heldout_{name}": value for name, value in self.figures_of(sampled, self.heldout).items()},
            **{f"heldout_greedy_{name}": value for name, value in self.figures_of(greedy, self.heldout).items()},
        }
        say(self.job.console, f"held-out reward with greedy decoding: {figures['heldout_greedy_reward']:.4f}")
        return figures

    def _answer_heldout(self, count: int, temperature: float) -> list[Answer]:
        """Sample and score one answer to each of the first `count` held-out prompts; all ranks get all answers."""
        assert self.heldout is not None
        options = RolloutOptions(1, self.args.longest_answer, temperature, derive_seed(self.args.seed, _HELD_OUT_SEED))
        self.model.eval()
        return self.collector.answer(self.heldout, [DrawnPrompt(i, i) for i in range(count)], options)

    def sample(self) -> str:
        """Answers to five evenly spaced held-out prompts, or training prompts if none are held out."""
        self.loader.pause()
        if not self.job.parallel.main:
            return ""
        source = self.heldout or self.train
        picked = range(0, len(source), max(1, len(source) // 5))[:5]
        seed = derive_seed(self.args.seed, _HELD_OUT_SEED)
        options = RolloutOptions(1, self.args.longest_answer, self.args.temperature, seed)
        self.model.eval()
        answers = self.collector.sampler.sample(source, [DrawnPrompt(i, i) for i in picked], options)
        score(self.rewards, source, answers, self.args.truncation_penalty)
        return "\n".join(transcript(self.job.tokenizer, a) for a in answers)


def _named_rewards(args: RolloutArgs, prompts: PromptSet, device: torch.device) -> Rewards:
    if not args.reward and any(prompt.reference is None for prompt in prompts.prompts):
        raise ValueError(
            "--reward: not all prompts of --data have a reference answer; name a reward, such as model=FOLDER"
        )
    return parse_rewards(args.reward or ("number",), args.on_reward_error, device, args.trust_remote_code)


def scaled_lr(nano: float, config: ModelConfig) -> float:
    """Scale `nano`, the peak learning rate tuned on the nano preset, by 1 / width, as AdamW's rate for hidden matrices
    transfers between widths (Yang et al., 2203.03466)."""
    return float(f"{nano * NANO_WIDTH / config.hidden_size:.2g}")


def mean_reward(answers: Sequence[Answer]) -> float:
    """Mean over the answers that have a reward. Raises ValueError if none has."""
    rewards = [a.reward for a in answers if not np.isnan(a.reward)]
    if not rewards:
        raise ValueError("no held-out answer could be scored; fix the reward, or turn evaluation off with --heldout 0")
    return float(np.mean(rewards))


def frozen(job: Job) -> Model:
    """A copy of the initial model in its compute dtype."""
    initial = job.place(job.initial.load())
    return Replica(initial, initial.compute_dtype or initial.dtype).model


def open_prompt_sets(
    args: RolloutArgs, tokenizer: Tokenizer, console: Console, by_tail: bool = False, task: BuiltinTask = ARITHMETIC
) -> tuple[PromptSet, PromptSet | None]:
    """(training, held-out) prompts; without --data, those of `task`. by_tail: as in PromptSet.split."""
    encoder = ThinkingPrompts(tokenizer, args.thinking)
    data, heldout = list(args.data), list(args.heldout_data)
    form = named_form(args)
    if not data:
        builtin = task.prompts(args.cache_dir, console)
        data, heldout = [str(builtin[0])], heldout or [str(builtin[1])]

    def read(paths: list[str]) -> PromptSet:
        return open_prompts(paths, encoder, args.max_prompt, args.on_bad_row, console, form)

    if heldout:
        return read(data), read(heldout)
    return read(data).split(args.heldout, by_tail=by_tail)


def find_initial(args: RolloutArgs, console: Console, task: BuiltinTask = ARITHMETIC) -> str | None:
    """The newest finished SFT run. Without --data: the newest on the weak version of `task`; trains one if none exists.
    With --plan: any, or None if none exists."""
    if args.data or args.plan:
        return from_newest(args, "sft")
    try:
        return newest_finished("sft", data=(task.name,))
    except ValueError:
        if world_size() > 1:
            raise ValueError(
                f"--from: no model has been trained on the built-in task yet; first run `python train/sft.py "
                f"{' '.join(task.weak_sft)}`"
            ) from None
    command = [sys.executable, str(Path(sys.argv[0]).with_name("sft.py")), *task.weak_sft]
    command += [] if args.cache_dir is None else ["--cache-dir", args.cache_dir]
    command += ["--device", args.device, "--precision", args.precision]
    say(console, f"no model has been trained on the built-in task yet: {' '.join(command[1:])}")
    if subprocess.run(command).returncode:
        raise ValueError(f"--from: {' '.join(command[1:])} did not finish; run it, or name a model")
    return newest_finished("sft", data=(task.name,))
