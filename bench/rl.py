"""The whole GRPO step, answers to update, beside the same algorithm done as upstream MiniMind does it.

    python bench/rl.py [--preset nano] [--prompts 8 --samples 8 --prompt 128 --new 128] [--peer ours naive]

Each contender (bench/training/grpo.py) lives in a process of its own, so that its memory is its own; they take turns, one
step each, so that a machine whose speed drifts slows all of them alike. Log-probabilities of its first step's answers
must be within twice what plain PyTorch in its precision is off, of a float64 model, or it is not timed. Prompts are of
half to all of --prompt tokens; every answer has exactly --new, which spares the padded batch its waiting. Weights are
random: speed does not depend on them.

Rows are added to rl.csv in --out. The last line of stdout is JSON.
"""

from __future__ import annotations

import dataclasses
import datetime
import json
import multiprocessing
import statistics
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import torch
from rich.console import Console
from rich.table import Table

from bench.common.timing import first_line, peak_mib, start_deaf
from bench.decode import random_model
from bench.operators.report import append, check_columns, columns_of, slug
from bench.training.grpo import PEERS, RolloutSetting, RolloutStep
from minimind.config import PRESETS, ModelConfig
from minimind.modeling import Model
from minimind.training.run_folder import versions
from minimind.utils.device import choose_device, choose_precision, describe_device
from minimind.utils.stdio import command_line
from minimind.weights import load_model, save_weights

PARTS = ("rollout", "reward", "train")


@dataclass(frozen=True)
class Args:
    """Measure a GRPO step against upstream's way of it."""

    preset: str = "nano"
    """Shape of the model, with random weights; a dense one."""
    peer: tuple[str, ...] = tuple(PEERS)
    """Who takes part; ratios are against the last."""
    prompts: int = 8
    """Prompts of a step."""
    samples: int = 8
    """Answers to each."""
    prompt: int = 128
    """Tokens of the longest prompt; the shortest has half."""
    new: int = 128
    """Tokens of every answer."""
    turns: int = 3
    """Timed steps of each."""
    threads: int | None = None
    """Of every contender; None: as many as PyTorch takes."""
    device: str = "auto"
    """auto, cpu, cuda."""
    out: str | None = None
    """Folder for the rows; None for bench/results/DEVICE."""


@dataclass(frozen=True)
class RolloutRow:
    """One contender. status: ok; refused, its log-probabilities are not the model's; failed, and `reason`. Seconds of a
    step and of its parts: medians over turns; p20, p80: what 20 and 80 of a hundred steps stay below.
    tokens_per_second: of answers, over the whole step. error_ratio: 2 or less passes."""

    date: str
    commit: str | None
    device: str
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


COLUMNS = columns_of(RolloutRow)


def main(args: Args) -> dict[str, Any]:
    device, threads = _check(args), args.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    found = versions(describe_device(device))
    folder = Path(args.out) if args.out else Path(__file__).parent / "results" / slug(str(found["device"]))
    table = folder / "rl.csv"
    check_columns(table, COLUMNS)
    stamp = {
        "date": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "commit": found["commit"], "device": found["device"], "threads": threads, "torch": found["torch"],
        "model": args.preset, "prompts": args.prompts, "samples": args.samples, "prompt": args.prompt,
        "new": args.new,
    }  # fmt: skip
    with tempfile.TemporaryDirectory(prefix="minimind-rl-") as place:
        model = random_model(ModelConfig.preset(args.preset))
        save_weights(model, Path(place))
        prompts = _prompts(args, model.config.vocab_size)
        setting = RolloutSetting(Path(place), prompts, args.samples, args.new, threads, device)
        rows = [RolloutRow(**stamp, peer=name, **fields) for name, fields in measure(args, setting).items()]
    append(table, rows)
    show(rows, Console(width=None if sys.stdout.isatty() else 120))
    return {"csv": str(table), "rows": [dataclasses.asdict(row) for row in rows]}


def measure(args: Args, setting: RolloutSetting) -> dict[str, dict[str, Any]]:
    """What Row holds of every contender."""
    results: dict[str, dict[str, Any]] = {name: {} for name in args.peer}
    workers = {name: RolloutWorker(name, setting) for name in args.peer}
    turns: dict[str, list[RolloutStep]] = {name: [] for name in args.peer}
    for turn in range(args.turns + 1):
        names = list(workers)
        for name in names[turn % max(1, len(names)) :] + names[: turn % max(1, len(names))]:
            try:
                done = workers[name].step(turn)
            except ContenderError as problem:
                results[name] = {"status": "failed", "reason": str(problem)}
                workers.pop(name)
                continue
            if turn:
                turns[name].append(done)
                continue
            ratio = results[name]["error_ratio"] = error_ratio(setting, done, name)
            if ratio > 2:
                reason = f"its log-probabilities are not the model's: error ratio {ratio:.3g}, above 2"
                results[name] |= {"status": "refused", "reason": reason}
                workers.pop(name).process.terminate()
    for name, worker in workers.items():
        results[name] |= summary(turns[name], setting) | {"peak_mib": worker.finish()}
    return results


