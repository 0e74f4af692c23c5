"""Draw where the time of a training step and of a decoding step goes, for docs/profiling.md.

    python bench/timelines.py [--what train decode] [--preset minimind2-small] [--data FILE...]

    train    three steps of train/pretrain.py --profile with AdamW, not compiled: compiled graphs have no blocks to show
    decode   three greedy steps of the engine with --batch sequences, with the engine's parts as spans

The pictures are timeline-train.png and timeline-decode.png in --out, with the table beside each as .txt. Recording
slows the steps down, so their times can only be compared with each other.
"""

from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch
from rich.console import Console

from bench.common.command import check_at_least, check_choices, run
from bench.common.models import random_model
from bench.common.record import ROOT, results_folder, stamp
from minimind.config import PRESETS, ModelConfig
from minimind.inference.engine import Engine
from minimind.inference.requests import Request, SamplingParams
from minimind.training.profiling import PICTURE, StepProfiler
from minimind.utils.device import choose_device, choose_precision
from minimind.utils.spans import span

WHAT = ("train", "decode")
# Parts of the engine's step: (object, method, name of the span). The rest is the engine's own bookkeeping.
PARTS = {
    "cpu": (("_scheduler", "plan", "plan"), ("_runner", "_decode", "decode"), ("_runner", "sample", "sample")),
    "cuda": (("_scheduler", "plan", "plan"), ("_runner", "step", "decode and sample")),  # one graph
}
STEPS = 5  # of training; the third to the last are recorded


@dataclass(frozen=True)
class Args:
    """Draw the timelines."""

    what: tuple[str, ...] = WHAT
    """Timelines to draw: train, decode."""
    preset: str = "minimind2-small"
    """Shape of the model, with random weights."""
    data: tuple[str, ...] = ()
    """Files to train on; empty: the built-in corpus."""
    rows: int | None = None
    """Rows of 512 tokens in a training step; None: 8 on a CPU, 64 on a GPU."""
    batch: int = 1
    """Sequences decoded together."""
    device: str = "auto"
    """Device: cpu, cuda, or auto, which takes a GPU if there is one."""
    out: str | None = None
    """Folder of the pictures and tables; None: bench/results/DEVICE."""


def main(args: Args) -> list[str]:
    """The paths of the pictures."""
    check_choices("what", args.what, WHAT)
    check_choices("preset", [args.preset], PRESETS)
    check_at_least(1, rows=args.rows, batch=args.batch)
    device = choose_device(args.device)
    columns = stamp(device, "torch")
    folder = results_folder(args.out, columns["device"])
    folder.mkdir(parents=True, exist_ok=True)
    head = f"{columns['device']}; torch {columns['torch']}, commit {columns['commit']}; {args.preset}"
    pictures = []
    for name in dict.fromkeys(args.what):
        picture = folder / f"timeline-{name}.png"
        with tempfile.TemporaryDirectory(prefix="minimind-timeline-") as place:
            table = (train if name == "train" else decode)(args, device, Path(place))
            shutil.copy(Path(place) / PICTURE, picture)
        picture.with_suffix(".txt").write_text(f"{head}\n{table}", encoding="utf-8")
        pictures.append(str(picture))
    return pictures


def train(args: Args, device: torch.device, place: Path) -> str:
    """Record steps of train/pretrain.py into `place`; the table that it prints."""
    rows = args.rows or (64 if device.type == "cuda" else 8)
    flags = {
        "preset": args.preset, "optimizer": "adamw", "batch-tokens": 512 * rows, "tokens": 512 * rows * STEPS,
        "evals": 1, "heldout": 0, "device": device, "out": place / "run",
    }  # fmt: skip
    command = [sys.executable, str(ROOT / "train" / "pretrain.py"), "--profile"]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    command += ["--data", *args.data] if args.data else []
    environment = {**os.environ, "COLUMNS": "110"}  # the width of the table
    answer = subprocess.run(command, capture_output=True, text=True, env=environment)
    if answer.returncode:
        message = " ".join((answer.stdout + answer.stderr).strip().splitlines()[-1:])
        raise ValueError(f"train/pretrain.py ended with status {answer.returncode}: {message}")
    shutil.copy(place / "run" / "profile" / PICTURE, place / PICTURE)
    lines = answer.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if "steps of" in line and "recorded" in line)
    last = next(i for i, line in enumerate(lines) if line.startswith("profile:"))
    return "\n".join(lines[first:last]) + "\n"


def decode(args: Args, device: torch.device, place: Path) -> str:
    """Record steps of the engine into `place`; the table of where their time went."""
    precision = choose_precision(device)
    model = random_model(ModelConfig.preset(args.preset)).to(device)
    engine = Engine(
        model, None, dtype=precision.compute_dtype, max_batch=args.batch, max_context=512, prefix_cache=False
    )
    for owner, method, name in PARTS[device.type]:
        part: Any = getattr(engine, owner)
        setattr(part, method, spanned(getattr(part, method), name))
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(16, model.config.vocab_size, (args.batch, 128), generator=generator)
    params = SamplingParams(max_new_tokens=64, temperature=0.0, ignore_eos=True)
    for row in prompts.tolist():
        engine.submit(Request(row, params))
    while sum(engine.stats().finished.values()) == 0 and engine.stats().running < args.batch:
        engine.step()
    with (place / "table").open("w+", encoding="utf-8") as file:
        console = Console(file=file, width=110)
        profiler = StepProfiler(place, console, first=9)  # a GPU's graphs are captured in the earlier steps
        for step in range(1, 12):
            profiler.begin(step)
            engine.step()
            profiler.end()
        profiler.close()
        file.seek(0)
        output = file.read()
    return output[: output.rindex("profile:")]


def spanned(function: Any, name: str) -> Any:
    """`function` within a span of this name."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with span(name):
            return function(*args, **kwargs)

    return wrapper


if __name__ == "__main__":
    run(main, Args, __doc__)
