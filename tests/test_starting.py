"""Ctrl-C while a script imports: no traceback, and 130, as when it runs."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SCRIPTS = sorted(ROOT.glob("train/*.py"))
# Stands for a package that takes long to import, and for the user who does not wait for it.
SLOW = "import os, signal, time\nos.kill(os.getpid(), signal.SIGINT)\ntime.sleep(60)\n"


@pytest.fixture
def impatient(tmp_path) -> dict[str, str]:
    for name in ("rich", "tokenizers", "torch"):
        (tmp_path / f"{name}.py").write_text(SLOW)
    return {**os.environ, "PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}


@pytest.mark.parametrize(
    "words",
    [*([str(s)] for s in SCRIPTS), ["-m", "minimind", "chat"], ["-m", "minimind.cli", "serve"]],
    ids=lambda words: Path(words[-1]).stem,
)
def test_an_interrupt_during_imports_prints_no_traceback(words, impatient):
    answer = subprocess.run(
        [sys.executable, *words, "--help"],
        env=impatient,
        capture_output=True,
        text=True,
        timeout=60,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # a shell's background job ignores it
    )
    assert (answer.returncode, answer.stderr) == (130, "")


def test_the_interrupt_of_one_who_ignores_it_stays_ignored():
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from minimind.utils.starting import leave_on_interrupt, started\n"
        "leave_on_interrupt(); started()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler); leave_on_interrupt(); started()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)
