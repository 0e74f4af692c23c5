"""bench/optimizers.py: the target and the tokens to it by hand, and the command with finished runs."""

import csv
import json
from dataclasses import replace
from pathlib import Path

import pytest

from bench import optimizers
from bench.optimizers import Args, Run, best_settings, main, planned, target_of, tokens_to, train

CURVE = ((0, 9.0), (100, 5.0), (200, 4.0), (300, 4.5), (400, 3.0))


@pytest.mark.parametrize(
    "target, tokens", [(9.5, 0), (5.0, 100), (4.5, 150), (4.0, 200), (3.5, 300 + 100 * 2 / 3), (2.9, None)]
)
def test_tokens_to_a_loss(target, tokens):
    assert tokens_to(CURVE, target) == pytest.approx(tokens)


def run(optimizer: str, lr: float, seed: int, loss: float) -> Run:
    return Run("poems.jsonl", optimizer, lr, seed, Path(), ((0, 9.0), (1000, loss)))


RUNS = [run("muon", 4e-3, 1, 3.0), run("muon", 4e-3, 2, 3.2), run("adamw", 4e-3, 1, 4.0), run("adamw", 4e-3, 2, 4.2),
        run("adamw", 8e-3, 1, 3.9), run("adamw", 8e-3, 2, 4.1)]  # fmt: skip


def test_the_target_is_the_worse_optimizers_loss_at_its_best_rate():
    assert best_settings(RUNS) == [("muon", 4e-3), ("adamw", 8e-3)]
    assert best_settings([replace(r, lr=1 - r.lr) for r in RUNS]) == [("muon", 0.996), ("adamw", 0.992)]
    assert target_of(RUNS) == 4.1
    assert [tokens_to(r.curve, 4.1) is None for r in RUNS] == [False, False, False, True, False, False]
    assert tokens_to(RUNS[0].curve, 4.1) == pytest.approx(1000 * 4.9 / 6.0)


def write(run: Run, losses: dict[int, float]) -> None:
    """The files of a finished run that the benchmark reads."""
    run.folder.mkdir(parents=True)
    rows = [{"kind": "train", "step": 1, "loss": 1.0}]
    rows += [
        {"kind": "eval", "tokens": t, "heldout_loss": x, "heldout_bpb": x / 2, "heldout_tokens": 77}
        for t, x in losses.items()
    ]
    (run.folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    start = {"commit": "abc", "device": "CPU; one process", "torch": "2"}
    (run.folder / "versions.json").write_text(json.dumps({"starts": [start]}))
    (run.folder / "finished").touch()


def test_finished_runs_are_compared_and_not_repeated(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(optimizers.subprocess, "run", lambda *_, **__: pytest.fail("a finished run was started"))
    data = tmp_path / "poems.jsonl"
    data.write_text("".join(json.dumps({"text": "a line " * (i + 3)}) + "\n" for i in range(30)))
    args = Args(data=(str(data),), seeds=(1, 2), adamw_lr=(8e-3,), runs=str(tmp_path / "runs"), out=str(tmp_path))
    for i, r in enumerate(planned(args, [str(data)])):
        write(r, {0: 9.0, 300: 6.0 - (r.optimizer == "muon"), 600: 4.0 + 0.1 * i})
    rows = main(args)["rows"]
    assert [(r["optimizer"], r["seed"], r["heldout_loss"]) for r in rows] == [
        ("muon", 1, 4.0),
        ("adamw", 1, 4.1),
        ("muon", 2, 4.2),
        ("adamw", 2, 4.3),
    ]
    assert {r["target_loss"] for r in rows} == {4.3} and rows[3]["tokens_to_target"] == 600
    assert rows[0]["tokens_to_target"] == pytest.approx(300 + 300 * 0.7) and rows[0]["commit"] == "abc"
    with (tmp_path / "optimizers.csv").open(encoding="utf-8", newline="") as file:
        assert [r["device"] for r in csv.DictReader(file)] == ["CPU"] * 4
    assert (tmp_path / "optimizers-nano.png").read_bytes().startswith(b"\x89PNG")
    assert "target: 4.300 nats per token" in capsys.readouterr().out


def test_flags_of_a_run(tmp_path, monkeypatch):
    """train/pretrain.py gets every setting of the run; a failed run is an error that names its log."""
    words: list[str] = []

    def call(command, **_):
        words.extend(command)
        return type("Done", (), {"returncode": 0 if len(words) < 30 else 2})()

    monkeypatch.setattr(optimizers.subprocess, "run", call)
    args = Args(tokens=5000, runs=str(tmp_path))
    one = replace(planned(args, ["/data/poems.jsonl"])[0], seed=7)
    train(one, args, 0.25)
    flags = dict(zip(words[2::2], words[3::2], strict=True))
    assert flags["--optimizer"] == "muon" and flags["--lr"] == "0.004" and flags["--seed"] == "7"
    assert flags["--heldout"] == "0.25" and int(flags["--eval-tokens"]) > 1e9 and flags["--tokens"] == "5000"
    with pytest.raises(ValueError, match=r"ended with status 2; see the end of .*poems-nano-5000-muon-0.004-seed1.log"):
        train(planned(args, ["/data/poems.jsonl"])[0], args, 0.25)


def test_rows_need_a_rate(tmp_path):
    with pytest.raises(ValueError, match="--seeds needs a value"):
        main(Args(muon_lr=(), adamw_lr=(), out=str(tmp_path)))
