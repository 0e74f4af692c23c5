"""Mix several parts of training data, each with a weight that may change over the run.

    --data a.jsonl:2 b.jsonl:1              two rows of a.jsonl for one of b.jsonl
    --data web.jsonl books.jsonl:0..3       the weight of books rises from 0 at the first step to 3 at the last
    --data web.jsonl maths.jsonl:0@0.8..2   maths only in the last fifth of the run, rising to twice the web's rows

A weight is a number, or several points NUMBER[@SHARE] joined by "..". SHARE is a share of the run from 0 to 1; it
defaults to 0 for the first point and to 1 for the last. The weight is linear between points and constant outside them.
Each next row comes from the part that lags most behind its share, so that any stretch of rows has the right shares to
within one row, for any number of processes.
"""

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

_NUMBER = r"\d+(?:\.\d+)?(?:@\d+(?:\.\d+)?)?"
_WEIGHTED = re.compile(rf"(.+):({_NUMBER}(?:\.\.{_NUMBER})*)")


@dataclass(frozen=True)
class Weight:
    """A piecewise linear weight: shares of the run, ascending, and the value at each."""

    shares: tuple[float, ...] = (0.0,)
    values: tuple[float, ...] = (1.0,)

    def at(self, share: float) -> float:
        """The weight at `share` of the run."""
        return float(np.interp(share, self.shares, self.values))


@dataclass(frozen=True)
class MixtureEntry:
    """An entry of --data: a path, and its weight or None."""

    path: str
    weight: Weight | None = None


def parse_part(entry: str) -> MixtureEntry:
    """Parse PATH or PATH:WEIGHT. Raises ValueError if the shares of the run do not ascend from 0 to 1."""
    match = _WEIGHTED.fullmatch(entry)
    if match is None or Path(entry).expanduser().exists():
        return MixtureEntry(entry)
    points = [point.partition("@") for point in match[2].split("..")]
    shares = [
        float(at) if at else 0.0 if i == 0 else 1.0 if i == len(points) - 1 else math.nan
        for i, (_, _, at) in enumerate(points)
    ]
    if any(math.isnan(share) for share in shares):
        raise ValueError(
            f"--data {entry}: a weight between the first and the last needs its share of the run, such as 1@0.5"
        )
    if shares != sorted(set(shares)) or shares[-1] > 1:
        raise ValueError(f"--data {entry}: shares of the run must ascend from 0 to 1")
    return MixtureEntry(match[1], Weight(tuple(shares), tuple(float(value) for value, _, _ in points)))


@dataclass(frozen=True)
class Mixture:
    """The parts of a corpus: the name, the weight and the documents first..stop of each."""

    names: tuple[str, ...]
    weights: tuple[Weight, ...]
    ranges: tuple[tuple[int, int], ...]

    def __post_init__(self) -> None:
        for name, (first, stop) in zip(self.names, self.ranges, strict=True):
            if first == stop:
                raise ValueError(f"--data {name}: none of its documents is left to train on; remove this entry")
        for share in sorted({share for weight in self.weights for share in (0.0, *weight.shares, 1.0)}):
            if not any(weight.at(share) for weight in self.weights):
                raise ValueError(f"--data: at {share:g} of the run every weight is 0; give one part a positive weight")

    def shares(self, share: float) -> np.ndarray:
        """float64 [parts]: each part's share of the rows at `share` of the run; the sum is 1."""
        weights = np.array([weight.at(share) for weight in self.weights])
        return weights / weights.sum()

    def mean_shares(self) -> np.ndarray:
        """float64 [parts]: each part's share of the rows of the whole run."""
        return np.mean([self.shares((i + 0.5) / 1000) for i in range(1000)], 0)

    def key(self) -> list[object]:
        """Everything that determines the order of rows, as plain values."""
        return [[list(part) for part in self.ranges], [[list(w.shares), list(w.values)] for w in self.weights]]


@dataclass
class PartSampler:
    """Chooses the part of each next row: the one that lags most behind its share. horizon: rows of the whole run."""

    mixture: Mixture
    horizon: int = 0
    taken: int = 0
    owed: list[float] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.owed = self.owed or [0.0] * len(self.mixture.names)

    def rows(self, count: int) -> list[int]:
        """The number of rows of each part among the next `count` rows."""
        drawn = [0] * len(self.owed)
        for _ in range(count):
            share = self.taken / self.horizon if self.horizon else 0.0
            self.owed = [o + s for o, s in zip(self.owed, self.mixture.shares(share).tolist(), strict=True)]
            part = max(range(len(drawn)), key=self.owed.__getitem__)
            self.owed[part] -= 1
            drawn[part] += 1
            self.taken += 1
        return drawn


def describe_mixture(mixture: Mixture, sizes: Sequence[int], tokens: float) -> str:
    """One line: each part's share of the rows, and the epochs of its `sizes` tokens in a run of `tokens`."""
    parts = [
        f"{name} {share:.0%} of the rows ({share * tokens / max(1, size):.2g} passes)"
        for name, share, size in zip(mixture.names, mixture.mean_shares(), sizes, strict=True)
    ]
    return "mixture: " + ", ".join(parts)
