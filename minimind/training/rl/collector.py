"""Collects a rollout: draws prompts, answers and scores them, and prepares the answers for training.

Each rank answers and scores its share of the prompts. Then the ranks exchange all answers, so that everything computed
from them is the same on every rank.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import chain
from typing import Protocol

import numpy as np
import torch
from rich.console import Console

from minimind.data.prompts import PromptSet
from minimind.inference.engine import Engine
from minimind.modeling import Model
from minimind.objectives.policy import token_log_probs
from minimind.objectives.surrogates import kl_estimates
from minimind.rewards import Rewards, RewardScale, Scores, SignalWatch, summary
from minimind.rewards.compose import Failures
from minimind.training.parallel import Parallel
from minimind.training.rl.loader import DriftStop, Rollout, Shape, pack
from minimind.training.rl.rollouts import Answer, DrawnPrompt, RolloutOptions
from minimind.utils.display import say

_TOKENS = 8192  # of a forward without gradients
_DRIFT_ANSWERS = 16  # answers that are scored again, to compare the trainer with the engine


class Stream(Protocol):
    """A source of prompts."""

    def draw(self, first: int, count: int) -> list[DrawnPrompt]: ...


class AnswerSource(Protocol):
    """Answers prompts: a Sampler, or a sampler of conversations with tools."""

    engine: Engine

    def sample(self, prompts: PromptSet, drawn: Sequence[DrawnPrompt], options: RolloutOptions) -> Sequence[Answer]: ...


@dataclass
class Collector:
    """Collects rollouts of `prompts` prompts, options.samples answers each, from the policy `model` by `sampler`.

    reference(answers): log-probabilities under the initial model, as from `log_probs_of`; None where the algorithm does
      not use them.
    annotate(answers): adds to a rank's share of the answers, for example a critic's values.
    advantages(all answers): sets their advantages from the scores and returns figures to log.
    before(answers of the previous rollout): called first, with the weights trained on these answers.
    scale: turns rewards into scores. stop: told of every new rollout. penalty: subtracted from the reward of an answer
      that was cut off; mask: whether the loss leaves such answers out.
    figures_of(answers): further figures of a rollout.
    refills: how many prompts may replace those whose answers all have the same reward, as a multiple of `prompts`.
    rescore: use the trainer's log-probabilities of the answers, by one more forward, instead of the engine's.
    """

    model: Model
    sampler: AnswerSource
    data: PromptSet
    stream: Stream
    rewards: Rewards
    prompts: int
    options: RolloutOptions
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
    figures_of: Callable[[list[Answer]], dict[str, float]] = lambda answers: {}
    refills: int = 0
    rescore: bool = False
    console: Console = field(default_factory=Console)
    watch: SignalWatch = field(default_factory=SignalWatch)
    all_masked: bool = False  # whether the newest rollout was, so that it is reported once
    failed: Counter[str] = field(default_factory=Counter)  # answers on which each reward failed, since the start

    def __call__(self, number: int, first: int, previous: list[Answer]) -> Rollout:
        """The rollout that begins with prompt `first` of the stream. previous: answers of the previous rollout."""
        seconds = {"rollout": 0.0, "reward": 0.0, "prepare": 0.0}
        self.model.eval()
        if self.before is not None and previous:
            with _timed(seconds, "prepare"):
                self.before(previous)
        sampled, kept, following = self._answers(first, seconds)
        with _timed(seconds, "prepare"):
            self._annotate(kept)
            figures = self._figures(sampled, kept) | (self.stop.begin() if self.stop else {})
            if self.rescore:
                self._rescore(kept)
            if kept:
                figures |= self._set_scores(kept) | self.advantages(kept)
        return Rollout(kept, following, figures, seconds)

    def _set_scores(self, answers: list[Answer]) -> dict[str, float]:
        """Turn the rewards into scores, and mask the answers that the loss leaves out."""
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
                f"{self.options.max_new_tokens}, and --mask-truncated leaves them out: there is nothing to learn from",
            )
        self.all_masked = masked == 1
        return figures | {"masked": masked}

    def _answers(self, first: int, seconds: dict[str, float]) -> tuple[list[Answer], list[Answer], int]:
        """(all answers, those to learn from, the next prompt's number)."""
        sampled: list[Answer] = []
        kept: list[Answer] = []
        missing, limit = self.prompts, self.prompts * (1 + self.refills)
        while missing and limit:
            drawn = self.stream.draw(first, min(missing, limit))
            first, limit = first + len(drawn), limit - len(drawn)
            answers = self.answer(self.data, drawn, self.options, seconds)
            sampled += answers
            scored = [a for a in answers if not np.isnan(a.reward)]
            kept += _with_differences(scored) if self.refills else scored
            missing = self.prompts - len({a.number for a in kept}) if self.refills else 0
        return sampled, kept or [a for a in sampled if not np.isnan(a.reward)], first

    def answer(
        self,
        data: PromptSet,
        drawn: list[DrawnPrompt],
        options: RolloutOptions,
        seconds: dict[str, float] | None = None,
    ) -> list[Answer]:
        """The scored answers to the prompts `drawn` from `data`, sorted by number and sample; each rank makes its share
        and all get all. A reward that failed is NaN, and its first failure is printed. seconds: "rollout" and "reward"
        are added to it."""
        own_prompts = drawn[self.parallel.rank :: self.parallel.world_size]
        seconds = seconds or {"rollout": 0.0, "reward": 0.0}
        with _timed(seconds, "rollout"):
            answers = self.sampler.sample(data, own_prompts, options)
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
        """Let each rank annotate its share of the answers, and exchange the results."""
        if self.reference is None and self.annotate is None:
            return
        own = answers[self.parallel.rank :: self.parallel.world_size]
        if self.reference is not None:
            for a, log_probs in zip(own, self.reference(own), strict=True):
                a.reference = log_probs
        if self.annotate is not None:
            self.annotate(own)
        parts = self.parallel.gather([(a.reference, a.values) for a in own])
        for rank, part in enumerate(parts):
            for a, values in zip(answers[rank :: self.parallel.world_size], part, strict=True):
                a.reference, a.values = values

    def _rescore(self, answers: list[Answer]) -> None:
        """Replace the engine's log-probabilities by the trainer's."""
        own = answers[self.parallel.rank :: self.parallel.world_size]
        for rank, part in enumerate(self.parallel.gather(log_probs_of(self.model, own, self.shape))):
            for a, log_probs in zip(answers[rank :: self.parallel.world_size], part, strict=True):
                a.log_probs = log_probs

    def _figures(self, sampled: list[Answer], kept: list[Answer]) -> dict[str, float]:
        """The figures of a rollout for metrics.jsonl."""
        groups = np.array([a.number for a in sampled]) if self.options.samples > 1 else None
        names = sampled[0].parts
        parts = {name: np.array([a.parts[name] for a in sampled]) for name in names}
        scores = Scores(np.array([a.reward for a in sampled]), parts, {})
        warning = self.watch.see(scores, groups)
        if warning is not None:
            say(self.console, f"{warning}; --show 4 prints some")
        log_probs = np.concatenate([a.log_probs for a in sampled]).astype(np.float64)
        figures = summary(scores, groups) | {
            "answers": len(sampled),
            "drawn": len({a.number for a in sampled}) / self.prompts,
            "length": np.mean([a.written for a in sampled]),
            "ended": np.mean([a.ended for a in sampled]),
            "entropy": -log_probs.mean(),  # an estimate: the tokens were sampled from the policy
            **self.figures_of(sampled),
        }
        if kept and kept[0].reference is not None:
            reference = np.concatenate([a.reference for a in kept if a.reference is not None])
            policy = torch.from_numpy(np.concatenate([a.log_probs for a in kept])).double()
            figures["kl"] = kl_estimates(policy, torch.from_numpy(reference).double()).mean().item()
        return {name: float(value) for name, value in (figures | self._drift(kept)).items()}

    def _drift(self, answers: list[Answer]) -> dict[str, float]:
        """Difference between the engine's and the trainer's log-probabilities of a few answers, before any update."""
        values = self.policy_change(answers, _DRIFT_ANSWERS)
        return {"drift_mean": values.mean(), "drift_max": values.max()} if len(values) else {}

    def policy_change(self, answers: list[Answer], count: int) -> np.ndarray:
        """|log p - log p'| for every token of the first `count` answers, with p of the current policy and p' of the
        engine when it sampled them."""
        own = answers[:count][self.parallel.rank :: self.parallel.world_size]
        current = log_probs_of(self.model, own, self.shape)
        changes = [np.abs(log_probs - a.log_probs) for a, log_probs in zip(own, current, strict=True)]
        return np.concatenate([np.zeros(0), *chain(*self.parallel.gather(changes))])


def score(rewards: Rewards, data: PromptSet, answers: Sequence[Answer], penalty: float = 0.0) -> dict[str, Failures]:
    """Set the rewards of `answers`, less `penalty` for those cut off, and NaN for those to leave out. Returns the
    failures by reward."""
    scores = rewards([a.as_sample(data[a.prompt]) for a in answers])
    for i, a in enumerate(answers):
        a.reward = float(scores.total[i]) - (0.0 if a.ended else penalty)
        a.parts = {name: float(values[i]) for name, values in scores.parts.items()}
    return scores.failures


def log_probs_of(model: Model, answers: Sequence[Answer], shape: Shape) -> list[np.ndarray]:
    """float32 log-probabilities of every answer's tokens under `model`, by full forwards."""
    values: list[np.ndarray] = []
    for part in chunks(answers):
        batch = pack(part, model.device, 0, 0, shape)
        log_probs = token_log_probs(
            model, batch.input_ids, batch.targets, batch.cu_seqlens, batch.num_targets, shape.temperature
        )
        values += per_answer(log_probs, batch.targets, part)
    return values


def per_answer(values: torch.Tensor, targets: torch.Tensor, answers: Sequence[Answer]) -> list[np.ndarray]:
    """float32 `values` [1, T] at the targets of packed `answers`, one array per answer."""
    picked = values.flatten()[targets.flatten() != -100].float().cpu().numpy()
    return np.split(picked, np.cumsum([a.written for a in answers])[:-1])


def chunks(answers: Sequence[Answer]) -> list[list[Answer]]:
    """`answers` in order, in lists of about _TOKENS tokens."""
    lists: list[list[Answer]] = []
    room = 0
    for a in answers:
        size = len(a.prompt_ids) + len(a.ids)
        if size > room:
            lists.append([])
            room = _TOKENS
        lists[-1].append(a)
        room -= size
    return lists


def _with_differences(answers: list[Answer]) -> list[Answer]:
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
