"""A start that is a fork behaves as a process of its own."""

import os
import signal
import subprocess
import sys
import time

import pytest

from tests import warm

ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def script(tmp_path, code: str) -> list[str]:
    (tmp_path / "script.py").write_text(code)
    return [sys.executable, str(tmp_path / "script.py")]


def test_arguments_environment_folder_and_streams_are_its_own(tmp_path):
    (tmp_path / "beside.py").write_text("here = __file__")
    code = """import os, sys, beside
assert __name__ == "__main__" and os.path.dirname(beside.here) == os.path.dirname(sys.argv[0])
print(sys.argv[1:], os.environ.get("ONLY_HERE"), os.getcwd(), repr(sys.stdin.read()))
print("wrong", file=sys.stderr)
"""
    answer = warm.run([*script(tmp_path, code), "a", "b c"], {**ENVIRONMENT, "ONLY_HERE": "yes"}, tmp_path)
    assert answer.stdout == f"['a', 'b c'] yes {tmp_path} ''\n"
    assert (answer.stderr, answer.returncode) == ("wrong\n", 0)


@pytest.mark.parametrize(
    ("code", "status", "message"),
    [
        ("raise SystemExit(7)", 7, ""),
        ("raise SystemExit", 0, ""),
        ("import sys; sys.exit('cannot go on')", 1, "cannot go on\n"),
        ("1 / 0", 1, "ZeroDivisionError: division by zero\n"),
        ("import atexit; atexit.register(print, 'the end')", 0, ""),
        ("import ctypes; ctypes.string_at(0)", -signal.SIGSEGV, ""),
    ],
)
def test_its_end_is_that_of_a_process(code, status, message, tmp_path):
    answer = warm.run(script(tmp_path, code), ENVIRONMENT)
    assert answer.returncode == status and answer.stderr.endswith(message)
    assert ("the end" in answer.stdout) == ("atexit" in code)


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_signals_reach_it(number, tmp_path):
    waiting = script(tmp_path, "import time; print('up', flush=True); time.sleep(60)")
    process = warm.popen(waiting, ENVIRONMENT, stdout=subprocess.PIPE)
    assert process.poll() is None
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(timeout=0.01)
    process.send_signal(number)
    assert process.wait(timeout=20) == -number == process.returncode


def test_an_interrupt_is_a_keyboard_interrupt(tmp_path):
    code = """import time
try:
    print("up", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    print("interrupted")
"""
    marker = tmp_path / "up"
    process = warm.popen(script(tmp_path, f"open({str(marker)!r}, 'w')\n{code}"), ENVIRONMENT, stdout=warm.PIPE)
    while not marker.exists():
        time.sleep(0.001)
    time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20)[0] == "up\ninterrupted\n" and process.returncode == 0


def test_two_at_once_and_modules(tmp_path):
    first = warm.popen(script(tmp_path, "import time; time.sleep(0.2); print(1)"), ENVIRONMENT, stdout=warm.PIPE)
    second = warm.run([sys.executable, "-m", "minimind", "--version"], ENVIRONMENT)
    assert second.stdout.strip().count(".") == 2 and first.communicate()[0] == "1\n"
