"""Rewards that look at the form of an answer: how it is built, how long it is, whether it repeats itself.

Every one lies in 0..1, 1 being right, except `overlong`, a penalty from -1 to 0.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np

from minimind.rewards.base import Reward, Sample
from minimind.tokenization.reasoning import parse_answer, parse_reply

_MARKERS = {"think": ("<think>", "</think>"), "answer": ("<think>", "</think>", "<answer>", "</answer>")}


def each(judge: Callable[[Sample], float]) -> Reward:
    """The reward that judges samples one by one."""

    def reward(samples: Sequence[Sample]) -> np.ndarray:
        return np.array([judge(sample) for sample in samples], np.float64)

    return reward


def format_reward(kind: str = "think") -> Reward:
    """1 for a reply of the right form, neither part being empty; else half the share of its markers that stand there
    exactly once, which leads a model that knows none of them to the form.

    think: <think>reasoning</think> and then the answer. answer: that in <answer>...</answer>. Where the prompt asked
    for no reasoning, 1 for an answer without any marker, else 0.
    """
    if kind not in _MARKERS:
        raise ValueError(f"format={kind}: choose think or answer")
    markers = _MARKERS[kind]

    def judge(sample: Sample) -> float:
        if sample.thinking is False:
            plain = parse_answer(sample.text)
            return float(plain is not None and plain.answer != "")
        reply = parse_reply(sample.text)
        wrapped = kind == "think" or sample.text.rstrip().endswith("</answer>")
        if reply is not None and reply.reasoning and reply.answer and wrapped:
            return 1.0
        return 0.5 * sum(sample.text.count(marker) == 1 for marker in markers) / len(markers)

    return each(judge)


@dataclass(frozen=True)
class Range:
    """Whole numbers low..high, as in "20..200"; "..200" begins with 0."""

    low: int
    high: int

    @staticmethod
    def parse(name: str, text: str) -> Range:
        found = re.fullmatch(r"(\d*)\.\.(\d+)", text)
        if found is None or int(found[1] or 0) >= int(found[2]):
            raise ValueError(f"{name}={text}: write LOW..HIGH with numbers of tokens, such as {name}=20..200")
        return Range(int(found[1] or 0), int(found[2]))


def length_reward(bounds: str) -> Reward:
    """1 for answers of LOW..HIGH tokens; a shorter one has its share of LOW, and beyond HIGH the reward falls in a line
    to 0 at twice HIGH."""
    limits = Range.parse("length", bounds)

    def judge(sample: Sample) -> float:
        tokens = len(sample.token_ids)
        if tokens < limits.low:
            return tokens / limits.low
        return float(np.clip(2 - tokens / limits.high, 0, 1))

    return each(judge)


def overlong_penalty(bounds: str) -> Reward:
    """0 up to LOW tokens, from there in a line to -1 at HIGH, -1 beyond: DAPO's soft punishment of long answers
    (2503.14476), LOW..HIGH being its cache."""
    limits = Range.parse("overlong", bounds)
    room = limits.high - limits.low
    return each(lambda sample: float(np.clip((limits.low - len(sample.token_ids)) / room, -1, 0)))


def repetition_reward(size: str = "3") -> Reward:
    """The share of different n-grams of tokens among all of an answer's: 1 where none repeats, as in answers shorter
    than n."""
    if not size.isdigit() or int(size) < 1:
        raise ValueError(f"repetition={size}: the length of the n-grams, a whole number above 0")
    n = int(size)

    def judge(sample: Sample) -> float:
        ids = tuple(sample.token_ids)
        grams = [ids[i : i + n] for i in range(len(ids) - n + 1)]
        return len(set(grams)) / len(grams) if grams else 1.0

    return each(judge)


def regex_reward(pattern: str) -> Reward:
    """1 where Python's regular expression is found anywhere in the answer ($ and . as without flags), else 0."""
    try:
        compiled = re.compile(pattern)
    except re.error as error:
        raise ValueError(f"regex={pattern}: not a regular expression ({error})") from None
    return each(lambda sample: float(compiled.search(sample.text) is not None))
