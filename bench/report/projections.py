"""The parts of docs/PERFORMANCE.md that are computed, not measured: MiniMind-Zero's hours, the default tiles."""

from __future__ import annotations

import dataclasses
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from bench import projection
from bench.operators.tuning import TABLES
from bench.report.rows import Device, Row, find, markdown, number, rows_of

CARDS = {86: "RTX 3090", 89: "RTX 4090", 90: "H100"}  # a common GPU of each architecture


def minimind_zero(devices: Sequence[Device], counts: Path = projection.COUNTS) -> str:
    """The projection with its arithmetic, and the hours at measured rates of a GPU."""
    per_token = _bytes_per_token(counts)
    tokens = {name: projection.zero_tokens(ratios) for name, ratios in per_token.items()}
    flops = projection.zero_flops()
    total = {name: sum(parts.values()) for name, parts in tokens.items()}
    tflops = projection.PUBLISHED["RTX 3090"]
    spent = projection.hours(total["likely"], flops, tflops, 1.0) / projection.ZERO_HOURS
    sizes = projection.ZERO_BYTES
    lines = [
        f"Upstream pretrains `{projection.ZERO_MODEL}` on {sizes['pretrain'] / 1e9:g} GB and teaches it on "
        f"{sizes['sft'] / 1e9:g} GB of files in {projection.ZERO_HOURS} hours on one RTX 3090, at "
        f"{projection.YUAN_PER_HOUR} yuan an hour. Those files are not here; their tokens are estimated from files of "
        "the same formats, with this project's tokenizer, JSON included (`python bench/projection.py`):",
        markdown(
            ("file", "format", "bytes", "tokens", "bytes a token"),
            [(r["data"], r["stage"], f"{int(r['bytes']):,}", f"{int(r['tokens']):,}",
              f"{int(r['bytes']) / int(r['tokens']):.3f}") for r in _newest(counts)],
        ),
        "Upstream's pretraining text is modern Chinese taken from conversations, so both stages are counted like the "
        f"conversations: {sizes['pretrain'] / 1e9:g}e9 / {per_token['likely']['pretrain']:.3f} + "
        f"{sizes['sft'] / 1e9:g}e9 / {per_token['likely']['sft']:.3f} = {total['likely'] / 1e6:,.0f}M tokens. At "
        "worst, with pretraining text that takes as many tokens as the first file above: "
        f"{total['worst'] / 1e6:,.0f}M. A token takes {flops / 1e6:.1f} MFLOP "
        f"(`Model.flops_per_token({projection.ZERO_CONTEXT})`: 6 for each weight of a product, and attention), so that",
        "```text\nhours = tokens x FLOP a token / (share x the card's TFLOP/s x 1e12) / 3600\n```",
        _hours_table(total, flops),
        "The share is that of the card's published bf16 rate which a step spends on the model's own operations. It is "
        "**assumed**: nobody has measured it on a card. Attention is PyTorch's FlashAttention 2 (`--attention torch`), "
        "the fastest for these cards; on Hopper 3 or 4 would raise the share. "
        f"Upstream's {projection.ZERO_HOURS} hours come to {spent:.0%} "
        "by the same count, since its rows are padded and cost as much as full ones.",
    ]  # fmt: skip
    return "\n\n".join([*lines, *_measured(devices, tokens["likely"])])


def _hours_table(total: dict[str, float], flops: int) -> str:
    body = []
    for card, tflops in projection.PUBLISHED.items():
        for share in projection.UTILISATIONS:
            hours = {name: projection.hours(tokens, flops, tflops, share) for name, tokens in total.items()}
            price = hours["likely"] * projection.YUAN_PER_HOUR if card == "RTX 3090" else None
            rate = share * tflops * 1e12 / flops
            body.append((
                card, f"{tflops:g}", f"{share:.0%}", f"{rate:,.0f}", f"{hours['likely']:.2f}", f"{hours['worst']:.2f}",
                "" if price is None else f"{price:.2f}",
            ))  # fmt: skip
    head = ("card", "TFLOP/s", "share, assumed", "tokens/s, projected", "hours, projected", "at worst",
            f"yuan at {projection.YUAN_PER_HOUR} an hour")  # fmt: skip
    return markdown(head, body)


