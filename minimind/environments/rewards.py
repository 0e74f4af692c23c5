"""What a conversation with tools is worth: its answer, its calls, and that none was needless. Each lies in 0..1.

answer     the final answer is right: it holds the reference; of a row with "gt", as upstream's agent_rl.jsonl has
           them, the share of these values that it holds
calls      the share of its calls that are well-formed, of a tool on offer, with arguments that fit the schema; 0
           where none was made and one is needed
frugal     of right answers, the calls that are needed over those that were made
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
_BESIDE = 80  # characters that an answer may have beside a reference that is no number: it is not to list them all


@dataclass(frozen=True)
class EpisodeSample(Sample):
    """A prompt and a conversation that followed; text: its final answer."""

    episode: Episode | None = None

    @property
    def conversation(self) -> Episode:
        assert self.episode is not None
        return self.episode


def agent_rewards(weights: dict[str, float]) -> list[RewardTerm]:
    return [RewardTerm(name, weight, _REWARDS[name], (0.0, 1.0), name) for name, weight in weights.items()]


def needed_calls(sample: Sample) -> int:
    """Calls that the answer takes: the row's "calls", else as many as it has values in "gt"."""
    said = sample.metadata.get("calls", len(_expected(sample)))
    return said if isinstance(said, int) else 0


def rightness(sample: Sample) -> float:
    """Of the final answer. ValueError where the row has neither a reference nor "gt"."""
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
    found = sample.metadata.get("gt") or []
    return found if isinstance(found, list) else [found]


def _is_answer(text: str, reference: str) -> bool:
    """The last number of `text` is the reference, where that is one; else `text` holds it and little beside."""
    number = _number(reference)
    if number is not None:
        return last_number(text) == number
    return len(text) <= len(reference) + _BESIDE and reference.strip().casefold() in text.casefold()


def _holds(text: str, value: Any) -> bool:
    """The text, or one of its numbers, is the value."""
    wanted = str(value).strip()
    if not wanted:
        return False
    number = _number(wanted)
    words = text.replace(",", "").split() if number is not None else []
    return wanted.casefold() in text.casefold() or any(last_number(word) == number for word in words)


def _number(text: str) -> Fraction | None:
    """Where a text is a number and nothing else."""
    try:
        return Fraction(text.strip().replace(",", ""))
    except (ValueError, ZeroDivisionError):
        return None
