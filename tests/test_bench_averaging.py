"""bench/averaging.py: gains by hand, and the command on a model of two layers."""

import csv
import json
from pathlib import Path

import pytest

from bench import averaging
from bench.averaging import Args, AveragingRow, gains, main
from minimind import ModelConfig


def row(schedule: str, seed: int, step: int, span: float, loss: float) -> AveragingRow:
    return AveragingRow("", None, "", "", "poems", "nano", schedule, 4e-3, seed, 10, step, span, 100, loss)


def test_gains_compare_the_ends_of_runs_with_one_seed_and_schedule():
    rows = [row("wsd", 1, 5, 0.0, 9.0), row("wsd", 1, 5, 0.1, 1.0), row("wsd", 1, 10, 0.0, 4.0),
            row("wsd", 1, 10, 0.1, 3.75), row("wsd", 2, 10, 0.0, 4.5), row("wsd", 2, 10, 0.1, 4.75),
            row("constant", 1, 10, 0.0, 5.0), row("constant", 1, 10, 0.2, 4.0)]  # fmt: skip
    assert gains(rows) == {("wsd", 0.1): [0.25, -0.25], ("constant", 0.2): [1.0]}


def test_weights_and_averages_are_measured_and_written(tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(averaging, "ROW", 64)
    monkeypatch.setattr(averaging, "BATCH", 256)
    monkeypatch.setattr(ModelConfig, "preset", lambda name: ModelConfig(32, 1, 2, 1, 16, 48, 6400))
    data = tmp_path / "lines.jsonl"
    data.write_text("".join(json.dumps({"text": f"line {i} of many " * 9}) + "\n" for i in range(60)))
    args = Args((str(data),), tokens=256 * 12, seeds=(1,), schedules=("constant", "wsd"), spans=(0.01, 0.5), evals=2,
                out=str(tmp_path))  # fmt: skip
    with Path(main(args)["csv"]).open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 2 * 2 * 3 and {r["step"] for r in rows} == {"6", "12"}
    ends = {(r["schedule"], float(r["span"])): float(r["heldout_loss"]) for r in rows if r["step"] == "12"}
    assert ends["constant", 0.0] != ends["constant", 0.5] and ends["constant", 0.0] != ends["wsd", 0.0]
    assert ends["constant", 0.01] == pytest.approx(ends["constant", 0.0], abs=1e-6)


@pytest.mark.parametrize("changes", [{"spans": (0.0,)}, {"seeds": ()}, {"tokens": 100}])
def test_unusable_flags_are_refused(changes, tmp_path):
    with pytest.raises(ValueError, match=r"--seeds|--tokens"):
        main(Args(out=str(tmp_path), **changes))