def summary(turns: list[RolloutStep], setting: RolloutSetting) -> dict[str, Any]:
    seconds = [sum(turn.seconds.values()) for turn in turns]
    quintiles = statistics.quantiles(seconds, n=5) if len(seconds) > 1 else seconds * 4
    median = statistics.median(seconds)
    answers = len(setting.prompts) * setting.samples
    return {
        "turns": len(turns),
        "seconds": median,
        "p20": quintiles[0],
        "p80": quintiles[-1],
        **{name: statistics.median(turn.seconds[name] for turn in turns) for name in PARTS},
        "tokens_per_second": answers * setting.new / median,
    }


def error_ratio(setting: RolloutSetting, turn: RolloutStep, name: str) -> float:
    """The largest error of the contender's log-probabilities over that of plain PyTorch in its precision."""
    dtype = torch.float32 if name != "ours" else choose_precision(setting.device).compute_dtype
    model = load_model(setting.folder)
    found = plain = 0.0
    for prompt, ids, log_probs in turn.answers:
        truth = _log_probs(model.double(), None, prompt, ids)
        same = _log_probs(model.float(), dtype, prompt, ids)
        own = torch.tensor(log_probs, dtype=torch.float64)
        found = max(found, (own - truth).abs().max().item())
        plain = max(plain, (same - truth).abs().max().item())
    return found / (plain + torch.finfo(torch.float32).eps)


@torch.no_grad()
def _log_probs(model: Model, dtype: torch.dtype | None, prompt: list[int], ids: list[int]) -> torch.Tensor:
    """float64 [len(ids)]: from whole logits."""
    model.compute_dtype = dtype
    logits = model(torch.tensor([prompt + ids])).logits[0, len(prompt) - 1 : -1]
    wide = logits if dtype is None else logits.float()
    return wide.log_softmax(-1).gather(1, torch.tensor(ids)[:, None])[:, 0].double()


class ContenderError(Exception):
    """A contender died; the message is the first line of what it said."""


class RolloutWorker:
    """A contender's process."""

    def __init__(self, name: str, setting: RolloutSetting) -> None:
        context = multiprocessing.get_context("spawn")
        self.pipe, theirs = context.Pipe()
        self.process = context.Process(target=work, args=(name, setting, theirs), daemon=True)
        start_deaf(self.process)
        theirs.close()  # so that a dead worker is an end of file here

    def step(self, seed: int) -> RolloutStep:
        return self._ask(seed)

    def finish(self) -> float | None:
        """Its peak memory in MiB."""
        return self._ask(None)

    def _ask(self, what: int | None) -> Any:
        try:
            self.pipe.send(what)
            answer = self.pipe.recv()
        except (EOFError, BrokenPipeError):
            raise ContenderError("its process died; if memory ran out, take fewer answers") from None
        if isinstance(answer, ContenderError):
            raise answer
        return answer


def work(name: str, setting: RolloutSetting, pipe: Connection) -> None:
    """Given a seed, answers with a Turn; given None, with its peak memory in MiB."""
    torch.set_num_threads(setting.threads)
    try:
        step = PEERS[name](setting)
        while (seed := pipe.recv()) is not None:
            pipe.send(step(seed))
        pipe.send(peak_mib(setting.device))
    except EOFError:  # the one who asked is gone
        return
    except Exception as problem:  # a contender that dies is a result, not the end of the run
        pipe.send(ContenderError(first_line(problem)))


def show(rows: list[RolloutRow], console: Console) -> None:
    """Ratios against the last row that was timed."""
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
    if args.preset not in PRESETS:
        raise ValueError(f"--preset {args.preset}: unknown; choose from {', '.join(PRESETS)}")
    if ModelConfig.preset(args.preset).num_experts:
        raise ValueError(f"--preset {args.preset}: the naive contender knows dense models alone")
    for name in args.peer:
        if name not in PEERS:
            raise ValueError(f"--peer {name}: unknown; choose from {', '.join(PEERS)}")
    for flag in ("prompts", "samples", "prompt", "new", "turns"):
        if getattr(args, flag) < 1:
            raise ValueError(f"--{flag} {getattr(args, flag)}: counts from 1")
    return choose_device(args.device)


if __name__ == "__main__":
    try:
        outcome = main(command_line(Args, __doc__))
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(json.dumps(outcome))
