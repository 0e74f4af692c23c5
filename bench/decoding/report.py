"""The rows, the table and the picture of bench/decode.py."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console
from rich.table import Table

from bench.common.plots import bars, plt, save
from bench.common.record import Row


@dataclass(frozen=True)
class DecodeRow(Row):
    """One decoder at one batch size.

    status: ok, refused (its tokens are not the greedy continuation) or failed; reason says why. ttft: seconds to the
    first token, the mean of the rows and the median of the turns. tpot: seconds between tokens of a row: the median of
    the steps, with the 20th and 80th percentile. tokens_per_second: batch / tpot. overall_per_second: new tokens /
    seconds of the whole call, prompt included. step_bytes: bytes of weights, keys and values that a step reads.
    bandwidth: bytes per second when a buffer of the weights' size is read. share: (step_bytes / bandwidth) / tpot.
    error_ratio: 2 or less passes (bench/decoding/judge.py). equal: share of the tokens that the float64 model would
    choose.
    """

    threads: int
    torch: str | None
    transformers: str | None
    llama_cpp: str | None
    vllm: str | None
    model: str
    weights: str
    peer: str
    width: str
    batch: int
    prompt: int
    new: int
    status: str
    reason: str = ""
    turns: int = 0
    ttft: float | None = None
    tpot: float | None = None
    p20: float | None = None
    p80: float | None = None
    tokens_per_second: float | None = None
    overall_per_second: float | None = None
    step_bytes: int | None = None
    kv_bytes_per_token: int | None = None
    bandwidth: float | None = None
    share: float | None = None
    peak_mib: float | None = None
    error_ratio: float | None = None
    equal: float | None = None


def show(rows: Sequence[DecodeRow], console: Console) -> None:
    """A table of one batch size; ratios are against the last row that was timed."""
    first = rows[0]
    base = next((row for row in reversed(rows) if row.tokens_per_second), None)
    table = Table(
        title=f"{first.model} ({first.weights}), batch {first.batch}, {first.prompt} + {first.new} tokens, "
        f"{first.threads} threads, {first.device}",
        caption=f"ratios against {base.peer if base else 'none'}; share: time to read the memory / time of a step",
    )
    for column in ("", "width", "tokens/s", "ratio", "TPOT ms", "p20-p80", "TTFT ms", "share", "KV B/token", "MiB",
                   "error", "equal"):  # fmt: skip
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        table.add_row(row.peer, row.width, *_cells(row, base))
    console.print(table)
    for row in rows:
        if row.status != "ok":
            console.print(f"{row.peer} {row.status}: {row.reason}", style="red", highlight=False)


def _cells(row: DecodeRow, base: DecodeRow | None) -> list[str]:
    checked = [
        "" if row.error_ratio is None else f"{row.error_ratio:.2g}",
        "" if row.equal is None else f"{row.equal:.1%}",
    ]
    if row.tpot is None or row.ttft is None or row.tokens_per_second is None:
        return [row.status, "", "", "", "", "", "", "", *checked]
    ratio = row.tokens_per_second / base.tokens_per_second if base and base.tokens_per_second else None
    return [
        f"{row.tokens_per_second:,.0f}",
        "" if ratio is None else f"{ratio:.2f}",
        f"{1e3 * row.tpot:.3g}",
        f"{1e3 * (row.p20 or 0):.3g}-{1e3 * (row.p80 or 0):.3g}",
        f"{1e3 * row.ttft:,.0f}",
        "" if row.share is None else f"{row.share:.0%}",
        f"{row.kv_bytes_per_token:,}",
        "" if row.peak_mib is None else f"{row.peak_mib:,.0f}",
        *checked,
    ]


def plot(rows: Sequence[DecodeRow], path: Path) -> None:
    """Tokens/s and time to the first token of every decoder that was timed; a row of panels for each batch size."""
    timed = [row for row in rows if row.tokens_per_second is not None]
    batches = list(dict.fromkeys(row.batch for row in timed))
    if not batches:
        return
    heights = [sum(row.batch == b for row in timed) for b in batches]
    figure, axes = plt.subplots(
        len(batches), 2, figsize=(11, 1.2 + 0.3 * len(timed) + 0.55 * len(batches)), squeeze=False, sharey="row",
        layout="constrained", gridspec_kw={"height_ratios": heights},
    )  # fmt: skip
    panels = (
        ("tokens/s of all rows", lambda r: r.tokens_per_second, "#1b6ca8"),
        ("ms to the first token", lambda r: 1e3 * (r.ttft or 0.0), "#d98324"),
    )
    for batch, line in zip(batches, axes, strict=True):
        here = [row for row in timed if row.batch == batch]
        for axis, (title, value, colour) in zip(line, panels, strict=True):
            colours = [colour if row.peer.startswith("ours") else "#9a9a9a" for row in here]
            bars(axis, title, [value(row) for row in here], [row.peer for row in here], colours)
        line[0].set_ylabel(f"batch {batch}", fontsize=10, fontweight="bold")
        line[0].invert_yaxis()
    first = timed[0]
    tokens = f"{first.prompt} + {first.new} tokens"
    save(figure, path, f"{first.model}, {tokens}, {first.weights}; {first.device}, {first.commit}")
