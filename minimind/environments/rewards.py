"""Rewards of a conversation with tools, each from 0 to 1.

answer     1 if the final answer matches the reference, else 0; for rows with a list "gt", as in upstream's
           agent_rl.jsonl, the share of these values that the final answer contains
calls      the share of calls that are well-formed, name a tool on offer and have arguments that fit the schema;
           without any call, 1 if none is needed, else 0
frugal     the answer reward, times needed calls / calls made if more were made than needed
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import Any

import numpy as np

from minimind.environments.episodes import Episode
from minimind.rewards import Reward, RewardTerm, Sample
from minimind.rewards.rules import last_number

WEIGHTS = {"answer": 1.0, "calls": 0.2, "frugal": 0.1}
_MAX_EXTRA = 80  # characters besides a reference that is not a number; an answer must not list all candidates


@dataclass(frozen=True)
class EpisodeSample(Sample):
    """A prompt and the conversation that continues it; text: the final answer."""

    episode: Episode | None = None

    @property
    def conversation(self) -> Episode:
        assert self.episode is not None
        return self.episode


def agent_rewards(weights: dict[str, float]) -> list[RewardTerm]:
    return [RewardTerm(name, weight, _REWARDS[name], (0.0, 1.0), name) for name, weight in weights.items()]


def needed_calls(sample: Sample) -> int:
    """Number of calls that the task needs: the row's "calls", else the number of its values in "gt"."""
    count = sample.metadata.get("calls", len(_expected(sample)))
    return count if isinstance(count, int) else 0


def rightness(sample: Sample) -> float:
    """The answer reward. Raises ValueError if the row has neither a reference nor "gt"."""
    expected = _expected(sample)
    if expected:
        return sum(_holds(sample.text, value) for value in expected) / len(expected)
    if sample.reference is None:
        raise ValueError('the prompt has neither a reference answer nor a list "gt" to check against')
    return float(_is_answer(sample.text, sample.reference))


def _answers(samples: Sequence[Sample]) -> np.ndarray:
    def judge(sample: Sample) -> float:
        try:
            return rightness(sample)
        except ValueError:
            return math.nan

    return np.array([judge(sample) for sample in samples])


def _calls(samples: Sequence[Sample]) -> np.ndarray:
    def judge(sample: Sample) -> float:
        calls = _episode(sample).calls
        if not calls:
            return float(needed_calls(sample) == 0)
        return sum(call.problem is None for call in calls) / len(calls)

    return np.array([judge(sample) for sample in samples])


def _frugal(samples: Sequence[Sample]) -> np.ndarray:
    def judge(sample: Sample) -> float:
        needed, made = needed_calls(sample), len(_episode(sample).calls)
        return needed / made if made > needed else 1.0

    return _answers(samples) * np.array([judge(sample) for sample in samples])


_REWARDS: dict[str, Reward] = {"answer": _answers, "calls": _calls, "frugal": _frugal}


def _episode(sample: Sample) -> Episode:
    assert isinstance(sample, EpisodeSample)
    return sample.conversation


def _expected(sample: Sample) -> list[Any]:
    values = sample.metadata.get("gt") or []
    return values if isinstance(values, list) else [values]


def _is_answer(text: str, reference: str) -> bool:
    """Whether the last number of `text` equals a numeric reference, or `text` contains another one and little else."""
    number = _number(reference)
    if number is not None:
        return last_number(text) == number
    return len(text) <= len(reference) + _MAX_EXTRA and reference.strip().casefold() in text.casefold()


def _holds(text: str, value: Any) -> bool:
    """Whether `text` contains the value, or a number equal to it."""
    expected = str(value).strip()
    if not expected:
        return False
    number = _number(expected)
    words = text.replace(",", "").split() if number is not None else []
    return expected.casefold() in text.casefold() or any(last_number(word) == number for word in words)


def _number(text: str) -> Fraction | None:
    """The value of a text that is a number and nothing else, else None."""
    try:
        return Fraction(text.strip().replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None
