"""The start of a command: Ctrl-C during imports, its arguments, and output streams of any kind."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from minimind import cli
from minimind.utils.startup import command_line, with_home

ROOT = Path(__file__).parents[2]
ROOT_HOME = Path("~root").expanduser()
SCRIPTS = sorted(ROOT.glob("train/*.py"))
# Stands for a package that takes long to import, and for a user who presses Ctrl-C meanwhile.
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


def test_an_ignored_interrupt_stays_ignored():
    code = (
        "import signal; signal.signal(signal.SIGINT, signal.SIG_IGN)\n"
        "from minimind.utils.startup import leave_on_interrupt, started\n"
        "leave_on_interrupt(); started()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.SIG_IGN\n"
        "signal.signal(signal.SIGINT, signal.default_int_handler); leave_on_interrupt(); started()\n"
        "assert signal.getsignal(signal.SIGINT) is signal.default_int_handler\n"
    )
    subprocess.run([sys.executable, "-c", code], check=True, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=60)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        (["--out=~/x"], ["--out=/home/me/x"]),
        (["--out", "~/x", "~/a b.jsonl", "a~/b"], ["--out", "/home/me/x", "/home/me/a b.jsonl", "a~/b"]),
        (
            ["--prompt", "~/x", "--prompt=~/x", "--name", "~", "--reward=a=~/b"],
            ["--prompt", "~/x", "--prompt=~/x", "--name", "~", "--reward=a=~/b"],
        ),
        (
            ["--out=~", "--data=~/x.jsonl:2.0", "--prompt=~", "--out=a~", "$HOME/x"],
            ["--out=/home/me", "--data=/home/me/x.jsonl:2.0", "--prompt=~", "--out=a~", "$HOME/x"],
        ),
        (["--out=~root/x", "--out=~root"], [f"--out={ROOT_HOME}/x", f"--out={ROOT_HOME}"]),
    ],
)
def test_a_tilde_is_expanded(arguments, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert with_home(arguments) == expected


def test_an_unknown_home_is_an_error(tmp_path, monkeypatch):
    """It does not become a folder of that name; an existing folder is used."""
    monkeypatch.chdir(tmp_path)
    for arguments in (["--out=~nobody-at-all/x"], ["--out", "~nobody-at-all/x"], ["--out=~nobody-at-all"]):
        with pytest.raises(ValueError, match=r"~nobody-at-all\S*: there is no such user; write \./~ for such a name"):
            with_home(arguments)
    (tmp_path / "~nobody-at-all").mkdir()
    assert with_home(["--out=~nobody-at-all/x"]) == ["--out=~nobody-at-all/x"]


@dataclass
class Flags:
    out: str = ""


def test_every_script_reads_its_flags_in_one_place(monkeypatch, capsys):
    monkeypatch.setenv("HOME", "/home/me")
    monkeypatch.setattr(sys, "argv", ["x", "--out=~/y"])
    assert command_line(Flags, None).out == "/home/me/y"
    monkeypatch.setattr(sys, "argv", ["x", "--out=~nobody-at-all/y"])
    with pytest.raises(SystemExit) as stopped:
        command_line(Flags, None)
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: --out ~nobody-at-all/y: ")
    monkeypatch.setattr(sys, "argv", ["minimind", "chat", "--model=~nobody-at-all/y"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    assert stopped.value.code == 2 and capsys.readouterr().err.startswith("error: --model ~nobody-at-all/y: ")
    for folder in ("train", "bench", "minimind"):
        for path in (ROOT / folder).rglob("*.py"):
            if path.name not in ("startup.py", "cli.py"):
                assert "tyro.cli(" not in path.read_text(encoding="utf-8"), path


def test_output_in_an_encoding_without_a_character():
    code = (
        "from rich.console import Console; from minimind.utils.display import say; "
        "from minimind.utils.startup import prepare_output; prepare_output(); say(Console(), '诗 caf\\u00e9')"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True
    )
    assert (answer.returncode, answer.stdout) == (0, "\\u8bd7 caf\\xe9\n"), answer.stderr


@pytest.mark.parametrize("place", [">&- 2>&-", ">/dev/full"])
def test_an_unwritable_output_gives_no_traceback(tmp_path, place):
    """The script's error can only go to standard error, if that is open."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    code = (
        "from minimind.training.arguments import StageArgs; from minimind.training.job import run_script; "
        "from minimind.utils.display import say; run_script(lambda args, console: say(console, 'x'), StageArgs, '')"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {place}"
    answer = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in answer.stderr
    if "full" in place:
        assert answer.returncode == 2 and "left on device; free some space, then" in answer.stderr


def test_the_command_without_arguments_imports_nothing_heavy():
    code = "import sys, minimind.cli; print([m for m in ('numpy', 'torch', 'rich') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout == "[]\n", answer.stderr


def test_help_fills_its_lines(monkeypatch, capsys):
    """Its lines do not break where those of the source's docstrings do, in scripts and in commands."""
    from train.pretrain import Args

    monkeypatch.setenv("COLUMNS", "200")
    monkeypatch.setattr(sys, "argv", ["pretrain.py", "--help"])
    for show in (lambda: command_line(Args, "Words."), lambda: cli.run(["zero", "--help"])):
        with pytest.raises(SystemExit):
            show()
    lines = capsys.readouterr().out.splitlines()
    assert any("rows of this file twice as often" in line for line in lines)
    assert any("the stages and their tokens" in line for line in lines)


def test_help_into_a_closed_pipe_is_no_traceback():
    command = f"{shlex.quote(sys.executable)} train/tokenizer.py --help | true"
    answer = subprocess.run(["bash", "-o", "pipefail", "-c", command], cwd=ROOT, capture_output=True, text=True)
    assert (answer.returncode, answer.stderr) == (0, "")
