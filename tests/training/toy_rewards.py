"""User-defined rewards for --reward function=tests.training.toy_rewards:NAME."""

from __future__ import annotations

from collections.abc import Sequence

from minimind.rewards import Sample


def vowels(samples: Sequence[Sample]) -> list[float]:
    """A tenth of the number of vowels, which differs between the answers of a random model."""
    return [sum(letter in "aeiou" for letter in sample.text) / 10 for sample in samples]


def no_z(samples: Sequence[Sample]) -> list[float]:
    """As vowels, but raises if an answer has a z."""
    if any("z" in sample.text for sample in samples):
        raise RuntimeError("an answer holds a z")
    return vowels(samples)


def always_raises(samples: Sequence[Sample]) -> list[float]:
    raise RuntimeError("out of order")


def one_for_all(samples: Sequence[Sample]) -> list[float]:
    return [1.0]


def all_equal(samples: Sequence[Sample]) -> list[float]:
    return [0.5] * len(samples)


def one(samples: Sequence[Sample]) -> list[float]:
    """1 for every answer, so that there is nothing to learn."""
    return [1.0] * len(samples)


def longer(samples: Sequence[Sample]) -> list[float]:
    """1 + tokens / 256."""
    return [1 + 0.5 * len(sample.token_ids) / 128 for sample in samples]
