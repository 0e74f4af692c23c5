"""bench/throughput.py on a CPU and a few steps: what is counted, written and refused."""

import csv
import dataclasses
import inspect
import json
import os
import subprocess
import sys
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from rich.console import Console

from bench import projection, throughput
from bench.common.record import columns_of
from bench.common.worker import ImplementationError
from bench.throughput import Args, data_of, main, slow_step
from bench.training import implementations
from bench.training.implementations import IMPLEMENTATIONS, Implementation, why_not
from bench.training.report import ThroughputRow, plot, show
from bench.training.stages import ALPHA, BETA, STAGES, Padding, padded_batches, padding_of, upstream_loss
from bench.training.worker import StepCost, _turn
from minimind import ModelConfig, ops
from minimind.modeling import Model
from minimind.objectives.next_token import Distillation, distillation_loss, next_token_loss
from minimind.objectives.preference import dpo, pair_log_probs, preference_loss
from minimind.training.batches import to_device
from minimind.training.stages.dpo import to_device as pairs_to_device

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "words.jsonl"
    path.write_text("".join(json.dumps({"text": "one two three four " * (i % 9 + 1)}) + "\n" for i in range(300)))
    return path


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "chats.jsonl"
    asked = [{"role": "user", "content": f"How many is {i}?"} for i in range(12)]
    said = [{"role": "assistant", "content": f"<think>Count to {i}.</think>It is {i}."} for i in range(12)]
    path.write_text("".join(json.dumps({"conversations": pair}) + "\n" for pair in zip(asked, said, strict=True)))
    return path


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("data") / "pairs.jsonl"
    rows = []
    for i in range(12):
        asked = {"role": "user", "content": f"How many is {i}?"}
        sides = {"chosen": f"It is {i}.", "rejected": "No."}
        rows.append({k: [asked, {"role": "assistant", "content": v}] for k, v in sides.items()})
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def row(**changes) -> ThroughputRow:
    values = dict.fromkeys(columns_of(ThroughputRow)) | {
        "device": "card", "stage": "pretrain", "preset": "minimind2-small", "data": "d", "rows": 8, "seq_len": 512,
        "peer": "ours", "steps": 3, "tokens_per_second": 1000.0, "positions_per_second": 2000.0, "step_seconds": 1.0,
        "p20": 0.9, "p80": 1.1, "peak_mib": 100.0, "loader_share": 0.01, "optimizer": "adamw", "date": "today",
        "padding": 0.5, "attention": "flash3",
    }  # fmt: skip
    return ThroughputRow(**(values | changes))


