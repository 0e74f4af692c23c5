"""Rewards of one's own, as --reward function=tests.training.toy_rewards:NAME finds them."""

from __future__ import annotations

from collections.abc import Sequence

from minimind.rewards import Sample


def vowels(samples: Sequence[Sample]) -> list[float]:
    """Something that answers of random weights differ in."""
    return [sum(letter in "aeiou" for letter in sample.text) / 10 for sample in samples]


def no_z(samples: Sequence[Sample]) -> list[float]:
    """Raises where an answer holds a z."""
    if any("z" in sample.text for sample in samples):
        raise RuntimeError("an answer holds a z")
    return vowels(samples)


def always_raises(samples: Sequence[Sample]) -> list[float]:
    raise RuntimeError("out of order")


def all_equal(samples: Sequence[Sample]) -> list[float]:
    return [0.5] * len(samples)
