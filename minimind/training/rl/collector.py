"""One rollout: prompts drawn, answered, scored, and made ready to learn from, by all ranks together.

Each rank answers and scores its share of the prompts; then all know all answers, and what follows from them is the same
everywhere.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Protocol, cast

import numpy as np
import torch
from rich.console import Console

from minimind.data.prompts import PromptSet
from minimind.modeling import Model
from minimind.objectives.policy import token_log_probs
from minimind.objectives.surrogates import kl_estimates
from minimind.rewards import Rewards, RewardScale, Sample, Scores, SignalWatch, summary
from minimind.rewards.compose import Failures
from minimind.training.parallel import Parallel
from minimind.training.rl.loader import Rollout, Shape, pack
from minimind.training.rl.rollouts import Answer, DrawnPrompt, RolloutOptions, Sampler
from minimind.training.rl.stop import DriftStop
from minimind.utils.display import say

_TOKENS = 8192  # of a forward without gradients
_CHECKED = 16  # answers that are scored again, to compare the trainer with the engine


class Stream(Protocol):
    """Where prompts come from."""

    def draw(self, first: int, count: int) -> list[DrawnPrompt]: ...


@dataclass
class Collector:
    """model: the policy, in training; sampler: samples from it. prompts: their number in a rollout, `how.samples`
    answers each.

    reference(answers): their log-probabilities under the model that the run began with, as scored_again gives them,
    where the algorithm wants them. annotate(answers): what else is
    worked out for a rank's share of them, such as a critic's values. advantages(answers): fills them in by the scores,
    given all, and returns figures to log. before(answers of the rollout before): called first, with the weights trained
    on them. scale: makes scores of the rewards. stop: told of every new rollout. penalty: taken off the reward of an
    answer that was cut off; mask: whether the loss leaves such answers out.
    refills: how many prompts may be drawn in place of those whose answers all have one reward, as a multiple of
    `prompts`; 0: such groups stay. rescore: learn from the trainer's log-probabilities of the answers, by one more
    forward, not from the engine's.
    """

    model: Model
    sampler: Sampler
    data: PromptSet
    stream: Stream
    rewards: Rewards
    prompts: int
    how: RolloutOptions
    shape: Shape
    parallel: Parallel
    advantages: Callable[[list[Answer]], dict[str, float]]
    reference: Callable[[Sequence[Answer]], list[np.ndarray]] | None = None
    annotate: Callable[[list[Answer]], None] | None = None
    before: Callable[[list[Answer]], None] | None = None
    scale: RewardScale = field(default_factory=RewardScale)
    stop: DriftStop | None = None
    penalty: float = 0.0
    mask: bool = False
    refills: int = 0
    rescore: bool = False
    console: Console = field(default_factory=Console)
    watch: SignalWatch = field(default_factory=SignalWatch)
    all_masked: bool = False  # whether the newest rollout was; said once for as long as that lasts
    failed: Counter[str] = field(default_factory=Counter)  # answers that each reward failed on, since the start

    def __call__(self, number: int, first: int, previous: list[Answer]) -> Rollout:
        """Rollout `number`, from the prompt `first` of the stream on; previous: answers of the rollout before."""
        seconds = {"rollout": 0.0, "reward": 0.0, "prepare": 0.0}
        self.model.eval()
        if self.before is not None and previous:
            with _timed(seconds, "prepare"):
                self.before(previous)
        made, kept, following = self._answers(first, seconds)
        with _timed(seconds, "prepare"):
            self._annotate(kept)
            figures = self._figures(made, kept) | (self.stop.begin() if self.stop else {})
            if self.rescore:
                self._rescore(kept)
            if kept:
                figures |= self._scored(kept) | self.advantages(kept)
        return Rollout(kept, following, figures, seconds)

    def _scored(self, answers: list[Answer]) -> dict[str, float]:
        """Make the scores of the rewards, and mask what the loss is to leave out."""
        scores, figures = self.scale(np.array([a.reward for a in answers]))
        for a, value in zip(answers, scores.tolist(), strict=True):
            a.score, a.masked = value, self.mask and not a.ended
        if not self.mask:
            return figures
        masked = float(np.mean([a.masked for a in answers]))
        if masked == 1 and not self.all_masked:
            say(
                self.console,
                f"warning: all {len(answers)} answers of a rollout were cut off at --max-new-tokens "
                f"{self.how.max_new_tokens}, and --mask-truncated leaves them out: there is nothing to learn from",
            )
        self.all_masked = masked == 1
        return figures | {"masked": masked}

    def _answers(self, first: int, seconds: dict[str, float]) -> tuple[list[Answer], list[Answer], int]:
        """(all answers, those to learn from, the next prompt's number)."""
        made: list[Answer] = []
        kept: list[Answer] = []
        missing, limit = self.prompts, self.prompts * (1 + self.refills)
        while missing and limit:
            drawn = self.stream.draw(first, min(missing, limit))
            first, limit = first + len(drawn), limit - len(drawn)
            answers = self.answer(self.data, drawn, self.how, seconds)
            made += answers
            scored = [a for a in answers if not np.isnan(a.reward)]
            kept += _teaching(scored) if self.refills else scored
            missing = self.prompts - len({a.number for a in kept}) if self.refills else 0
        return made, kept or [a for a in made if not np.isnan(a.reward)], first

    def answer(
        self, data: PromptSet, drawn: list[DrawnPrompt], how: RolloutOptions, seconds: dict[str, float] | None = None
    ) -> list[Answer]:
        """The answers to `drawn` of `data`, of which each rank makes its part, by number and sample; their rewards are
        NaN where they failed, which is said once of each reward. seconds: what "rollout" and "reward" are added to."""
        mine = drawn[self.parallel.rank :: self.parallel.world_size]
        seconds = seconds or {"rollout": 0.0, "reward": 0.0}
        with _timed(seconds, "rollout"):
            answers = self.sampler.sample(data, mine, how)
        with _timed(seconds, "reward"):
            failures = score(self.rewards, data, answers, self.penalty)
        with _timed(seconds, "rollout"):  # the ranks wait for the slowest
            parts = self.parallel.gather((answers, failures))
        for name, failure in chain(*(failures.items() for _, failures in parts)):
            if not self.failed[name]:
                say(self.console, f"reward {name} failed on {failure.count} answers: {failure.first}")
            self.failed[name] += failure.count
        return sorted(chain(*(answers for answers, _ in parts)), key=lambda a: (a.number, a.sample))

    def _annotate(self, answers: list[Answer]) -> None:
        """What each rank works out for its share of the answers, made known to all."""
        if self.reference is None and self.annotate is None:
            return
        mine = answers[self.parallel.rank :: self.parallel.world_size]
        if self.reference is not None:
            for a, log_probs in zip(mine, self.reference(mine), strict=True):
                a.reference = log_probs
        if self.annotate is not None:
            self.annotate(mine)
        known = self.parallel.gather([(a.reference, a.values) for a in mine])
        for rank, part in enumerate(known):
            for a, worked_out in zip(answers[rank :: self.parallel.world_size], part, strict=True):
                a.reference, a.values = worked_out

    def _rescore(self, answers: list[Answer]) -> None:
        """The trainer's own log-probabilities in place of the engine's."""
        mine = answers[self.parallel.rank :: self.parallel.world_size]
        for rank, part in enumerate(self.parallel.gather(scored_again(self.model, mine, self.shape))):
            for a, log_probs in zip(answers[rank :: self.parallel.world_size], part, strict=True):
                a.log_probs = log_probs

    def _figures(self, made: list[Answer], kept: list[Answer]) -> dict[str, float]:
        """What metrics.jsonl has of a rollout."""
        groups = np.array([a.number for a in made]) if self.how.samples > 1 else None
        names = made[0].parts
        parts = {name: np.array([a.parts[name] for a in made]) for name in names}
        scores = Scores(np.array([a.reward for a in made]), parts, {})
        warning = self.watch.see(scores, groups)
        if warning is not None:
            say(self.console, f"{warning}; --show 4 prints some")
        log_probs = np.concatenate([a.log_probs for a in made]).astype(np.float64)
        figures = summary(scores, groups) | {
            "answers": len(made),
            "drawn": len({a.number for a in made}) / self.prompts,
            "length": np.mean([len(a.ids) for a in made]),
            "ended": np.mean([a.ended for a in made]),
            "entropy": -log_probs.mean(),  # an estimate, as the tokens were drawn from what it is the entropy of
        }
        if kept and kept[0].reference is not None:
            reference = np.concatenate([a.reference for a in kept if a.reference is not None])
            sampled = torch.from_numpy(np.concatenate([a.log_probs for a in kept])).double()
            figures["kl"] = kl_estimates(sampled, torch.from_numpy(reference).double(), "k3").mean().item()
        return {name: float(value) for name, value in (figures | self._drift(kept)).items()}

    def _drift(self, answers: list[Answer]) -> dict[str, float]:
        """How far the engine's log-probabilities are from the trainer's, before any update, on a few answers."""
        values = self.moved(answers, _CHECKED)
        return {"drift_mean": values.mean(), "drift_max": values.max()} if len(values) else {}

    def moved(self, answers: list[Answer], count: int) -> np.ndarray:
        """|log p - what the engine said| of every token of the first `count` answers, p being the policy as it is."""
        mine = answers[:count][self.parallel.rank :: self.parallel.world_size]
        again = scored_again(self.model, mine, self.shape)
        apart = [np.abs(log_probs - a.log_probs) for a, log_probs in zip(mine, again, strict=True)]
        return np.concatenate([np.zeros(0), *chain(*self.parallel.gather(apart))])


def score(rewards: Rewards, data: PromptSet, answers: Sequence[Answer], penalty: float = 0.0) -> dict[str, Failures]:
    """Fill in the rewards of `answers`, less `penalty` where one was cut off, NaN where one is to be left out; which
    rewards failed."""
    samples = []
    for a in answers:
        prompt = data[a.prompt]
        ids, reason = a.ids.tolist(), cast(Any, "stop" if a.ended else "length")
        text = prompt.opening + a.text
        samples.append(Sample(prompt.messages, text, ids, reason, prompt.reference, prompt.metadata, prompt.thinking))
    scores = rewards(samples)
    for i, a in enumerate(answers):
        a.reward = float(scores.total[i]) - (0.0 if a.ended else penalty)
        a.parts = {name: float(values[i]) for name, values in scores.parts.items()}
    return scores.failures


def scored_again(model: Model, answers: Sequence[Answer], shape: Shape) -> list[np.ndarray]:
    """Log-probabilities of the answers' tokens under `model`, float32, by full forwards."""
    found: list[np.ndarray] = []
    for part in parts(answers):
        batch = pack(part, model.device, 0, 0, shape)
        log_probs = token_log_probs(
            model, batch.input_ids, batch.targets, batch.cu_seqlens, batch.num_targets, shape.temperature
        )
        found += per_answer(log_probs, batch.targets, part)
    return found


def per_answer(values: torch.Tensor, targets: torch.Tensor, answers: Sequence[Answer]) -> list[np.ndarray]:
    """The numbers [1, T] at the targets of packed `answers`, of each answer: float32."""
    picked = values.flatten()[targets.flatten() != -100].float().cpu().numpy()
    return np.split(picked, np.cumsum([len(a.ids) for a in answers])[:-1])


def parts(answers: Sequence[Answer]) -> list[list[Answer]]:
    """`answers` in their order, in parts of about _TOKENS tokens."""
    found: list[list[Answer]] = []
    room = 0
    for a in answers:
        size = len(a.prompt_ids) + len(a.ids)
        if size > room:
            found.append([])
            room = _TOKENS
        found[-1].append(a)
        room -= size
    return found


def _teaching(answers: list[Answer]) -> list[Answer]:
    """The answers of groups whose rewards differ."""
    rewards: dict[int, set[float]] = {}
    for a in answers:
        rewards.setdefault(a.number, set()).add(a.reward)
    return [a for a in answers if len(rewards[a.number]) > 1]


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    began = time.perf_counter()
    try:
        yield
    finally:
        seconds[name] += time.perf_counter() - began