def run(tmp_path, *flags: str) -> list[dict]:
    """Rows of bench/throughput.py with nano on one thread."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MINIMIND_CACHE": str(tmp_path / "cache")}
    environment.pop("TRITON_INTERPRET", None)
    command = [sys.executable, "bench/throughput.py", "--preset", "nano", "--out", str(tmp_path / "out"), *flags]
    answer = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=300)
    assert answer.returncode == 0, answer.stderr[-3000:]
    return json.loads(answer.stdout.splitlines()[-1])["rows"]


@pytest.mark.heavy
def test_a_run_of_two_stages(data, pairs, tmp_path):
    rows = run(
        tmp_path, "--stage", "pretrain,dpo", "--data", f"pretrain={data}", f"dpo={pairs}", "--peer", "ours-eager",
        "upstream-style", "--steps", "3", "--turn", "2", "--warmup", "1", "--rows", "2", "--seq-len", "96",
    )  # fmt: skip
    assert [(r["stage"], r["peer"]) for r in rows] == [
        (stage, peer) for stage in ("pretrain", "dpo") for peer in ("ours-eager", "upstream-style")
    ]
    for ours, peer in (rows[:2], rows[2:]):
        assert ours["steps"] == peer["steps"] == 3 and ours["graph_breaks"] is None
        assert (ours["attention"], peer["attention"]) == ("documents", "sdpa")
        assert ours["padding"] < 0.2 < peer["padding"], "packed rows are full, padded ones are not"
        for row in (ours, peer):
            computed = row["tokens_per_second"] / row["positions_per_second"]
            assert row["padding"] == pytest.approx(1 - computed)
            assert 150 < row["peak_mib"] < 4000
    assert rows[2]["once_seconds"] > 0 and all(r["once_seconds"] is None for r in (rows[0], rows[1], rows[3]))
    with (tmp_path / "out/throughput.csv").open(encoding="utf-8", newline="") as file:
        assert [r["peer"] for r in csv.DictReader(file)] == ["ours-eager", "upstream-style"] * 2
    (picture,) = (tmp_path / "out").glob("throughput-*.png")
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("stage", STAGES)
def test_both_sides_train_on_the_same_thing(stage, data, chats, pairs, tmp_path, monkeypatch):
    """With every sequence whole, both sides see every token of a pass, and learn from the same targets."""
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path))
    kind = STAGES[stage]
    paths = [str(pairs if kind.pairs else data if stage == "pretrain" else chats)]
    corpus = kind.open(paths, Console(quiet=True))
    number = corpus.num_documents * (2 if kind.pairs else 1)
    batch = next(padded_batches(kind, corpus, number, 64, torch.device("cpu")))
    loader = kind.loader(corpus, 2, 64)
    packed = list(loader.epoch_batches())
    assert batch.real == loader.tokens_per_epoch + sum(getattr(b, "shared", 0) for b in packed)
    assert int(batch.inputs.ne(0).sum()) == batch.real + number, "and the ends, which predict nothing"
    if not kind.pairs:
        assert int(batch.weights.ne(0).sum()) == sum(b.num_targets for b in packed)
        assert float(batch.weights.sum()) == pytest.approx(sum(b.global_weight for b in packed))
    else:
        half = number // 2
        assert not torch.equal(batch.inputs[:half], batch.inputs[half:])
        prompt = (batch.weights[0] == 0).int().argmin()
        assert torch.equal(batch.inputs[0, :prompt], batch.inputs[half, :prompt]), "sides of one pair"


def test_padding_by_hand(data, pairs, tmp_path, monkeypatch):
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path))
    corpus = STAGES["pretrain"].open([str(data)], Console(quiet=True))
    lengths = corpus.lengths(np.arange(corpus.num_documents))
    found = padding_of(STAGES["pretrain"], corpus, 4, 32)
    assert found.padded == pytest.approx(1 - np.minimum(lengths - 1, 32).mean() / 32)
    assert 0 <= found.packed < 0.1 < found.padded


@pytest.mark.parametrize("stage", ["sft", "reason", "distill", "dpo"])
def test_upstreams_loss_equals_ours(stage, chats, pairs, tmp_path, monkeypatch):
    """Upstream's loss over padded rows equals ours over packed rows, apart from the two means of distill."""
    monkeypatch.setenv("MINIMIND_CACHE", str(tmp_path))
    kind = STAGES[stage]
    corpus = kind.open([str(pairs if kind.pairs else chats)], Console(quiet=True))
    number = corpus.num_documents * (2 if kind.pairs else 1)
    padded = next(padded_batches(kind, corpus, number, 64, torch.device("cpu")))
    loader = kind.loader(corpus, number, 64)
    model, other = (Model(ModelConfig.preset("nano")).double() for _ in range(2))
    (host,) = loader.epoch_batches()
    place = pairs_to_device if kind.pairs else to_device
    batch = place(host, torch.device("cpu"))
    frozen = other if kind.pairs or kind.teacher else None
    theirs = upstream_loss(kind, model, frozen, padded)
    with ops.using("reference"):
        if kind.pairs:
            reference, _ = pair_log_probs(other, batch)
            scored = dataclasses.replace(
                batch, reference_chosen=reference.chosen, reference_rejected=reference.rejected
            )
            own, _, _ = preference_loss(model, scored, partial(dpo, beta=BETA))
        elif kind.teacher:
            own, _ = distillation_loss(model, other, batch, Distillation(alpha=ALPHA))
        else:
            own, *_ = next_token_loss(model, batch)
    assert theirs.item() == pytest.approx(own.item() / batch.global_weight, rel=1e-5)


