"""Compare whole GRPO steps, from answers to update: ours and the same algorithm as upstream MiniMind runs it.

    python bench/rl.py [--preset nano] [--prompts 8 --samples 8 --prompt 128 --new 128] [--peer ours naive]

Each implementation (bench/training/grpo.py) runs in a process of its own, so that its memory is its own; they take
turns, one step each. An implementation is timed only if the log-probabilities of its first step's answers are right:
compared with a float64 model, they may be wrong by twice the error of plain PyTorch in the same precision. Prompts have
between half of --prompt and --prompt tokens. Every answer has exactly --new tokens, so that the padded batch loses no
time waiting. Weights are random, since speed does not depend on them.

Rows are added to rl.csv in --out. The last line of stdout is JSON.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch
from rich.console import Console
from rich.table import Table

from bench.common.command import check_at_least, check_choices, run, table_console
from bench.common.models import random_model
from bench.common.record import Row, append, as_dicts, check_columns, results_folder, stamp
from bench.common.timing import spread
from bench.common.worker import Worker, take_turn
from bench.training.grpo import IMPLEMENTATIONS, RolloutSetting, RolloutStep, start
from minimind.config import PRESETS, ModelConfig
from minimind.modeling import Model
from minimind.utils.device import choose_device, choose_precision
from minimind.weights import load_model, save_weights

PARTS = ("rollout", "reward", "train")


@dataclass(frozen=True)
class Args:
    """Compare GRPO steps."""

    preset: str = "nano"
    """Shape of the model, a dense one, with random weights."""
    peer: tuple[str, ...] = tuple(IMPLEMENTATIONS)
    """Implementations to compare; ratios are against the last."""
    prompts: int = 8
    """Prompts of a step."""
    samples: int = 8
    """Answers to each."""
    prompt: int = 128
    """Tokens of the longest prompt; the shortest has half as many."""
    new: int = 128
    """Tokens of every answer."""
    turns: int = 3
    """Timed steps of each implementation."""
    threads: int | None = None
    """Threads of each implementation; None: PyTorch's default."""
    device: str = "auto"
    """Device: cpu, cuda, or auto, which takes a GPU if there is one."""
    out: str | None = None
    """Folder of the rows; None: bench/results/DEVICE."""


@dataclass(frozen=True)
class RolloutRow(Row):
    """One implementation.

    status: ok; refused (its log-probabilities are not the model's) or failed, with the reason. seconds: of a step, with
    the 20th and 80th percentile; rollout, reward, train: of its parts; all are medians over the turns.
    tokens_per_second: tokens of the answers / seconds of the whole step. error_ratio: 2 or less passes.
    """

    threads: int
    torch: str | None
    model: str
    peer: str
    prompts: int
    samples: int
    prompt: int
    new: int
    status: str = "ok"
    reason: str = ""
    turns: int = 0
    seconds: float | None = None
    p20: float | None = None
    p80: float | None = None
    rollout: float | None = None
    reward: float | None = None
    train: float | None = None
    tokens_per_second: float | None = None
    peak_mib: float | None = None
    error_ratio: float | None = None


def main(args: Args) -> dict[str, Any]:
    device, threads = _check(args), args.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    columns = stamp(device, "torch") | {
        "threads": threads, "model": args.preset, "prompts": args.prompts, "samples": args.samples,
        "prompt": args.prompt, "new": args.new,
    }  # fmt: skip
    folder = results_folder(args.out, columns["device"])
    check_columns(folder / "rl.csv", RolloutRow)
    with tempfile.TemporaryDirectory(prefix="minimind-rl-") as place:
        model = random_model(ModelConfig.preset(args.preset))
        save_weights(model, Path(place))
        prompts = _prompts(args, model.config.vocab_size)
        setting = RolloutSetting(Path(place), prompts, args.samples, args.new, threads, device)
        rows = [RolloutRow(**columns, peer=name, **fields) for name, fields in measure(args, setting).items()]
    append(folder / "rl.csv", rows)
    show(rows, table_console())
    return {"csv": str(folder / "rl.csv"), "rows": as_dicts(rows)}


