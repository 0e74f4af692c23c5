"""Measure the server under load: many clients stream answers at once, and every answer is checked.

    python bench/serving.py [--preset nano | --model FOLDER] [--clients 64] [--seconds 60]

Each client sends one prompt after another and reads each answer's stream to its end. An answer must equal, to the last
character, the one that its prompt gets alone in an engine. Therefore the server computes in float32, where the two are
the same; in bfloat16, a batch of another size rounds differently, which changes a word in about one of fifty answers.
Clients and server share the machine. Speed does not depend on the weights: those of a preset are random.

A row is added to serving.csv in --out, and a picture is drawn beside it. The last line of stdout is JSON. The exit
status is 1 if an answer was lost or mixed up.
"""

from __future__ import annotations

import asyncio
import dataclasses
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

from bench.common.command import check_at_least, check_choices, run
from bench.common.models import random_model
from bench.common.plots import hide_frame, plt, save
from bench.common.record import ROOT, Row, append, check_columns, results_folder, stamp
from minimind.config import PRESETS, ModelConfig
from minimind.inference.engine import Engine
from minimind.inference.requests import Request, SamplingParams
from minimind.modeling import Model
from minimind.tokenization import load_tokenizer
from minimind.utils.device import choose_device
from minimind.weights import load_model, save_weights


@dataclass(frozen=True)
class Args:
    """Measure the server under load."""

    preset: str = "nano"
    """Shape of the model, with random weights."""
    model: str | None = None
    """A run folder or checkpoint instead of --preset."""
    clients: int = 64
    """Clients that stream at the same time."""
    seconds: float = 60.0
    """Time in which requests begin; the last ones are read to their end."""
    max_batch: int = 32
    """The server's --max-batch."""
    prompt: int = 96
    """Tokens of the longest prompt; the shortest has 8."""
    new: int = 96
    """Tokens of the longest answer; the shortest has 16."""
    prompts: int = 2
    """Different prompts of each client."""
    threads: int | None = None
    """Threads of the server; None: PyTorch's default."""
    device: str = "auto"
    """Device: cpu, cuda, or auto, which takes a GPU if there is one."""
    out: str | None = None
    """Folder of the row and the picture; None: bench/results/DEVICE."""


@dataclass(frozen=True)
class CheckedPrompt:
    """A prompt, the number of tokens to request, and the expected text."""

    ids: list[int]
    new: int
    expected: str


@dataclass(frozen=True)
class ServingRow(Row):
    """One run.

    seconds: of the load. ttft: seconds from a request to its first text; tpot: seconds between two pieces of its text.
    requests: all of them; lost: those that broke off or failed; mixed: those whose answer differs from the one that
    their prompt gets alone. rss: MiB of the server after a quarter of the time and at the end. client_cpu: processors
    that the clients took from the server.
    """

    threads: int
    torch: str | None
    model: str
    weights: str
    dtype: str
    clients: int
    max_batch: int
    prompt: int
    new: int
    seconds: float
    requests: int
    lost: int
    mixed: int
    tokens: int
    tokens_per_second: float
    ttft_p50: float
    ttft_p99: float
    tpot_p50: float
    tpot_p99: float
    rss_quarter: float | None
    rss_end: float | None
    client_cpu: float


