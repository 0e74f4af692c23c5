"""`minimind zero` as a user runs it, on toy data: to its end, killed on the way, and refused."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from filelock import FileLock

from minimind import load_model
from minimind.training.checkpoint import list_checkpoints
from tests.apps.test_zero_report import Page
from tests.training.runs import ONE_THREAD, last_step, reproducible

pytestmark = pytest.mark.heavy
STAGES = "pretrain", "sft"
FLAGS = "--seq-len 64 --batch-tokens 512 --save-every 2 --log-every 1"


@pytest.fixture(scope="module")
def place(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("zero")
    texts = [{"text": f"The number after {i} is {i + 1}, and a cat sat on mat {i}."} for i in range(200)]
    turns = [("user", "What is after {}?"), ("assistant", "It is {}.")]
    chats = [
        {"conversations": [{"role": r, "content": c.format(i + n)} for n, (r, c) in enumerate(turns)]}
        for i in range(200)
    ]
    for name, found in (("text", texts), ("chat", chats)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in found))
    return folder


def command(place: Path, out: str, *more: str) -> list[str]:
    return [
        sys.executable, "-m", "minimind", "zero", "--preset", "nano", "--out", str(place / out),
        "--data", f"pretrain={place / 'text.jsonl'}", f"sft={place / 'chat.jsonl'}",
        "--cache-dir", str(place / "cache"),
        "--flags", f"pretrain={FLAGS} --tokens 8192", f"sft={FLAGS} --epochs 2 --eval-questions 4", *more,
    ]  # fmt: skip


def finish(arguments: list[str]) -> subprocess.CompletedProcess:
    return subprocess.run(arguments, env=ONE_THREAD, capture_output=True, text=True, timeout=600)


@pytest.fixture(scope="module")
def unbroken(place) -> Path:
    began = time.monotonic()
    answer = finish(command(place, "unbroken", "--ppl", str(place / "text.jsonl"), "--export", "hf"))
    (place / "seconds").write_text(str(time.monotonic() - began))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    for told in ("stage 1 of 2, pretrain", "stage 2 of 2, sft", "all stages", "exact answers", "perplexity by context",
                 "exported: "):  # fmt: skip
        assert told in answer.stdout, told
    return place / "unbroken"


def test_it_ends_with_a_model_and_a_page(unbroken):
    figures = json.loads((unbroken / "results.json").read_text())
    assert all(figures[name]["finished"] and figures[name]["tokens"] > 0 for name in STAGES)
    assert figures["pretrain"]["after"]["heldout_loss"] < figures["pretrain"]["before"]["heldout_loss"]
    page = Page((unbroken / "report" / "index.html").read_text(encoding="utf-8"))
    assert "What is after" in " ".join(page.text) and "svg" in page.tags and not page.addresses
    assert json.loads((unbroken / "sft" / "config.json").read_text())["weights"].startswith("step-")


def test_it_is_evaluated_and_exported(unbroken):
    scores = json.loads((unbroken / "evaluation" / "perplexity.json").read_text())["scores"]
    assert [score["context"] for score in scores] == [128, 256, 512, 1024]
    model, exported = (load_model(unbroken / name) for name in ("sft", "export/hf"))
    assert torch.equal(exported.head_weight, model.head_weight)
    assert "Evaluation and export" in (unbroken / "report" / "index.html").read_text(encoding="utf-8")


def test_a_finished_one_is_left_alone_and_other_flags_are_refused(place, unbroken):
    before = {file: file.stat().st_mtime_ns for file in unbroken.glob("*/checkpoints/*/*")}
    answer = finish(command(place, "unbroken"))
    assert answer.returncode == 0 and "sft: finished before" in answer.stdout
    assert before == {file: file.stat().st_mtime_ns for file in unbroken.glob("*/checkpoints/*/*")}
    answer = finish(command(place, "unbroken", "--budget", "2h"))
    assert answer.returncode == 2
    assert answer.stderr.splitlines()[-1].endswith(
        "begun with --budget 5min (now 2h); repeat that command or name another folder"
    )


def start(arguments: list[str]) -> subprocess.Popen:
    def hear() -> None:  # a job of a shell's background ignores Ctrl-C
        signal.signal(signal.SIGINT, signal.default_int_handler)

    streams = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
    return subprocess.Popen(arguments, env=ONE_THREAD, text=True, preexec_fn=hear, **streams)


def wait_for(what, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 300
    while not what():
        assert process.poll() is None and time.monotonic() < deadline, "it ended before it could be killed"
        time.sleep(0.002)


def kill_when(what, arguments: list[str]) -> None:
    process = start(arguments)
    wait_for(what, process)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


def assert_same(out: Path, unbroken: Path) -> None:
    """Both left the same curves and weights."""
    for name in STAGES:
        assert reproducible(out / name) == reproducible(unbroken / name)
        ours, theirs = (list_checkpoints(folder / name)[-1] for folder in (out, unbroken))
        assert (ours / "model.safetensors").read_bytes() == (theirs / "model.safetensors").read_bytes()


@pytest.mark.skipif(os.name != "posix", reason="SIGKILL is POSIX's")
@pytest.mark.slow
def test_killed_anywhere_the_same_command_goes_on(place, unbroken):
    """Killed before the first stage, twice in it, between both stages and in the second, the command still ends with
    the curves and weights of an uninterrupted one. The stage of a killed command stops by itself."""
    out, arguments = place / "killed", command(place, "killed")
    kill_when(lambda: (out / "zero.json").exists(), arguments)
    kill_when(lambda: last_step(out / "pretrain") >= 3, arguments)
    with FileLock(out / "pretrain" / ".lock").acquire(timeout=120):
        assert not (out / "pretrain" / "finished").exists(), "the stage trained on when nobody waited for it"
    kill_when(lambda: last_step(out / "pretrain") >= 9, arguments)
    kill_when(lambda: (out / "pretrain" / "finished").exists(), arguments)
    kill_when(lambda: last_step(out / "sft") >= 2, arguments)
    answer = finish(arguments)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "pretrain: finished before" in answer.stdout and "continuing after step" in answer.stdout
    assert_same(out, unbroken)
    assert len(json.loads((out / "zero.json").read_text())["starts"]) == 6


@pytest.mark.skipif(sys.platform != "linux", reason="it finds the stage in /proc")
@pytest.mark.slow
def test_killed_at_ten_random_moments_the_same_command_goes_on(place, unbroken):
    """Moments of the clock: in an import, a measurement, a step or a save. Half of the kills end the stage as well. One
    that ends before its moment is compared, and another begins."""
    seconds = float((place / "seconds").read_text())
    choose, kills, runs = random.Random(24), 0, 0
    while kills < 10:
        runs += 1
        out = place / f"random-{runs}"
        process = start(command(place, out.name))
        while kills < 10:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.communicate(timeout=choose.uniform(0.0, seconds))
                break
            children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
            process.kill()
            for child in children if kills % 2 else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(child), signal.SIGKILL)
            process.communicate()
            kills += 1
            process = start(command(place, out.name))
        text, _ = process.communicate(timeout=600)
        assert process.returncode == 0, text
        assert_same(out, unbroken)


@pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")
def test_ctrl_c_saves_and_leaves_a_page_about_what_there_is(place):
    out, arguments = place / "stopped", command(place, "stopped")
    process = start(arguments)
    wait_for(lambda: last_step(out / "pretrain") >= 3, process)
    second = finish(arguments)
    assert second.returncode == 2 and "another minimind zero works in it" in second.stderr
    process.send_signal(signal.SIGINT)
    text, _ = process.communicate(timeout=120)
    assert process.returncode == 130, text
    assert "saved; the same command continues" in text and "interrupted; the same command continues" in text
    assert "0 of 2 stages finished" in (out / "report" / "index.html").read_text(encoding="utf-8")


def test_a_plan_trains_nothing(place):
    answer = finish(command(place, "planned", "--plan", "--price", "3"))
    assert answer.returncode == 0, answer.stdout + answer.stderr
    assert "plan of --budget 5min: pretrain, sft" in answer.stdout and "cost here" in answer.stdout
    assert not (place / "planned").exists()


def test_what_a_stage_refuses_is_told_in_its_own_line(place):
    (place / "empty.jsonl").write_text("")
    answer = finish(command(place, "bad", "--data", f"pretrain={place / 'empty.jsonl'}"))
    assert answer.returncode == 2 and "error: pretrain: " in answer.stderr
    assert not (place / "bad" / "zero.json").exists()
