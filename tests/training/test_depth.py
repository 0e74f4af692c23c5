"""The first steps of a run train the lowest layers alone."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest
import torch
from safetensors.torch import load_file

from minimind import ModelConfig
from minimind.modeling import Model
from minimind.training.batches import pretraining_depth
from minimind.training.checkpoint import list_checkpoints, step_of
from minimind.training.depth import WHOLE, DepthWarmup, close_upper_layers
from minimind.training.job import Job
from tests.training.runs import as_killed, command, finish, reproducible, run

STEPS, SHALLOW = 8, 4
FLAGS = ["--tokens", str(512 * STEPS), "--save-every", "1", "--keep-checkpoints", "9", "--depth-warmup", "0.5",
         "--optimizer", "adamw"]  # fmt: skip
DENSE = ModelConfig(64, 8, 4, 2, 16, 128)
EXPERTS = ModelConfig(64, 4, 4, 2, 16, 128, num_experts=4, num_experts_per_tok=2, num_shared_experts=1,
                      moe_intermediate_size=64)  # fmt: skip


@pytest.mark.parametrize("config", [DENSE, EXPERTS], ids=["dense", "experts"])
def test_closed_layers_are_the_identity(config):
    torch.manual_seed(0)
    model = Model(config)
    ids = torch.randint(config.vocab_size, (1, 20))
    open_logits = model(ids).logits
    close_upper_layers(model, 1)
    whole = model(ids).logits
    model.depth = 1
    assert model(ids).logits.equal(whole) and not whole.equal(open_logits)


def test_a_layer_learns_when_its_steps_come():
    model = Model(DENSE)
    close_upper_layers(model, 2)
    depth = DepthWarmup.of(model, 3, 2)
    for step, trained in ((0, 2), (2, 2), (3, 8)):
        depth.apply(model, step)
        model.zero_grad()
        model(torch.arange(9)[None]).logits.square().mean().backward()
        with_gradients = [any(p.grad is not None for p in layer.parameters()) for layer in model.layers]
        assert with_gradients == [i < trained for i in range(8)]
    frozen = Model(DENSE).requires_grad_(False)
    WHOLE.apply(frozen, 0)
    assert not any(p.requires_grad for p in frozen.parameters())  # such as the model beneath an adapter


def test_work_counts_shallow_steps_by_their_cost():
    depth = DepthWarmup(4, 2, 0.25)
    assert [depth.work(0, n) for n in (0, 2, 4, 6)] == [0, 0.5, 1.0, 3.0]
    assert depth.work(3, 5) == 1.25 and depth.work(4, 8) == WHOLE.work(4, 8) == 4
    model = Model(DENSE)
    layer = sum(p.numel() for p in model.layers[0].parameters())
    assert DepthWarmup.of(model, 4, 2).cost == pytest.approx(1 - 6 * layer / model.num_parameters())


def test_short_runs_on_a_cpu_begin_shallow():
    def chosen(tokens: float, device: str = "cpu", ranks: int = 1, weights: Path | None = None, **flags: float):
        job = SimpleNamespace(default_device=device, parallel=SimpleNamespace(world_size=ranks), config=DENSE,
                              initial=SimpleNamespace(weights=weights),
                              settle=lambda name, rule: flags.get(name, rule()[0]))  # fmt: skip
        return pretraining_depth(cast(Job, job), tokens)

    parameters = Model(DENSE).num_parameters()
    assert [chosen(parameters / each)[0] for each in (1000, 112, 111, 56, 55)] == [0.9375, 0.9375, 0.875, 0.875, 0]
    assert chosen(1) == (0.9375, 1) and chosen(1, depth_layers=0.25) == (0.9375, 2)
    assert chosen(1, device="cuda") == chosen(1, ranks=2) == chosen(1, weights=Path("a")) == (0, 8)


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    text = finish(command(data, out, *FLAGS))
    assert f"the first {SHALLOW} steps train 1 of " in " ".join(text.split())
    return out


def test_upper_layers_wait_for_their_steps(unbroken):
    weights = {step_of(folder): load_file(folder / "model.safetensors") for folder in list_checkpoints(unbroken)}
    for name, first in weights[1].items():
        upper = ".layers." in f".{name}" and ".layers.0." not in f".{name}"
        assert weights[SHALLOW][name].equal(first) == upper, name
        assert not weights[STEPS][name].equal(first), name


@pytest.mark.parametrize("step", [SHALLOW - 2, SHALLOW, SHALLOW + 1])
def test_killed_and_started_again_it_continues_to_the_bit(step, unbroken, data, tmp_path):
    out = as_killed(unbroken, step, tmp_path / "killed")
    assert f"continuing after step {step}" in finish(command(data, out, *FLAGS))
    assert reproducible(out) == reproducible(unbroken)
    ours, theirs = (list_checkpoints(folder)[-1] / "model.safetensors" for folder in (out, unbroken))
    assert ours.read_bytes() == theirs.read_bytes()


def test_a_run_of_an_earlier_version_keeps_its_quarter_of_the_layers(unbroken, data, tmp_path):
    out = as_killed(unbroken, SHALLOW - 2, tmp_path / "killed")
    config = json.loads((out / "config.json").read_text())
    del config["chosen"]["depth_layers"], config["args"]["depth_layers"]
    (out / "config.json").write_text(json.dumps(config))
    assert "--depth-layers 0.25" in " ".join(finish(command(data, out, *FLAGS)).split())


def test_a_longer_run_keeps_its_shallow_steps(unbroken, data, tmp_path):
    line = [flag for flag in FLAGS if flag != str(512 * STEPS)]
    longer = ["--tokens", str(512 * 12), *line[1:], "--lengthen", str(unbroken)]
    assert f"the first {SHALLOW} steps" in " ".join(finish(command(data, tmp_path / "longer", *longer)).split())


def test_a_plan_counts_the_shallow_steps(data, tmp_path):
    def operations(share: str) -> float:
        estimate = tmp_path / f"{share}.json"
        line = command(
            data, tmp_path / "none", "--tokens", "8192", "--depth-warmup", share, "--plan-json", str(estimate)
        )
        assert run([*line, "--plan"]).returncode == 0
        return json.loads(estimate.read_text())["flops"]

    whole, half, full = (operations(share) for share in ("0", "0.5", "1"))
    assert full < 0.7 * whole and half == pytest.approx((whole + full) / 2)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--depth-warmup", "1.5"], "--depth-warmup 1.5: a share of the steps, from 0 to 1"),
        (["--depth-warmup", "0.5", "--from", "runs/x"], "is for random weights"),
        (["--depth-layers", "0.5", "--depth-warmup", "0"], "--depth-layers 0.5: this run has no --depth-warmup"),
        (["--depth-layers", "8", "--depth-warmup", "0.5"], "--depth-layers 8.0: a share of the layers, from 0 to 1"),
        (["--depth-warmup", "0.5", "--compile", "--cuda-graph"], "without --cuda-graph"),
    ],
)
def test_impossible_flags_are_refused(flags, message, data, tmp_path):
    answer = run(command(data, tmp_path / "run", *flags))
    assert answer.returncode == 2 and message in " ".join(answer.stdout.split())
