"""Running the scripts in train/ as a user does, and reading what they left."""

import json
import os
import re
import runpy
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from rich.console import Console

from minimind import ModelConfig, load_tokenizer
from minimind.data import Corpus
from minimind.modeling import Model
from minimind.training.checkpoint import list_checkpoints, step_of
from minimind.weights import save_weights
from tests import warm

SCRIPT = Path(__file__).parents[2] / "train" / "pretrain.py"
# One thread: the shapes are too small for two, and two suffer when other tests run beside them. The repository is where
# --reward function= finds the tests' own rewards.
ONE_THREAD = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(SCRIPT.parents[1])}
TWO_THREADS = {"OMP_NUM_THREADS": "2", **os.environ}
TINY = ModelConfig(64, 2, 4, 2, 16, 128, qk_norm=True)


def save_origin(config: ModelConfig, folder: Path) -> Path:
    """A checkpoint of random weights with its tokenizer."""
    torch.manual_seed(0)
    save_weights(Model(config), folder)
    load_tokenizer().save(folder)
    return folder


def command(data: Path, out: Path, *extra: str) -> list[str]:
    flags = ["--data", str(data), "--out", str(out), "--seq-len", "64", "--batch-tokens", "512",
             "--evals", "2", "--log-every", "3", "--cache-dir", str(data.parent / "cache"), *extra]  # fmt: skip
    return [sys.executable, str(SCRIPT), *flags]


def torchrun(processes: int, *arguments: str) -> list[str]:
    """The command `arguments` (a script and its flags) under the real launcher."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    return [sys.executable, *launcher, *arguments]


def run(arguments: list[str], env: dict[str, str] = ONE_THREAD) -> subprocess.CompletedProcess:
    return warm.run(arguments, env)


def finish(arguments: list[str], processes: int = 1) -> str:
    """The output of a command that must succeed, on this many processes."""
    answer = run(arguments) if processes == 1 else run_ranks(processes, arguments)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return answer.stdout


def run_ranks(processes: int, arguments: list[str]) -> subprocess.CompletedProcess:
    """Run one process per rank, as torchrun does; the environment tells each about the others, and a failure ends
    all."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    world = {
        "WORLD_SIZE": str(processes),
        "LOCAL_WORLD_SIZE": str(processes),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    ranks = [
        warm.popen(arguments, ONE_THREAD | world | {"RANK": str(n), "LOCAL_RANK": str(n)}, None, warm.PIPE, warm.PIPE)
        for n in range(processes)
    ]
    deadline = time.monotonic() + 300
    while any(rank.poll() is None for rank in ranks) and time.monotonic() < deadline:
        if any(rank.returncode for rank in ranks):
            break
        time.sleep(0.005)
    for rank in ranks:
        rank.kill()
    outputs = [rank.communicate() for rank in ranks]
    status = next((rank.returncode for rank in ranks if rank.returncode), 0)
    return subprocess.CompletedProcess(arguments, status, *("".join(o[i] or "" for o in outputs) for i in (0, 1)))


def call(script: Path, **flags) -> None:
    """The script's main with these flags, in this process."""
    names = runpy.run_path(str(script))
    assert names["main"](names["Args"](**flags), Console(quiet=True))


def learn(stage: str, place: Path, *flags: str) -> Path:
    """Run a stage with its defaults as a user does who stands in the folder `place`; the run folder it leaves."""
    arguments = [sys.executable, str(SCRIPT.with_name(f"{stage}.py")), *flags]
    answer = subprocess.run(arguments, cwd=place, capture_output=True, text=True, timeout=3600, env=TWO_THREADS)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    return place / re.findall("finished in (.+): see", answer.stdout)[-1]


def lines_of(view: Corpus, file: Path) -> list[dict]:
    """The rows of the one .jsonl file that `view` is a part of."""
    rows = file.read_text(encoding="utf-8").splitlines()
    return [json.loads(rows[view.locate(i)[1]]) for i in range(view.num_documents)]


def reproducible(folder: Path) -> list[dict]:
    rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [{k: v for k, v in row.items() if k != "time"} for row in rows]


def rows_of(folder: Path, kind: str) -> list[dict]:
    return [row for row in reproducible(folder) if row["kind"] == kind]


def as_killed(run: Path, step: int, out: Path) -> Path:
    """A copy of a finished run in the state that a kill after its checkpoint of `step` would have left."""
    shutil.copytree(run, out)
    (out / "finished").unlink()
    for checkpoint in list_checkpoints(out):
        if step_of(checkpoint) > step:
            shutil.rmtree(checkpoint)
    assert step_of(list_checkpoints(out)[-1]) == step
    return out


def last_step(out: Path) -> int:
    """The newest complete training row on the disk."""
    if not (out / "metrics.jsonl").exists():
        return 0
    lines = (out / "metrics.jsonl").read_text().splitlines(keepends=True)
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return max((row["step"] for row in rows if row["kind"] == "train"), default=0)


def kill_after(step: int, arguments: list[str], out: Path) -> None:
    """Start a run, and kill -9 it when `step` is in its metrics."""
    process = warm.popen(arguments, ONE_THREAD, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and last_step(out) < step:
        time.sleep(0.01)  # it reads the file each time, on the processor that the run needs
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL, f"ended before step {step}"


def assert_continues_to_the_bit(arguments: list[str], out: Path, unbroken: Path, *kills: int) -> str:
    """Killed after the steps `kills` and started again, the run in `out` leaves the curve, the samples and the weights
    of `unbroken`. Returns what the last start printed."""
    for step in kills:
        kill_after(step, arguments, out)
    text = finish(arguments)
    assert "continuing after step" in text
    assert reproducible(out) == reproducible(unbroken)
    assert (out / "samples.txt").read_text() == (unbroken / "samples.txt").read_text()
    ours, theirs = (list_checkpoints(folder)[-1] for folder in (out, unbroken))
    weights = sorted(path.name for path in theirs.glob("*.safetensors"))
    assert weights and ours.name == theirs.name
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in weights)
    return text


def assert_same_curve(
    rows: list[dict], truth: list[dict], rel: float, abs: float = 0.0, grad_norm: float = 1e-3
) -> None:
    """Every figure of every step. Where a figure is the share of margins above 0, it is not compared before the second
    step: all margins are 0 there but for rounding, which decides their signs."""
    assert len(rows) == len(truth)
    for row, expected in zip(rows, truth, strict=True):
        assert row.keys() == expected.keys() and row["kind"] == expected["kind"]
        for name in row.keys() - {"kind"}:
            if name.endswith("accuracy") and row["step"] <= 1:
                continue
            bound = grad_norm if name == "grad_norm" else rel
            assert row[name] == pytest.approx(expected[name], rel=bound, abs=abs), (row["step"], name)
