"""Pretraining and SFT as a user runs them, from text to a model that answers: how long each took and what came of it.

    python bench/end_to_end.py [--preset minimind2-small] [--data FILE...] [--chats FILE...] [--no-compile]

train/pretrain.py and then train/sft.py run with their defaults, one after the other, in a temporary folder. Rows are
added to end_to_end.csv in --out; the losses are drawn beside it. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find


from bench.operators.report import append, check_columns, columns_of, slug
from minimind.config import PRESETS
from minimind.training.metrics import read_metrics
from minimind.training.run_folder import versions
from minimind.utils.device import choose_device, describe_device
from minimind.utils.stdio import command_line

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Args:
    """Time pretraining and SFT to their end."""

    preset: str = "minimind2-small"
    """Shape of the model."""
    data: tuple[str, ...] = ()
    """Of pretraining; None takes the built-in corpus."""
    chats: tuple[str, ...] = ()
    """Of SFT; None takes the built-in conversations."""
    tokens: int | None = None
    """Of pretraining; None for one pass."""
    chat_tokens: int | None = None
    """Of SFT; None for three passes."""
    compile: bool = True
    """Train with --compile."""
    device: str = "auto"
    """auto, cpu, cuda."""
    out: str | None = None
    """Folder for the rows and the pictures; None for bench/results/DEVICE."""


@dataclass(frozen=True)
class StageRow:
    """One stage. tokens: positions trained on, padding (about 1%) included; seconds: of its training steps alone;
    wall_seconds: of the whole command, tokenizing, compiling, evaluating and saving included. Losses: held out, nats
    per token and at the end bits per byte. correct: share of held-out questions answered to the letter, after SFT.
    attention: whose it trained with, as minimind.ops.attention.attention_name says."""

    date: str
    commit: str | None
    device: str
    torch: str | None
    stage: str
    preset: str
    data: str
    steps: int
    tokens: int
    seconds: float
    wall_seconds: float
    tokens_per_second: float
    attention: str
    heldout_before: float | None
    heldout_after: float | None
    heldout_bpb: float | None
    correct: float | None


COLUMNS = columns_of(StageRow)


def main(args: Args) -> dict[str, Any]:
    if args.preset not in PRESETS:
        raise ValueError(f"--preset {args.preset}: unknown; choose from {', '.join(PRESETS)}")
    for flag, count in (("tokens", args.tokens), ("chat-tokens", args.chat_tokens)):
        if count is not None and count < 1:
            raise ValueError(f"--{flag} {count}: counts from 1")
    found = versions(describe_device(choose_device(args.device)))
    folder = Path(args.out) if args.out else Path(__file__).parent / "results" / slug(found["device"])
    check_columns(folder / "end_to_end.csv", COLUMNS)
    stamp = {name: found[name] for name in ("commit", "device", "torch")}
    stamp["date"] = datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds")
    rows = []
    with tempfile.TemporaryDirectory(prefix="minimind-end-to-end-") as place:
        pretrained, taught = Path(place) / "pretrain", Path(place) / "sft"
        for stage, out, data, tokens, flags in (
            ("pretrain", pretrained, args.data, args.tokens, ("--preset", args.preset)),
            ("sft", taught, args.chats, args.chat_tokens, ("--from", str(pretrained))),
        ):
            given = [*flags, *(("--data", *data) if data else ())]
            given += [] if tokens is None else ["--tokens", str(tokens)]
            wall = train(args, stage, out, given)
            name = "+".join(Path(path).name for path in data) or "built-in"
            row = StageRow(**stamp, stage=stage, preset=args.preset, data=name, wall_seconds=wall, **outcome(out))
            append(folder / "end_to_end.csv", [row])
            shutil.copy(out / "loss.png", folder / f"end-to-end-{stage}-{stamp['commit'] or 'unknown'}.png")
            rows.append(dataclasses.asdict(row))
    return {"csv": str(folder / "end_to_end.csv"), "rows": rows}


def train(args: Args, stage: str, out: Path, flags: Sequence[str]) -> float:
    """Seconds of the whole command. ValueError, after its own words, where it failed."""
    command = [sys.executable, str(ROOT / "train" / f"{stage}.py"), "--out", str(out), "--device", args.device, *flags]
    command += ["--compile"] if args.compile else []
    start = time.perf_counter()
    status = subprocess.run(command, stdout=sys.stderr).returncode
    if status:
        raise ValueError(f"train/{stage}.py ended with status {status}; see above")
    return time.perf_counter() - start


def outcome(run: Path) -> dict[str, Any]:
    """What Row holds of a finished run, from its metrics and versions."""
    start = json.loads((run / "versions.json").read_text(encoding="utf-8"))["starts"][-1]
    rows = read_metrics(run / "metrics.jsonl")
    steps = [row for row in rows if row["kind"] == "train"]
    evals = [row for row in rows if row["kind"] == "eval"]
    seconds, tokens = steps[-1]["time"]["seconds"], steps[-1]["tokens"]
    first, last = (evals[0], evals[-1]) if evals else ({}, {})
    return {
        "steps": len(steps), "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds,
        "attention": start["attention"],
        "heldout_before": first.get("heldout_loss"), "heldout_after": last.get("heldout_loss"),
        "heldout_bpb": last.get("heldout_bpb"), "correct": last.get("heldout_exact"),
    }  # fmt: skip


if __name__ == "__main__":
    try:
        result = main(command_line(Args, __doc__))
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(json.dumps(result))
