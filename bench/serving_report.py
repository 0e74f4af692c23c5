"""What bench/serving.py leaves behind: a row of a CSV and a picture."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib
import numpy as np

from bench.operators.report import columns_of

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class ServingRow:
    """One run. Seconds: of the load, then of a request to its first text (ttft) and between its pieces of text (tpot).
    requests: finished in that time or begun in it; lost: of them, those that broke off or failed; mixed: those whose
    answer is not the one that their prompt gets alone. rss: of the server, MiB, after a quarter of the time and at the
    end. client_cpu: processors that this program itself took from the server."""

    date: str
    commit: str | None
    device: str
    threads: int
    torch: str | None
    model: str
    weights: str
    dtype: str
    clients: int
    max_batch: int
    prompt: int
    new: int
    seconds: float
    requests: int
    lost: int
    mixed: int
    tokens: int
    tokens_per_second: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    rss_quarter: float | None
    rss_end: float | None
    client_cpu: float


COLUMNS = columns_of(ServingRow)


def plot(
    row: ServingRow, ttft: Sequence[float], tokens_at: Sequence[float], rss: Sequence[tuple[float, float]], path: Path
) -> None:
    """ttft in seconds; tokens_at: when each piece of text came, rss: (when, MiB), in seconds since the start."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    left.plot(np.sort(ttft) * 1e3, np.linspace(0, 100, len(ttft)), color="#1b6ca8")
    for share, value, side in ((50, row.ttft_p50, "left"), (99, row.ttft_p99, "right")):
        left.plot(1e3 * value, share, "o", color="#d98324", markersize=5)
        left.text(1e3 * value, share - 8, f" p{share}: {1e3 * value:,.0f} ms ", ha=side, fontsize=8)
    left.set(title="requests whose first text came within, %", xlabel="ms")
    counts, edges = np.histogram(tokens_at, bins=np.arange(0, max(tokens_at) + 1, 1.0))
    middle.plot(edges[:-1], counts, color="#5aa469")
    middle.set(title="pieces of text a second, all clients", xlabel="seconds", ylim=(0, None))
    if rss:
        right.plot(*zip(*rss, strict=True), color="#a05195")
    right.set(title="memory of the server, MiB", xlabel="seconds", ylim=(0, None))
    for axis in (left, middle, right):
        axis.spines[["top", "right"]].set_visible(False)
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=8)
    figure.suptitle(
        f"{row.clients} streaming clients for {row.seconds:.0f} s: {row.requests:,} answers, {row.lost} lost, "
        f"{row.mixed} mixed, {row.tokens_per_second:,.0f} tokens/s; {row.model} ({row.weights}), {row.dtype}, "
        f"{row.device}, {row.commit}",
        fontsize=9,
        x=0.01,
        ha="left",
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
