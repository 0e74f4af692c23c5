"""train/grpo.py as a user runs it: files, resuming, one and two processes, and errors."""

from __future__ import annotations

import json
import runpy
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from minimind import ModelConfig, load_model
from minimind.training.rl.stage import scaled_lr
from minimind.weights import save_weights
from tests.training.runs import (
    ONE_THREAD,
    SCRIPT,
    TINY,
    as_killed,
    assert_continues_to_the_bit,
    assert_same_curve,
    call,
    finish,
    last_step,
    reproducible,
    rows_of,
    run,
    save_origin,
    torchrun,
)

GRPO = SCRIPT.with_name("grpo.py")
TOY = "function=tests.training.toy_rewards:"
# Two steps of two micro-batches on each of four rollouts: a checkpoint after step 3 lies inside one.
FLAGS = ["--rollouts", "4", "--prompts", "4", "--samples", "4", "--minibatches", "2", "--micro-batches", "2", "--evals",
         "2", "--eval-prompts", "12", "--save-every", "3", "--lr", "0.003", "--precision", "fp32",
         "--reward", TOY + "vowels"]  # fmt: skip
STEPS = 8


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    return save_origin(TINY, tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module")
def prompts(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("prompts") / "prompts.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(40):
            asked = [{"role": "user", "content": f"Say {'more ' * (i % 5)}{i}."}]
            file.write(json.dumps({"conversations": [*asked, {"role": "assistant", "content": ""}]}) + "\n")
    return path


def command(origin: Path, prompts: Path, out: Path, *extra: str) -> list[str]:
    return [sys.executable, str(GRPO), "--from", str(origin), "--data", str(prompts), "--out", str(out),
            "--max-new-tokens", "6", *FLAGS, *extra]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(origin, prompts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    text = finish(command(origin, prompts, out, "--show", "1"))
    assert "data: 36 prompts; held out 4; reward: 1 function" in text
    assert text.count("  reward ") >= 4 * 4  # a prompt's answers of every rollout
    return out


def test_run_leaves_curves_and_figures_of_every_rollout(unbroken):
    for picture in ("loss.png", "rewards.png"):
        assert (unbroken / picture).read_bytes().startswith(b"\x89PNG")
    assert "[reward " in (unbroken / "samples.txt").read_text()
    rollouts, steps = rows_of(unbroken, "rollout"), rows_of(unbroken, "train")
    assert [row["step"] for row in rollouts] == [1, 3, 5, 7] and len(steps) == STEPS
    for row in rollouts:
        assert row["answers"] == 16 and 0 < row["length"] <= 6 and row["entropy"] > 0
        assert row["reward"] == row["reward_function"] and 0 <= row["degenerate_groups"] <= 1
        assert row["drift_max"] < 2e-5  # float32 on both sides: a few roundings of numbers near 10
    assert rollouts[0]["kl"] < 1e-9 < rollouts[-1]["kl"]
    timed = [json.loads(line)["time"] for line in (unbroken / "metrics.jsonl").read_text().splitlines()]
    parts = [time for time in timed if "rollout" in time]
    assert all(time.keys() >= {"rollout", "reward", "prepare"} for time in parts) and "train" in parts[-1]


def test_first_step_follows_the_rewards(unbroken):
    """Before any update the clip does nothing, and GRPO's loss is 0 but for rounding: advantages have mean 0."""
    first = rows_of(unbroken, "train")[0]
    assert abs(first["loss"]) < 0.5 and first["clipped"] == 0 and first["ratio"] == pytest.approx(1, abs=1e-5)
    assert first["grad_norm"] > 0.01


def test_killed_inside_a_rollout_and_started_again_the_run_is_the_same_to_the_bit(unbroken, origin, prompts, tmp_path):
    out = tmp_path / "killed"
    assert_continues_to_the_bit(command(origin, prompts, out, "--show", "1"), out, unbroken, 4)


def test_a_finished_run_is_lengthened_to_the_bit(unbroken, origin, prompts, tmp_path):
    """Its rate is constant, so that it becomes the run that would have been planned for more rollouts."""
    longer = "--rollouts", "6", "--show", "1"
    finish(command(origin, prompts, tmp_path / "planned", *longer))
    text = finish(command(origin, prompts, tmp_path / "out", *longer, "--lengthen", str(unbroken)))
    assert "lengthened at step 8 from 8 steps to 12: the rate goes on at 1.00 of the peak" in text
    for kind in ("train", "rollout"):
        assert rows_of(tmp_path / "out", kind) == rows_of(tmp_path / "planned", kind)


def assert_same_rollouts(out: Path, truth: Path) -> None:
    """The curves are the same, except for the difference between engine and trainer, which is rounding."""

    def compared(folder: Path) -> list[dict]:
        rounding = {"drift_mean", "drift_max", "ratio_drift", "behaviour_kl"}
        return [{k: v for k, v in row.items() if k not in rounding} for row in reproducible(folder)]

    assert_same_curve(compared(out), compared(truth), rel=1e-3, abs=2e-5)


PLAIN = ["--optimizer", "adamw", "--grad-clip", "1000"]


@pytest.fixture(scope="module")
def alone(origin, prompts, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "alone"
    finish(command(origin, prompts, out, *PLAIN, "--keep-checkpoints", "9"))
    return out


@pytest.mark.parametrize("step", [3, 6])
def test_a_run_resumes_with_other_micro_batches(step, origin, prompts, alone, tmp_path):
    """From inside a rollout, and from the end of one."""
    out = as_killed(alone, step, tmp_path / "cut")
    text = finish(command(origin, prompts, out, *PLAIN, "--micro-batches", "4", "--show", "1"))
    assert "continues with other flags: keep_checkpoints 9 (now 2), micro_batches 2 (now 4), show 0 (now 1)" in text
    assert_same_rollouts(out, alone)


def test_curve_of_two_processes_is_that_of_one(origin, prompts, alone, tmp_path):
    out = tmp_path / "two"
    text = finish(command(origin, prompts, out, *PLAIN), 2)
    assert text.count("finished in") == 1
    assert_same_rollouts(out, alone)


@pytest.mark.slow
def test_a_run_of_two_processes_resumes_on_one_inside_a_rollout(origin, prompts, alone, tmp_path):
    out = tmp_path / "out"
    process = subprocess.Popen(
        torchrun(2, *command(origin, prompts, out, *PLAIN)[1:]),
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
        env=ONE_THREAD,
    )
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline and process.poll() is None and last_step(out) < 4:
        time.sleep(0.005)
    process.send_signal(signal.SIGTERM)
    process.wait()
    assert "continuing after step" in finish(command(origin, prompts, out, *PLAIN))
    assert_same_rollouts(out, alone)


@pytest.mark.slow
@pytest.mark.parametrize("loss", ["dapo", "dr_grpo", "gspo", "cispo"])
def test_other_losses_raise_the_reward_too(loss, origin, prompts, tmp_path):
    flags = ["--loss", loss, "--rollouts", "40", "--samples", "16", "--save-every", "100", "--evals", "1"]
    finish(command(origin, prompts, tmp_path / "out", *flags))
    rewards = [row["reward"] for row in rows_of(tmp_path / "out", "rollout")]
    assert sum(rewards[-5:]) / 5 > sum(rewards[:5]) / 5 + 0.1, rewards
    assert "kl" not in rows_of(tmp_path / "out", "rollout")[0]


def attempt(origin: Path, prompts: Path, out: Path, **flags) -> None:
    """The script's main with these flags, in this process."""
    settings = {
        "from_": str(origin), "data": (str(prompts),), "out": str(out), "max_new_tokens": 6, "rollouts": 4,
        "prompts": 4, "samples": 4, "evals": 1, "eval_prompts": 4, "precision": "fp32", "lr": 0.003,
        "reward": (TOY + "vowels",), **flags,
    }  # fmt: skip
    call(GRPO, **settings)


@pytest.mark.parametrize(
    ("loss", "expected", "few"), [("grpo", 4, 1), ("dapo", 8, 1), ("dr_grpo", 8, 1), ("gspo", 4, 1), ("cispo", 8, 1)]
)
def test_default_minibatches_are_the_papers(loss, expected, few):
    """64 x 4 answers, at least 32 in each step; where there are 40 answers, all in one. dapo and cispo take their
    papers' 16 from 512 answers on."""
    names = runpy.run_path(str(GRPO))
    assert names["default_minibatches"](names["Args"](loss=loss)) == expected
    assert names["default_minibatches"](names["Args"](loss=loss, prompts=10)) == few
    assert names["default_minibatches"](names["Args"](loss=loss, prompts=256)) == {
        "grpo": 4,
        "gspo": 4,
        "dr_grpo": 8,
    }.get(loss, 16)


def test_the_rate_follows_the_width():
    rates = [scaled_lr(5e-5, ModelConfig.preset(name)) for name in ("nano", "minimind2-small", "minimind2")]
    assert rates == [5e-5, 1.9e-5, 1.3e-5]  # 192, 512 and 768 wide


def test_clips_act_with_the_defaults(origin, prompts, tmp_path):
    """With a single step per rollout, the former default, every ratio would stay 1."""
    settings = {"samples": 16, "rollouts": 2, "lr": 0.01, "warmup": 0.0, "loss": "gspo"}
    attempt(origin, prompts, tmp_path / "out", **settings)
    trained = rows_of(tmp_path / "out", "train")
    assert len(trained) == 4 and trained[1]["clipped"] > 0.1 and trained[3]["ratio_drift"] > 1e-3


def test_failing_rewards_are_counted_and_the_run_goes_on_or_stops(origin, prompts, tmp_path):
    attempt(origin, prompts, tmp_path / "on", reward=(TOY + "no_z",), samples=16)
    rows = rows_of(tmp_path / "on", "rollout")
    assert any(row.get("reward_failed_function") for row in rows) and all(row["answers"] == 64 for row in rows)
    broken = (TOY + "always_raises",)
    with pytest.raises(ValueError, match=r"reward function failed on .* out of order") as stopped:
        attempt(origin, prompts, tmp_path / "stop", reward=broken, on_reward_error="stop")
    assert "\n" not in str(stopped.value)
    with pytest.raises(ValueError, match="no answer is left to learn from"):
        attempt(origin, prompts, tmp_path / "none", reward=broken, heldout=0)
    with pytest.raises(ValueError, match="no held-out answer could be scored; fix the reward, or turn evaluation off"):
        attempt(origin, prompts, tmp_path / "held", reward=broken)
    message = rf"--reward {TOY}one_for_all returned 1 value for \d+ samples: it must return a list of \d+ numbers"
    with pytest.raises(ValueError, match=message):
        attempt(origin, prompts, tmp_path / "one", reward=(TOY + "one_for_all",))


def test_equal_rewards_are_reported_and_change_nothing(origin, prompts, tmp_path):
    flags = ["--reward", TOY + "all_equal", "--beta", "0", "--loss", "dapo", "--refills", "1"]
    text = finish(command(origin, prompts, tmp_path / "out", *flags))
    assert text.count("warning: for 3 steps in every group all rewards are equal") == 1
    rows = rows_of(tmp_path / "out", "rollout")
    assert all(row["degenerate_groups"] == 1 and row["drawn"] == 2 for row in rows)
    before, after = load_model(origin), load_model(tmp_path / "out")
    for a, b in zip(before.parameters(), after.parameters(), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"samples": 1}, "--samples 1: an answer is compared with others to its prompt; take 2 or more"),
        ({"max_prompt": 5}, ":1: the prompt has .* tokens, more than --max-prompt 5"),
        ({"reward": ()}, "--reward: not all prompts of --data have a reference answer"),
        ({"reward": ("letters",)}, "--reward letters: there is no reward 'letters'"),
        ({"clip_low": 2.0}, "low=2.0: the ratio's lower bound is 1 - low"),
        ({"parallel": "fsdp"}, "--parallel fsdp: answers are sampled from whole weights; take ddp"),
        ({"minibatches": 0}, "--minibatches 0: must be above 0"),
        (
            {"max_prompt": 32768},
            r"--max-prompt and --max-new-tokens, together 32774: the model knows 32768 positions; take no more",
        ),
    ],
)
def test_errors_are_one_line(flags, message, origin, prompts, tmp_path):
    with pytest.raises(ValueError, match=message) as error:
        attempt(origin, prompts, tmp_path / "no", **flags)
    assert "\n" not in str(error.value) and not (tmp_path / "no").exists()


def test_weights_that_are_not_finite_stop_the_run_with_a_line(origin, prompts, tmp_path):
    model = load_model(origin)
    with torch.no_grad():
        model.embed_tokens.weight[5] = float("nan")
    bad = tmp_path / "bad"
    save_weights(model, bad)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (bad / name).write_bytes((origin / name).read_bytes())
    with pytest.raises(ValueError, match="the logits are not finite"):
        attempt(bad, prompts, tmp_path / "out")


def test_a_rate_too_high_ends_in_a_line_and_keeps_the_checkpoints(origin, prompts, tmp_path):
    flags = ["--lr", "1e30", "--grad-clip", "1e30", "--warmup", "0.001", "--save-every", "1"]
    answer = run(command(origin, prompts, tmp_path / "out", *flags))
    assert answer.returncode == 2 and "Traceback" not in answer.stderr, answer.stderr
    assert "error: step" in answer.stdout and "Checkpoints are from before" in answer.stdout
