"""Project the time of upstream's MiniMind-Zero, and rates on other GPUs: arithmetic, always labelled as such.

    python bench/projection.py --pretrain FILE... --sft FILE...

counts the bytes and tokens of files like those that MiniMind-Zero is trained on, and adds a row for each to
bench/results/bytes-per-token.csv. docs/PERFORMANCE.md uses them to convert upstream's file sizes into tokens.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch
from rich.console import Console

from bench.common.command import run
from bench.common.record import RESULTS, append, as_dicts, stamp
from bench.training.report import ThroughputRow
from bench.training.stages import STAGES
from minimind.config import ModelConfig
from minimind.data.corpus import Corpus
from minimind.modeling import Model
from minimind.training.estimate import CARDS

COUNTS = RESULTS / "bytes-per-token.csv"
# Dense bf16 TFLOP/s with float32 accumulation.
PUBLISHED = {card.name: card.tflops for card in CARDS if card.name.startswith("RTX")}
# Upstream's MiniMind-Zero, according to its README: one pass over pretrain_hq.jsonl and sft_mini_512.jsonl, whose sizes
# these are, in 2.1 hours on one RTX 3090 at 1.3 yuan an hour.
ZERO_MODEL = "minimind2-small"
ZERO_BYTES = {"pretrain": 1.6e9, "sft": 1.2e9}
ZERO_HOURS, YUAN_PER_HOUR = 2.1, 1.3
ZERO_CONTEXT = 256  # tokens: half of upstream's rows of 512, which no document fills
UTILISATIONS = (0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Args:
    """Count the bytes and tokens of files."""

    pretrain: tuple[str, ...] = ()
    """Files of {"text": ...} rows."""
    sft: tuple[str, ...] = ()
    """Files of conversations."""


@dataclass(frozen=True)
class Count:
    """One file. bytes: on the disk; tokens: as the stage's encoder makes them."""

    date: str
    commit: str | None
    stage: str
    data: str
    bytes: int
    documents: int
    tokens: int


def main(args: Args) -> list[dict[str, Any]]:
    if not args.pretrain and not args.sft:
        raise ValueError("nothing to count: give --pretrain or --sft files")
    columns = stamp(torch.device("cpu"))
    counts = []
    for stage, files in (("pretrain", args.pretrain), ("sft", args.sft)):
        for file in files:
            corpus = STAGES[stage].open([file], Console(stderr=True))
            size, name = Path(file).stat().st_size, Path(file).name
            count = Count(
                columns["date"], columns["commit"], stage, name, size, corpus.num_documents, corpus.num_tokens
            )
            print(f"{name}: {size / count.tokens:.3f} bytes a token")
            counts.append(count)
    append(COUNTS, counts)
    return as_dicts(counts)


def zero_flops() -> int:
    """Floating-point operations of training MiniMind-Zero's model on one token."""
    with torch.device("meta"):
        return Model(ModelConfig.preset(ZERO_MODEL)).flops_per_token(ZERO_CONTEXT)


def zero_tokens(bytes_per_token: dict[str, float]) -> dict[str, float]:
    """Stage -> tokens of MiniMind-Zero, from the sizes of its files."""
    return {stage: size / bytes_per_token[stage] for stage, size in ZERO_BYTES.items()}


def hours(tokens: float, flops_per_token: float, tflops: float, utilisation: float) -> float:
    """Training time on a GPU of `tflops`, of which the model's operations take this share."""
    return tokens * flops_per_token / (utilisation * tflops * 1e12) / 3600


def cards(rows: Sequence[ThroughputRow], console: Console) -> list[dict[str, Any]]:
    """Positions/s on other GPUs, if they reached the same share of their published rate as this one of its own."""
    projected = []
    console.print("projected, not measured: the utilisation of this run times each card's published limit")
    for row in (r for r in rows if r.utilisation is not None and r.peer.startswith("ours")):
        with torch.device("meta"):
            flops = Model(ModelConfig.preset(row.preset)).flops_per_token(row.seq_len)
        for card, limit in PUBLISHED.items():
            rate = (row.utilisation or 0.0) * limit * 1e12 / flops
            projected.append({
                "card": card, "preset": row.preset, "peer": row.peer, "attention": row.attention,
                "positions_per_second": rate,
            })  # fmt: skip
            console.print(
                f"  {card}: {row.preset}, {row.peer}, attention as here ({row.attention}): {rate:,.0f} positions/s",
                highlight=False,
            )
    return projected


def headline(rows: Sequence[ThroughputRow], corpus: Corpus, console: Console) -> dict[str, Any]:
    """Hours of upstream's MiniMind-Zero at the measured rates. Its tokens are estimated from its files' sizes and the
    bytes per token of this pretraining data. SFT, unless it was measured, is taken to run at the pretraining rate."""
    measured = {r.stage: r for r in rows if r.peer == "ours" and r.preset == ZERO_MODEL}
    if "pretrain" not in measured:
        raise ValueError(f"--headline: --peer must include ours, and --preset {ZERO_MODEL}")
    per_token = corpus.num_bytes / corpus.num_tokens
    tokens = zero_tokens(dict.fromkeys(ZERO_BYTES, per_token))
    rates = {stage: measured.get(stage, measured["pretrain"]).tokens_per_second for stage in tokens}
    hours_of = {stage: n / rates[stage] / 3600 for stage, n in tokens.items()}
    total = sum(hours_of.values())
    how = f"at {rates['sft']:,.0f} tokens/s" if "sft" in measured else "at the pretraining rate"
    console.print(
        f"MiniMind-Zero at {rates['pretrain']:,.0f} tokens/s on {measured['pretrain'].device} "
        f"(attention: {measured['pretrain'].attention}), projected from file sizes "
        f"and {per_token:.2f} bytes per token: pretraining {hours_of['pretrain']:.2f} h, SFT {hours_of['sft']:.2f} h "
        f"({how}), {total:.2f} h in all, {total * YUAN_PER_HOUR:.2f} yuan at {YUAN_PER_HOUR} an hour; upstream reports "
        f"{ZERO_HOURS} h on one RTX 3090",
        highlight=False,
        soft_wrap=True,
    )
    return {"tokens": tokens, "hours": hours_of, "total_hours": total, "bytes_per_token": per_token}


if __name__ == "__main__":
    run(main, Args, __doc__)
