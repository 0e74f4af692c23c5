"""Training throughput and peak memory against named peers, in one interleaved run.

    python bench/throughput.py --data FILE... [--preset minimind2-small] [--steps 20]

Each contender lives in a process of its own, so that peak memory is its own too; the processes take turns, a few
steps each, so that a machine whose speed drifts slows all of them alike.

    minimind      this project's step: packed rows, the device's precision, fused forms, no full logits
    minimind-c    the same under torch.compile
    padded-fp32   the same model driven as upstream MiniMind drives it on a CPU: float32, one document a row, padded
                  to --seq-len, full logits, mean loss over unmasked tokens, plain AdamW

tokens/s counts real tokens only; padded tokens/s counts every position computed.
"""

from __future__ import annotations

import json
import multiprocessing
import resource
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any, cast

import numpy as np
import torch
import torch.nn.functional as F
import tyro
from rich.console import Console
from rich.table import Table

from minimind import ops
from minimind.config import ModelConfig
from minimind.data.cache import open_corpus
from minimind.data.corpus import builtin_corpus
from minimind.data.loader import PackedLoader
from minimind.modeling import Model
from minimind.objectives.next_token import TokenBatch, next_token_loss
from minimind.tokenization import load_tokenizer
from minimind.training.device import choose_device, choose_precision, describe_device
from minimind.training.optim import OptimizerName, build_optimizers
from minimind.training.run_folder import versions


@dataclass(frozen=True)
class Args:
    """Measure one training step against its peers."""

    data: tuple[str, ...] = ()
    """As in train/pretrain.py; None takes the built-in corpus."""
    preset: str = "minimind2-small"
    """Model shape."""
    contenders: tuple[str, ...] = ("minimind", "padded-fp32")
    """Which of minimind, minimind-c, padded-fp32 to run; the last is what ratios are against."""
    steps: int = 20
    """Timed steps of each."""
    warmup: int = 2
    """Untimed steps of each."""
    turn: int = 5
    """Steps in a turn."""
    rows: int = 8
    """Rows in a batch."""
    seq_len: int = 512
    """Tokens in a row."""
    optimizer: OptimizerName = "adamw"
    """Of the minimind contenders; the padded peer has AdamW."""
    device: str = "auto"
    """auto, cpu, cuda."""
    json: str | None = None
    """Also write the result to this file."""


Step = Callable[[], tuple[int, int]]  # runs one step, returns (real tokens, computed positions)


def minimind_step(args: Args, device: torch.device, compile_model: bool) -> Step:
    torch.manual_seed(0)
    model = Model(ModelConfig.preset(args.preset)).to(device)
    model.compute_dtype = choose_precision(device).compute_dtype
    trained = cast(Model, torch.compile(model)) if compile_model else model
    optimizer = build_optimizers(model, args.optimizer, 1e-4, 0.1)
    loader = PackedLoader(_corpus(args), args.seq_len, args.rows, seed=0)

    def step() -> tuple[int, int]:
        batch = loader.next_batch()
        arrays = (batch.input_ids, batch.targets, batch.cu_seqlens)
        ids, targets, cu_seqlens = (torch.from_numpy(a).to(device, non_blocking=True) for a in arrays)
        tensors = TokenBatch(ids, targets, cu_seqlens, batch.num_targets)
        loss, aux = next_token_loss(trained, tensors)
        (loss / batch.num_targets + aux).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        return batch.num_targets, args.rows * args.seq_len

    return step


def padded_step(args: Args, device: torch.device) -> Step:
    ops.set_mode("reference")
    torch.manual_seed(0)
    model = Model(ModelConfig.preset(args.preset)).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)
    corpus = _corpus(args)
    order = np.random.default_rng(0).permutation(corpus.num_documents)
    place = 0

    def step() -> tuple[int, int]:
        nonlocal place
        ids = torch.zeros(args.rows, args.seq_len, dtype=torch.int64)
        mask = torch.zeros(args.rows, args.seq_len)
        for row in range(args.rows):
            document = corpus.document(int(order[place % len(order)]))[: args.seq_len]
            place += 1
            ids[row, : len(document)] = torch.from_numpy(document.astype(np.int64))
            mask[row, : len(document)] = 1
        inputs, targets, weights = ids[:, :-1].to(device), ids[:, 1:].to(device), mask[:, 1:].to(device)
        out = model(inputs)
        loss = F.cross_entropy(out.logits.flatten(0, 1), targets.flatten(), reduction="none")
        ((loss * weights.flatten()).sum() / weights.sum() + out.aux_loss).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return int(mask[:, 1:].sum()), args.rows * args.seq_len

    return step


