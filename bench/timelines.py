"""Where the time of a training step and of a decoding step goes, as pictures: what docs/profiling.md shows.

    python bench/timelines.py [--what train decode] [--preset minimind2-small] [--data FILE...]

train    three steps of train/pretrain.py --profile, AdamW, eager: compiled graphs have no blocks to show
decode   three steps of the engine with --batch sequences, greedy, its parts as spans

Pictures go to timeline-train.png and timeline-decode.png in --out, the tables beside each as .txt. Recording slows
the steps down: their times are for comparing with each other only.
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

from bench.decode import random_model
from bench.operators.report import slug
from minimind.config import PRESETS, ModelConfig
from minimind.inference.engine import Engine
from minimind.inference.requests import Request, SamplingParams
from minimind.training.profiling.profiler import PICTURE, StepProfiler, span
from minimind.training.run_folder import versions
from minimind.utils.device import choose_device, choose_precision, describe_device
from minimind.utils.stdio import command_line

ROOT = Path(__file__).parents[1]
WHAT = ("train", "decode")
# Parts of Engine's step: (object, method, name of the span). What is outside them is the engine's own bookkeeping.
PARTS = {
    "cpu": (("_scheduler", "plan", "plan"), ("_runner", "_decode", "decode"), ("_runner", "sample", "sample")),
    "cuda": (("_scheduler", "plan", "plan"), ("_runner", "step", "decode and sample")),  # one graph
}
TRAINED = 5  # steps; the third to the last are recorded


@dataclass(frozen=True)
class Args:
    """Draw the timelines."""

    what: tuple[str, ...] = WHAT
    """Any of train, decode."""
    preset: str = "minimind2-small"
    """Shape of the model, with random weights."""
    data: tuple[str, ...] = ()
    """To train on; None takes the built-in corpus."""
    rows: int | None = None
    """Rows of 512 tokens in a training step; None for 8 on a CPU and 64 on a GPU."""
    batch: int = 1
    """Sequences that decode together."""
    device: str = "auto"
    """auto, cpu, cuda."""
    out: str | None = None
    """Folder for pictures and tables; None for bench/results/DEVICE."""


def main(args: Args) -> list[Path]:
    """The pictures."""
    for value in args.what:
        if value not in WHAT:
            raise ValueError(f"--what {value}: unknown; choose from {', '.join(WHAT)}")
    if args.preset not in PRESETS:
        raise ValueError(f"--preset {args.preset}: unknown; choose from {', '.join(PRESETS)}")
    for flag, number in (("rows", args.rows or 1), ("batch", args.batch)):
        if number < 1:
            raise ValueError(f"--{flag} {number}: counts from 1")
    device = choose_device(args.device)
    found = versions(describe_device(device))
    folder = Path(args.out) if args.out else Path(__file__).parent / "results" / slug(found["device"])
    folder.mkdir(parents=True, exist_ok=True)
    head = f"{found['device']}; torch {found['torch']}, commit {found['commit']}; {args.preset}"
    pictures = []
    for what in dict.fromkeys(args.what):
        with tempfile.TemporaryDirectory(prefix="minimind-timeline-") as place:
            said = (train if what == "train" else decode)(args, device, Path(place))
            pictures.append(folder / f"timeline-{what}.png")
            shutil.copy(Path(place) / PICTURE, pictures[-1])
        pictures[-1].with_suffix(".txt").write_text(f"{head}\n{said}", encoding="utf-8")
        print(pictures[-1])
    return pictures


def train(args: Args, device: torch.device, place: Path) -> str:
    """Record steps of train/pretrain.py into `place`; what it said about them."""
    rows = args.rows or (64 if device.type == "cuda" else 8)
    flags = {
        "preset": args.preset, "optimizer": "adamw", "batch-tokens": 512 * rows, "tokens": 512 * rows * TRAINED,
        "evals": 1, "heldout": 0, "device": device, "out": place / "run",
    }  # fmt: skip
    given = [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    data = ["--data", *args.data] if args.data else []
    command = [sys.executable, str(ROOT / "train" / "pretrain.py"), "--profile", *given, *data]
    wide = {**os.environ, "COLUMNS": "110"}  # of the tables
    answer = subprocess.run(command, capture_output=True, text=True, env=wide)
    if answer.returncode:
        words = " ".join((answer.stdout + answer.stderr).strip().splitlines()[-1:])
        raise ValueError(f"train/pretrain.py ended with status {answer.returncode}: {words}")
    shutil.copy(place / "run" / "profile" / PICTURE, place / PICTURE)
    lines = answer.stdout.splitlines()
    first = next(i for i, line in enumerate(lines) if "steps of" in line and "recorded" in line)
    last = next(i for i, line in enumerate(lines) if line.startswith("profile:"))
    return "\n".join(lines[first:last]) + "\n"


def decode(args: Args, device: torch.device, place: Path) -> str:
    """Record steps of the engine into `place`; the table of where they went."""
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
    with (place / "said").open("w+", encoding="utf-8") as file:
        console = Console(file=file, width=110)
        profiler = StepProfiler(place, console, first=9)  # the graphs of a GPU are captured in the first
        for step in range(1, 12):
            profiler.begin(step)
            engine.step()
            profiler.end()
        profiler.close()
        file.seek(0)
        said = file.read()
    return said[: said.rindex("profile:")]


def spanned(function: Any, name: str) -> Any:
    """`function` within a span of this name."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        with span(name):
            return function(*args, **kwargs)

    return wrapper


if __name__ == "__main__":
    try:
        main(command_line(Args, __doc__))
    except ValueError as problem:
        raise SystemExit(f"error: {problem}") from None
