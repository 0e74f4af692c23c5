"""Lines and pictures of a run."""

import json
import os
import re
import warnings
from functools import partial
from pathlib import Path

from rich.console import Console

from minimind.training.metrics import plot_figures, plot_losses, plot_rollouts
from minimind.utils.display import caption, say

ROOT_HOME = Path("~root").expanduser()


def test_any_title_is_drawn_without_warnings(tmp_path, capsys, rendered):
    """Titles with Chinese, emoji, dollars and invalid bytes, and gradients that are all zero."""
    train = {"kind": "train", "tokens": 1, "loss": 2.0, "grad_norm": 0.0, "lr": 1e-3}
    heldout = {"kind": "eval", "tokens": 1, "heldout_all": True, "heldout_loss": 2.0, "heldout_gap": 0.5}
    (tmp_path / "metrics.jsonl").write_text(json.dumps(train) + "\n" + json.dumps(heldout) + "\n")
    titles = ["pretrain-nano-唐诗 🦜", "cost_$5_to_$9^", r"a\$b$^{_", "x" * 250, "लिपि ไทย\n\t", "\ud800", "", "$"]
    for title in (*titles, os.fsdecode(b"gbk_\xca\xfd")):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            plot_losses(tmp_path / "metrics.jsonl", tmp_path / "loss.png", title)
            plot_figures(tmp_path / "metrics.jsonl", tmp_path / "gap.png", title, "nats", {"heldout_gap": "the gap"})
        assert not capsys.readouterr().err
        for picture in (tmp_path / "loss.png", tmp_path / "gap.png"):
            assert picture.stat().st_size > 5000
            picture.unlink()


def test_a_caption_can_be_drawn_by_matplotlib(monkeypatch):
    monkeypatch.setattr("matplotlib.font_manager.get_font_names", lambda: ["DejaVu Sans"])
    assert caption("cost_$5, 唐诗三百首 é") == r"cost_\$5, … é"
    assert caption(os.fsdecode(b"gbk_\xca")) == caption("gbk_\ud800") == "gbk_\N{REPLACEMENT CHARACTER}"
    assert caption("run 🦜🦜 of ไทย\nx") == "run … of …x"
    assert caption("a" * 50 + "b" * 50) == "a" * 45 + "…" + "b" * 45
    monkeypatch.setattr("matplotlib.font_manager.get_font_names", lambda: ["Noto Sans CJK SC"])
    assert caption("唐诗 🦜") == "唐诗 …"


def test_a_failed_picture_does_not_fail_the_run(tmp_path, capsys, rendered):
    """Neither a broken row nor a missing folder."""
    metrics = tmp_path / "metrics.jsonl"
    metrics.write_text('{"kind": "eval"}\n{"kin')
    plot_losses(metrics, tmp_path / "loss.png", "x")
    assert re.fullmatch(
        r"\S+loss\.png: not drawn \(\S+metrics\.jsonl:2: not a row of metrics .*\)\n", capsys.readouterr().err
    )
    metrics.write_text("")
    for draw in (plot_losses, partial(plot_figures, unit="", labels={}), plot_rollouts):
        draw(metrics, picture=tmp_path / "absent" / "a.png", title="x")
        assert "a.png: not drawn (" in capsys.readouterr().err


def test_lines_are_shown_as_they_are(capsys):
    say(Console(), "cuda:x [bold] :smile: runs/a:b")
    assert capsys.readouterr().out == "cuda:x [bold] :smile: runs/a:b\n"