def work(name: str, args: Args, pipe: Connection) -> None:
    """A contender's process: told a number of steps, it answers with seconds and counts of each."""
    device = choose_device(args.device)
    makers: dict[str, Callable[[], Step]] = {
        "minimind": lambda: minimind_step(args, device, False),
        "minimind-c": lambda: minimind_step(args, device, True),
        "padded-fp32": lambda: padded_step(args, device),
    }
    if name not in makers:
        pipe.send(f"--contenders {name}: unknown; choose from {', '.join(makers)}")
        return
    step = makers[name]()
    pipe.send("ready")
    while (count := pipe.recv()) is not None:
        results = []
        for _ in range(count):
            _wait(device)
            start = time.perf_counter()
            real, computed = step()
            _wait(device)
            results.append((time.perf_counter() - start, real, computed))
        pipe.send(results)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    pipe.send(torch.cuda.max_memory_allocated() / 2**20 if device.type == "cuda" else peak)


def main(args: Args) -> dict[str, Any]:
    console = Console(stderr=True)
    _corpus(args)  # tokenize before the clock and before the processes share the cores
    context = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name in args.contenders:
        pipes[name], theirs = context.Pipe()
        process = context.Process(target=work, args=(name, args, theirs), daemon=True)
        process.start()
        theirs.close()  # so that a dead worker is an end of file here
        processes.append(process)
        answer = pipes[name].recv()
        if answer != "ready":
            raise ValueError(answer)
        pipes[name].send(args.warmup)
        pipes[name].recv()
    timings: dict[str, list[tuple[float, int, int]]] = {name: [] for name in args.contenders}
    while len(timings[args.contenders[-1]]) < args.steps:
        for name, pipe in pipes.items():
            pipe.send(min(args.turn, args.steps - len(timings[name])))
            timings[name] += pipe.recv()
        console.print(f"{len(timings[args.contenders[-1]])}/{args.steps} steps", highlight=False)
    device = choose_device(args.device)
    result: dict[str, Any] = {
        "preset": args.preset,
        "shape": [args.rows, args.seq_len],
        "data": [str(d) for d in args.data] or ["built-in"],
        "steps": args.steps,
        "optimizer": args.optimizer,
        **versions(describe_device(device)),
        "contenders": {},
    }
    for name, pipe in pipes.items():
        pipe.send(None)
        result["contenders"][name] = _summary(timings[name], pipe.recv())
    for process in processes:
        process.join()
    return result


def _summary(timings: list[tuple[float, int, int]], peak_mib: float) -> dict[str, Any]:
    seconds = sum(t for t, _, _ in timings)
    quartiles = statistics.quantiles([t for t, _, _ in timings], n=5) if len(timings) > 1 else [seconds]
    return {
        "tokens_per_second": sum(real for _, real, _ in timings) / seconds,
        "padded_tokens_per_second": sum(computed for _, _, computed in timings) / seconds,
        "step_seconds_median": statistics.median(t for t, _, _ in timings),
        "step_seconds_p20": quartiles[0],
        "step_seconds_p80": quartiles[-1],
        "peak_mib": peak_mib,
    }


def show(result: dict[str, Any], args: Args) -> None:
    base = result["contenders"][args.contenders[-1]]
    table = Table(
        title=f"{args.preset}, {args.rows} x {args.seq_len}, {args.steps} steps, {result['device']}"
    )
    for column in ("", "tokens/s", "ratio", "padded tokens/s", "step s, p20-p80", "peak MiB", "ratio"):
        table.add_column(column, justify="right" if column else "left")
    for name, row in result["contenders"].items():
        table.add_row(
            name,
            f"{row['tokens_per_second']:,.0f}",
            f"{row['tokens_per_second'] / base['tokens_per_second']:.2f}x",
            f"{row['padded_tokens_per_second']:,.0f}",
            f"{row['step_seconds_p20']:.2f}-{row['step_seconds_p80']:.2f}",
            f"{row['peak_mib']:,.0f}",
            f"{row['peak_mib'] / base['peak_mib']:.2f}x",
        )
    Console().print(table)


def _corpus(args: Args):
    return open_corpus(list(args.data) or [builtin_corpus()], load_tokenizer())


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()


if __name__ == "__main__":
    parsed = tyro.cli(Args, description=__doc__)
    try:
        outcome = main(parsed)
    except ValueError as problem:
        raise SystemExit(f"error: {problem}") from None
    except EOFError:
        raise SystemExit(
            "error: a contender's process died; most likely memory ran out: fewer --rows"
        ) from None
    show(outcome, parsed)
    if parsed.json:
        with open(parsed.json, "w", encoding="utf-8") as file:
            json.dump(outcome, file, indent=2)
    print(json.dumps(outcome))
