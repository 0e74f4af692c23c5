"""The built-in task from nothing: a weak model is taught, and GRPO, PPO and SPO raise its held-out reward."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from minimind.training.rl.stage import ARITHMETIC
from tests.training.runs import SCRIPT, rows_of

STEPS = {"grpo": (4, 1), "ppo": (4, 2), "spo": (4, 1)}  # (steps, passes) on each rollout


def assert_learnt(run: Path, steps: int, passes: int) -> None:
    """The held-out reward rises from below 0.4 to above 0.7 of its maximum, in each third of the run. Only sampled
    tokens are trained on, and the clip acts as the algorithm says."""
    held = [row["heldout_reward"] for row in rows_of(run, "eval")]
    assert 0.2 < held[0] < 0.4 and held[-1] > 0.7, held
    rollouts, trained = rows_of(run, "rollout"), rows_of(run, "train")
    thirds = [part.mean() for part in np.array_split([row["reward"] for row in rollouts], 3)]
    assert thirds[0] < thirds[1] < thirds[2], thirds
    assert len(trained) == steps * len(rollouts)
    for i, rollout in enumerate(rollouts):
        mine = trained[i * steps : (i + 1) * steps]
        learnt = sum(row["targets"] for row in mine) / (rollout["answers"] * rollout["length"])
        assert learnt == pytest.approx(passes)
        first = mine[0]  # the policy still equals the one that sampled the answers, to bf16's rounding
        assert first["clipped"] < 0.02 and first["ratio"] == pytest.approx(1, abs=0.02)
    later = [row["clipped"] for i, row in enumerate(trained) if i % steps]
    assert 0.001 < np.mean(later) < 0.3, np.mean(later)


def launch(script: str, folder: Path, *flags: str) -> None:
    arguments = [sys.executable, str(SCRIPT.with_name(f"{script}.py")), "--out", str(folder), *flags]
    answer = subprocess.run(arguments, capture_output=True, text=True, timeout=1800)
    assert answer.returncode == 0, answer.stdout + answer.stderr


@pytest.fixture(scope="module")
def weak(tmp_path_factory) -> tuple[Path, str]:
    folder = tmp_path_factory.mktemp("weak")
    cache = str(folder / "cache")
    launch("sft", folder / "sft", "--cache-dir", cache, *ARITHMETIC.weak_sft)
    return folder / "sft", cache


@pytest.mark.slow
@pytest.mark.parametrize("script", STEPS)
def test_held_out_reward_rises(script, weak, tmp_path):
    launch(script, tmp_path / script, "--from", str(weak[0]), "--cache-dir", weak[1])
    assert_learnt(tmp_path / script, *STEPS[script])
