"""Samples for tests of rewards."""

from __future__ import annotations

from typing import Any

from minimind.rewards import Sample


def sample(text: str, reference: str | None = None, tokens: int | list[int] = 0, **changes: Any) -> Sample:
    ids = list(range(tokens)) if isinstance(tokens, int) else tokens
    prompt = changes.pop("prompt", [{"role": "user", "content": "?"}])
    return Sample(prompt, text, ids, reference=reference, **changes)


def boom(samples: list[Sample]) -> list[float]:
    """A custom reward that fails on some samples."""
    if any("bad" in sample.text for sample in samples):
        raise KeyError("bad\nin two lines")
    return [float(len(sample.text)) for sample in samples]


def unwell(samples: list[Sample]) -> list[float]:
    """A reward that returns values that are not finite."""
    return [float("inf") if "bad" in sample.text else 1.0 for sample in samples]


def short(samples: list[Sample]) -> list[float]:
    """A reward that returns too few numbers; tests replace it."""
    return [1.0] * (len(samples) - 1)


not_a_function = 3
