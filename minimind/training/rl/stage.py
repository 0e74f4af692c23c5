"""A run of a reinforcement learning stage: from prompts and rewards to batches, held-out figures and samples."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import torch
from rich.console import Console

from minimind.config import ModelConfig
from minimind.data.prompts import PromptSet
from minimind.inference.request_state import derive_seed
from minimind.inference.runner import Replica
from minimind.lora import adapters_off
from minimind.modeling import Model
from minimind.objectives.policy import Aggregation
from minimind.rewards import Rewards, RewardScale, model_weights, parse_rewards
from minimind.training.adapters import Adapting
from minimind.training.job import Job, Objective, TrainingPlan
from minimind.training.rl.actor_critic import CRITIC
from minimind.training.rl.arguments import RolloutArgs
from minimind.training.rl.collector import Collector, Stream, score, scored_again
from minimind.training.rl.estimate import of_rollouts
from minimind.training.rl.inputs import find_origin, open_data
from minimind.training.rl.loader import RolloutLoader, Shape, passes
from minimind.training.rl.rollouts import Answer, DrawnPrompt, PromptStream, RolloutOptions, Sampler
from minimind.training.rl.stop import DriftStop
from minimind.training.rl.view import draw_curves, show_groups, transcript
from minimind.training.trainer import Event, StageLoss
from minimind.utils.display import say

_TOGETHER = 256  # answers that decode together, at most
_HELD_OUT_SEED = 0x5EED  # apart from the rollouts' seeds


@dataclass
class Rollouts:
    """A run of such a stage: what is answered and how it is scored. `Job` is its frame."""

    job: Job
    args: RolloutArgs
    train: PromptSet
    heldout: PromptSet | None
    rewards: Rewards
    shape: Shape
    adapting: Adapting
    model: Model = field(init=False)
    trained: Model = field(init=False)
    collector: Collector = field(init=False)
    stop: DriftStop | None = field(init=False, default=None)
    loader: RolloutLoader = field(init=False)

    @staticmethod
    def begin(stage: str, args: RolloutArgs, aggregation: Aggregation, console: Console) -> Rollouts:
        """Flags, data and rewards, then the run folder and the model."""
        args.check()
        args = dataclasses.replace(
            args, from_=args.from_ or find_origin(args, console), seq_len=args.max_prompt + args.longest_answer
        )
        job = Job.begin(stage, args, console)
        for folder, weights in model_weights(args.reward).items():
            job.refer(f"reward {folder}", weights)
        by_tail = job.settle("split", lambda: ("hash", "")) == "tail"
        train, heldout = open_data(args, job.tokenizer, console, by_tail)
        if len(train) < args.prompts:
            job.notes.append(
                f"little data: {len(train):,} prompts, fewer than --prompts {args.prompts} of a rollout, which asks "
                f"each {args.prompts / len(train):.1f} times"
            )
        if not args.reward and any(prompt.reference is None for prompt in train.prompts):
            raise ValueError(
                "--reward: not all prompts of --data have a reference answer; name what to reward, such as model=FOLDER"
            )
        rewards = parse_rewards(args.reward or ("number",), args.on_reward_error, job.device, args.trust_remote_code)
        adapting = Adapting.of(job, args)
        minibatches = args.minibatches or 1
        job.planned = lambda flags: flags["rollouts"] * minibatches * args.inner_epochs
        job.open_run()
        longest = max(len(prompt.ids) for prompt in train.prompts) + args.longest_answer
        answers = -(-args.prompts * args.samples // minibatches)
        fitting = passes(answers, longest, job.config, torch.device(job.rules))
        shape = Shape(
            minibatches, args.inner_epochs, args.micro_batches or fitting, aggregation, args.longest_answer,
            args.temperature, args.seed,
        )  # fmt: skip
        return Rollouts(job, args, train, heldout, rewards, shape, adapting)

    def build(
        self,
        advantages: Callable[[list[Answer]], dict[str, float]],
        *,
        make: Callable[[Model], Model] | None = None,
        stream: Stream | None = None,
        keepers: Mapping[str, Any] | None = None,
        with_reference: bool = False,
        annotate: Callable[[list[Answer]], None] | None = None,
        before: Callable[[list[Answer]], None] | None = None,
        refills: int = 0,
        rescore: bool = False,
        mask: bool = False,
    ) -> None:
        """The model, the engine on its weights, and what makes batches of its answers. make: the model to train of the
        one that the run begins with; mask: whether the algorithm leaves out what was cut off, where --mask-truncated
        does not say; the rest as of Collector and RolloutLoader."""
        job, args = self.job, self.args
        self.model, self.trained = job.build_model(self.adapting.prepare, make)
        scale = RewardScale(args.reward_clip, args.reward_norm == "running")
        policy = [p for n, p in self.model.named_parameters() if not n.startswith(CRITIC)]
        self.stop = DriftStop(args.target_kl, policy, job.parallel) if args.target_kl else None
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
            how=RolloutOptions(args.samples, args.longest_answer, args.temperature, args.seed),
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
            refills=refills,
            rescore=rescore,
            console=job.console,
        )
        kept = {"scale": scale, **({"stop": self.stop} if self.stop else {}), **(keepers or {})}
        self.loader = RolloutLoader(self.collector, self.shape, job.parallel, job.device, kept)

    def _reference(self) -> Callable[[Sequence[Answer]], list[np.ndarray]]:
        """Scores answers under the model that the run began with: a frozen one, or the base without the adapter."""
        if self.adapting.config is None:
            return partial(scored_again, frozen(self.job), shape=self.shape)

        def under_the_base(answers: Sequence[Answer]) -> list[np.ndarray]:
            with adapters_off(self.model):
                return scored_again(self.model, answers, self.shape)

        return under_the_base

    def fit(self, loss: Callable[[Any], StageLoss], nano_lr: float, lines: Sequence[str] = (), **more: Any) -> bool:
        """Train to the last step; False when it was interrupted. nano_lr: nano's peak rate; more: of Objective."""
        job, adapting = self.job, self.adapting
        rate = self.rate(nano_lr)
        told = f"peak rate: {rate:g}, by the width from nano's {nano_lr:g}; --lr sets another"
        if self.args.lr is not None:
            told = f"peak rate: {self.args.lr:g}, as --lr says"
        plan = TrainingPlan(self.loader, self.args.rollouts * self.shape.steps, self.shape.micro_batches, 0)
        objective = Objective(
            loss=loss if self.stop is None else self._watched(loss, self.stop),
            before_update=self.stop.before_update if self.stop else lambda: None,
            evaluate=self.evaluate,
            sample=self.sample,
            describe=lambda answers: [transcript(job.tokenizer, a) for a in answers],
            data_fingerprint=f"{self.train.identity:016x}",
            peak_lr=rate,
            loss_unit="per answer" if self.shape.aggregation == "sample" else "per token",
            news=self.news,
            estimate=of_rollouts,
            **(adapting.files() | more),
        )
        try:
            lines = [*self.describe(), *lines, *adapting.lines(self.model), told]
            done = job.fit(plan, self.model, objective, lines)
        finally:
            for name, count in self.collector.failed.items():
                say(job.console, f"reward {name} failed on {count:,} answers in all")
            if job.parallel.main and job.run.metrics.exists():
                draw_curves(job.run.metrics, job.run.path / "rewards.png", job.run.path.name)
        return done

    def rate(self, nano_lr: float) -> float:
        """The peak rate where --lr does not say."""
        return self.adapting.rate(peak_lr(nano_lr, self.job.config))

    @staticmethod
    def _watched(loss: Callable[[Any], StageLoss], stop: DriftStop) -> Callable[[Any], StageLoss]:
        def watched(batch: Any) -> StageLoss:
            found = loss(batch)
            assert len(found) == 3
            stop.see(batch, found[2])
            return found

        return watched

    def describe(self) -> list[str]:
        """What is printed about the data and the sampling at start."""
        args, held = self.args, f"; held out {len(self.heldout)}" if self.heldout else ""
        return [
            f"data: {len(self.train):,} prompts{held}; reward: {self.rewards}",
            f"rollouts: {args.prompts} prompts x {args.samples} answers of at most {args.longest_answer} tokens; "
            f"{self.shape.steps} steps on each; {self._cut_off()}",
            self.collector.sampler.engine.describe(),
        ]

    def _cut_off(self) -> str:
        """What becomes of an answer at the limit."""
        fate = "left out of the loss" if self.collector.mask else "learnt from as it stands"
        penalty = self.args.truncation_penalty
        return f"cut-off answers are {fate}" + (f", their reward less {penalty:g}" if penalty else "")

    def news(self) -> Event | None:
        """The newest rollout's row; says when there was nothing to learn from it."""
        rollout = self.loader.news()
        if rollout is None:
            return None
        figures = rollout.figures
        if self.args.show and self.job.parallel.main:
            show_groups(self.job.console, self.job.tokenizer, rollout.answers, self.args.show)
        return Event("rollout", figures, rollout.seconds, f"reward {figures.get('reward', 0.0):.3f}  ")

    def evaluate(self, final: bool) -> dict[str, Any]:
        """Held-out rewards: of sampled answers, as those that are trained on, and of the likeliest ones."""
        self.loader.pause()
        if self.heldout is None:
            return {}
        count = len(self.heldout) if final else min(self.args.eval_prompts, len(self.heldout))
        sampled = self._heldout(count, self.args.temperature)
        greedy = self._heldout(count, 0.0)
        figures = {
            "heldout_reward": mean_reward(sampled),
            "heldout_greedy_reward": mean_reward(greedy),
            "heldout_length": float(np.mean([len(a.ids) for a in sampled])),
            "heldout_prompts": count,
            "heldout_dropped": int(sum(np.isnan(a.reward) for a in sampled)),
            "heldout_all": final,
        }
        say(self.job.console, f"the likeliest answers' held-out reward is {figures['heldout_greedy_reward']:.4f}")
        return figures

    def _heldout(self, count: int, temperature: float) -> list[Answer]:
        """An answer to each of the first `count` held-out prompts, scored; of all ranks."""
        assert self.heldout is not None
        how = RolloutOptions(1, self.args.longest_answer, temperature, derive_seed(self.args.seed, _HELD_OUT_SEED))
        self.model.eval()
        return self.collector.answer(self.heldout, [DrawnPrompt(i, i) for i in range(count)], how)

    def sample(self) -> str:
        """Answers to prompts from all over the held-out ones, or the training ones."""
        self.loader.pause()
        if not self.job.parallel.main:
            return ""
        source = self.heldout or self.train
        picked = range(0, len(source), max(1, len(source) // 5))[:5]
        how = RolloutOptions(
            1, self.args.longest_answer, self.args.temperature, derive_seed(self.args.seed, _HELD_OUT_SEED)
        )
        self.model.eval()
        answers = self.collector.sampler.sample(source, [DrawnPrompt(i, i) for i in picked], how)
        score(self.rewards, source, answers, self.args.truncation_penalty)
        return "\n".join(transcript(self.job.tokenizer, a) for a in answers)


NANO_WIDTH = 192


def peak_lr(nano: float, config: ModelConfig) -> float:
    """The peak rate for a model where `nano` is the one tuned on nano: in inverse proportion to the width, as AdamW's
    rate for hidden matrices transfers (Yang et al., 2203.03466)."""
    return float(f"{nano * NANO_WIDTH / config.hidden_size:.2g}")


def mean_reward(answers: Sequence[Answer]) -> float:
    """Of the held-out answers that have a reward."""
    rewards = [a.reward for a in answers if not np.isnan(a.reward)]
    if not rewards:
        raise ValueError("no held-out answer could be scored; mend the reward, or measure nothing with --heldout 0")
    return float(np.mean(rewards))


def frozen(job: Job) -> Model:
    """The model that the run began with, once, in the dtype that it computes in."""
    origin = job.place(job.origin.model())
    dtype = origin.compute_dtype or origin.dtype
    return Replica(origin, dtype).model
