"""bench/campaign.py: slices are run once, cut off in time, and do not stop each other; every command exists."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import tyro
from rich.console import Console

from bench import campaign, end_to_end, kernel_check, native_check, throughput, timelines
from bench.campaign import Campaign
from bench.cards.slices import FIRST, LIMIT, NOT_OF_A_CARD, Sizes, Slice, sizes_of, slices
from bench.training.worker import WorkerStep
from minimind.ops import native

ROOT = Path(__file__).parents[1]
CARD = dict(cuda=True, memory=80 * 2**30)


@pytest.fixture
def here(tmp_path) -> Campaign:
    return Campaign(tmp_path, "abc", Console(quiet=True), {}, {"COLOUR": "green"})


def python(name: str, code: str, **fields) -> Slice:
    return Slice(name, (sys.executable, "-c", code), **fields)


def test_slices_are_run_once_and_their_failures_again(here, tmp_path):
    here.go_on(
        [
            python("good one", "import os; print(os.environ['COLOUR'], os.environ['SIZE'])", environment={"SIZE": "4"}),
            python("bad one", "print('what went wrong'); raise SystemExit(3)"),
            Slice("other", ("x",), needs="no-such-program"),
            python("after them", ""),
        ]
    )
    names = "good one", "bad one", "other", "after them"
    assert [here.done(name) for name in names] == [True, False, False, True]
    state = json.loads((tmp_path / "campaign.json").read_text())
    assert state["bad one"]["status"] == "failed: exit status 3"
    assert state["other"]["status"] == "not run: no-such-program is not on PATH"
    assert (tmp_path / state["good one"]["log"]).read_text() == "green 4\n"
    here.commit = "def"
    assert not here.done("good one"), "another commit has to pass by itself"


def test_failures_are_named_at_the_end(here, capsys):
    here.console = Console()
    pieces = [python("good one", ""), python("bad one", "raise SystemExit('out of [memory]')"), python("new", "")]
    here.go_on(pieces[:2])
    capsys.readouterr()
    here.report(pieces)
    assert capsys.readouterr().out == "bad one: failed: exit status 1: out of [memory]\n"


def test_nothing_is_begun_that_the_time_does_not_hold(here):
    here.deadline = time.monotonic() + 30
    here.go_on([python("long one", "", minutes=2.0), python("short one", "", minutes=0.1)])
    assert list(here.state) == ["short one"] and here.done("short one")


@pytest.mark.parametrize("by", [pytest.param("limit", marks=pytest.mark.heavy), "deadline"])
def test_a_slice_that_takes_too_long_is_cut_off_with_all_that_it_started(here, tmp_path, monkeypatch, by):
    if by == "limit":
        monkeypatch.setattr(campaign, "LIMIT", 2.0)
    else:
        here.deadline = time.monotonic() + 2.0
    child = f"import os, time; open({str(tmp_path / 'pid')!r}, 'w').write(str(os.getpid())); time.sleep(60)"
    here.run(python("slow", f"import subprocess, sys; subprocess.run([sys.executable, '-c', {child!r}])", minutes=0.0))
    assert here.state["slow"]["status"].startswith("failed: cut off after")
    with pytest.raises(ProcessLookupError):
        pid = int((tmp_path / "pid").read_text())
        for _ in range(50):  # until whoever adopted it has taken its exit status
            os.kill(pid, 0)
            time.sleep(0.1)


def test_every_kernel_is_proven_and_every_question_asked():
    found = slices(**CARD)
    kinds = {"parity", "sanitizer", "throughput", "attention", "decode", "kernels", "rl", "serving", "end", "timeline",
             "loader", "tune"}  # fmt: skip
    assert {piece.name.split()[0] for piece in found} == kinds
    assert len({piece.name for piece in found}) == len(found)
    named = {part for piece in found for part in piece.command}
    tests = {f"tests/kernels/{f.name}" for f in (ROOT / "tests/kernels").glob("test_*.py")}
    left_out = {f"tests/kernels/test_{name}.py" for name in NOT_OF_A_CARD}
    assert tests - named == left_out, "a new file is of a card unless it is said not to be"
    for tool in ("memcheck", "racecheck", "initcheck", "synccheck"):
        checked = [piece for piece in found if piece.name.endswith(tool)]
        assert {piece.command[-1] for piece in checked} == {"bench/native_check.py", "bench/kernel_check.py"}
        assert all(piece.environment["PYTORCH_NO_CUDA_MEMORY_CACHING"] == "1" for piece in checked)
    for piece in found:
        assert 0 < 60 * piece.minutes < LIMIT
    assert tuple(piece.name for piece in found[: len(FIRST)]) == FIRST
    assert sum(piece.minutes for piece in found[: len(FIRST)]) <= 30
    stages = {piece.name for piece in found if piece.name.startswith("throughput")}
    assert stages >= {f"throughput {stage}" for stage in ("sft", "lora", "distill", "reason", "dpo")}
    assert not any(piece.needs for piece in slices(cuda=False, memory=0))


@pytest.mark.parametrize(("cuda", "smoke"), [(True, False), (True, True), (False, False), (False, True)])
def test_every_command_parses(cuda, smoke):
    """With the dataclass of its own script, so that a flag that was renamed does not fail on a rented card."""
    out = ("--out", "somewhere")
    for piece in slices(cuda, 80 * 2**30, ["a.jsonl"], ["b.jsonl"], smoke, out):
        script = next(part for part in piece.command if part.endswith(".py"))
        assert (ROOT / script).exists()
        if script.startswith("bench/"):
            module = importlib.import_module(script.removesuffix(".py").replace("/", "."))
            flags = piece.command[piece.command.index(script) + 1 :]
            args = tyro.cli(module.Args, args=list(flags))
            checked = script in ("bench/native_check.py", "bench/kernel_check.py")
            assert checked or args.out == "somewhere", "rows of a smoke run must not land among the real ones"


def test_a_small_card_gets_small_batches():
    large, small = sizes_of(True, 80 * 2**30, False), sizes_of(True, 24 * 2**30, False)
    assert isinstance(large, Sizes) and small.rows < large.rows
    dpo = next(piece for piece in slices(True, 24 * 2**30) if piece.name == "throughput dpo")
    assert dpo.command[dpo.command.index("--rows") + 1] == "8"  # as many positions as 16 rows of 512


def test_an_unknown_slice_is_refused_and_the_list_runs_nothing(capsys):
    with pytest.raises(ValueError, match="--only nonsense: no slice"):
        campaign.main(campaign.Args(only=("nonsense",), list=True, device="cpu"))
    assert campaign.main(campaign.Args(list=True, device="cpu")) == 0
    assert "parity kernels" in capsys.readouterr().out


def test_a_peer_that_dies_takes_no_other_along(monkeypatch):
    class Fake:
        def __init__(self, name, setting):
            self.name, self.steps = name, []
            if name == "at once":
                raise ValueError("--peer at once: its process died")

        def run(self, count, counts):
            self.steps += [WorkerStep(1.0, 1.0, 0.0, 0, 8)] * (count if counts else 0)
            if self.name == "later" and len(self.steps) > 2:
                raise ValueError("--peer later: its process died")

    monkeypatch.setattr(throughput, "Worker", Fake)
    args = throughput.Args(steps=6, turn=2)
    setting = SimpleNamespace(stage="sft", preset="nano")
    names = ["at once", "well", "later"]
    workers, died = throughput.measure(args, setting, names, Console(quiet=True))
    assert list(workers) == ["well"] and len(workers["well"].steps) == 6
    assert died == [f"sft, nano: --peer {name}: its process died" for name in ("at once", "later")]


def test_what_the_sanitizers_watch_is_checked_too(monkeypatch, capsys):
    args = kernel_check.Args(ops=("rope",), device="cpu")
    assert kernel_check.main(args) == 0 and "rope, D 80, 8/2 heads" in capsys.readouterr().out
    monkeypatch.setattr(kernel_check, "worst_ratio", lambda *_: 2.01)
    assert kernel_check.main(args) == 1 and "2 is allowed" in capsys.readouterr().out
    with pytest.raises(ValueError, match="--ops rop: unknown"):
        kernel_check.main(kernel_check.Args(ops=("rop",), device="cpu"))


@pytest.mark.skipif(native.why_not(torch.device("cpu")) is not None, reason="the native operators are not built")
def test_the_native_operators_are_compared_with_the_reference(monkeypatch):
    monkeypatch.setattr(native_check, "ATTENTION", native_check.ATTENTION[:1])
    assert native_check.main(native_check.Args("cpu")) == 0
    monkeypatch.setattr(native_check, "append", lambda dtype, cache, dim, device, seen=[]: _other(dtype, dim, seen))
    assert native_check.main(native_check.Args("cpu")) == 1


def _other(dtype: torch.dtype, dim: int, seen: list) -> tuple:
    """Arguments of rope_append_kv that are not those of the time before."""
    seen.append(None)
    shape = [torch.zeros(2, 16, 2, dim) for _ in range(2)]
    angles = torch.full((10, dim // 2), float(len(seen)))
    places = torch.tensor([0, 9, 3], dtype=torch.int32), torch.tensor([5, -1, 16])
    qkv = torch.ones(3, 12 * dim)
    return (qkv, angles.cos(), angles.sin(), *places, *shape, 8, None, None, 1e-6, None, None)


def test_a_timeline_of_decoding(tmp_path):
    args = timelines.Args(what=("decode",), preset="nano", device="cpu", out=str(tmp_path))
    (picture,) = timelines.main(args)
    assert picture.read_bytes().startswith(b"\x89PNG")
    said = picture.with_suffix(".txt").read_text()
    assert all(f"│ {part} " in said for part in ("plan", "decode", "sample")) and "nano" in said
    with pytest.raises(ValueError, match="--what eat: unknown"):
        timelines.main(timelines.Args(what=("eat",)))


def test_what_a_run_came_to(tmp_path):
    rows = [
        {"kind": "eval", "heldout_loss": 9.0, "heldout_bpb": 4.0, "time": {"seconds": 9.0}},
        {"kind": "train", "tokens": 100, "time": {"seconds": 1.0}},
        {"kind": "train", "tokens": 200, "time": {"seconds": 4.0}},
        {"kind": "eval", "heldout_loss": 3.0, "heldout_bpb": 1.5, "heldout_exact": 0.25, "time": {"seconds": 9.0}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    starts = [{"attention": "torch"}, {"attention": "flash3"}]
    (tmp_path / "versions.json").write_text(json.dumps({"starts": starts}))
    assert end_to_end.outcome(tmp_path) == {
        "steps": 2, "tokens": 200, "seconds": 4.0, "tokens_per_second": 50.0, "heldout_before": 9.0,
        "heldout_after": 3.0, "heldout_bpb": 1.5, "correct": 0.25, "attention": "flash3",
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.skipif(torch.cuda.is_available(), reason="a card has its own campaign to run")
def test_every_command_runs_at_its_smallest():
    """Minutes: what `bench/campaign.py --smoke` is for."""
    command = [sys.executable, "bench/campaign.py", "--smoke", "--device", "cpu"]
    answer = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert answer.returncode == 0, answer.stdout
