"""bench/timelines.py and bench/end_to_end.py, which run whole programs: the pictures and the rows."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bench import end_to_end, timelines


def test_a_timeline_of_decoding(tmp_path):
    args = timelines.Args(what=("decode",), preset="nano", device="cpu", out=str(tmp_path))
    (picture,) = map(Path, timelines.main(args))
    assert picture.read_bytes().startswith(b"\x89PNG")
    table = picture.with_suffix(".txt").read_text()
    assert all(f"│ {part} " in table for part in ("plan", "decode", "sample")) and "nano" in table
    with pytest.raises(ValueError, match="--what eat: unknown"):
        timelines.main(timelines.Args(what=("eat",)))


def test_the_figures_of_a_finished_run(tmp_path):
    rows = [
        {"kind": "eval", "heldout_loss": 9.0, "heldout_bpb": 4.0, "time": {"seconds": 9.0}},
        {"kind": "train", "tokens": 100, "time": {"seconds": 1.0}},
        {"kind": "train", "tokens": 200, "time": {"seconds": 4.0}},
        {"kind": "eval", "heldout_loss": 3.0, "heldout_bpb": 1.5, "heldout_exact": 0.25, "time": {"seconds": 9.0}},
    ]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    starts = [{"attention": "torch"}, {"attention": "flash3"}]
    (tmp_path / "versions.json").write_text(json.dumps({"starts": starts}))
    assert end_to_end.run_figures(tmp_path) == {
        "steps": 2, "tokens": 200, "seconds": 4.0, "tokens_per_second": 50.0, "heldout_before": 9.0,
        "heldout_after": 3.0, "heldout_bpb": 1.5, "correct": 0.25, "attention": "flash3",
    }  # fmt: skip
