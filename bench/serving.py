"""The server under load: many clients stream answers at once, and every answer is checked.

    python bench/serving.py [--preset nano | --model FOLDER] [--clients 64] [--seconds 60]

Each client asks one prompt after the other and reads the stream to its end. An answer must be, to the last character,
the one that its prompt gets alone in an engine; that is why the server computes in float32, where the two are the same
(in bfloat16 a batch of another size rounds otherwise, and one answer in some fifty takes another word somewhere).
Clients and server share the machine. Speed does not depend on the weights: a preset's are random.

A row is added to serving.csv in --out, and a picture is drawn beside it. The last line of stdout is JSON; the exit
status is 1 where an answer was lost or mixed up.
"""

from __future__ import annotations

import asyncio
import dataclasses
import datetime
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path[0] = str(Path(__file__).parents[1])  # `bench`, and no `kernels` for transformers to find

import httpx
import numpy as np
import torch
from rich.console import Console

from bench.decode import random_model
from bench.operators.report import append, check_columns, slug
from bench.serving_report import COLUMNS, ServingRow, plot
from minimind.config import PRESETS, ModelConfig
from minimind.inference.engine import Engine
from minimind.inference.requests import Request, SamplingParams
from minimind.modeling import Model
from minimind.tokenization import load_tokenizer
from minimind.training.run_folder import versions
from minimind.utils.device import choose_device, describe_device
from minimind.utils.stdio import command_line
from minimind.weights import load_model, save_weights

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Args:
    """Measure the server under load."""

    preset: str = "nano"
    """Shape of the model, with random weights."""
    model: str | None = None
    """A run folder or checkpoint instead of --preset."""
    clients: int = 64
    """Streams at a time."""
    seconds: float = 60.0
    """No request begins later; those that run are read to their end."""
    max_batch: int = 32
    """Of the server."""
    prompt: int = 96
    """Longest prompt, tokens; the shortest has 8."""
    new: int = 96
    """Longest answer, tokens; the shortest has 16."""
    prompts: int = 2
    """Different ones of each client."""
    threads: int | None = None
    """Of the server; None: as many as PyTorch takes."""
    device: str = "auto"
    """auto, cpu, cuda."""
    out: str | None = None
    """Folder for the row and the picture; None for bench/results/DEVICE."""


@dataclass(frozen=True)
class Task:
    """A prompt, how many tokens to ask for, and the text that must come."""

    prompt: list[int]
    new: int
    expected: str


@dataclass
class Log:
    """What the clients saw, in seconds since the start."""

    start: float = field(default_factory=time.perf_counter)
    ttft: list[float] = field(default_factory=list)
    gaps: list[float] = field(default_factory=list)
    pieces_at: list[float] = field(default_factory=list)
    rss: list[tuple[float, float]] = field(default_factory=list)
    requests: int = 0
    lost: int = 0
    mixed: int = 0
    tokens: int = 0

    def now(self) -> float:
        return time.perf_counter() - self.start


def main(args: Args) -> dict[str, Any]:
    console = Console(stderr=True)
    device = _check(args)
    threads = args.threads or torch.get_num_threads()
    torch.set_num_threads(threads)
    found = versions(describe_device(device))
    folder = Path(args.out) if args.out else ROOT / "bench" / "results" / slug(str(found["device"]))
    check_columns(folder / "serving.csv", COLUMNS)
    model = load_model(args.model) if args.model else random_model(ModelConfig.preset(args.preset))
    tasks = make_tasks(model.to(device), args)
    console.print(f"{len(tasks)} prompts and the answers they get alone", highlight=False)
    with tempfile.TemporaryDirectory(prefix="minimind-serving-") as place:
        save_weights(model, Path(place))
        load_tokenizer().save(place)
        with server(args, Path(place), threads) as (url, process):
            cpu = time.process_time()
            log = asyncio.run(load(url, process, args, tasks))
            cpu = time.process_time() - cpu
            left = _left(url)
    if left:
        raise RuntimeError(f"{left:g} samples are still in the server, and nobody waits for them")
    row = ServingRow(
        date=datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        commit=found["commit"], device=found["device"], threads=threads, torch=found["torch"],
        model=Path(args.model).name if args.model else args.preset,
        weights="trained" if args.model else "random weights", dtype="fp32", clients=args.clients,
        max_batch=args.max_batch, prompt=args.prompt, new=args.new, client_cpu=cpu / log.now(), **summary(log),
    )  # fmt: skip
    append(folder / "serving.csv", [row])
    picture = folder / f"serving-{found['commit'] or 'unknown'}.png"
    plot(row, log.ttft, log.pieces_at, log.rss, picture)
    return {"csv": str(folder / "serving.csv"), "png": str(picture), **dataclasses.asdict(row)}


