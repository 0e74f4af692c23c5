"""train/pretrain.py under torchrun on the CPU: the curve does not depend on the processes or the strategy."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minimind import load_model
from minimind.training.checkpoint import list_checkpoints, load_trainer_state
from minimind.training.parallel import Parallel
from tests.training.runs import ONE_THREAD, SCRIPT, command, finish, last_step, reproducible, run, torchrun

STEPS = 12
# float32 and AdamW, or rounding grows; no clipping, as a float32 norm on a CPU is good to 5e-5 only
FLAGS = ["--tokens", str(512 * STEPS), "--precision", "fp32", "--optimizer", "adamw", "--grad-clip", "1000",
         "--evals", "1", "--log-every", "1", "--save-every", "4", "--depth-warmup", "0"]  # fmt: skip
DDP, FSDP = ("--parallel", "ddp"), ("--parallel", "fsdp")
slow = pytest.mark.slow


def start_until(step: int, arguments: list[str], out: Path) -> tuple[subprocess.Popen, int]:
    """torchrun of `arguments` on two ranks whose run has written `step`, and the process id of its second rank."""
    launcher = torchrun(2, *arguments[1:])
    process = subprocess.Popen(launcher, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=ONE_THREAD)
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline and process.poll() is None and last_step(out) < step:
        time.sleep(0.005)
    assert process.poll() is None and last_step(out) >= step, "ended too early, or never came there"
    workers = subprocess.run(["pgrep", "-P", str(process.pid), "-f", SCRIPT.name], capture_output=True, text=True)
    return process, max(int(line) for line in workers.stdout.split())


@pytest.fixture(scope="module")
def alone(data, tmp_path_factory) -> Path:
    """The same run in one process without torchrun."""
    out = tmp_path_factory.mktemp("runs") / "alone"
    finish(command(data, out, *FLAGS))
    return out


def assert_same(out: Path, alone: Path, rel: float = 2e-5) -> None:
    """Every figure of every step, once; the weights; one set of samples."""
    rows, expected = reproducible(out), reproducible(alone)
    assert [(r["kind"], r["step"]) for r in rows] == [(r["kind"], r["step"]) for r in expected]
    for row, truth in zip(rows, expected, strict=True):
        assert row.pop("grad_norm", 0) == pytest.approx(truth.pop("grad_norm", 0), rel=1e-3)
        assert row.pop("kind") == truth.pop("kind") and row == pytest.approx(truth, rel=rel)
    for a, b in zip(load_model(out).parameters(), load_model(alone).parameters(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=2e-3)
    assert (out / "samples.txt").read_text(encoding="utf-8").count("=== step") == 2
    assert (out / "loss.png").exists() and (out / "finished").exists()


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (4, ("--profile",)),
        pytest.param(1, DDP, marks=slow),
        pytest.param(2, DDP, marks=slow),
        pytest.param(2, (*DDP, "--micro-tokens", "256"), marks=slow),
        pytest.param(3, DDP, marks=slow),  # does not divide the 8 rows of a batch
        pytest.param(2, (*FSDP, "--micro-tokens", "256"), marks=slow),
        pytest.param(4, (*FSDP, "--replicas", "2"), marks=slow),
        pytest.param(8, (*FSDP, "--replicas", "2"), marks=slow),  # a row each
        pytest.param(2, (*DDP, "--compile", "--recompute"), marks=slow),
        pytest.param(2, (*DDP, "--compile"), marks=slow),
        pytest.param(2, (*FSDP, "--compile"), marks=slow),
        pytest.param(2, (*FSDP, "--recompute"), marks=slow),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, tuple) else str(value),
)
def test_curve_is_that_of_one_process(processes, flags, data, alone, tmp_path):
    text = finish(command(data, tmp_path / "out", *FLAGS, *flags), processes)
    assert text.count("finished in") == text.count("device:") == 1  # rank 0 alone speaks
    assert ("communication" in text) == ("--profile" in flags)
    assert_same(tmp_path / "out", alone)


@pytest.mark.heavy
def test_one_killed_rank_then_another_count_and_strategy(data, alone, tmp_path):
    """kill -9 of one rank ends the run. Other processes continue from its checkpoint, and no line is written twice."""
    out = tmp_path / "out"
    process, worker = start_until(6, command(data, out, *FLAGS, *FSDP), out)
    os.kill(worker, signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0 and not (out / "finished").exists()
    at_four = list_checkpoints(out)[0]
    state = load_trainer_state(at_four)["optimizer"]["state"]
    assert state.keys() == dict(load_model(at_four).named_parameters()).keys()
    text = finish(torchrun(1, *command(data, out, *FLAGS, *DDP)[1:]))
    assert "continuing after step" in text
    assert_same(out, alone)
    starts = json.loads((out / "versions.json").read_text())["starts"]
    assert [s["device"].partition("; ")[2] for s in starts] == ["2 processes, fsdp", "1 processes, ddp"]


@slow
@pytest.mark.parametrize("then", [DDP, FSDP], ids=" ".join)
def test_one_interrupted_rank_stops_all_at_one_step(then, data, alone, tmp_path):
    out = tmp_path / "out"
    process, worker = start_until(5, command(data, out, *FLAGS), out)
    os.kill(worker, signal.SIGINT)
    text = process.communicate(timeout=120)[0].decode()
    assert process.returncode != 0 and "saved; the same command continues" in text
    assert "continuing after step" in finish(command(data, out, *FLAGS, *then), 4)
    assert_same(out, alone)


def test_mixture_of_experts_steps_are_those_of_one_process():
    """Batch-level and sequence-level auxiliary loss, ranks with unequal numbers of targets; see ranks.py."""
    finish([sys.executable, str(Path(__file__).with_name("ranks.py"))], 2)


@pytest.mark.parametrize(
    ("processes", "replicas"), [(3, 1), pytest.param(2, 1, marks=slow), pytest.param(4, 2, marks=slow)]
)
def test_muon_distributes_its_matrices(processes, replicas):
    """Shards that end within a matrix, and stacked experts cut along either dimension; see muon_ranks.py."""
    finish([sys.executable, str(Path(__file__).with_name("muon_ranks.py")), str(replicas)], processes)


@slow
@pytest.mark.parametrize(("processes", "mesh"), [(2, ()), (4, ("--replicas", "2"))], ids=["shards", "mesh"])
def test_muon_steps_on_shards(processes, mesh, data, tmp_path):
    """bf16 and Newton-Schulz on DTensors; rounding grows, so the curves are near, not equal."""
    curves = []
    flags = ["--tokens", str(512 * STEPS), "--precision", "bf16", "--depth-warmup", "0"]
    for name, ranks, strategy in (("one", 1, ()), ("several", processes, (*FSDP, *mesh))):
        finish(command(data, tmp_path / name, *flags, *strategy), ranks)
        curves.append([row["loss"] for row in reproducible(tmp_path / name) if row["kind"] == "train"])
    assert curves[0] == pytest.approx(curves[1], rel=0.02)


def environment(monkeypatch, world: int | None) -> None:
    for name, value in (("WORLD_SIZE", world), ("RANK", 1), ("LOCAL_RANK", 1)):
        if world is None:
            monkeypatch.delenv(name, raising=False)
        else:
            monkeypatch.setenv(name, str(value))


BAD = {
    "no torchrun": (None, ("ddp", 1), "--parallel ddp: start it with `torchrun --standalone --nproc-per-node"),
    "no torchrun for fsdp": (None, ("fsdp", 1), "--parallel fsdp: start it with `torchrun"),
    "copies": (2, ("none", 1), "--parallel none: torchrun started 2 processes"),
    "replicas of ddp": (4, ("auto", 2), "--replicas 2: needs --parallel fsdp"),
    "replicas alone": (None, ("auto", 2), "--replicas 2: needs --parallel fsdp"),
    "remainder": (4, ("fsdp", 3), "--replicas 3: must divide the 4 processes"),
    "none": (4, ("fsdp", 0), "--replicas 0: must divide"),
    "nothing to sum": (None, ("auto", 1, "bf16"), "--reduce-dtype bf16: one process sends no gradients"),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_flags(case, monkeypatch):
    world, arguments, message = BAD[case]
    environment(monkeypatch, world)
    with pytest.raises(ValueError, match=message):
        Parallel.from_env(*arguments)


def test_auto_is_ddp_where_there_are_several(monkeypatch):
    environment(monkeypatch, None)
    assert Parallel.from_env("auto", 1) == Parallel()
    environment(monkeypatch, 2)
    assert Parallel.from_env("auto", 1) == Parallel("ddp", 1, 1, 2)


def test_a_gpu_for_each_process(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    assert Parallel("ddp", 3, 1, 4).choose_device("auto") == torch.device("cuda", 1)
    assert Parallel("ddp", 3, 1, 4).choose_device("cpu") == torch.device("cpu")
    with pytest.raises(ValueError, match="process 3 of this node finds 2 GPUs"):
        Parallel("ddp", 2, 2, 4).choose_device("cuda")
    with pytest.raises(ValueError, match="--device cuda:1: torchrun gives each process its own GPU"):
        Parallel("ddp", 0, 0, 2).choose_device("cuda:1")


@pytest.mark.heavy
def test_too_few_rows_for_the_processes(data, tmp_path):
    answer = run(torchrun(2, *command(data, tmp_path / "out", "--batch-tokens", "64")[1:]))
    assert answer.returncode != 0
    assert "error: --micro-tokens 64: fewer than a row of --seq-len 64 for each of 2 processes" in answer.stdout
    assert answer.stdout.count("error:") == 1 and not (tmp_path / "out").exists()
