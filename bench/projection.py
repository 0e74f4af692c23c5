"""What measured rates would mean elsewhere: arithmetic, and labelled so wherever it is shown.

    python bench/projection.py --pretrain FILE... --sft FILE...

counts the bytes and tokens of files like those that upstream's MiniMind-Zero is trained on, and adds a row for each to
bench/results/bytes-per-token.csv: what docs/PERFORMANCE.md turns upstream's file sizes into tokens with.
"""

from __future__ import annotations

import datetime
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch
from rich.console import Console

from bench.operators.report import append
from bench.training.report import ThroughputRow
from bench.training.stages import STAGES
from minimind.config import ModelConfig
from minimind.data.corpus import Corpus
from minimind.modeling import Model
from minimind.training.cards import CARDS
from minimind.training.run_folder import versions
from minimind.utils.device import describe_device
from minimind.utils.stdio import command_line

COUNTS = Path(__file__).parent / "results" / "bytes-per-token.csv"
# Dense bf16 TFLOP/s with float32 accumulation.
PUBLISHED = {card.name: card.tflops for card in CARDS if card.name.startswith("RTX")}
# Upstream's MiniMind-Zero as its README has it: one pass over pretrain_hq.jsonl and sft_mini_512.jsonl, of these bytes,
# in 2.1 hours on one RTX 3090 at 1.3 yuan an hour.
ZERO_MODEL = "minimind2-small"
ZERO_BYTES = {"pretrain": 1.6e9, "sft": 1.2e9}
ZERO_HOURS, YUAN_PER_HOUR = 2.1, 1.3
ZERO_CONTEXT = 256  # tokens: half of its rows of 512, which no document fills
UTILISATIONS = (0.2, 0.3, 0.4, 0.5)


@dataclass(frozen=True)
class Args:
    """Count the tokens of files."""

    pretrain: tuple[str, ...] = ()
    """Of {"text": ...} rows."""
    sft: tuple[str, ...] = ()
    """Of conversations."""


@dataclass(frozen=True)
class Count:
    """One file: bytes on the disk, and tokens as the stage's encoder writes them."""

    date: str
    commit: str | None
    stage: str
    data: str
    bytes: int
    documents: int
    tokens: int


def main(args: Args) -> list[Count]:
    if not args.pretrain and not args.sft:
        raise ValueError("nothing to count: give --pretrain or --sft files")
    date = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    commit = versions(describe_device(torch.device("cpu")))["commit"]
    counts = []
    for stage, files in (("pretrain", args.pretrain), ("sft", args.sft)):
        for file in files:
            corpus = STAGES[stage].open([file], Console(stderr=True))
            size = Path(file).stat().st_size
            counts.append(Count(date, commit, stage, Path(file).name, size, corpus.num_documents, corpus.num_tokens))
    append(COUNTS, counts)
    return counts


def zero_flops() -> int:
    """Operations of training MiniMind-Zero's model on one token."""
    with torch.device("meta"):
        return Model(ModelConfig.preset(ZERO_MODEL)).flops_per_token(ZERO_CONTEXT)


def zero_tokens(bytes_per_token: dict[str, float]) -> dict[str, float]:
    """Tokens of MiniMind-Zero's stages, from its files' sizes."""
    return {stage: size / bytes_per_token[stage] for stage, size in ZERO_BYTES.items()}


def hours(tokens: float, flops_per_token: float, tflops: float, utilisation: float) -> float:
    """Of a card of `tflops` that spends this share of them on the model's operations."""
    return tokens * flops_per_token / (utilisation * tflops * 1e12) / 3600


def cards(rows: Sequence[ThroughputRow], console: Console) -> list[dict[str, Any]]:
    """Positions/s on other cards, if they reached that share of their published limit that this one did of its own."""
    found = []
    console.print("projected, not measured: the utilisation of this run times each card's published limit")
    for row in (r for r in rows if r.utilisation is not None and r.peer.startswith("ours")):
        with torch.device("meta"):
            flops = Model(ModelConfig.preset(row.preset)).flops_per_token(row.seq_len)
        for card, limit in PUBLISHED.items():
            rate = (row.utilisation or 0.0) * limit * 1e12 / flops
            found.append({
                "card": card, "preset": row.preset, "peer": row.peer, "attention": row.attention,
                "positions_per_second": rate,
            })  # fmt: skip
            console.print(
                f"  {card}: {row.preset}, {row.peer}, attention as here ({row.attention}): {rate:,.0f} positions/s",
                highlight=False,
            )
    return found


def headline(rows: Sequence[ThroughputRow], corpus: Corpus, console: Console) -> dict[str, Any]:
    """Hours for upstream's MiniMind-Zero at the measured rates. Its tokens are estimated from its files' sizes and the
    bytes per token of this pretraining data; SFT that was not measured is taken to run at the pretraining rate."""
    found = {r.stage: r for r in rows if r.peer == "ours" and r.preset == ZERO_MODEL}
    if "pretrain" not in found:
        raise ValueError(f"--headline: needs --peer ours and --preset {ZERO_MODEL} among what is measured")
    per_token = corpus.num_bytes / corpus.num_tokens
    tokens = zero_tokens(dict.fromkeys(ZERO_BYTES, per_token))
    rates = {stage: found.get(stage, found["pretrain"]).tokens_per_second for stage in tokens}
    taken = {stage: n / rates[stage] / 3600 for stage, n in tokens.items()}
    total = sum(taken.values())
    how = f"at {rates['sft']:,.0f} tokens/s" if "sft" in found else "at the pretraining rate"
    console.print(
        f"MiniMind-Zero at {rates['pretrain']:,.0f} tokens/s on {found['pretrain'].device} "
        f"(attention: {found['pretrain'].attention}), projected from file sizes "
        f"and {per_token:.2f} bytes per token: pretraining {taken['pretrain']:.2f} h, SFT {taken['sft']:.2f} h "
        f"({how}), {total:.2f} h in all, {total * YUAN_PER_HOUR:.2f} yuan at {YUAN_PER_HOUR} an hour; upstream reports "
        f"{ZERO_HOURS} h on one RTX 3090",
        highlight=False,
        soft_wrap=True,
    )
    return {"tokens": tokens, "hours": taken, "total_hours": total, "bytes_per_token": per_token}


if __name__ == "__main__":
    try:
        for count in main(command_line(Args, __doc__)):
            print(f"{count.data}: {count.bytes / count.tokens:.3f} bytes a token")
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