def make_tasks(model: Model, args: Args) -> list[Task]:
    """Prompts of random tokens whose answers, each computed alone, are unlike each other. ValueError where a model has
    not that many to give."""
    rng = np.random.default_rng(0)
    wanted, vocab = args.clients * args.prompts, model.config.vocab_size
    engine = Engine(model, load_tokenizer(), dtype=torch.float32, max_batch=1, prefix_cache=False, kv_tokens=4096)
    requests = [
        Request(
            rng.integers(16, vocab, int(rng.integers(8, args.prompt + 1))).tolist(),
            SamplingParams(int(rng.integers(16, args.new + 1)), temperature=0),
        )
        for _ in range(wanted * 3 // 2)
    ]
    tasks: dict[str, Task] = {}
    for request, output in zip(requests, engine.generate(requests), strict=True):
        new = request.params.max_new_tokens
        if output.text and new:
            tasks[output.text] = Task(list(request.prompt), new, output.text)  # type: ignore[arg-type]
    if len(tasks) < wanted:
        raise ValueError(f"the model gives {len(tasks)} different answers, {wanted} are needed; use fewer --clients")
    return list(tasks.values())[:wanted]


@contextmanager
def server(args: Args, folder: Path, threads: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`minimind serve` in a process of its own: (url, process)."""
    cache = 2 * args.max_batch * (args.prompt + args.new)  # soon in use all over: memory then stands still
    flags = {
        "model": folder, "port": 0, "dtype": "fp32", "device": args.device, "max-batch": args.max_batch,
        "max-queue": args.clients, "kv-tokens": cache,
    }  # fmt: skip
    command = [sys.executable, "-m", "minimind.cli", "serve"]
    command += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": str(ROOT)}
    environment.pop("MINIMIND_API_KEY", None)
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment, cwd=folder)
    try:
        assert process.stdout is not None
        found = re.search(r" at (http://\S+)/v1", process.stdout.readline())
        if found is None:
            raise ValueError(f"the server did not start: exit status {process.wait()}")
        yield found[1], process
    finally:
        process.terminate()
        process.wait()


async def load(url: str, process: subprocess.Popen[str], args: Args, tasks: list[Task]) -> Log:
    limits = httpx.Limits(max_connections=args.clients + 1, max_keepalive_connections=args.clients + 1)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as client:
        name = (await client.get("/v1/models")).json()["data"][0]["id"]
        log = Log()
        watcher = asyncio.create_task(_watch(process.pid, log))

        async def one(number: int) -> None:
            for task in itertools.cycle(tasks[number :: args.clients]):
                if log.now() >= args.seconds:
                    return
                await ask(client, name, task, log)

        await asyncio.gather(*(one(number) for number in range(args.clients)))
        watcher.cancel()
    return log


async def ask(client: httpx.AsyncClient, name: str, task: Task, log: Log) -> None:
    """One answer, streamed; the log takes up what came of it."""
    body = {"model": name, "prompt": task.prompt, "max_tokens": task.new, "temperature": 0, "stream": True,
            "stream_options": {"include_usage": True}}  # fmt: skip
    start = last = log.now()
    pieces: list[str] = []
    reason, done, tokens = None, False, 0
    log.requests += 1
    try:
        async with client.stream("POST", "/v1/completions", json=body) as response:
            response.raise_for_status()
            async for line in response.aiter_lines():
                done = done or line == "data: [DONE]"
                if not line.startswith("data: {"):
                    continue
                chunk = json.loads(line.removeprefix("data: "))
                tokens = (chunk.get("usage") or {}).get("completion_tokens", tokens)
                for choice in chunk.get("choices", ()):
                    now = log.now()
                    (log.gaps if pieces else log.ttft).append(now - (last if pieces else start))
                    log.pieces_at.append(now)
                    last = now
                    pieces.append(choice["text"])
                    reason = choice["finish_reason"] or reason
    except httpx.HTTPError:
        done = False
    log.tokens += tokens
    log.lost += not done or reason not in ("stop", "length")
    log.mixed += done and "".join(pieces) != task.expected


def summary(log: Log) -> dict[str, Any]:
    seconds = log.now()
    if not log.ttft or not log.gaps:
        raise ValueError("no answer came: is --seconds too short?")
    ttft, gaps = (np.percentile(values, (50, 99)).tolist() for values in (log.ttft, log.gaps))
    quarter = next((mib for at, mib in log.rss if at >= seconds / 4), None)
    return {
        "seconds": seconds, "requests": log.requests, "lost": log.lost, "mixed": log.mixed, "tokens": log.tokens,
        "tokens_per_second": log.tokens / seconds, "ttft_p50": ttft[0], "ttft_p99": ttft[1], "tpot_p50": gaps[0],
        "tpot_p99": gaps[1], "rss_quarter": quarter, "rss_end": log.rss[-1][1] if log.rss else None,
    }  # fmt: skip


async def _watch(pid: int, log: Log) -> None:
    """The server's resident memory, where /proc tells it."""
    statm = Path(f"/proc/{pid}/statm")
    while statm.exists():
        pages = int(statm.read_text().split()[1])
        log.rss.append((log.now(), pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
        await asyncio.sleep(0.5)


def _left(url: str) -> float:
    """Samples in the queue and in the batch."""
    found = re.findall(
        r"^minimind_requests_(?:waiting|running) (\S+)", httpx.get(f"{url}/metrics", trust_env=False).text, re.MULTILINE
    )
    return sum(map(float, found))


def _check(args: Args) -> torch.device:
    if args.preset not in PRESETS:
        raise ValueError(f"--preset {args.preset}: unknown; choose from {', '.join(PRESETS)}")
    if not 0 < args.seconds < float("inf"):
        raise ValueError(f"--seconds {args.seconds:g}: a number above 0")
    for flag, value, least in (("clients", args.clients, 1), ("prompts", args.prompts, 1), ("prompt", args.prompt, 8),
                               ("new", args.new, 16), ("threads", args.threads or 1, 1)):  # fmt: skip
        if value < least:
            raise ValueError(f"--{flag} {value}: at least {least}")
    return choose_device(args.device)


if __name__ == "__main__":
    try:
        outcome = main(command_line(Args, __doc__))
    except (ValueError, OSError) as problem:
        raise SystemExit(f"error: {problem}") from None
    except KeyboardInterrupt:
        raise SystemExit(130) from None
    print(json.dumps(outcome))
    raise SystemExit(int(outcome["lost"] > 0 or outcome["mixed"] > 0))
