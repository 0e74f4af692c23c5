"""Pictures and lines that a run shows."""

import json
import os
import shlex
import subprocess
import sys
import warnings

import pytest
from rich.console import Console

from minimind.data.progress import say
from minimind.training.metrics import plot_losses


def test_a_picture_of_anything_is_drawn_without_a_word(tmp_path):
    """Chinese and emoji in the title, and gradients that are all zero."""
    row = {"kind": "train", "tokens": 1, "loss": 2.0, "grad_norm": 0.0, "lr": 1e-3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "pretrain-nano-唐诗 🦜")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


def test_a_line_that_is_no_row_of_metrics_is_named(tmp_path):
    (tmp_path / "metrics.jsonl").write_text('{"kind": "eval"}\n{"kin')
    with pytest.raises(ValueError, match=r"metrics\.jsonl:2: no row of metrics .*; remove the line"):
        plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", "x")


def test_lines_are_shown_as_they_are(capsys):
    say(Console(), "cuda:x [bold] :smile: runs/a:b")
    assert capsys.readouterr().out == "cuda:x [bold] :smile: runs/a:b\n"


def test_an_encoding_without_a_character_ends_nothing():
    code = (
        "from rich.console import Console; from minimind.data.progress import say; "
        "from minimind.stdio import prepare_output; prepare_output(); say(Console(), '诗 caf\\u00e9')"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONIOENCODING": "ascii"},
        capture_output=True,
        text=True,
    )
    assert (answer.returncode, answer.stdout) == (0, "\\u8bd7 caf\\xe9\n"), answer.stderr


@pytest.mark.parametrize("place", [">&- 2>&-", ">/dev/full"])
def test_an_output_that_takes_nothing_is_no_traceback(tmp_path, place):
    """The script's error has nowhere to go but standard error, if that is open."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    code = (
        "from minimind.training.arguments import StageArgs; from minimind.training.script import run_script; "
        "from minimind.data.progress import say; run_script(lambda args, console: say(console, 'x'), StageArgs, '')"
    )
    command = f"{shlex.quote(sys.executable)} -c {shlex.quote(code)} {place}"
    answer = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert "Traceback" not in answer.stderr
    if "full" in place:
        assert answer.returncode == 2 and "left on device; free some space, then" in answer.stderr


def test_the_command_alone_answers_at_once():
    code = "import sys, minimind.cli; print([m for m in ('numpy', 'torch', 'rich') if m in sys.modules])"
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert answer.stdout == "[]\n", answer.stderr