def _measured(devices: Sequence[Device], tokens: dict[str, float]) -> list[str]:
    """Hours at the real tokens/s of the GPUs that measured both stages."""
    lines = []
    for device in (d for d in devices if not d.is_cpu):
        ours = {"preset": projection.ZERO_MODEL, "peer": "ours"}
        rows = {stage: find(device.tables["throughput"], stage=stage, **ours) for stage in tokens}
        rates = {stage: number(row, "tokens_per_second") for stage, row in rows.items()}
        hours = {stage: tokens[stage] / rate / 3600 for stage, rate in rates.items() if rate}
        if len(hours) == len(tokens):
            parts = ", ".join(f"{stage} {hours[stage]:.2f} h at {rates[stage]:,.0f} tokens/s" for stage in tokens)
            lines.append(f"At the rates measured on {device.name}: {parts}; {sum(hours.values()):.2f} h in all.")
    return lines or ["At measured rates of a card: not measured, needs a card (`python bench/card.py`)."]


def _bytes_per_token(counts: Path) -> dict[str, dict[str, float]]:
    ratios = {
        stage: [int(r["bytes"]) / int(r["tokens"]) for r in _newest(counts) if r["stage"] == stage]
        for stage in projection.ZERO_BYTES
    }
    likely = ratios["sft"][0]
    return {
        "likely": dict.fromkeys(projection.ZERO_BYTES, likely),
        "worst": {"pretrain": min(ratios["pretrain"]), "sft": likely},
    }


def _newest(counts: Path) -> list[Row]:
    return list({(row["stage"], row["data"]): row for row in rows_of(counts)}.values())


def default_tiles(devices: Sequence[Device], resources: Path) -> str:
    """Every table of tile sizes with the entry of each architecture and its origin."""
    tuned = {(r["table"], r["entry"].split(":")[0]) for d in devices for r in d.tables["tuning"]}
    body = []
    for module, attribute in dict.fromkeys(pair for pairs in TABLES.values() for pair in pairs):
        table = getattr(importlib.import_module(f"minimind.kernels.{module}"), attribute)
        name = f"kernels/{module}.py {attribute}"
        entries = {arch: max(other for other in table if other <= arch) for arch in CARDS}
        for entry in dict.fromkeys(entries.values()):
            archs = [arch for arch, taken in entries.items() if taken == entry]
            searched = [arch for arch in archs if (name, str(arch)) in tuned]
            origin = "report and arithmetic"
            if searched:
                origin = "searched on " + ", ".join(f"sm_{arch}" for arch in searched)
            body += [
                (f"`{name}`", ", ".join(f"sm_{arch}" for arch in archs), f"`{part}`", origin)
                for part in _parts(table[entry])
            ]
    return "\n\n".join(
        (
            markdown(("table", "taken on", "entry", "chosen from"), body),
            "What the kernels need with these entries in bf16, from `python bench/resources.py` (ptxas, no card): "
            "ranges over the presets' shapes; programs: how many share a multiprocessor, and what stops the next.",
            _needs(resources),
        )
    )


def _parts(config: object) -> list[str]:
    """The names and numbers of an entry, a line for each nested config."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}  # type: ignore[arg-type]
    nested = {name: value for name, value in fields.items() if dataclasses.is_dataclass(value)}
    if nested:
        return [f"{name}: {part}" for name, value in nested.items() for part in _parts(value)]
    return [", ".join(f"{name} {value}" for name, value in fields.items())]


def _needs(resources: Path) -> str:
    """A line for each kernel and the architectures on which its resources are the same."""
    rows = json.loads(resources.read_text(encoding="utf-8"))
    groups: dict[tuple[str, ...], list[int]] = {}
    for kernel, arch in sorted({(r["kernel"].lstrip("_"), r["arch"]) for r in rows}):
        here = [r for r in rows if r["kernel"].lstrip("_") == kernel and r["arch"] == arch]
        columns = ("num_warps", "num_stages", "registers", "spilled", "shared", "programs")
        bounds = sorted({part for r in here for part in r["bound"].split(", ")})
        cells = (*(_range(here, column) for column in columns), ", ".join(bounds))
        groups.setdefault((f"`{kernel}`", *cells), []).append(arch)
    body = [(name, ", ".join(f"sm_{a}" for a in archs), *cells) for (name, *cells), archs in groups.items()]
    head = ("kernel", "card", "warps", "stages", "registers", "spilled", "shared bytes", "programs", "bound by")
    return markdown(head, body)


def _range(rows: Sequence[dict[str, Any]], column: str) -> str:
    low, high = (pick(int(r[column]) for r in rows) for pick in (min, max))
    return f"{low:,}" if low == high else f"{low:,}-{high:,}"