@dataclass
class LoadLog:
    """The clients' observations, in seconds since the start. rss: (time, MiB of the server)."""

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
    columns = stamp(device, "torch")
    folder = results_folder(args.out, columns["device"])
    check_columns(folder / "serving.csv", ServingRow)
    model = load_model(args.model) if args.model else random_model(ModelConfig.preset(args.preset))
    prompts = make_prompts(model.to(device), args)
    console.print(f"{len(prompts)} prompts and the answers that each gets alone", highlight=False)
    with tempfile.TemporaryDirectory(prefix="minimind-serving-") as place:
        save_weights(model, Path(place))
        load_tokenizer().save(place)
        with server(args, Path(place), threads) as (url, process):
            cpu = time.process_time()
            log = asyncio.run(load(url, process, args, prompts))
            cpu = time.process_time() - cpu
            unfinished = _unfinished(url)
    if unfinished:
        raise RuntimeError(f"the server still has {unfinished:g} requests, although all clients have ended")
    row = ServingRow(
        **columns, threads=threads, model=Path(args.model).name if args.model else args.preset,
        weights="trained" if args.model else "random weights", dtype="fp32", clients=args.clients,
        max_batch=args.max_batch, prompt=args.prompt, new=args.new, client_cpu=cpu / log.now(), **summary(log),
    )  # fmt: skip
    append(folder / "serving.csv", [row])
    picture = folder / f"serving-{columns['commit'] or 'unknown'}.png"
    plot(row, log, picture)
    return {"csv": str(folder / "serving.csv"), "png": str(picture), **dataclasses.asdict(row)}


def failure(outcome: dict[str, Any]) -> str:
    """Empty if every answer was right."""
    wrong = outcome["lost"] or outcome["mixed"]
    return f"{outcome['lost']} answers were lost and {outcome['mixed']} mixed up" if wrong else ""


