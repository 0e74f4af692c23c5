"""docs/recipe.md, from the rows of bench/recipe.py."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench.common.record import RESULTS
from bench.report.rows import Row, markdown, number, ratio, rows_of, text
from bench.training.tries import BASE, TRIES

PAGE = "docs/recipe.md"
Key = tuple[str, str, int]  # corpus, shape, tokens
HEAD = """\
# Tries with the recipe of pretraining

Written by `python bench/performance.py` from the rows of `bench/recipe.py`: no figure here is typed. Each try changes
some flags of the reference recipe, which is `train/pretrain.py` with steps of 4,096 tokens and five iterations of Muon;
the peak rate follows its usual rule. Gains are in nats per held-out token: above zero, the try is better. "Equal
tokens" compares runs of one seed that saw the same tokens, on any processor. "Equal time" also counts how long the
steps took, on a CPU in processor seconds, where one processor ran both: a try whose steps take r times as long is
compared with the reference after r times the tokens, whose loss is estimated from its runs with once and twice the
tokens. Ranges are over seeds. Processor seconds grow when other programs share the caches, as they did in most of these
runs, so that a run may take half as much again: small differences of time mean nothing.

Changes that won at equal time on both corpora are the defaults on a CPU: `steps-2048` for runs of up to 1,638,400
tokens, `iterations-3`, and depth warm-up with Muon in blocks of 256: `eighth-0.9375` in runs with at most one token for
112 parameters, `eighth-0.875` for 56, with steps of 1,024 tokens up to 51,200 tokens (`steps-1024-eighth-0.9375`). In
longer runs of nano depth warm-up loses; its matrices are too narrow for two blocks. Blocks without depth warm-up were
not measured and are not the default. Tries with blocks or depth warm-up contain `steps-2048-iterations-3`: compare them
with it. In runs of 102,400 tokens steps of 1,024 tokens win on Tang poems and lose on English, whose documents are
longer, so that a step sees few of them; blocks of 128 take less time than blocks of 256 and cost more loss on
English."""


def page(results: Path = RESULTS) -> str:
    """The whole page."""
    rows = [row for folder in sorted(results.iterdir()) for row in rows_of(folder / "recipe.csv")]
    compared = {key_of(row) for row in rows if row["attempt"] == BASE}
    keys = [key for key in dict.fromkeys(key_of(row) for row in rows if row["attempt"] != BASE) if key in compared]
    parts = [HEAD, _list()]
    for key in keys:
        corpus, shape, tokens = key
        devices = dict.fromkeys(row["device"] for row in rows if key_of(row) == key)
        parts += [f"## {shape}, {corpus}, {tokens:,} tokens", "; ".join(devices), table(rows, key)]
    return "\n\n".join(parts) + "\n"


def _list() -> str:
    lines = [f"- **{name}**: {one.about}." for name, one in TRIES.items()]
    return "\n".join(["## The tries", "", *lines])


def key_of(row: Row) -> Key:
    return row["corpus"], row["shape"], int(row["tokens"])


def table(rows: Sequence[Row], key: Key) -> str:
    """A row for every try of one corpus, shape and number of tokens, the best first."""
    base = [row for row in rows if key_of(row) == key and row["attempt"] == BASE]
    corpus, shape, tokens = key
    doubled = (corpus, shape, 2 * tokens)
    more = {row["seed"]: row for row in rows if key_of(row) == doubled and row["attempt"] == BASE}
    names = dict.fromkeys(row["attempt"] for row in rows if key_of(row) == key and row["attempt"] != BASE)
    body = []
    for name in names:
        own = [row for row in rows if key_of(row) == key and row["attempt"] == name and _reference(row, base)]
        if own:
            body.append(figures(own, base, more))
    body.sort(key=lambda one: -one["tokens"][0])
    head = ("try", "flags", "seeds", "gain at equal tokens", "time of a run", "gain at equal time")
    lines = [
        (
            one["name"],
            one["flags"],
            str(one["seeds"]),
            _range(one["tokens"]),
            text(one["ratio"], ".2f", "x"),
            _range(one["time"]),
        )
        for one in body
    ]
    losses = ", ".join(f"{float(row['heldout_loss']):.4f}" for row in base)
    note = f"The reference recipe: {losses} nats per token"
    if more:
        doubled_losses = ", ".join(f"{float(row['heldout_loss']):.4f}" for row in more.values())
        note += f"; with twice the tokens {doubled_losses}"
    return f"{markdown(head, lines)}\n\n{note}."


def _reference(row: Row, base: Sequence[Row]) -> Row | None:
    """The reference run of the same seed, on the same device if there is one."""
    same_seed = [one for one in base if one["seed"] == row["seed"]]
    return min(same_seed, key=lambda one: one["device"] != row["device"], default=None)


def figures(own: Sequence[Row], base: Sequence[Row], more: dict[str, Row]) -> dict[str, Any]:
    """The gains of a try: mean, lowest and highest over seeds."""
    gains, ratios, timed = [], [], []
    for row in own:
        reference = _reference(row, base)
        assert reference is not None
        share = time_ratio(row, reference) if reference["device"] == row["device"] else None
        gains.append(float(reference["heldout_loss"]) - float(row["heldout_loss"]))
        ratios += [share] if share else []
        if share and row["seed"] in more:
            slope = float(more[row["seed"]]["heldout_loss"]) - float(reference["heldout_loss"])  # for twice the tokens
            timed.append(gains[-1] + slope * math.log2(share))
    return {
        "name": own[0]["attempt"], "flags": f"`{own[0]['flags']}`", "seeds": len(own), "tokens": _spread(gains),
        "ratio": statistics.fmean(ratios) if ratios else None, "time": _spread(timed),
    }  # fmt: skip


def time_ratio(row: Row, reference: Row) -> float | None:
    """The time of one run's steps divided by the other's: on a CPU processor time, on a GPU wall time."""
    column = "busy_seconds" if "threads" in row["device"] else "seconds"
    return ratio(number(row, column), number(reference, column))


def _spread(values: Sequence[float]) -> tuple[float, float, float]:
    return (statistics.fmean(values), min(values), max(values)) if values else (math.nan,) * 3


def _range(values: tuple[float, float, float]) -> str:
    mean, low, high = values
    if math.isnan(mean):
        return ""
    return f"{mean:+.4f}" if low == high else f"{mean:+.4f} ({low:+.4f} to {high:+.4f})"
