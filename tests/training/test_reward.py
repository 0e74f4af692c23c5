"""train/reward.py as a user runs it: figures, resuming, and its use as a reward."""

from __future__ import annotations

import json
import math
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minimind import ModelConfig, load_tokenizer
from minimind.data.builtin.chat import preferences
from minimind.data.cache import open_preferences
from minimind.data.pair_loader import PairLoader
from minimind.data.split import split
from minimind.rewards import Sample, parse_rewards
from minimind.tokenization import ChatEncoder
from minimind.training.stages.reward_model import to_device
from minimind.value_head import load_value_model
from tests.training.runs import (
    SCRIPT,
    assert_continues_to_the_bit,
    assert_same_curve,
    finish,
    lines_of,
    reproducible,
    rows_of,
    run,
    save_origin,
)
from tests.training.test_dpo import FLAGS, origin, pairs

__all__ = ["origin", "pairs"]  # fixtures

REWARD = SCRIPT.with_name("reward.py")


def command(origin: Path, data: Path, out: Path, *extra: str) -> list[str]:
    return [sys.executable, str(REWARD), "--from", str(origin), "--data", str(data), "--out", str(out), "--cache-dir",
            str(data.parent / "cache"), *FLAGS, *extra]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(origin, pairs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    text = finish(command(origin, pairs, out, "--centering", "0.05"))
    assert "longer than --seq-len 128: 1 of all pairs cut at the beginning of their prompt, 1 pairs left out" in text
    assert "prompts computed once for both answers: " in text
    assert "held-out loss 0.6931 per pair" in text and f"--reward model={out}:1" in text
    return out


def held_out(pairs: Path) -> list[dict]:
    encoder = ChatEncoder(load_tokenizer())
    return lines_of(split(open_preferences([pairs], encoder, pairs.parent / "cache", longest=128))[1], pairs)


def scored(run: Path, rows: list[dict]) -> np.ndarray:
    """float64 [pairs, 2]: what the run gives as a reward, in float32."""
    rewards = parse_rewards([f"model={run}"], on_error="stop")
    rewards.parts[0].reward.model.compute_dtype = None
    samples = [Sample(row[side][:-1], row[side][-1]["content"]) for row in rows for side in ("chosen", "rejected")]
    return rewards(samples).total.reshape(-1, 2)


def test_held_out_figures_are_those_of_the_reward(unbroken, pairs):
    """The score in training, of packed pairs, is the one that reinforcement learning gets, from text."""
    for picture in ("loss.png", "accuracy.png", "scores.png"):
        assert (unbroken / picture).read_bytes().startswith(b"\x89PNG")
    scores = scored(unbroken, held_out(pairs))
    margins = scores[:, 0] - scores[:, 1]
    last = rows_of(unbroken, "eval")[-1]
    assert last["heldout_all"] and last["heldout_pairs"] == len(scores)
    for name, values in (
        ("loss", np.logaddexp(0, -margins) + 0.05 * scores.sum(1) ** 2),
        ("margin", margins),
        ("chosen_score", scores[:, 0]),
        ("rejected_score", scores[:, 1]),
        ("accuracy", margins > 0),
    ):
        assert last[f"heldout_{name}"] == pytest.approx(values.mean(), rel=1e-4, abs=1e-5), name
    rows = rows_of(unbroken, "train")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-6) and rows[0]["accuracy"] == 0.5
    assert rows[-1]["loss"] < 0.6 and rows[-1]["margin"] > 0.1
    assert "+" in (unbroken / "samples.txt").read_text()


def test_killed_and_started_again_the_curve_is_the_same_to_the_bit(unbroken, origin, pairs, tmp_path):
    out = tmp_path / "killed"
    assert_continues_to_the_bit(command(origin, pairs, out, "--centering", "0.05"), out, unbroken, 4)


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        pytest.param(2, ("--parallel", "ddp", "--micro-tokens", "256"), marks=pytest.mark.slow),
        pytest.param(1, ("--micro-tokens", "128"), marks=pytest.mark.slow),
        pytest.param(1, ("--compile",), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_curve_is_that_of_one_process(processes, flags, origin, pairs, tmp_path):
    plain = ["--optimizer", "adamw", "--grad-clip", "1000", "--log-every", "1"]
    finish(command(origin, pairs, tmp_path / "alone", *plain))
    arguments = command(origin, pairs, tmp_path / "out", *plain, *flags)
    assert finish(arguments, processes).count("finished in") == 1
    assert_same_curve(reproducible(tmp_path / "out"), reproducible(tmp_path / "alone"), rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("share", [False, True])
def test_the_scored_token_is_the_last_before_the_end_of_the_turn(pairs, share):
    """On both sides of every pair, whatever follows in the row, with the prompt once or twice."""
    tokenizer = load_tokenizer()
    corpus = open_preferences([pairs], ChatEncoder(tokenizer), pairs.parent / "cache")
    rows = [json.loads(line) for line in pairs.read_text().splitlines()]
    seen = 0
    for host in PairLoader(corpus, 128, 4, share=share).epoch_batches():
        batch = to_device(host, torch.device("cpu"), 128)
        ids, cu = batch.input_ids.flatten(), host.cu_seqlens
        assert len(batch.cu_seqlens) == 128 and (batch.shared_prefix is not None) == share
        for k, pair in enumerate(host.pairs):
            prompt = ids[cu[host.prompt[k]] : cu[host.prompt[k] + 1]].tolist()
            for side, segments, ends in (
                ("chosen", host.chosen, batch.chosen),
                ("rejected", host.rejected, batch.rejected),
            ):
                start = cu[segments[k]]
                messages = rows[pair][side]
                text = tokenizer.apply_chat_template(messages).rpartition("<|im_end|>")[0]
                assert tokenizer.decode([*prompt, *ids[start : ends[k] + 1].tolist()]) == text
                seen += 1
    assert seen == 2 * 298


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--centering", "-1"], "centering=-1.0: must be 0 or more"),
        (["--parallel", "fsdp"], "--parallel fsdp: a reward model is trained with ddp"),
    ],
)
def test_errors_are_one_line(flags, message, origin, pairs, tmp_path):
    answer = run(command(origin, pairs, tmp_path / "no", *flags))
    assert answer.returncode == 2 and "Traceback" not in answer.stderr, answer.stderr
    assert f"error: {message}" in " ".join(answer.stdout.split()), answer.stdout
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_nano_learns_to_tell_manners(tmp_path):
    """Tested on questions worded unlike any training question. A model that looks at the answer alone is right in half
    of the pairs, as is a coin; four in five of 234 pairs are nine standard deviations from that."""
    first, out = save_origin(ModelConfig.preset("nano"), tmp_path / "origin"), tmp_path / "reward"
    arguments = [
        sys.executable,
        str(REWARD),
        "--from",
        str(first),
        "--out",
        str(out),
        "--cache-dir",
        str(tmp_path / "cache"),
    ]
    answer = subprocess.run(arguments, capture_output=True, text=True, timeout=1800)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    accuracy = [row["heldout_accuracy"] for row in rows_of(out, "eval")]
    assert accuracy[0] == 0.5 and accuracy[-1] >= 0.8, accuracy
    scores = scored(out, preferences()[1])
    assert (scores[:, 0] > scores[:, 1]).mean() >= 0.8
    assert load_value_model(out).config == ModelConfig.preset("nano")