def test_peak_memory_excludes_the_parents():
    """A small child reports little memory although its parent has much; ru_maxrss would be inherited."""
    code = """
import resource, subprocess, sys
held = bytearray(b"x" * (600 << 20))
child = "import torch; from bench.common.timing import peak_mib; print(peak_mib(torch.device('cpu')))"
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10, flush=True)
subprocess.run([sys.executable, "-c", child], check=True)
"""
    answer = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert answer.returncode == 0, answer.stderr
    parent, child = map(float, answer.stdout.split())
    assert parent > 600 and 100 < child < 550


def test_a_slow_step_is_explained():
    steps = [StepCost(1.0, 2.0, 0.1, 10, 5)] * 4 + [StepCost(3.0, 2.5, 0.6, 1000, 5)]
    assert slow_step(steps[:4]) is None
    line = slow_step(steps) or ""
    assert "step 5 took 3 s instead of 1" in line and "0.6 of them in the kernel, 1,000 page faults" in line


@pytest.mark.heavy
def test_ours_has_a_row_with_each_optimizer(data, tmp_path):
    assert Args().peer[:2] == ("ours", "ours-muon")
    flags = ["--steps", "2", "--warmup", "1", "--rows", "2", "--seq-len", "64", "--data", str(data)]
    rows = run(tmp_path, "--peer", "ours-muon", "ours-eager", *flags)
    assert [(r["peer"], r["optimizer"]) for r in rows] == [("ours-muon", "muon"), ("ours-eager", "adamw")]
    assert why_not("ours-muon", "lora", "nano", torch.device("cpu")) == "adapters are trained with adamw"


@pytest.mark.parametrize(
    "flags, message",
    [
        ({"peer": ("theirs",)}, "--peer theirs: unknown; choose from ours, "),
        ({"preset": ("nano,gpt5",)}, "--preset gpt5: unknown"),
        ({"stage": ("sft,ppo",)}, "--stage ppo: unknown; choose from pretrain"),
        ({"steps": 0}, "--steps 0: must be at least 1"),
        ({"seq_len": 0}, "--seq-len 0: must be at least 1"),
        ({"project": True, "device": "cpu"}, "--project: needs a GPU"),
        ({"headline": True, "stage": ("sft",)}, "--headline: needs --stage pretrain"),
        ({"stage": ("sft,dpo",), "data": ("a.jsonl",)}, "--data a.jsonl: .* name the stage: sft=a.jsonl"),
        ({"stage": ("sft",), "data": ("dpo=a.jsonl",)}, "--data dpo=a.jsonl: --stage does not name dpo"),
        ({"stage": ("lora",), "optimizer": "muon"}, "--optimizer muon: adapters"),
    ],
)
def test_bad_arguments(flags, message):
    with pytest.raises(ValueError, match=message):
        main(Args(**flags))


def test_each_stage_has_its_files():
    args = Args(stage=("sft", "dpo"), data=("sft=a.jsonl", "dpo=b.jsonl", "sft=c.jsonl"))
    assert data_of(args, "sft") == ["a.jsonl", "c.jsonl"] and data_of(args, "dpo") == ["b.jsonl"]
    assert data_of(Args(data=("x=1.jsonl",)), "pretrain") == ["x=1.jsonl"]


def test_an_implementation_that_cannot_run_has_a_reason():
    cpu = torch.device("cpu")
    assert why_not("liger", "pretrain", "minimind2-small", cpu) == "Liger-Kernel needs a GPU"
    assert "cannot have the shape of minimind3" in (why_not("hf", "sft", "minimind3", cpu) or "")
    assert "cannot train dpo" in (why_not("hf", "dpo", "minimind2-small", cpu) or "")
    assert "no plain form of dpo" in (why_not("compile", "dpo", "minimind2-small", cpu) or "")
    assert "in bf16 already" in (why_not("upstream-bf16", "sft", "minimind2", torch.device("cuda")) or "")
    assert all(why_not("ours", stage, "minimind3-moe", cpu) is None for stage in STAGES)


