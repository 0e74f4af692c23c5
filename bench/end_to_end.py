"""Run pretraining and SFT as a user does, from text to a model that answers: how long each takes, how good it gets.

    python bench/end_to_end.py [--preset minimind2-small] [--data FILE...] [--chats FILE...] [--no-compile]

train/pretrain.py and then train/sft.py run with their defaults in a temporary folder. Rows are added to end_to_end.csv
in --out, and the losses are drawn beside it. The last line of stdout is JSON.
"""

from __future__ import annotations

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


from bench.common.command import check_at_least, check_choices, run
from bench.common.record import ROOT, Row, append, as_dicts, check_columns, results_folder, stamp
from minimind.config import PRESETS
from minimind.training.metrics import read_metrics
from minimind.utils.device import choose_device


@dataclass(frozen=True)
class Args:
    """Time pretraining and SFT from beginning to end."""

    preset: str = "minimind2-small"
    """Shape of the model."""
    data: tuple[str, ...] = ()
    """Files for pretraining; empty: the built-in corpus."""
    chats: tuple[str, ...] = ()
    """Files for SFT; empty: the built-in conversations."""
    tokens: int | None = None
    """Tokens of pretraining; None: one pass over the data."""
    chat_tokens: int | None = None
    """Tokens of SFT; None: three passes over the data."""
    compile: bool = True
    """Train with --compile."""
    device: str = "auto"
    """Device: cpu, cuda, or auto, which takes a GPU if there is one."""
    out: str | None = None
    """Folder of the rows and the pictures; None: bench/results/DEVICE."""


@dataclass(frozen=True)
class StageRow(Row):
    """One stage.

    tokens: positions trained on, including about 1% padding. seconds: of the training steps alone; wall_seconds: of the
    whole command, which also tokenizes, compiles, evaluates and saves. heldout_before, heldout_after: held-out loss in
    nats per token; heldout_bpb: at the end in bits per byte. correct: share of held-out questions with an exactly right
    answer after SFT. attention: the implementation, as minimind.ops.attention.attention_name names it.
    """

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


def main(args: Args) -> dict[str, Any]:
    check_choices("preset", [args.preset], PRESETS)
    check_at_least(1, tokens=args.tokens, chat_tokens=args.chat_tokens)
    columns = stamp(choose_device(args.device), "torch")
    folder = results_folder(args.out, columns["device"])
    table = folder / "end_to_end.csv"
    check_columns(table, StageRow)
    rows = []
    with tempfile.TemporaryDirectory(prefix="minimind-end-to-end-") as place:
        pretrained, tuned = Path(place) / "pretrain", Path(place) / "sft"
        for stage, out, data, tokens, flags in (
            ("pretrain", pretrained, args.data, args.tokens, ["--preset", args.preset]),
            ("sft", tuned, args.chats, args.chat_tokens, ["--from", str(pretrained)]),
        ):
            flags += ["--data", *data] if data else []
            flags += [] if tokens is None else ["--tokens", str(tokens)]
            seconds = train(args, stage, out, flags)
            name = "+".join(Path(path).name for path in data) or "built-in"
            row = StageRow(
                **columns, stage=stage, preset=args.preset, data=name, wall_seconds=seconds, **run_figures(out)
            )
            append(table, [row])
            shutil.copy(out / "loss.png", folder / f"end-to-end-{stage}-{columns['commit'] or 'unknown'}.png")
            rows.append(row)
    return {"csv": str(table), "rows": as_dicts(rows)}


def train(args: Args, stage: str, out: Path, flags: Sequence[str]) -> float:
    """Run the stage's script; seconds of the whole command. ValueError if it fails, after its own messages."""
    command = [sys.executable, str(ROOT / "train" / f"{stage}.py"), "--out", str(out), "--device", args.device, *flags]
    command += ["--compile"] if args.compile else []
    start = time.perf_counter()
    status = subprocess.run(command, stdout=sys.stderr).returncode
    if status:
        raise ValueError(f"train/{stage}.py ended with status {status}; see above")
    return time.perf_counter() - start


def run_figures(folder: Path) -> dict[str, Any]:
    """Columns of StageRow, from the metrics and versions of a finished run."""
    start = json.loads((folder / "versions.json").read_text(encoding="utf-8"))["starts"][-1]
    rows = read_metrics(folder / "metrics.jsonl")
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
    run(main, Args, __doc__)
