"""Fit the best rate to held-out losses over rates, and a rule to best rates: c width^a depth^b steps^g batch^h, where g
may change with the width.

Logarithms have base 2, so that an error of 1 is a factor of two.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from bench.rates.runs import Point, TransferRow

Losses = Mapping[float, float]  # rate -> held-out loss, infinite if the run diverged
MAX_RATES = 9  # of a scan: a loss without a minimum within a factor of 2^8 has none
NOISE = 0.01  # standard deviation of a loss in nats, unless two seeds show it
REFERENCE = {"width": 256, "depth": 4, "steps": 50, "batch_tokens": 4096}
PRODUCT = "width*steps"  # the term by which the exponent of the steps changes when the width doubles
DRAWS = 400


@dataclass(frozen=True)
class Optimum:
    """The minimum of a scan's parabola. log_rate: its place, with the standard error; loss: at the minimum; curvature:
    the loss a factor of two away minus that at the minimum; rates: the number of fitted rates."""

    point: Point
    log_rate: float
    error: float
    loss: float
    curvature: float
    rates: int

    @property
    def rate(self) -> float:
        return 2.0**self.log_rate


@dataclass(frozen=True)
class Term:
    """A factor of a rule. exponent: by how many powers of two the best rate moves if `name` doubles; of PRODUCT, by how
    much the exponent of the steps grows if the width doubles."""

    name: str
    exponent: float
    error: float


@dataclass(frozen=True)
class Rule:
    """rate: at REFERENCE, the mean over corpora; error: in powers of two; terms: supported by the data; dropped: not
    supported, with the last estimate; spread: of the optima about the rule; points: the number of optima."""

    rate: float
    error: float
    terms: tuple[Term, ...]
    dropped: tuple[Term, ...]
    spread: float
    points: int

    def __call__(self, point: Point) -> float:
        exponents = {term.name: term.exponent for term in self.terms}
        return self.rate * 2 ** sum(e * _size(point, name) for name, e in exponents.items())


def by_point(rows: Sequence[TransferRow]) -> dict[Point, dict[float, float]]:
    """Scan -> rate -> held-out loss."""
    scans: dict[Point, dict[float, float]] = {}
    for row in rows:
        scans.setdefault(row.point, {})[row.rate] = row.loss
    return scans


def next_rate(losses: Losses, start: float) -> float | None:
    """The next rate to try on a grid of factors of two; None once the lowest loss has a higher one on either side."""
    if not losses:
        return start
    if len(losses) >= MAX_RATES:
        return None
    best = min(losses, key=losses.__getitem__)
    if math.isinf(losses[best]):
        return min(losses) / 2
    return next((rate for rate in (best * 2, best / 2) if _loss_at(losses, rate) is None), None)


def _loss_at(losses: Losses, rate: float) -> float | None:
    """The loss at this rate, up to rounding of the rate."""
    return next((loss for other, loss in losses.items() if math.isclose(other, rate, rel_tol=1e-3)), None)


def optimum(point: Point, losses: Losses, noise: float = NOISE, draws: int = DRAWS) -> Optimum | None:
    """The minimum of a parabola in log rate through the lowest loss, its neighbours, and up to two more losses that are
    not higher than these. None if the lowest has fewer than two neighbours. The error is that of draws with `noise` on
    every loss."""
    lowest = _lowest(losses)
    if lowest is None:
        return None
    x, y = np.log2(list(lowest)), np.array(list(lowest.values()))
    moved = y + np.random.default_rng(0).normal(0, noise, (draws, len(y)))
    curvature, vertex, height = (float(values[0]) for values in _parabolas(x, y[None]))
    error = float(np.std(_parabolas(x, moved)[1], ddof=1))
    return Optimum(point, vertex, error, height, curvature, len(x))


def _lowest(losses: Losses) -> dict[float, float] | None:
    finite = {rate: loss for rate, loss in sorted(losses.items()) if math.isfinite(loss)}
    rates = list(finite)
    if len(rates) < 3:
        return None
    best = rates.index(min(finite, key=finite.__getitem__))
    if best in (0, len(rates) - 1):
        return None
    near = rates[best - 1 : best + 2]
    edge = max(finite[rate] for rate in near)
    more = sorted((r for r in rates if r not in near and finite[r] <= edge), key=finite.__getitem__)[:2]
    return {rate: finite[rate] for rate in sorted([*near, *more])}


def _parabolas(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """x [rates], y [n, rates] -> (curvature, vertex, height) [n] of least squares parabolas. The vertex is kept within
    a factor of two of x; it is at the lowest y if noise has turned the parabola upside down."""
    middle = x.mean()
    powers = np.stack([(x - middle) ** 2, x - middle, np.ones_like(x)], axis=1)
    a, b, c = np.linalg.pinv(powers) @ y.T
    bent = a <= 0
    vertex = np.where(bent, x[y.argmin(1)] - middle, -b / (2 * np.where(bent, 1.0, a)))
    vertex = vertex.clip(x.min() - middle - 1, x.max() - middle + 1)
    return a, vertex + middle, c + b * vertex + a * vertex**2


def noise_of(rows: Sequence[TransferRow]) -> float | None:
    """Standard deviation of a loss between two seeds, without the offset that all rates of a seed share; None if no two
    seeds have three rates in common. Only rates within a factor of two of the best count."""
    scans = by_point(rows)
    squares, degrees = 0.0, 0
    for point, losses in scans.items():
        other = scans.get(replace(point, seed=1), {}) if point.seed != 1 else {}
        lowest = _lowest(losses) or {}
        gaps = [loss - o for rate, loss in lowest.items() if (o := _loss_at(other, rate)) is not None]
        if len(gaps) >= 3 and all(map(math.isfinite, gaps)):
            squares += float(np.var(gaps)) * len(gaps) / 2
            degrees += len(gaps) - 1
    return math.sqrt(squares / degrees) if degrees else None


def optima_of(rows: Sequence[TransferRow]) -> list[Optimum]:
    """The optima of all scans that have one."""
    noise = noise_of(rows) or NOISE
    optima = (optimum(point, losses, noise) for point, losses in by_point(rows).items())
    return [one for one in optima if one is not None]


def fit(optima: Sequence[Optimum]) -> Rule:
    """Least squares over the optima's logarithms. Terms less than two standard errors from 0 are dropped one after
    another, the least certain first; width and steps stay as long as their product does. The standard errors follow
    from the optima's spread about the rule, which contains the errors of the scans. Raises ValueError if there are too
    few optima."""
    names = [n for n in (*REFERENCE, PRODUCT) if len({_size(o.point, n) for o in optima}) > 1]
    dropped: list[Term] = []
    while True:
        if len(optima) < len(names) + 2:
            raise ValueError(f"{len(optima)} optima are too few for a rule of {', '.join(names) or 'a constant'}")
        values, errors, spread = _least_squares(optima, names)
        terms = [Term(n, float(values[i + 1]), float(errors[i + 1])) for i, n in enumerate(names)]
        loose = [t for t in terms if PRODUCT not in names or t.name not in PRODUCT.split("*")]
        weakest = min(loose, key=lambda t: abs(t.exponent) / max(t.error, 1e-9), default=None)
        if weakest is None or abs(weakest.exponent) >= 2 * weakest.error:
            break
        names.remove(weakest.name)
        dropped.append(weakest)
    return Rule(2.0 ** float(values[0]), float(errors[0]), tuple(terms), tuple(dropped), spread, len(optima))


def _size(point: Point, name: str) -> float:
    """log2(size / reference size); for PRODUCT, the product of the logarithms of width and steps."""
    return math.prod(math.log2(getattr(point, part) / REFERENCE[part]) for part in name.split("*"))


def _design(optima: Sequence[Optimum], names: Sequence[str]) -> np.ndarray:
    """[optima, 1 + names + corpora - 1]: each corpus has a constant of its own, and these add up to 0."""
    corpora = sorted({o.point.corpus for o in optima})
    rows = []
    for o in optima:
        own = [float(o.point.corpus == c) - float(o.point.corpus == corpora[-1]) for c in corpora[:-1]]
        rows.append([1.0, *(_size(o.point, name) for name in names), *own])
    return np.array(rows)


def _least_squares(optima: Sequence[Optimum], names: Sequence[str]) -> tuple[np.ndarray, np.ndarray, float]:
    """(coefficients and their standard errors [columns of the design], spread of the optima about them)"""
    design, log_rates = _design(optima, names), np.array([o.log_rate for o in optima])
    values = np.linalg.lstsq(design, log_rates, rcond=None)[0]
    residuals = log_rates - design @ values
    spread = math.sqrt(float(residuals @ residuals) / max(1, len(optima) - len(values)))
    return values, spread * np.sqrt(np.diag(np.linalg.pinv(design.T @ design))), spread
