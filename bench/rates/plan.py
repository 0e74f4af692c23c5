"""The scans of bench/transfer.py in order, and the loop that runs them, which several processes can share."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout
from rich.console import Console

from bench.rates.fit import Optimum, by_point, next_rate, optima_of
from bench.rates.runs import Point, read, train, write
from minimind.utils.display import duration

# First rates: what the scripts used for nano before there was a rule; AdamW's from bench/optimizers.py.
FIRST = {("pretrain", "muon"): 4e-3, ("pretrain", "adamw"): 8e-3, ("sft", "muon"): 2e-3, ("sft", "adamw"): 1e-3}
CHATS = "conversations"  # the corpus of SFT: the built-in conversations


class OutOfTimeError(Exception):
    """The time for new runs is over."""


def planned(
    corpora: Sequence[str], widths: Sequence[int], tokens: int, only: Sequence[str] = ()
) -> list[tuple[str, Point]]:
    """(name, scan), the most informative first, so that an interrupted sweep has a result. only: names of scans. Raises
    ValueError for an unknown name."""
    first, second, n = corpora[0], corpora[-1], tokens
    narrow, wide, widest = widths[0], widths[min(2, len(widths) - 1)], widths[-1]
    base = Point(first, narrow, 4, n)
    chats = replace(base, stage="sft", corpus=CHATS, tokens=3 * n // 2)
    adamw = replace(base, optimizer="adamw")
    some = sorted({narrow, wide, widest})
    groups: dict[str, list[Point]] = {
        "tokens": [replace(base, tokens=t * n) for t in (1, 2, 4)],
        "width": [replace(base, width=w) for w in widths[1:]],
        "seed": [replace(base, seed=2), replace(base, width=wide, seed=2)],
        "batch": [replace(base, batch_tokens=b, tokens=t) for b, t in ((1024, n), (2048, n), (8192, 4 * n))],
        "depth": [replace(base, width=wide, depth=d) for d in (2, 8)],
        "adamw": [replace(adamw, width=w) for w in some],
        "sft": [replace(chats, width=w) for w in some],
        "sft-adamw": [replace(chats, width=w, optimizer="adamw") for w in (narrow, wide)],
        "corpus": [replace(base, corpus=second, width=w) for w in (narrow, wide)] if second != first else [],
        "tokens-wide": [
            *[replace(base, width=wide, tokens=t) for t in (2 * n, 4 * n)],
            replace(base, width=widest, tokens=4 * n),
            replace(base, tokens=8 * n),
        ],
        "adamw-more": [
            *[replace(adamw, tokens=t) for t in (2 * n, 4 * n)],
            replace(adamw, batch_tokens=1024),
            replace(adamw, width=wide, tokens=4 * n),
            replace(adamw, width=wide, depth=8),
        ],
        "embedding": [
            *[replace(base, embedding=e) for e in (2.0, 4.0, 0.5)],
            replace(base, width=widest, embedding=2.0),
        ],
        "warmup": [replace(base, warmup=w) for w in (0.0, 0.1)],
    }
    unknown = sorted(set(only) - set(groups))
    if unknown:
        raise ValueError(f"--only {' '.join(unknown)}: choose from {', '.join(groups)}")
    return [(name, point) for name, points in groups.items() if not only or name in only for point in points]


def start_of(point: Point, optima: Sequence[Optimum]) -> float:
    """The first rate of a scan: on the grid, the best rate of the most similar scan, or else the first rate."""
    first = FIRST[point.stage, point.optimizer]
    similar = [o for o in optima if (o.point.stage, o.point.optimizer) == (point.stage, point.optimizer)]
    if not similar:
        return first
    nearest = min(similar, key=lambda o: _distance(o.point, point))
    return first * 2.0 ** round(nearest.log_rate - math.log2(first))


def _distance(a: Point, b: Point) -> float:
    sizes = ("width", "depth", "tokens", "batch_tokens", "embedding")
    return sum(abs(math.log2(getattr(a, s) / getattr(b, s))) for s in sizes) + (a.corpus != b.corpus)


class Sweep:
    """Runs scans in this process. Several processes can share `table` and `work`."""

    def __init__(
        self, table: Path, work: Path, find: Callable[[str], str], console: Console, minutes: float | None = None
    ) -> None:
        """find: corpus -> the path of its file."""
        self.table, self.work, self.find, self.console = table, work, find, console
        self.began = time.monotonic()
        self.ends = math.inf if minutes is None else self.began + 60 * minutes
        self.done = 0.0  # operations of this process's runs

    def scans(self, plan: Sequence[tuple[str, Point]]) -> None:
        """Run every scan that no other process is running."""
        for number, (name, point) in enumerate(plan):
            lock = FileLock(self.work / f"{point.name}.lock")
            try:
                lock.acquire(timeout=0)
            except Timeout:
                self.say(f"{name}: {point}: another process is running it")
                continue
            with lock:
                while (rate := self._next(point)) is not None:
                    left = [p for _, p in plan[number:]]
                    self._run(f"{name}, scan {number + 1} of {len(plan)}", point, rate, left)

    def runs(self, point: Point, rates: Sequence[float]) -> None:
        """Run these rates."""
        for number, rate in enumerate(rates):
            losses = by_point(read(self.table)).get(point, {})
            with FileLock(self.work / f"{point.name}-{rate:g}.lock"):
                if not any(math.isclose(rate, r, rel_tol=1e-3) for r in losses):
                    self._run("check", point, rate, [point] * (len(rates) - number))

    def _next(self, point: Point) -> float | None:
        rows = read(self.table)
        losses = by_point(rows).get(point, {})
        return next_rate(losses, start_of(point, optima_of(rows)))

    def _run(self, title: str, point: Point, rate: float, left: Sequence[Point]) -> None:
        if time.monotonic() > self.ends:
            raise OutOfTimeError
        self.say(f"{title}: {point}, rate {rate:g}{self._eta(left)}")
        row = train(point, rate, self.find(point.corpus), self.work)
        write(self.table, row)
        self.done += point.flops
        loss = "the loss diverged" if row.heldout_loss is None else f"{row.heldout_loss:.4f} nats per token"
        self.say(f"  {loss} in {duration(row.seconds)}")

    def _eta(self, left: Sequence[Point]) -> str:
        """Remaining time at the speed so far, with three and a half rates for each scan that has not begun."""
        if not self.done:
            return ""
        scans = by_point(read(self.table))
        operations = sum(max(0.5, 3.5 - len(scans.get(p, {}))) * p.flops for p in left)
        return f"; about {duration(operations * (time.monotonic() - self.began) / self.done)} left"

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, soft_wrap=True)