def measure(args: Args, setting: RolloutSetting) -> dict[str, dict[str, Any]]:
    """The columns of RolloutRow for every implementation."""
    results: dict[str, dict[str, Any]] = {name: {} for name in args.peer}
    workers = {name: Worker(start, name, setting) for name in args.peer}
    steps: dict[str, list[RolloutStep]] = {name: [] for name in args.peer}

    def drop(name: str, reason: str, status: str = "failed") -> None:
        results[name] |= {"status": status, "reason": reason}
        workers.pop(name).close()

    def check(name: str) -> None:
        ratio = results[name]["error_ratio"] = error_ratio(setting, workers[name].ask(0), name)
        if ratio > 2:
            drop(name, f"its log-probabilities are not the model's: error ratio {ratio:.3g}, above 2", "refused")

    def step(seed: int, name: str) -> None:
        steps[name].append(workers[name].ask(seed))

    take_turn(workers, 0, check, drop)
    for turn in range(1, args.turns + 1):
        take_turn(workers, turn, partial(step, turn), drop)

    def finish(name: str) -> None:
        results[name] |= summary(steps[name], setting) | {"peak_mib": workers[name].ask(None)}
        workers.pop(name).close()

    take_turn(workers, 0, finish, drop)
    return results


def summary(steps: Sequence[RolloutStep], setting: RolloutSetting) -> dict[str, Any]:
    """Columns of RolloutRow for one implementation's steps."""
    median, p20, p80 = spread([sum(step.seconds.values()) for step in steps])
    answers = len(setting.prompts) * setting.samples
    return {
        "turns": len(steps),
        "seconds": median,
        "p20": p20,
        "p80": p80,
        **{name: statistics.median(step.seconds[name] for step in steps) for name in PARTS},
        "tokens_per_second": answers * setting.new / median,
    }


def error_ratio(setting: RolloutSetting, step: RolloutStep, name: str) -> float:
    """The largest error of the implementation's log-probabilities, divided by that of plain PyTorch in its
    precision."""
    dtype = torch.float32 if name != "ours" else choose_precision(setting.device).compute_dtype
    model = load_model(setting.folder)
    error = plain_error = 0.0
    for prompt, ids, log_probs in step.answers:
        truth = _log_probs(model.double(), None, prompt, ids)
        plain = _log_probs(model.float(), dtype, prompt, ids)
        own = torch.tensor(log_probs, dtype=torch.float64)
        error = max(error, (own - truth).abs().max().item())
        plain_error = max(plain_error, (plain - truth).abs().max().item())
    return error / (plain_error + torch.finfo(torch.float32).eps)


@torch.no_grad()
def _log_probs(model: Model, dtype: torch.dtype | None, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """float64 [len(ids)], computed from the full logits."""
    model.compute_dtype = dtype
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    wide = logits if dtype is None else logits.float()
    return wide.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].double()


def show(rows: list[RolloutRow], console: Console) -> None:
    """A table; ratios are against the last row that was timed."""
    first, base = rows[0], next((row for row in reversed(rows) if row.seconds), None)
    table = Table(
        title=f"GRPO step, {first.model}: {first.prompts} x {first.samples} answers of {first.new} tokens, "
        f"prompts of up to {first.prompt}; {first.device}"
    )
    for column in ("", "s", "p20-p80", "ratio", *PARTS, "tokens/s", "MiB", "", "error"):
        table.add_column(column, justify="right" if column else "left", no_wrap=True)
    for row in rows:
        if row.seconds is None or base is None or base.seconds is None:
            console.print(f"{row.peer} {row.status}: {row.reason}", style="red", highlight=False)
            continue
        memory = f"{row.peak_mib / base.peak_mib:.2f}x" if row.peak_mib and base.peak_mib else ""
        table.add_row(
            row.peer, f"{row.seconds:.3g}", f"{row.p20:.3g}-{row.p80:.3g}", f"{base.seconds / row.seconds:.2f}x",
            *(f"{getattr(row, part):.3g}" for part in PARTS), f"{row.tokens_per_second:,.0f}",
            f"{row.peak_mib or 0:,.0f}", memory, f"{row.error_ratio:.2g}",
        )  # fmt: skip
    console.print(table)


def _prompts(args: Args, vocab: int) -> list[list[int]]:
    generator = torch.Generator().manual_seed(0)
    lengths = torch.linspace(max(1, args.prompt // 2), args.prompt, args.prompts).round().int().tolist()
    return [torch.randint(16, vocab, (length,), generator=generator).tolist() for length in lengths]


def _check(args: Args) -> torch.device:
    check_choices("preset", [args.preset], PRESETS)
    if ModelConfig.preset(args.preset).num_experts:
        raise ValueError(f"--preset {args.preset}: must be a dense model; the naive implementation has no experts")
    check_choices("peer", args.peer, IMPLEMENTATIONS)
    sizes = {name: getattr(args, name) for name in ("prompts", "samples", "prompt", "new", "turns")}
    check_at_least(1, **sizes)
    return choose_device(args.device)


if __name__ == "__main__":
    run(main, Args, __doc__)