def make_prompts(model: Model, args: Args) -> list[CheckedPrompt]:
    """Prompts of random tokens with the answers that each gets alone, all different. ValueError if the model does not
    give that many different answers."""
    rng = np.random.default_rng(0)
    count, vocab = args.clients * args.prompts, model.config.vocab_size
    engine = Engine(model, load_tokenizer(), dtype=torch.float32, max_batch=1, prefix_cache=False, kv_tokens=4096)
    requests = [
        Request(
            rng.integers(16, vocab, int(rng.integers(8, args.prompt + 1))).tolist(),
            SamplingParams(int(rng.integers(16, args.new + 1)), temperature=0),
        )
        for _ in range(count * 3 // 2)
    ]
    prompts: dict[str, CheckedPrompt] = {}
    for request, output in zip(requests, engine.generate(requests), strict=True):
        new = request.params.max_new_tokens
        if output.text and new:
            prompts[output.text] = CheckedPrompt(list(request.prompt), new, output.text)  # type: ignore[arg-type]
    if len(prompts) < count:
        raise ValueError(f"the model gives {len(prompts)} different answers, {count} are needed; use fewer --clients")
    return list(prompts.values())[:count]


@contextmanager
def server(args: Args, folder: Path, threads: int) -> Iterator[tuple[str, subprocess.Popen[str]]]:
    """`minimind serve` in a process of its own: (url, process)."""
    cache = 2 * args.max_batch * (args.prompt + args.new)  # soon all in use, so that memory stays constant
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
        address = re.search(r" at (http://\S+)/v1", process.stdout.readline())
        if address is None:
            raise ValueError(f"the server did not start: exit status {process.wait()}")
        yield address[1], process
    finally:
        process.terminate()
        process.wait()


async def load(url: str, process: subprocess.Popen[str], args: Args, prompts: list[CheckedPrompt]) -> LoadLog:
    """Run all clients until their time is over."""
    limits = httpx.Limits(max_connections=args.clients + 1, max_keepalive_connections=args.clients + 1)
    async with httpx.AsyncClient(base_url=url, timeout=120, limits=limits, trust_env=False) as client:
        name = (await client.get("/v1/models")).json()["data"][0]["id"]
        log = LoadLog()
        watcher = asyncio.create_task(_watch(process.pid, log))

        async def run_client(number: int) -> None:
            for prompt in itertools.cycle(prompts[number :: args.clients]):
                if log.now() >= args.seconds:
                    return
                await ask(client, name, prompt, log)

        await asyncio.gather(*(run_client(number) for number in range(args.clients)))
        watcher.cancel()
    return log


async def ask(client: httpx.AsyncClient, name: str, prompt: CheckedPrompt, log: LoadLog) -> None:
    """Stream one answer, and add it to the log."""
    body = {"model": name, "prompt": prompt.ids, "max_tokens": prompt.new, "temperature": 0, "stream": True,
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
    log.mixed += done and "".join(pieces) != prompt.expected


def summary(log: LoadLog) -> dict[str, Any]:
    seconds = log.now()
    if not log.ttft or not log.gaps:
        raise ValueError("no answer came; give more --seconds")
    ttft, gaps = (np.percentile(values, (50, 99)).tolist() for values in (log.ttft, log.gaps))
    quarter = next((mib for at, mib in log.rss if at >= seconds / 4), None)
    return {
        "seconds": seconds, "requests": log.requests, "lost": log.lost, "mixed": log.mixed, "tokens": log.tokens,
        "tokens_per_second": log.tokens / seconds, "ttft_p50": ttft[0], "ttft_p99": ttft[1], "tpot_p50": gaps[0],
        "tpot_p99": gaps[1], "rss_quarter": quarter, "rss_end": log.rss[-1][1] if log.rss else None,
    }  # fmt: skip


async def _watch(pid: int, log: LoadLog) -> None:
    """Record the server's resident memory, if /proc exists."""
    statm = Path(f"/proc/{pid}/statm")
    while statm.exists():
        pages = int(statm.read_text().split()[1])
        log.rss.append((log.now(), pages * os.sysconf("SC_PAGE_SIZE") / 2**20))
        await asyncio.sleep(0.5)


def _unfinished(url: str) -> float:
    """Requests in the server's queue and batch."""
    metrics = httpx.get(f"{url}/metrics", trust_env=False).text
    counts = re.findall(r"^minimind_requests_(?:waiting|running) (\S+)", metrics, re.MULTILINE)
    return sum(map(float, counts))


def _check(args: Args) -> torch.device:
    check_choices("preset", [args.preset], PRESETS)
    if not 0 < args.seconds < float("inf"):
        raise ValueError(f"--seconds {args.seconds:g}: must be above 0")
    check_at_least(1, clients=args.clients, prompts=args.prompts, threads=args.threads)
    check_at_least(8, prompt=args.prompt)
    check_at_least(16, new=args.new)
    return choose_device(args.device)


def plot(row: ServingRow, log: LoadLog, path: Path) -> None:
    """Distribution of the time to the first text, pieces of text per second, and the server's memory."""
    figure, (left, middle, right) = plt.subplots(1, 3, figsize=(12, 3.2), layout="constrained")
    left.plot(np.sort(log.ttft) * 1e3, np.linspace(0, 100, len(log.ttft)), color="#1b6ca8")
    for share, value, side in ((50, row.ttft_p50, "left"), (99, row.ttft_p99, "right")):
        left.plot(1e3 * value, share, "o", color="#d98324", markersize=5)
        left.text(1e3 * value, share - 8, f" p{share}: {1e3 * value:,.0f} ms ", ha=side, fontsize=8)
    left.set(title="requests whose first text came within, %", xlabel="ms")
    counts, edges = np.histogram(log.pieces_at, bins=np.arange(0, max(log.pieces_at) + 1, 1.0))
    middle.plot(edges[:-1], counts, color="#5aa469")
    middle.set(title="pieces of text a second, all clients", xlabel="seconds", ylim=(0, None))
    if log.rss:
        right.plot(*zip(*log.rss, strict=True), color="#a05195")
    right.set(title="memory of the server, MiB", xlabel="seconds", ylim=(0, None))
    for axis in (left, middle, right):
        hide_frame(axis)
        axis.title.set_fontsize(9)
        axis.tick_params(labelsize=8)
    answers = f"{row.requests:,} answers, {row.lost} lost, {row.mixed} mixed, {row.tokens_per_second:,.0f} tokens/s"
    setting = f"{row.model} ({row.weights}), {row.dtype}, {row.device}, {row.commit}"
    save(figure, path, f"{row.clients} streaming clients for {row.seconds:.0f} s: {answers}; {setting}")


if __name__ == "__main__":
    run(main, Args, __doc__, failure)
