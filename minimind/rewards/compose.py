"""A weighted sum of rewards: parsing the words of --reward, evaluating each part, and handling parts that fail.

Then its use: figures for metrics.jsonl, a warning when rewards teach nothing, clipping and normalisation.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from numbers import Real
from typing import Any

import numpy as np

from minimind.rewards.rules import (
    Reward,
    Sample,
    exact_reward,
    format_reward,
    json_reward,
    length_reward,
    number_reward,
    overlong_penalty,
    regex_reward,
    repetition_reward,
    tools_reward,
)
from minimind.utils.startup import named_object


def function_reward(path: str) -> Reward:
    """Import the function at "package.module:function", from the working directory or Python's path.

    It takes a list of `Sample`s and returns one number for each. ValueError if there is no such function."""
    function = named_object(path, "function", "function=")
    if not callable(function):
        module, _, name = path.partition(":")
        raise ValueError(f"function={path}: {module} has no function {name!r}")
    return function


def as_numbers(returned: Any, count: int) -> np.ndarray:
    """Convert what a reward returned for `count` samples to float64 [count], with None as NaN and True as 1.

    returned: a list, tuple, or one-dimensional array or tensor of numbers. ValueError for anything else; its message
    continues a sentence that begins with the reward's name.
    """
    values = returned.tolist() if hasattr(returned, "tolist") else returned
    if not isinstance(values, list | tuple):
        raise ValueError(_returned(f"{_shown(returned)}, no list,", count))
    if len(values) != count:
        raise ValueError(_returned(f"{len(values)} value{'' if len(values) == 1 else 's'}", count))
    return np.array([_as_number(value, count) for value in values])


def _as_number(value: Any, count: int) -> float:
    value = value.item() if hasattr(value, "item") and getattr(value, "ndim", None) == 0 else value
    if value is None:
        return float("nan")
    try:
        if isinstance(value, Real):
            return float(value)
    except OverflowError:
        pass
    raise ValueError(_returned(f"{_shown(value)}, no number,", count))


def _returned(what: str, count: int) -> str:
    expected = "a list of one number" if count == 1 else f"a list of {count} numbers, one for each"
    return f"returned {what} for {count} sample{'' if count == 1 else 's'}: it must return {expected}"


def _shown(value: Any) -> str:
    """A value's type and the beginning of its repr, in one line."""
    try:
        text = " ".join(repr(value).split())
    except Exception:  # a user's __repr__ may raise anything
        text = "that cannot be shown"
    kind = "" if value is None else f"{type(value).__name__} "
    return f"{kind}{text if len(text) <= 40 else f'{text[:40]}...'}"


# Rewards that need no model: each maker takes the text after "=", if there is one.
MAKERS: dict[str, Callable[..., Reward]] = {
    "format": format_reward,
    "length": length_reward,
    "overlong": overlong_penalty,
    "repetition": repetition_reward,
    "regex": regex_reward,
    "number": number_reward,
    "exact": exact_reward,
    "json": json_reward,
    "tools": tools_reward,
    "function": function_reward,
}
# The range of each reward; others are unbounded.
BOUNDS: dict[str, tuple[float, float]] = {"overlong": (-1.0, 0.0)} | dict.fromkeys(
    ("format", "length", "repetition", "regex", "number", "exact", "json", "tools"), (0.0, 1.0)
)
MODELS = ("model", "answer_model")  # loaded by minimind.rewards.model
NEED_ARGUMENT = {"length": "20..200", "overlong": "200..256", "regex": "PATTERN", "model": "FOLDER",
                 "answer_model": "FOLDER", "function": "package.module:function"}  # fmt: skip
NO_ARGUMENT = {"number", "exact", "tools"}


class RewardError(ValueError):
    """A reward failed and --on-reward-error is stop, or a function did not return one number per sample."""


@dataclass(frozen=True)
class Spec:
    """One parsed word of --reward: name[=argument][:weight]."""

    name: str
    argument: str | None
    weight: float

    @staticmethod
    def parse(text: str) -> Spec:
        """The text after the last colon is the weight if it is a number; else the weight is 1. ValueError for bad
        words."""
        head, colon, tail = text.rpartition(":")
        weight = _number(tail) if colon else None
        if weight is None:
            head, weight = text, 1.0
        name, equals, argument = head.partition("=")
        names = [*MAKERS, *MODELS]
        if name not in names:
            raise ValueError(f"--reward {text}: there is no reward {name!r}; choose from {', '.join(names)}")
        if not argument and (equals or name in NEED_ARGUMENT):
            raise ValueError(f"--reward {text}: write {name}={NEED_ARGUMENT.get(name, 'ARGUMENT')}:WEIGHT")
        if equals and name in NO_ARGUMENT:
            raise ValueError(f"--reward {text}: {name} takes no argument; write {name}:WEIGHT")
        if not math.isfinite(weight) or weight == 0:
            raise ValueError(f"--reward {text}: the weight must be a finite number other than 0")
        return Spec(name, argument if equals else None, weight)

    def make(self) -> Reward:
        """Make the reward of a word that needs no model."""
        try:
            return MAKERS[self.name](*([] if self.argument is None else [self.argument]))
        except ValueError as error:
            raise ValueError(f"--reward {error}") from None


