"""Pictures and lines that a run shows."""

import json
import os
import re
import shlex
import subprocess
import sys
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import pytest
from rich.console import Console

from minimind import cli
from minimind.training.metrics import plot_figures, plot_losses
from minimind.training.rl.view import draw_curves
from minimind.utils.display import caption
from minimind.utils.progress import say
from minimind.utils.stdio import command_line, with_home

ROOT_HOME = Path("~root").expanduser()


def test_a_picture_of_anything_is_drawn_without_a_word(tmp_path, capsys):
    """Chinese, emoji, dollars and bytes that are no text in the title, and gradients that are all zero."""
    row = {"kind": "train", "tokens": 1, "loss": 2.0, "grad_norm": 0.0, "lr": 1e-3}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    titles = ["pretrain-nano-唐诗 🦜", "cost_$5_to_$9^", r"a\$b$^{_", "x" * 250, "लिपि ไทย\n\t", "\ud800", "", "$"]
    for title in (*titles, os.fsdecode(b"gbk_\xca\xfd")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", title)
        picture = tmp_path / "loss.png"
        assert picture.read_bytes().startswith(b"\x89PNG") and not capsys.readouterr().err
        picture.unlink()


def test_a_title_is_what_matplotlib_can_write(monkeypatch):
    monkeypatch.setattr("matplotlib.font_manager.get_font_names", lambda: ["DejaVu Sans"])
    assert caption("cost_$5, 唐诗三百首 é") == r"cost_\$5, … é"
    assert caption(os.fsdecode(b"gbk_\xca")) == caption("gbk_\ud800") == "gbk_\N{REPLACEMENT CHARACTER}"
    assert caption("run 🦜🦜 of ไทย\nx") == "run … of …x"
    assert caption("a" * 50 + "b" * 50) == "a" * 45 + "…" + "b" * 45
    monkeypatch.setattr("matplotlib.font_manager.get_font_names", lambda: ["Noto Sans CJK SC"])
    assert caption("唐诗 🦜") == "唐诗 …"


def test_a_picture_fails_no_run(tmp_path, capsys):
    """Neither by a row that is none nor by a folder that is gone."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"kind": "eval"}\n{"kin')
    plot_losses(metrics, tmp_path / "loss.png", "x")
    assert re.fullmatch(
        r"\S+loss\.png: not drawn \(\S+metrics\.jsonl:2: not a row of metrics .*\)\n", capsys.readouterr().err
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
def test_a_tilde_means_home(given, expected, monkeypatch):
    monkeypatch.setenv("HOME", "/home/me")
    assert with_home(given) == expected


def test_a_home_that_is_not_there(tmp_path, monkeypatch):
    """Rather than a folder of that name. What is there is meant."""
    monkeypatch.chdir(tmp_path)
    for given in (["--out=~nobody-at-all/x"], ["--out", "~nobody-at-all/x"], ["--out=~nobody-at-all"]):
        with pytest.raises(ValueError, match=r"~nobody-at-all\S*: there is no such user; write \./~ for a name"):
            with_home(given)
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
    root = Path(__file__).parents[1]
    for folder in ("train", "bench", "minimind"):
        for path in (root / folder).rglob("*.py"):
            if path.name not in ("stdio.py", "cli.py"):
                assert "tyro.cli(" not in path.read_text(encoding="utf-8"), path


def test_lines_are_shown_as_they_are(capsys):
    say(Console(), "cuda:x [bold] :smile: runs/a:b")
    assert capsys.readouterr().out == "cuda:x [bold] :smile: runs/a:b\n"


def test_an_encoding_without_a_character_ends_nothing():
    code = (
        "from rich.console import Console; from minimind.utils.progress import say; "
        "from minimind.utils.stdio import prepare_output; prepare_output(); say(Console(), '诗 caf\\u00e9')"
    )
    answer = subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "PYTHONIOENCODING": "ascii"}, capture_output=True, text=True
    )
    assert (answer.returncode, answer.stdout) == (0, "\\u8bd7 caf\\xe9\n"), answer.stderr


@pytest.mark.parametrize("place", [">&- 2>&-", ">/dev/full"])
def test_an_output_that_takes_nothing_is_no_traceback(tmp_path, place):
    """The script's error has nowhere to go but standard error, if that is open."""
    if not os.path.exists("/dev/full"):
        pytest.skip("this system has no /dev/full")
    code = (
        "from minimind.training.arguments import StageArgs; from minimind.training.job import run_script; "
        "from minimind.utils.progress import say; run_script(lambda args, console: say(console, 'x'), StageArgs, '')"
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
