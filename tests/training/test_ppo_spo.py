"""train/ppo.py and train/spo.py as a user runs them: critic and tracker resume, on one process and on two."""

from __future__ import annotations

import runpy
import sys
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch

from minimind import load_model
from minimind.rewards import parse_rewards
from minimind.training.checkpoint import list_checkpoints, load_trainer_state
from minimind.value_head import load_value_model
from tests.training.runs import SCRIPT, TINY, assert_continues_to_the_bit, finish, rows_of, run, save_origin
from tests.training.test_grpo import TOY, assert_same_rollouts

FLAGS = ["--rollouts", "4", "--prompts", "12", "--evals", "2", "--eval-prompts", "12", "--save-every", "3",
         "--minibatches", "2", "--lr", "0.003", "--precision", "fp32", "--max-new-tokens", "6", "--grad-clip", "1000",
         "--reward", TOY + "vowels"]  # fmt: skip
SCORED = ["--reward-norm", "running", "--truncation-penalty", "0.1"]
PPO = ["--inner-epochs", "1", "--critic-lr", "0.006", *SCORED]
STAGES = {
    "ppo": ("ppo", PPO),
    "ppo shared": ("ppo", [*PPO, "--critic", "shared", "--kl-in", "loss"]),
    "spo": ("spo", ["--reward-range", "0", "4"]),
}
some = pytest.mark.parametrize("name", ["ppo", "spo", pytest.param("ppo shared", marks=pytest.mark.slow)])


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    return save_origin(TINY, tmp_path_factory.mktemp("origin"))


