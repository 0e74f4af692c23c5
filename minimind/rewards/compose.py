"""Several rewards as one: a weighted sum whose parts are kept, and what becomes of samples that one cannot judge."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minimind.rewards.base import Reward, Sample
from minimind.rewards.functions import function_reward, numbers_of
from minimind.rewards.rules import format_reward, length_reward, overlong_penalty, regex_reward, repetition_reward
from minimind.rewards.verifiers import exact_reward, json_reward, number_reward, tools_reward

# Rewards that need no model, and what stands behind "=": how each is made.
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
# The lowest and the highest value of each; what is not here may say anything.
BOUNDS: dict[str, tuple[float, float]] = {"overlong": (-1.0, 0.0)} | dict.fromkeys(
    ("format", "length", "repetition", "regex", "number", "exact", "json", "tools"), (0.0, 1.0)
)
MODELS = ("model", "answer_model")  # loaded by minimind.rewards.model
NEED_ARGUMENT = {"length": "20..200", "overlong": "200..256", "regex": "PATTERN", "model": "FOLDER",
                 "answer_model": "FOLDER", "function": "package.module:function"}  # fmt: skip
NO_ARGUMENT = {"number", "exact", "tools"}


class RewardError(ValueError):
    """A reward failed, and the run was told to stop where one does; or it returned what are no rewards."""


@dataclass(frozen=True)
class Spec:
    """What one word of --reward says: name[=argument][:weight]."""

    name: str
    argument: str | None
    weight: float

    @staticmethod
    def parse(text: str) -> Spec:
        """The weight is what follows the last colon, if that is a number, else 1. A ValueError says what is wrong."""
        head, colon, tail = text.rpartition(":")
        weight = _number(tail) if colon else None
        if weight is None:
            head, weight = text, 1.0
        name, equals, argument = head.partition("=")
        known = [*MAKERS, *MODELS]
        if name not in known:
            raise ValueError(f"--reward {text}: there is no reward {name!r}; choose from {', '.join(known)}")
        if not argument and (equals or name in NEED_ARGUMENT):
            raise ValueError(f"--reward {text}: write {name}={NEED_ARGUMENT.get(name, 'ARGUMENT')}:WEIGHT")
        if equals and name in NO_ARGUMENT:
            raise ValueError(f"--reward {text}: {name} takes no argument; write {name}:WEIGHT")
        if not math.isfinite(weight) or weight == 0:
            raise ValueError(f"--reward {text}: the weight must be a finite number other than 0")
        return Spec(name, argument if equals else None, weight)

    def make(self) -> Reward:
        """The reward; of a model, minimind.rewards.model makes it."""
        try:
            return MAKERS[self.name](*([] if self.argument is None else [self.argument]))
        except ValueError as error:
            raise ValueError(f"--reward {error}") from None


@dataclass(frozen=True)
class RewardTerm:
    """name: the reward's, numbered where there are several of it; bounds: between which it lies, None: unknown; word:
    what it was asked for by, weight left out."""

    name: str
    weight: float
    reward: Reward
    bounds: tuple[float, float] | None = None
    word: str = ""


@dataclass(frozen=True)
class Failures:
    """Samples that a reward could not judge: how many, and what the first was about."""

    count: int
    first: str


@dataclass(frozen=True)
class Scores:
    """total float64 [n], the weighted sum, NaN where a sample is to be left out; parts: each reward by its name,
    unweighted, NaN where it failed; failures: of the rewards that failed, by name."""

    total: np.ndarray
    parts: dict[str, np.ndarray]
    failures: dict[str, Failures]

    @property
    def kept(self) -> np.ndarray:
        """bool [n]: the samples that have a reward."""
        return ~np.isnan(self.total)


@dataclass
class Rewards:
    """Called with samples, it gives their Scores. A reward fails on a sample where it raises or says NaN, an infinity
    or None; one that raises for a batch is asked again for every sample alone. Anything but as many numbers as samples
    is a RewardError: the function is wrong, not a sample.

    on_error: "stop" raises RewardError; "drop" leaves the sample out; a number is taken for what the reward did not
    say. failed: how often each reward has failed since the start.
    """

    parts: Sequence[RewardTerm]
    on_error: str = "drop"
    failed: Counter[str] = field(default_factory=Counter)

    def __post_init__(self) -> None:
        if self.on_error not in ("stop", "drop") and _number(self.on_error) is None:
            raise ValueError(
                f"--on-reward-error {self.on_error}: stop, drop (leave the sample out) or a number to take instead"
            )
        if not self.parts:
            raise ValueError("--reward: name at least one, such as number:1 format:0.5")

    def __call__(self, samples: Sequence[Sample]) -> Scores:
        total, parts, failures = np.zeros(len(samples)), {}, {}
        for part in self.parts:
            values, reason = _judge(part, samples)
            missing = np.isnan(values)
            if missing.any():
                failures[part.name] = self._failed(part.name, int(missing.sum()), reason)
            parts[part.name] = values
            total += part.weight * np.where(missing, self._instead, values)
        return Scores(total, parts, failures)

    def __str__(self) -> str:
        return " + ".join(f"{part.weight:g} {part.name}" for part in self.parts)

    @property
    def bounds(self) -> tuple[float, float] | None:
        """The lowest and the highest sum there can be, weights included; None where a part may say anything."""
        low = high = 0.0
        for part in self.parts:
            if part.bounds is None:
                return None
            said = part.bounds if math.isnan(self._instead) else (*part.bounds, self._instead)
            low += min(part.weight * value for value in said)
            high += max(part.weight * value for value in said)
        return low, high

    @property
    def _instead(self) -> float:
        number = _number(self.on_error)
        return math.nan if number is None else number

    def _failed(self, name: str, count: int, reason: str) -> Failures:
        self.failed[name] += count
        if self.on_error == "stop":
            raise RewardError(
                f"reward {name} failed on {count} samples: {reason}. Mend it, or go on with --on-reward-error drop"
            )
        return Failures(count, reason)


def name_parts(made: Sequence[tuple[Spec, Reward]]) -> list[RewardTerm]:
    """Parts with different names: the second `regex` is regex-2."""
    seen: Counter[str] = Counter()
    parts = []
    for spec, reward in made:
        seen[spec.name] += 1
        number = seen[spec.name]
        name = spec.name if number == 1 else f"{spec.name}-{number}"
        word = spec.name if spec.argument is None else f"{spec.name}={spec.argument}"
        parts.append(RewardTerm(name, spec.weight, reward, BOUNDS.get(spec.name), word))
    return parts


def _judge(part: RewardTerm, samples: Sequence[Sample]) -> tuple[np.ndarray, str]:
    """(float64 [n], NaN where the reward failed; why it first did)."""
    if not samples:
        return np.zeros(0), ""
    try:
        said: Any = part.reward(samples)
    except Exception as error:  # a reward may be anybody's code
        if len(samples) == 1:
            return np.full(1, math.nan), _reason(error)
        alone = [_judge(part, [sample]) for sample in samples]
        return np.concatenate([value for value, _ in alone]), next((why for _, why in alone if why), "")
    try:
        values = numbers_of(said, len(samples))
    except ValueError as wrong:
        raise RewardError(f"--reward {part.word or part.name} {wrong}") from None
    finite = np.isfinite(values)
    return np.where(finite, values, math.nan), "" if finite.all() else f"it gave {values[~finite][0]}"


def _reason(error: Exception) -> str:
    """One line; a ValueError of ours says enough without its name."""
    text = str(error) if type(error) is ValueError else f"{type(error).__name__}: {error}"
    return (text.splitlines() or [type(error).__name__])[0]


def _number(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:
        return None
