"""Flags of pretraining that change its recipe: steps that grow, projections that begin at zero, variants of Muon."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import pytest

from minimind.modeling import Model
from minimind.training.batches import TrainingPlan, growing_steps, pretraining_batch
from minimind.training.checkpoint import list_checkpoints
from minimind.training.initial_model import scale_outputs
from minimind.training.job import Job
from minimind.training.muon import CPU_BLOCK, CPU_ITERATIONS
from tests.training.runs import TINY, as_killed, command, finish, reproducible, rows_of

FLAGS = ["--tokens", str(512 * 4), "--save-every", "3", "--batch-warmup", "0.5", "--momentum-warmup", "0.5",
         "--muon-row-beta", "0.9", "--cautious-decay", "--output-init", "0.5"]  # fmt: skip


def test_growing_steps_see_all_tokens():
    steps, growth = growing_steps(4096, 512, 0.5)
    assert (steps, growth) == (8 + 4 + 4, ((8, 128), (4, 256)))
    plan = TrainingPlan(None, steps, 8, 512, growth)
    assert [plan.micro_batches_of(step) for step in (0, 7, 8, 11, 12, 15)] == [2, 2, 4, 4, 8, 8]
    assert [plan.tokens_before(step) for step in (0, 8, 12, 16)] == [0, 1024, 2048, 4096]
    assert plan.whole_steps == 8 and [plan.place_in_schedule(step) for step in (0, 8, 12, 15)] == [0, 2, 4, 7]
    equal = TrainingPlan(None, 8, 1, 512)
    assert equal.tokens_before(3) == 1536 and equal.whole_steps == 8 and equal.place_in_schedule(5) == 5


def test_short_runs_on_a_cpu_take_smaller_steps():
    def batch(tokens: float, device: str = "cpu", preset: str = "minimind2-small", ranks: int = 1, **flags) -> int:
        args = SimpleNamespace(**{"micro_tokens": None, "row": 512} | flags)
        job = SimpleNamespace(default_device=device, initial=SimpleNamespace(preset=preset), args=args,
                              parallel=SimpleNamespace(world_size=ranks))  # fmt: skip
        size, reason = pretraining_batch(cast(Job, job), tokens)
        assert (str(size) in reason) == (size in (1024, 2048))
        return size

    assert [batch(tokens) for tokens in (51_200, 51_201, 1_638_400, 1_638_401)] == [1024, 2048, 2048, 4096]
    assert batch(1e5, "cuda") == 65_536 and batch(1e5, "cuda", "nano") == 4096
    assert batch(1e5, ranks=4) == 2048 and batch(1e5, ranks=8) == 4096  # no rank without a row
    assert batch(1e5, micro_tokens=4096) == batch(1e5, row=4096) == 4096
    assert batch(1e4, row=2048) == 2048


def test_a_short_run_keeps_its_choices_in_its_folder(data, tmp_path):
    line = command(data, tmp_path / "run", "--tokens", "4096", "--device", "cpu")
    batch = line.index("--batch-tokens")
    assert "as this run began" not in finish([*line[:batch], *line[batch + 2 :]])
    chosen = json.loads((tmp_path / "run" / "config.json").read_text())["chosen"]
    assert (chosen["batch_tokens"], chosen["depth_warmup"], chosen["depth_layers"]) == (1024, 0.9375, 0.125)
    assert (chosen["muon_iterations"], chosen["muon_block"]) == (CPU_ITERATIONS, CPU_BLOCK)
    finish(command(data, tmp_path / "whole", "--tokens", "4096", "--device", "cpu", "--depth-warmup", "0"))
    assert json.loads((tmp_path / "whole" / "config.json").read_text())["chosen"]["muon_block"] == 0
    assert rows_of(tmp_path / "run", "train")[-1]["tokens"] == 4096


def test_scaled_outputs_leave_the_stream_alone():
    model = Model(TINY)
    before = {name: parameter.clone() for name, parameter in model.named_parameters()}
    scale_outputs(model, 0.0)
    changed = {name for name, parameter in model.named_parameters() if not parameter.equal(before[name])}
    ends = ("self_attn.o_proj.weight", "mlp.down_proj.weight")
    assert changed == {f"layers.{i}.{end}" for i in range(TINY.num_hidden_layers) for end in ends}
    assert all(not model.get_parameter(name).any() for name in changed)


@pytest.fixture(scope="module")
def unbroken(data, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    text = finish(command(data, out, *FLAGS))
    assert "8 steps of 128, then 256, then 512 tokens" in " ".join(text.split())
    return out


def test_a_run_with_growing_steps_logs_its_tokens_and_its_rate(unbroken):
    rows = rows_of(unbroken, "train")
    tokens = [row["tokens"] for row in rows]
    assert tokens == [128, 256, 384, 512, 768, 1024, 1536, 2048]
    assert all(row["targets"] <= size for row, size in zip(rows, [128] * 4 + [256] * 2 + [512] * 2, strict=True))
    rates = [row["lr"] for row in rows]
    assert rates[0] == rates[3] > rates[4] > rates[6] > rates[7] == pytest.approx(0.1 * rates[0])


def test_killed_and_started_again_it_continues_to_the_bit(unbroken, data, tmp_path):
    out = as_killed(unbroken, 6, tmp_path / "killed")
    assert "continuing after step 6" in finish(command(data, out, *FLAGS))
    assert reproducible(out) == reproducible(unbroken)
    ours, theirs = (list_checkpoints(folder)[-1] / "model.safetensors" for folder in (out, unbroken))
    assert ours.read_bytes() == theirs.read_bytes()