@dataclass(frozen=True)
class RewardTerm:
    """One part of the sum. name: unique among the parts; bounds: the range of the reward, None if unknown; word: its
    word of --reward without the weight."""

    name: str
    weight: float
    reward: Reward
    bounds: tuple[float, float] | None = None
    word: str = ""


@dataclass(frozen=True)
class Failures:
    """How many samples a reward failed on, and the first reason."""

    count: int
    first: str


@dataclass(frozen=True)
class Scores:
    """total: float64 [n], the weighted sum, NaN for samples to leave out. parts: the unweighted rewards by name, NaN
    where a reward failed. failures: by the name of the reward."""

    total: np.ndarray
    parts: dict[str, np.ndarray]
    failures: dict[str, Failures]

    @property
    def kept(self) -> np.ndarray:
        """bool [n], True for samples that have a reward."""
        return ~np.isnan(self.total)


@dataclass
class Rewards:
    """A weighted sum of rewards: call it with samples to get their Scores.

    A reward fails on a sample if it raises or returns NaN, an infinity or None. If it raises for a batch, it is called
    again for each sample alone. If it does not return one number per sample, the function itself is wrong: RewardError.

    on_error: "stop" raises RewardError; "drop" leaves the sample out; a number replaces the missing reward. failed:
    number of failures of each reward since the start.
    """

    parts: Sequence[RewardTerm]
    on_error: str = "drop"
    failed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.on_error not in ("stop", "drop") and _number(self.on_error) is None:
            raise ValueError(f"--on-reward-error {self.on_error}: choose stop, drop or a number to use instead")
        if not self.parts:
            raise ValueError("--reward: name at least one, such as number:1 format:0.5")

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        total, parts, failures = np.zeros(len(samples)), {}, {}
        for part in self.parts:
            values, reason = _evaluate(part, samples)
            missing = np.isnan(values)
            if missing.any():
                failures[part.name] = self._record_failure(part.name, int(missing.sum()), reason)
            parts[part.name] = values
            total += part.weight * np.where(missing, self._replacement, values)
        return Scores(total, parts, failures)

    def __str__(self) -> str:
        return " + ".join(f"{part.weight:g} {part.name}" for part in self.parts)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The range of the weighted sum; None if a part is unbounded."""
        low = high = 0.0
        for part in self.parts:
            if part.bounds is None:
                return None
            extremes = part.bounds if math.isnan(self._replacement) else (*part.bounds, self._replacement)
            low += min(part.weight * value for value in extremes)
            high += max(part.weight * value for value in extremes)
        return low, high

    @property
    def _replacement(self) -> float:
        """The value of a reward that failed."""
        number = _number(self.on_error)
        return math.nan if number is None else number

    def _record_failure(self, name: str, count: int, reason: str) -> Failures:
        self.failed[name] += count
        if self.on_error == "stop":
            raise RewardError(
                f"reward {name} failed on {count} samples: {reason}. Fix it, or go on with --on-reward-error drop"
            )
        return Failures(count, reason)


def make_terms(rewards: Sequence[tuple[Spec, Reward]]) -> list[RewardTerm]:
    """Give each reward a unique name: the second `regex` becomes regex-2."""
    seen: Counter[str] = Counter()
    parts = []
    for spec, reward in rewards:
        seen[spec.name] += 1
        number = seen[spec.name]
        name = spec.name if number == 1 else f"{spec.name}-{number}"
        word = spec.name if spec.argument is None else f"{spec.name}={spec.argument}"
        parts.append(RewardTerm(name, spec.weight, reward, BOUNDS.get(spec.name), word))
    return parts


def _evaluate(part: RewardTerm, samples: Sequence[Sample]) -> tuple[np.ndarray, str]:
    """(float64 [n], NaN where the reward failed; the first reason)."""
    if not samples:
        return np.zeros(0), ""
    try:
        returned: Any = part.reward(samples)
    except Exception as error:  # a reward may be any code
        if len(samples) == 1:
            return np.full(1, math.nan), _reason(error)
        single = [_evaluate(part, [sample]) for sample in samples]
        return np.concatenate([value for value, _ in single]), next((reason for _, reason in single if reason), "")
    try:
        values = as_numbers(returned, len(samples))
    except ValueError as error:
        raise RewardError(f"--reward {part.word or part.name} {error}") from None
    finite = np.isfinite(values)
    return np.where(finite, values, math.nan), "" if finite.all() else f"it gave {values[~finite][0]}"


def _reason(error: Exception) -> str:
    """The error in one line. A ValueError's message is shown without the type."""
    text = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    return (text.splitlines() or [type(error).__name__])[0]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None


