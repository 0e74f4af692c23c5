"""bench/rl.py on a CPU and a tiny model: its implementations agree, wrong results are refused, rows are written."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from rich.console import Console

from bench import agents, rl
from bench.common.models import random_model
from bench.common.record import columns_of
from bench.rl import PARTS, Args, RolloutRow, error_ratio, main, show, summary
from bench.training.grpo import (
    IMPLEMENTATIONS,
    RolloutSetting,
    RolloutStep,
    left_padded,
    naive_generate,
    naive_log_probs,
)
from minimind import ModelConfig, ops
from minimind.config import PRESETS
from minimind.weights import save_weights
from tests.environments import agent

SMALL = ModelConfig(32, 2, 4, 2, 16, 64, qk_norm=True)


@pytest.fixture
def setting(tmp_path) -> RolloutSetting:
    save_weights(random_model(SMALL), tmp_path / "model")
    prompts = [list(range(20, 20 + length)) for length in (3, 9, 6)]
    return RolloutSetting(tmp_path / "model", prompts, 2, 5, 1, torch.device("cpu"))


def test_naive_sampling_after_padding_follows_the_model(setting):
    """Every sampled token has the same probability in the padded batch as alone and unpadded."""
    ops.set_mode("reference")
    model = random_model(SMALL).double()
    ids, mask = left_padded(setting)
    assert ids.shape == mask.shape == (6, 9) and mask.sum(1).tolist() == [3, 3, 9, 9, 6, 6]
    drawn: list[torch.Tensor] = []
    multinomial = torch.multinomial

    def record(p: torch.Tensor, count: int) -> torch.Tensor:
        drawn.append(p.log())
        return multinomial(p, count)

    with torch.no_grad(), pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "multinomial", record)
        whole = naive_generate(model, ids, mask, 5)
        answers = whole[:, 9:]
        batched = naive_log_probs(model, whole, torch.cat((mask, mask.new_ones(answers.shape)), 1), 5)
        for row in range(6):
            prompt = setting.prompts[row // 2]
            both = torch.cat((torch.tensor(prompt), answers[row]))[None]
            alone = model(both).logits[0, len(prompt) - 1 : -1].log_softmax(-1)
            torch.testing.assert_close(torch.stack([p[row] for p in drawn]), alone)
            torch.testing.assert_close(batched[row], alone.gather(1, answers[row][:, None])[:, 0])


@pytest.mark.parametrize("name", IMPLEMENTATIONS)
def test_implementations_score_their_answers_as_the_model_does(name, setting):
    turn = IMPLEMENTATIONS[name](setting)(0)
    assert set(turn.seconds) == set(PARTS) and all(value > 0 for value in turn.seconds.values())
    for prompt, ids, log_probs in turn.answers:
        assert prompt in setting.prompts and len(ids) == len(log_probs) == 5
    assert error_ratio(setting, turn, name) <= 2
    prompt, ids, log_probs = turn.answers[0]
    wrong = RolloutStep(answers=[(prompt, ids, [log_probs[1], log_probs[0], *log_probs[2:]])])
    assert error_ratio(setting, wrong, name) > 2


class InProcess:
    """A worker without a process."""

    def __init__(self, start, *arguments):
        self.ask = start(*arguments)

    def close(self) -> None:
        pass


def test_rows_table_and_last_line(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(PRESETS, "nano", SMALL)
    monkeypatch.setattr(rl, "Worker", InProcess)
    args = Args(prompts=2, samples=2, prompt=6, new=4, turns=2, threads=1, device="cpu", out=str(tmp_path))
    result = main(args)
    json.dumps(result)
    rows = list(csv.DictReader(Path(result["csv"]).read_text().splitlines()))
    assert list(rows[0]) == columns_of(RolloutRow) and [row["peer"] for row in rows] == list(IMPLEMENTATIONS)
    for row in result["rows"]:
        assert row["status"] == "ok" and row["turns"] == 2 and row["peak_mib"] > 0
        assert row["tokens_per_second"] == pytest.approx(2 * 2 * 4 / row["seconds"])
    assert "naive" in capsys.readouterr().out


def test_a_steps_time_is_the_sum_of_its_parts(setting):
    turns = [RolloutStep({"rollout": 1.0 * i, "reward": 0.0, "train": 2.0}) for i in (1, 2, 9)]
    columns = summary(turns, setting)
    assert (columns["seconds"], columns["rollout"], columns["train"]) == (4, 2, 2)
    assert columns["tokens_per_second"] == 6 * 5 / 4
    row = RolloutRow("", None, "", 1, None, "nano", "ours", 1, 1, 1, 1, seconds=1.0, p20=1, p80=1, rollout=0.5,
                     reward=0.1, train=0.4, tokens_per_second=1, error_ratio=1)  # fmt: skip
    console = Console(record=True, width=120)
    show([row, replace(row, peer="naive", seconds=4.0)], console)
    assert "4.00x" in console.export_text()


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"preset": "nana"}, "--preset nana: unknown"),
        ({"preset": "minimind2-moe"}, "--preset minimind2-moe: must be a dense model"),
        ({"peer": ("trl",)}, "--peer trl: unknown; choose from ours"),
        ({"new": 0}, "--new 0: must be at least 1"),
    ],
)
def test_errors(flags, message):
    with pytest.raises(ValueError, match=message):
        main(Args(**flags))


@pytest.mark.heavy
def test_ctrl_c_is_no_traceback(tmp_path):
    """A terminal sends Ctrl-C to the workers too."""
    command = [sys.executable, rl.__file__, "--preset", "nano", "--peer", "ours", "--out", str(tmp_path)]
    with subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        # a shell's background job ignores it
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as bench:
        place = Path(f"/proc/{bench.pid}/task/{bench.pid}/children")
        # multiprocessing's tracker and the worker: in the midst of its start
        while len(children := place.read_text().split()) < 2:
            assert bench.poll() is None
            time.sleep(0.001)
        os.killpg(bench.pid, signal.SIGINT)
        output = bench.communicate(timeout=60)[0].decode()
    assert bench.returncode == 130 and "Traceback" not in output, output
    end = time.monotonic() + 20
    while any(Path(f"/proc/{child}").exists() for child in children):
        assert time.monotonic() < end, "a worker outlives the benchmark"
        time.sleep(0.05)


@pytest.mark.heavy
def test_conversations_with_tools_are_the_same_and_cost_fewer_tokens(tmp_path):
    """bench/agents.py; the model knows conversations with other tasks, so it says anything, but the same."""
    agent.agent().compute_dtype = None
    save_weights(agent.agent(), tmp_path / "model")
    agent.TOKENIZER.save(tmp_path / "model")
    flags = agents.Args(str(tmp_path / "model"), tasks=2, alone=2, rounds=1, threads=1, out=str(tmp_path))
    result = agents.main(flags)
    ours, ours_fp32, theirs = result["rows"]
    assert ours_fp32["same"] == theirs["same"] == 1 and theirs["peer"] == agents.UPSTREAM
    assert ours_fp32["computed_per_written"] <= theirs["computed_per_written"] and ours["conversations"] == 2
    assert len((tmp_path / "agents.csv").read_text().splitlines()) == 4
