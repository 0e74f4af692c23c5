"""Pictures and lines that a run shows."""

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from functools import partial

import pytest
from rich.console import Console

from minimind.data.progress import say
from minimind.display import caption
from minimind.stdio import with_home
from minimind.training.figures import plot_figures
from minimind.training.metrics import plot_losses
from minimind.training.rl_view import draw_curves


def test_a_picture_of_anything_is_drawn_without_a_word(tmp_path, capsys):
    """Chinese, emoji, dollars and bytes that are no text in the title, and gradients that are all zero."""
    row = {"kind": "train", "tokens": 1, "loss": 2.0, "grad_norm": 0.0, "lr": 1e-3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    for title in ("pretrain-nano-唐诗 🦜", "cost_$5_to_$9^", os.fsdecode(b"gbk_\xca\xfd")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", title)
        picture = tmp_path / "loss.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and not capsys.readouterr().err
        picture.unlink()


def test_a_title_is_what_matplotlib_can_write(monkeypatch):
    monkeypatch.setattr("matplotlib.font_manager.get_font_names", lambda: ["DejaVu Sans"])
    assert caption("cost_$5, 唐诗三百首 é") == r"cost_\$5, … é"
    assert caption(os.fsdecode(b"gbk_\xca")) == "gbk_\N{REPLACEMENT CHARACTER}"
    monkeypatch.setattr("matplotlib.font_manager.get_font_names", lambda: ["Noto Sans CJK SC"])
    assert caption("唐诗") == "唐诗"


def test_a_picture_fails_no_run(tmp_path, capsys):
    """Neither by a row that is none nor by a folder that is gone."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"kind": "eval"}\n{"kin')
    plot_losses(metrics, tmp_path / "loss.png", "x")
    assert re.fullmatch(
        r"\S+loss\.png: not drawn \(\S+metrics\.jsonl:2: no row of metrics .*\)\n", capsys.readouterr().err
    )
    metrics.write_text("")
    for draw in (plot_losses, partial(plot_figures, unit="", labels={}), draw_curves):
        draw(metrics, picture=tmp_path / "absent" / "a.png", title="x")
        assert "a.png: not drawn (" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        (["--out=~/x"], ["--out=/home/me/x"]),
        (["--out", "~/x", "~/a b.jsonl", "a~/b"], ["--out", "/home/me/x", "/home/me/a b.jsonl", "a~/b"]),
        (["--prompt", "~/x", "--prompt=~/x", "--name", "~", "--reward=a=~/b"],
         ["--prompt", "~/x", "--prompt=~/x", "--name", "~", "--reward=a=~/b"]),
    ],
)  # fmt: skip
def test_a_tilde_means_home(given, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert with_home(given) == expected


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