def command(name: str, origin: Path, prompts: Path, out: Path, *extra: str) -> list[str]:
    script, flags = STAGES[name]
    return [sys.executable, str(SCRIPT.with_name(f"{script}.py")), "--from", str(origin), "--data", str(prompts),
            "--out", str(out), *FLAGS, *flags, *extra]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(origin, prompts, tmp_path_factory):
    """The run of each stage, made when it is first asked for."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            out = made[name] = tmp_path_factory.mktemp("runs") / name.replace(" ", "-")
            finish(command(name, origin, prompts, out))
        return made[name]

    return of


@some
def test_killed_inside_a_rollout_and_started_again_the_run_is_the_same_to_the_bit(
    name, unbroken, origin, prompts, tmp_path
):
    out, whole = tmp_path / "killed", unbroken(name)
    assert_continues_to_the_bit(command(name, origin, prompts, out), out, whole, 4)
    for file in list_checkpoints(whole)[-1].rglob("critic/*.safetensors"):
        assert (out / file.relative_to(whole)).read_bytes() == file.read_bytes()


@some
def test_curve_of_two_processes_is_that_of_one(name, unbroken, origin, prompts, tmp_path):
    finish(command(name, origin, prompts, tmp_path / "two"), 2)
    assert_same_rollouts(tmp_path / "two", unbroken(name))


def test_the_critic_learns_and_lies_beside_the_policy(unbroken, origin):
    run_folder = unbroken("ppo")
    newest = list_checkpoints(run_folder)[-1]
    critic, policy, first = load_value_model(newest / "critic"), load_model(newest), load_model(origin)
    assert critic.value_head.weight.abs().max() > 0
    for name, weight in policy.named_parameters():
        assert weight.shape == first.get_parameter(name).shape
    ids = torch.arange(8)[None]
    assert not torch.equal(critic(ids).hidden_states, policy(ids).hidden_states)
    rollouts, trained = rows_of(run_folder, "rollout"), rows_of(run_folder, "train")
    assert rollouts[0]["value"] == 0 != rollouts[-1]["value"]  # the head begins at zero
    assert {"value_error", "value_clipped", "kl"} <= trained[0].keys() and "explained_variance" in rollouts[0]


def test_the_tracker_takes_in_every_answer_and_is_kept(unbroken):
    run_folder = unbroken("spo")
    state = load_trainer_state(list_checkpoints(run_folder)[-1])["loader"]
    kept = state["keepers"]["tracker"]
    assert kept["drift"] > 0 and state["rollout"] == 4
    seen = kept["successes"].numpy() + kept["failures"].numpy()
    assert (seen != seen[np.argmin(kept["seen_at"].numpy())]).any() and len(seen) == 36
    assert len({answer["prompt"] for answer in state["answers"]}) == len(state["answers"]) == 12


def test_rewards_outside_the_range_are_reported_and_counted(origin, prompts, tmp_path):
    text = finish(command("spo", origin, prompts, tmp_path / "out", "--reward-range", "0", "0.0001"))
    assert " ".join(text.split()).count("lie outside --reward-range 0 0.0001 and are clipped to it") == 1
    rollouts = rows_of(tmp_path / "out", "rollout")
    assert len(rollouts) == 4 and any(row["reward_clamped"] > 0 for row in rollouts)


@pytest.mark.parametrize(
    ("reward", "flags", "expected"),
    [
        ("number:2", {}, ((0.0, 2.0), "none")),
        ("number", {"truncation_penalty": 0.5}, ((-0.5, 1.0), "none")),
        (TOY + "vowels", {}, ((-3.0, 3.0), "running")),
        (TOY + "vowels", {"reward_clip": (-2.0, 5.0)}, ((-2.0, 5.0), "none")),
        ("number", {"reward_norm": "running"}, ((-3.0, 3.0), "running")),
        (TOY + "vowels", {"reward_range": (0.0, 4.0)}, ((0.0, 4.0), "none")),
    ],
)
def test_the_range_of_success_is_that_of_the_rewards(reward, flags, expected):
    names = runpy.run_path(str(SCRIPT.with_name("spo.py")))
    found, norm, reason = names["range_of"](names["Args"](**flags), parse_rewards([reward]))
    assert (found, norm) == expected and reason


def test_a_reward_model_needs_no_range(origin, prompts, tmp_path):
    """Rewards without bounds are normalised, and success spans three deviations to either side."""
    flags = ["--rollouts", "2", "--save-every", "9", "--thinking", "0.5", "--mask-truncated", "True"]
    arguments = command("spo", origin, prompts, tmp_path / "out", *flags)
    at = arguments.index("--reward-range")
    text = finish([*arguments[:at], *arguments[at + 3 :]])
    assert "success: rewards from -3 to 3, in standard deviations" in " ".join(text.split())
    rollouts = rows_of(tmp_path / "out", "rollout")
    assert all(row["reward_deviation"] > 0 for row in rollouts)
    assert [row["masked"] for row in rollouts] == pytest.approx([1 - row["ended"] for row in rollouts])


def test_a_stopped_rollout_leaves_the_policy_and_not_the_critic(origin, prompts, tmp_path):
    """The KL of the first step on a rollout is rounding only; every later step exceeds so low a target."""
    flags = ["--target-kl", "1e-7", "--minibatches", "3", "--rollouts", "2", "--critic-lr", "0.01"]
    flags += ["--reward-norm", "running", "--truncation-penalty", "0.5", "--save-every", "1"]
    out = tmp_path / "out"
    finish(command("ppo", origin, prompts, out, *flags, "--keep-checkpoints", "9"))
    assert [row["policy_steps"] for row in rows_of(out, "rollout")] == [0, 1]
    checkpoints = list_checkpoints(out)
    policies, critics = ([load_model(c) for c in checkpoints], [load_value_model(c / "critic") for c in checkpoints])
    moved = [not torch.equal(a.embed_tokens.weight, b.embed_tokens.weight) for a, b in pairwise(policies)]
    assert moved == [False, False, True, False, False]  # between six steps: the first of each rollout alone
    assert all(not torch.equal(a.value_head.weight, b.value_head.weight) for a, b in pairwise(critics))
    assert {"critic_grad_norm", "grad_norm"} <= rows_of(out, "train")[0].keys()


@pytest.mark.parametrize(
    ("script", "flags", "message"),
    [
        ("ppo", {"lam": 2.0}, r"lam=2.0: both must lie in \[0, 1\]"),
        ("ppo", {"value_clip": 0.0}, "--value-clip 0.0: must be above 0"),
        ("ppo", {"critic_lr": 0.0}, "--critic-lr 0.0: must be above 0"),
        ("ppo", {"target_kl": -0.1}, "--target-kl -0.1: must be above 0"),
        ("spo", {"truncation_penalty": -1.0}, "--truncation-penalty -1.0: must be 0 or more"),
        ("spo", {"reward_clip": (1.0, 1.0)}, "--reward-clip 1 1: give the lower end first"),
        ("spo", {"thinking": 1.5}, "--thinking 1.5: must be a share from 0 to 1"),
        ("ppo", {"beta": -1.0}, "--beta -1.0: must be 0 or more"),
        ("ppo", {"value_weight": 0.0}, "--value-weight 0.0: must be above 0"),
        ("ppo", {"temperature": float("nan")}, "--temperature nan: must be above 0"),
        ("spo", {"reward_range": (1.0, 0.0)}, "rewards from 1.0 to 0.0: give the lower end first"),
        ("spo", {"half": 0.0}, "half=0.0, exploration=0.05: both must be above 0"),
    ],
)
def test_numbers_without_meaning_are_refused_before_anything_is_made(script, flags, message):
    names = runpy.run_path(str(SCRIPT.with_name(f"{script}.py")))
    names["Args"]().check()
    with pytest.raises(ValueError, match=message):
        names["Args"](**flags).check()


@pytest.mark.parametrize(
    ("name", "flags", "message"),
    [
        ("spo", ["--samples", "2"], "--samples 2: there is one answer to a prompt; set --prompts instead"),
        ("ppo", ["--clip-range", "1.5"], "low=1.5: the ratio's lower bound"),
    ],
)
def test_errors_are_one_line(name, flags, message, origin, prompts, tmp_path):
    answer = run(command(name, origin, prompts, tmp_path / "no", *flags))
    assert answer.returncode == 2 and "Traceback" not in answer.stderr, answer.stderr
    assert message in " ".join(answer.stdout.split()), answer.stdout