def degenerate(total: np.ndarray, groups: np.ndarray) -> np.ndarray:
    """Whether all rewards of a group are equal, or fewer than two: bool, one per group in ascending order. Samples left
    out (NaN) do not count."""
    kept = ~np.isnan(total)
    equal = []
    for group in np.unique(groups):
        rewards = total[kept & (groups == group)]
        equal.append(len(rewards) < 2 or rewards.min() == rewards.max())
    return np.array(equal, bool)


def summary(scores: Scores, groups: np.ndarray | None = None) -> dict[str, float]:
    """Figures for metrics.jsonl: reward and reward_std over samples; reward_NAME, the unweighted mean of each part;
    reward_failed_NAME, the number of samples it failed on, if any; reward_dropped, the number of samples left out; and
    degenerate_groups, the share of groups that are degenerate. Means over no samples are omitted."""
    kept = scores.total[scores.kept]
    figures: dict[str, float] = {}
    if len(kept):
        figures |= {"reward": float(kept.mean()), "reward_std": float(kept.std())}
    for name, values in scores.parts.items():
        judged = values[~np.isnan(values)]
        if len(judged):
            figures[f"reward_{name}"] = float(judged.mean())
        if len(judged) < len(values):
            figures[f"reward_failed_{name}"] = float(len(values) - len(judged))
    figures["reward_dropped"] = float(len(scores.total) - len(kept))
    if groups is not None:
        figures["degenerate_groups"] = float(degenerate(scores.total, groups).mean())
    return figures


@dataclass
class SignalWatch:
    """Warns once when rewards that are compared with each other have been equal for `patience` steps in a row."""

    patience: int = 3
    silent: int = 0

    def see(self, scores: Scores, groups: np.ndarray | None = None) -> str | None:
        """Return a warning line, or None. groups: samples are compared within these; None: within the whole batch."""
        total = scores.total
        if len(total) == 0:
            return None
        equal = bool(degenerate(total, np.zeros(len(total), np.int64) if groups is None else groups).all())
        self.silent = self.silent + 1 if equal else 0
        if self.silent != self.patience:
            return None
        kept = total[scores.kept]
        if not len(kept):
            return f"warning: for {self.patience} steps no reward could judge a sample; there is nothing to learn from"
        compared = "all samples have the same reward" if groups is None else "in every group all rewards are equal"
        return (
            f"warning: for {self.patience} steps {compared} (now {kept.mean():.3g} on average): there is nothing to "
            "learn from; use easier or harder prompts, more samples or a higher temperature"
        )

    def state_dict(self) -> dict[str, int]:
        return {"silent": self.silent}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.silent = state["silent"]


_EPS = 1e-8  # added to a standard deviation


@dataclass
class RewardScale:
    """Clips rewards and normalises them by running statistics.

    clip: (lowest, highest) reward; None: no clipping. running: subtract the mean of all rewards so far, this batch
    included, and divide by their standard deviation (Welford 1962; Chan et al. 1983). count, mean and squares (the sum
    of squared distances from the mean) are the running state. ValueError for an empty clip range.
    """

    clip: tuple[float, float] | None = None
    running: bool = False
    count: int = 0
    mean: float = 0.0
    squares: float = 0.0

    def __post_init__(self) -> None:
        if self.clip is not None and not self.clip[0] < self.clip[1]:
            raise ValueError(f"--reward-clip {self.clip[0]:g} {self.clip[1]:g}: give the lower end first")

    @property
    def deviation(self) -> float:
        """Standard deviation of all rewards so far; 0 before there are any."""
        return math.sqrt(self.squares / self.count) if self.count else 0.0

    def __call__(self, rewards: np.ndarray) -> tuple[np.ndarray, dict[str, float]]:
        """float64 [n], without NaN -> (scaled rewards, figures): reward_clipped, the share that was clipped;
        reward_mean and reward_deviation, the running statistics."""
        figures: dict[str, float] = {}
        if self.clip is not None and len(rewards):
            clipped = np.clip(rewards, *self.clip)
            figures["reward_clipped"] = float((clipped != rewards).mean())
            rewards = clipped
        if not self.running or not len(rewards):
            return rewards, figures
        self._update(rewards)
        figures |= {"reward_mean": self.mean, "reward_deviation": self.deviation}
        return (rewards - self.mean) / (self.deviation + _EPS), figures

    def _update(self, rewards: np.ndarray) -> None:
        total = self.count + len(rewards)
        shift = float(rewards.mean()) - self.mean
        self.squares += float(np.square(rewards - rewards.mean()).sum())
        self.squares += shift * shift * self.count * len(rewards) / total
        self.mean += shift * len(rewards) / total
        self.count = total

    def state_dict(self) -> dict[str, Any]:
        return {"count": self.count, "mean": self.mean, "squares": self.squares}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.count, self.mean, self.squares = state["count"], state["mean"], state["squares"]
