"""--ema: the averaged weights themselves, measured, kept, and the same after any interruption and on several
processes."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from minimind import load_model, load_tokenizer
from minimind.data import open_corpus
from minimind.data.split import split
from minimind.inference.loading import WeightArgs, open_weights
from minimind.lora import LoRAConfig, add_adapter
from minimind.training.checkpoint import list_checkpoints
from minimind.training.evaluation import heldout_loss
from minimind.training.optim import AVERAGE_FOLDER, WeightAverage
from minimind.training.parallel import Parallel
from minimind.value_head import load_value_model
from tests.adapted import make
from tests.training.runs import (
    SCRIPT,
    TINY,
    assert_continues_to_the_bit,
    assert_same_curve,
    command,
    finish,
    reproducible,
    rows_of,
    run,
    save_origin,
)

FLAGS = ["--tokens", str(512 * 12), "--save-every", "5", "--ema", "0.5", "--precision", "fp32", "--optimizer", "adamw",
         "--grad-clip", "1000", "--depth-warmup", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    text = finish(command(data, out, *FLAGS))
    assert "held-out loss of ema" in text and "the averaged weights: --model or --from" in " ".join(text.split())
    return out


def test_the_average_follows_its_formula():
    """Against a loop in float64. Each update rounds twice, of numbers up to 4: half a unit of 4 each time."""
    model = make()
    weight = model.norm.weight
    average = WeightAverage(model, 0.6)
    expected = weight.detach().double().clone()
    for step in range(20):
        with torch.no_grad():
            weight.copy_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(step)))
        average.update()
        decay = min(0.6, (1 + step) / (10 + step))
        expected = decay * expected + (1 - decay) * weight.detach().double()
    before = weight.detach().clone()
    with average.in_place():
        torch.testing.assert_close(weight.detach().double(), expected, rtol=0, atol=20 * 2 * 2**-22)
    assert torch.equal(weight, before)
    assert average.updates == 20


def test_with_an_adapter_only_its_weights_are_averaged():
    model = make()
    add_adapter(model, LoRAConfig())
    average = WeightAverage(model, 0.9)
    assert len(average._values) == sum(p.requires_grad for p in model.parameters()) == 2 * 4 * 2


def assert_recorded_figures_are_of_what_was_saved(out: Path, data: Path) -> None:
    last = rows_of(out, "eval")[-1]
    corpus = open_corpus([data], load_tokenizer(), data.parent / "cache")
    for path, name in ((list_checkpoints(out)[-1] / AVERAGE_FOLDER, "heldout_ema_loss"), (out, "heldout_loss")):
        found = heldout_loss(load_model(path), split(corpus, 0.05)[1], 64, None, Parallel())
        assert found["heldout_loss"] == pytest.approx(last[name], rel=1e-5), name
    assert abs(last["heldout_ema_loss"] - last["heldout_loss"]) > 1e-3


def test_recorded_figures_are_those_of_the_saved_average(unbroken, data):
    assert_recorded_figures_are_of_what_was_saved(unbroken, data)
    opened = open_weights(WeightArgs(str(list_checkpoints(unbroken)[-1] / AVERAGE_FOLDER)), torch.device("cpu"))
    assert opened.stage == "pretrain" and not opened.notes
    first, *_, last = rows_of(unbroken, "eval")
    assert first["heldout_ema_loss"] == first["heldout_loss"] > last["heldout_ema_loss"] + 0.5


def test_killed_and_started_again_the_average_is_the_same_to_the_bit(unbroken, data, tmp_path):
    out = tmp_path / "killed"
    assert_continues_to_the_bit(command(data, out, *FLAGS), out, unbroken, 7)
    ours, theirs = (list_checkpoints(run)[-1] / AVERAGE_FOLDER / "model.safetensors" for run in (out, unbroken))
    assert ours.read_bytes() == theirs.read_bytes()


@pytest.mark.heavy
@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_two_processes_compute_the_same_average(strategy, unbroken, data, tmp_path):
    """And a run on shards goes on with one process."""
    out = tmp_path / "two"
    finish(command(data, out, *FLAGS, "--parallel", strategy), 2)
    assert_same_curve(reproducible(out), reproducible(unbroken), rel=1e-3, abs=2e-5)
    assert_recorded_figures_are_of_what_was_saved(out, data)
    last = list_checkpoints(out)[-1]
    for file in [*last.rglob("*.*")]:
        file.unlink()
    (last / AVERAGE_FOLDER).rmdir()
    last.rmdir()
    (out / "finished").unlink()
    assert "continuing after step 10" in finish(command(data, out, *FLAGS))
    assert_same_curve(reproducible(out), reproducible(unbroken), rel=1e-3, abs=2e-5)


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    return save_origin(TINY, tmp_path_factory.mktemp("origin"))


@pytest.mark.heavy
@pytest.mark.parametrize(("stage", "file"), [("reward", "model.safetensors"), ("lora", "adapter_model.safetensors")])
def test_a_stage_averages_the_weights_it_saves(stage, file, origin, tmp_path):
    arguments = [sys.executable, str(SCRIPT.with_name(f"{stage}.py")), "--from", str(origin), "--out",
                 str(tmp_path / "run"), "--cache-dir", str(tmp_path / "cache"), "--tokens", "3072", "--seq-len", "256",
                 "--batch-tokens", "512", "--ema", "0.9", "--evals", "1", "--eval-tokens", "400"]  # fmt: skip
    finish(arguments)
    newest = list_checkpoints(tmp_path / "run")[-1]
    raw, averaged = load_file(newest / file), load_file(newest / AVERAGE_FOLDER / file)
    assert raw.keys() == averaged.keys() and any(not torch.equal(raw[k], averaged[k]) for k in raw)
    assert "heldout_ema_loss" in rows_of(tmp_path / "run", "eval")[-1]
    if stage == "reward":
        load_value_model(newest / AVERAGE_FOLDER)
    else:
        open_weights(WeightArgs(str(newest / AVERAGE_FOLDER)), torch.device("cpu"))


@pytest.mark.parametrize("decay", ["0", "1", "1.5"])
def test_shares_without_meaning_are_refused(decay, data, tmp_path):
    answer = run(command(data, tmp_path / "no", "--ema", decay))
    assert answer.returncode == 2 and ": must be above 0 and below 1" in answer.stdout