def test_every_implementation_is_described():
    text = inspect.cleandoc(implementations.__doc__ or "")
    for name in IMPLEMENTATIONS:
        assert f"\n{name} " in text


def test_projections_by_hand(capsys):
    (first, second) = projection.cards([row(utilisation=0.5), row(utilisation=None)], Console())
    flops = 154.9e6 + 8 * 8 * 64 * 2 * 512 * 3  # 6 for each weight of a matrix, and half of the scores' square
    assert first["positions_per_second"] == pytest.approx(0.5 * 71e12 / flops, rel=0.01)
    assert second["card"] == "RTX 4090" and second["attention"] == "flash3"
    output = capsys.readouterr().out
    assert "projected, not measured" in output and output.count("attention as here (flash3)") == 2
    corpus = type("Fake", (), {"num_bytes": 3000, "num_tokens": 1000})()
    found = projection.headline([row(tokens_per_second=1e5)], corpus, Console())
    assert found["total_hours"] == pytest.approx(2.8e9 / 3 / 1e5 / 3600)
    assert "(attention: flash3)" in capsys.readouterr().out
    both = [row(tokens_per_second=1e5), row(stage="sft", tokens_per_second=5e4)]
    hours = projection.headline(both, corpus, Console())["hours"]
    assert hours["sft"] / hours["pretrain"] == pytest.approx(2 * 1.2 / 1.6)
    with pytest.raises(ValueError, match="--peer must include ours"):
        projection.headline([row(peer="hf")], corpus, Console())


def test_the_table_names_the_attention(capsys):
    show([row(), row(peer="hf", attention="sdpa")], Padding(0.5, 0.1), Console(width=200))
    output = capsys.readouterr().out
    assert "attention" in output and "flash3" in output and "sdpa" in output


def test_a_picture_of_several_presets(tmp_path):
    rows = [row(), row(peer="hf"), row(preset="minimind2", peer="hf"), row(stage="dpo", peak_mib=None)]
    plot(rows, tmp_path / "a.png")
    assert (tmp_path / "a.png").stat().st_size > 5000


def test_an_implementation_that_fails_takes_no_other_along(monkeypatch):
    class FakeWorker:
        def __init__(self, start, name, setting):
            self.name, self.steps = name, 0

        def ask(self, request):
            count, counts = request
            self.steps += count * counts
            if self.name == "at once" or (self.name == "later" and self.steps > 2):
                raise ImplementationError("its process died")
            return [StepCost(1.0, 1.0, 0.0, 0, 8)] * count

        def close(self):
            pass

    monkeypatch.setattr(throughput, "Worker", FakeWorker)
    comparison = throughput.TrainingComparison(SimpleNamespace(stage="sft", preset="nano"), Console(quiet=True))
    comparison.run(["at once", "well", "later"], warmup=3, steps=6, turn_steps=2)
    assert list(comparison.workers) == ["well"] and len(comparison.costs["well"]) == 6
    assert comparison.failures == [f"sft, nano: --peer {name}: its process died" for name in ("at once", "later")]


def test_implementations_on_one_gpu_leave_memory_to_each_other(monkeypatch):
    """Together they need more than a GPU may have: a turn frees its memory, and begins with a step that does not
    count."""
    events: list[str] = []
    monkeypatch.setattr(torch.cuda, "empty_cache", lambda: events.append("emptied"))

    def step() -> int:
        implementation.loading += 1.0
        events.append("step")
        return 1

    implementation = Implementation(step)
    with _turn(implementation, torch.device("cuda")):
        assert events == ["step"] and implementation.loading == 0
        implementation.step()
    assert events == ["step", "step", "emptied"] and implementation.loading == 1
    with _turn(implementation, torch.device("cpu")):
        pass
    assert len(events) == 3
