"""What measured rates would mean elsewhere: arithmetic, and labelled so wherever it is shown."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from rich.console import Console

from bench.throughput_report import Row
from minimind.config import ModelConfig
from minimind.data.store import Corpus
from minimind.modeling import Model

# Dense bf16 TFLOP/s with float32 accumulation, from NVIDIA's GA102 and AD102 architecture whitepapers.
PUBLISHED = {"RTX 3090": 71.0, "RTX 4090": 165.2}
# Upstream's MiniMind-Zero as its README has it: one pass over pretrain_hq.jsonl and sft_mini_512.jsonl, of these bytes,
# in 2.1 hours on one RTX 3090 at 1.3 yuan an hour.
ZERO_BYTES = {"pretrain": 1.6e9, "sft": 1.2e9}
ZERO_HOURS, YUAN_PER_HOUR = 2.1, 1.3


def cards(rows: Sequence[Row], console: Console) -> list[dict[str, Any]]:
    """Positions/s on other cards, if they reached that share of their published limit that this one did of its own."""
    found = []
    console.print("projected, not measured: the utilisation of this run times each card's published limit")
    for row in (r for r in rows if r.utilisation is not None and r.peer.startswith("ours")):
        with torch.device("meta"):
            flops = Model(ModelConfig.preset(row.preset)).flops_per_token(row.seq_len)
        for card, limit in PUBLISHED.items():
            rate = (row.utilisation or 0.0) * limit * 1e12 / flops
            found.append({"card": card, "preset": row.preset, "peer": row.peer, "positions_per_second": rate})
            console.print(f"  {card}: {row.preset}, {row.peer}: {rate:,.0f} positions/s", highlight=False)
    return found


def headline(rows: Sequence[Row], corpus: Corpus, console: Console) -> dict[str, Any]:
    """Hours for upstream's MiniMind-Zero at the measured rates. Its tokens are estimated from its files' sizes and the
    bytes per token of this pretraining data; SFT that was not measured is taken to run at the pretraining rate."""
    found = {r.stage: r for r in rows if r.peer == "ours" and r.preset == "minimind2-small"}
    if "pretrain" not in found:
        raise ValueError("--headline: needs --peer ours and --preset minimind2-small among what is measured")
    per_token = corpus.num_bytes / corpus.num_tokens
    tokens = {stage: size / per_token for stage, size in ZERO_BYTES.items()}
    rates = {stage: found.get(stage, found["pretrain"]).tokens_per_second for stage in tokens}
    hours = {stage: n / rates[stage] / 3600 for stage, n in tokens.items()}
    total = sum(hours.values())
    how = f"at {rates['sft']:,.0f} tokens/s" if "sft" in found else "at the pretraining rate"
    console.print(
        f"MiniMind-Zero at {rates['pretrain']:,.0f} tokens/s on {found['pretrain'].device}, projected from file sizes "
        f"and {per_token:.2f} bytes per token: pretraining {hours['pretrain']:.2f} h, SFT {hours['sft']:.2f} h "
        f"({how}), {total:.2f} h in all, {total * YUAN_PER_HOUR:.2f} yuan at {YUAN_PER_HOUR} an hour; upstream reports "
        f"{ZERO_HOURS} h on one RTX 3090",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    return {"tokens": tokens, "hours": hours, "total_hours": total, "bytes_per_token": per_token}
