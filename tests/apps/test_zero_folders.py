"""The stages of `minimind zero` lie one folder deeper than other runs, and are found all the same."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from minimind.inference.loading import _newest_run
from minimind.training.run_folder import newest_finished


@pytest.fixture
def runs(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number, (name, stage, data) in enumerate(
        [("older", "sft", []), ("zero-5min/sft", "sft", []), ("zero-5min/sums", "sft", ["builtin:arithmetic"])]
    ):
        folder = tmp_path / "runs" / name
        (folder / "checkpoints" / "step-00000001").mkdir(parents=True)
        (folder / "config.json").write_text(json.dumps({"stage": stage, "args": {"data": data}}))
        (folder / "finished").touch()
        for file in (folder / "finished", folder / "checkpoints"):
            os.utime(file, (number, number))
    return tmp_path / "runs"


def test_later_stages_go_on_from_them(runs):
    assert newest_finished("sft") == "runs/zero-5min/sft"
    assert newest_finished("sft", data=("builtin:arithmetic",)) == "runs/zero-5min/sums"


def test_the_chat_opens_them(runs):
    assert _newest_run() == Path("runs/zero-5min/sums")
