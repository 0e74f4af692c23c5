"""How `minimind zero` runs a stage: its lines, the time that is left, and a child that ends with its parent."""

from __future__ import annotations

import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from rich.console import Console

import minimind
from minimind.apps.zero import running
from minimind.apps.zero.planning import State, alone_in
from minimind.apps.zero.running import Clock, StageView, run_stage, was_stopped

ROOT = Path(__file__).parents[2]
posix = pytest.mark.skipif(os.name != "posix", reason="signals are POSIX's")


def view() -> tuple[StageView, io.StringIO]:
    shown = io.StringIO()
    return StageView(Console(file=shown, width=200), "sft 2/3", Clock(own=100.0, later=50.0)), shown


def run(script: Path, tmp_path: Path, *flags: str) -> tuple[int, str, float]:
    """(exit status, lines, seconds that were counted) of a stage."""
    spent: list[float] = []
    mine, shown = view()
    quiet = Console(quiet=True)
    status = run_stage([str(script), *flags], tmp_path / "run", tmp_path / "log", mine, quiet, spent.append)
    return status, shown.getvalue(), sum(spent)


def test_steps_are_shown_with_the_time_of_all_stages():
    mine, shown = view()
    mine.line("loss 3 of something: step 1/2")
    mine.line("step 10/100  loss 3.1  ETA 9s")
    first, second = shown.getvalue().splitlines()
    assert first == "loss 3 of something: step 1/2"
    assert second == "sft 2/3: step 10/100  loss 3.1  ETA 9s; all stages 2m20s"  # 90 of 100 s, and 50 s


def test_the_time_that_is_left_follows_the_pace(monkeypatch):
    now = [0.0]
    monkeypatch.setattr(running.time, "monotonic", lambda: now[0])
    clock = Clock(own=100.0, later=50.0)
    clock.left(0, 100)
    now[0] = 20.0  # ten steps, twice as slow as projected: 180 s of this stage, 100 s of the others
    assert clock.left(10, 100) == pytest.approx(280)


def test_a_script_runs_as_it_does_by_itself(tmp_path):
    script = tmp_path / "stage.py"
    script.write_text("import sys\nprint(__name__, sys.argv, sys.path[0])\nprint('é', file=sys.stderr)\nsys.exit(7)\n")
    status, text, seconds = run(script, tmp_path, "--lr", "1")
    assert status == 7 and seconds > 0 and not was_stopped(status)
    assert text.splitlines() == [f"__main__ {[str(script), '--lr', '1']} {tmp_path}", "é"]
    assert (tmp_path / "log").read_text(encoding="utf-8") == text


WAITS = """
import signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: (print("saved", flush=True), sys.exit(130)))
print("ready", flush=True)
time.sleep(60)
"""


@posix
def test_a_program_runs_as_a_module(tmp_path):
    mine, shown = view()
    program = ["-m", "minimind", "--version"]
    assert run_stage(program, tmp_path / "run", tmp_path / "log", mine, Console(quiet=True), lambda s: None) == 0
    assert shown.getvalue().strip() == minimind.__version__


def test_a_stage_ends_with_the_process_that_started_it(tmp_path):
    (tmp_path / "stage.py").write_text(WAITS)
    arguments = [sys.executable, "-m", "minimind.apps.zero.running", str(tmp_path / "stage.py")]
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    process = subprocess.Popen(arguments, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdin is not None
    assert process.stdout.readline() == "ready\n"
    process.stdin.close()  # as the kernel does for a process that was killed
    assert process.stdout.read() == "saved\n" and process.wait(timeout=60) == 130


@posix
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_reaches_the_stage_once_and_spares_the_command(tmp_path, number):
    (tmp_path / "stage.py").write_text(WAITS)
    mine, shown = view()
    mine_line = mine.line

    def line(text: str) -> None:
        mine_line(text)
        if text == "ready":
            os.kill(os.getpid(), number)

    mine.line = line  # type: ignore[method-assign]
    command = [str(tmp_path / "stage.py")]
    before = signal.signal(number, signal.default_int_handler)  # a job of a shell's background ignores SIGINT
    try:
        status = run_stage(command, tmp_path / "run", tmp_path / "log", mine, Console(quiet=True), lambda _: None)
    finally:
        signal.signal(number, before)
    assert was_stopped(status) and shown.getvalue() == "ready\nsaved\n"


def test_two_do_not_work_in_one_folder(tmp_path):
    refused = pytest.raises(ValueError, match="another minimind zero works in it")
    with alone_in(tmp_path / "out"), refused, alone_in(tmp_path / "out"):
        pass
    with alone_in(tmp_path / "out"):
        pass


def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path / "mine.txt").write_text("")
    with pytest.raises(ValueError, match="not empty, and no folder of minimind zero"):
        State.open(tmp_path, {})
    (tmp_path / "zero.json").write_text("{")
    with pytest.raises(ValueError, match=r"zero\.json: damaged; put it back"):
        State.open(tmp_path, {})
