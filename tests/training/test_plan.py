"""--plan agrees with the run that follows, for every stage and for sampled data."""

from __future__ import annotations

import json
import random
import re
import runpy
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from minimind import ModelConfig
from minimind.lora import LoRAConfig, add_adapter
from minimind.modeling import Model
from minimind.training import estimate
from minimind.training import plan as plan_module
from minimind.training.batches import CONTEXT_BYTES, step_bytes, tokens_that_fit
from minimind.training.estimate import CARDS, Card, cost
from minimind.training.plan import Estimate, relative_error, survey
from tests.training.runs import ONE_THREAD, SCRIPT, TINY, finish, rows_of, run, save_origin

WORDS = ["the", "of", "and", "a", "in", "is", "was", "that", "for", "it", "with", "as", "his", "on", "be", "at", "by"]


@pytest.fixture(autouse=True)
def quick(monkeypatch, tmp_path):
    monkeypatch.setattr(estimate, "_MEASURED_SECONDS", 0.0)
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    return save_origin(TINY, tmp_path_factory.mktemp("origin"))


def said(rng: random.Random, most: int) -> str:
    return " ".join(rng.choices(WORDS, k=rng.randrange(1, most)))


def rows(kind: str, path: Path, count: int, most: int = 60) -> Path:
    """A file of rows of this kind; every tenth is long."""
    rng = random.Random(0)
    with path.open("w", encoding="utf-8") as file:
        for i in range(count):
            size = 4 * most if i % 10 == 0 else most
            user = {"role": "user", "content": said(rng, most)}
            answers = [{"role": "assistant", "content": said(rng, size)} for _ in range(2)]
            row = {
                "text": {"text": said(rng, size)},
                "chats": {"conversations": [user, answers[0]]},
                "thoughts": {
                    "conversations": [
                        user,
                        {"role": "assistant", "content": f"<think>\n{said(rng, most)}\n</think>\n\nyes {i}"},
                    ]
                },
                "pairs": {"chosen": [user, answers[0]], "rejected": [user, answers[1]]},
                "prompts": {"conversations": [user, {"role": "assistant", "content": ""}]},
            }[kind]
            file.write(json.dumps(row) + "\n")
    return path


def plan(stage: str, **flags) -> Estimate:
    names = runpy.run_path(str(SCRIPT.with_name(f"{stage}.py")))
    return survey(names["main"], names["Args"](plan=True, **flags))


STAGES = {
    "pretrain": ("text", {}),
    "sft": ("chats", {}),
    "reason": ("thoughts", {}),
    "lora": ("chats", {}),
    "distill": ("chats", {"teacher": True}),
    "dpo": ("pairs", {}),
    "reward": ("pairs", {}),
    "grpo": ("prompts", {"rollouts": 3, "prompts": 8, "max_new_tokens": 9, "reward": ("repetition",)}),
    "ppo": ("prompts", {"rollouts": 3, "prompts": 8, "max_new_tokens": 9, "reward": ("repetition",)}),
    "spo": ("prompts", {"rollouts": 3, "prompts": 8, "max_new_tokens": 9, "reward": ("repetition",)}),
}


@pytest.mark.parametrize("stage", STAGES)
def test_every_stage_plans_and_leaves_nothing(stage, origin, tmp_path):
    kind, flags = STAGES[stage]
    if flags.get("teacher"):
        flags = {"teacher": str(origin)}
    data = rows(kind, tmp_path / "mine.jsonl", 200)
    before = sorted(origin.rglob("*"))
    found = plan(stage, from_=str(origin), data=(str(data),), cache_dir=str(tmp_path / "cache"), **flags)
    assert not (tmp_path / "runs").exists() and sorted(origin.rglob("*")) == before
    assert found.stage == stage and found.data.error == 0
    assert found.data.p50 <= found.data.p95 <= found.data.p99 <= found.data.longest
    assert found.steps > 0 and found.tokens > 0 and found.flops > 0 and found.measured_hours > 0
    assert found.optimizer == "adamw"  # the weights are of no run; an adapter and RL take no other
    assert (found.trained < found.parameters / 2) == (stage == "lora")
    assert [card.name for card in found.cards] == [card.name for card in CARDS]
    assert all(card.fits and card.hours > 0 for card in found.cards)
    assert f"this machine, {found.device}: " in "\n".join(found.lines())
    text = "\n".join(found.lines())
    assert "nothing is trained" in text and "projected, not measured" in text and "±" not in text
    json.dumps(found.figures())
    if found.rows:
        held = round(200 * 0.05)
        assert 200 - 3 * held <= found.data.documents < 200
        assert found.steps * found.step_tokens == found.tokens
    else:
        assert found.steps == 3 * {"grpo": 1, "ppo": 4, "spo": 4}[stage]
        assert found.epochs == pytest.approx(3 * 8 / found.data.documents)


@pytest.mark.heavy
def test_the_run_is_as_planned(origin, tmp_path):
    """Data for which the run must choose the passes, the row length and the optimizer."""
    data = rows("chats", tmp_path / "mine.jsonl", 150, 300)
    flags = {"batch_tokens": 8192, "seed": 3}
    where = {"from_": str(origin), "data": (str(data),), "cache_dir": str(tmp_path / "cache")}
    found = plan("sft", **where, **flags)
    command = [sys.executable, str(SCRIPT.with_name("sft.py")), "--from", str(origin), "--data", str(data),
               "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out"), "--batch-tokens", "8192",
               "--seed", "3", "--evals", "1", "--log-every", "1", "--precision", "fp32"]  # fmt: skip
    text = finish(command)
    chosen = json.loads((tmp_path / "out" / "config.json").read_text())["chosen"]
    assert chosen["seq_len"] == found.row > 512 and chosen["optimizer"] == found.optimizer == "adamw"
    assert found.epochs == pytest.approx(chosen["epochs"], rel=0.5 / found.steps) and chosen["epochs"] > 2
    assert f"{found.steps} steps of {found.step_tokens:,} tokens" in text
    assert rows_of(tmp_path / "out", "train")[-1]["step"] == found.steps
    conversations = re.search(r"data: (\d+) conversations, ([\d,]+) tokens a pass", text)
    assert conversations is not None
    assert int(conversations[1]) == found.data.documents
    assert int(conversations[2].replace(",", "")) == found.data.tokens
    for note in found.notes:
        assert note in text or note.startswith("on a GPU")


@pytest.mark.parametrize(
    ("stage", "kind"), [("pretrain", "text"), ("sft", "chats"), pytest.param("dpo", "pairs", marks=pytest.mark.heavy)]
)
def test_a_sample_of_the_data_gives_the_plan_of_all_of_it(stage, kind, origin, tmp_path, monkeypatch):
    """Four standard errors are allowed, which chance exceeds once in 16,000."""
    data = rows(kind, tmp_path / "mine.jsonl", 6000)
    where = {"from_": str(origin), "data": (str(data),), "cache_dir": str(tmp_path / "cache")}
    truth = plan(stage, **where)
    monkeypatch.setattr(plan_module, "SAMPLE_BYTES", 1 << 18)
    found = plan(stage, **where)
    assert found.data.read_bytes is not None and found.data.read_bytes < 1.2 * (1 << 18)
    assert found.data.bytes == truth.data.bytes == data.stat().st_size
    assert 0 < found.data.error < 0.06
    assert found.data.tokens == pytest.approx(truth.data.tokens, rel=2 * found.data.error)
    assert found.data.documents == pytest.approx(truth.data.documents, rel=2 * found.data.documents_error)
    for name in ("row", "optimizer", "step_tokens", "peak_lr"):
        assert getattr(found, name) == getattr(truth, name)
    assert found.epochs == pytest.approx(truth.epochs, rel=0.02)
    assert found.steps == pytest.approx(truth.steps, rel=2 * found.data.error)
    assert found.data.p95 == pytest.approx(truth.data.p95, rel=0.1)
    assert "±" in "\n".join(found.lines()) and not list(Path(tmp_path).glob("minimind-plan*"))


def test_a_declared_size_stretches_the_rows_at_hand(origin, tmp_path):
    """With --plan-gb a thousand times the size of a file that is read whole, the choices follow that size."""
    data = rows("chats", tmp_path / "mine.jsonl", 100)
    where = {"from_": str(origin), "data": (str(data),), "cache_dir": str(tmp_path / "cache")}
    few = plan("sft", **where)
    many = plan("sft", **where, plan_gb=1000 * data.stat().st_size / 1e9, plan_measure=False)
    assert few.epochs == pytest.approx(10, rel=0.1)  # 5 times upstream's 2
    assert many.epochs == pytest.approx(2, rel=1e-3)
    # a million tokens at most are held out, of the few a twentieth
    assert many.data.documents == pytest.approx(1000 * 100, rel=0.3)
    assert many.data.tokens == pytest.approx(1000 * few.data.tokens, rel=0.3)
    assert many.data.declared and "as --plan-gb says" in many.lines()[1]
    assert many.measured == "" and "this machine" not in "\n".join(many.lines())
    lora = {size: plan("lora", **where, plan_gb=size, plan_measure=False).step_tokens for size in (1e-4, 1.0)}
    assert lora == {1e-4: 1024, 1.0: 4096}


def test_a_shape_without_weights_and_files_of_every_kind(tmp_path):
    """--preset without any run; a folder, a weight and a compressed file."""
    import gzip

    (tmp_path / "some").mkdir()
    rows("chats", tmp_path / "some" / "a.jsonl", 80)
    rows("chats", tmp_path / "some" / "b.jsonl", 40)
    packed = tmp_path / "c.jsonl.gz"
    packed.write_bytes(gzip.compress(rows("chats", tmp_path / "c", 60).read_bytes()))
    (tmp_path / "c").unlink()
    found = plan(
        "sft",
        preset="nano",
        data=(f"{tmp_path / 'some'}:2", str(packed)),
        heldout_data=(f"extra={packed}",),
        cache_dir=str(tmp_path / "cache"),
        plan_gb=0.01,
        plan_measure=False,
    )
    assert found.preset == "nano" and found.optimizer == "muon" and found.data.documents > 1000
    assert any("mixture: some 67% of the rows" in note for note in found.notes)
    where = {"preset": "nano", "data": (str(packed),), "cache_dir": str(tmp_path / "cache")}
    assert plan("lora", **where, plan_measure=False).optimizer == "adamw"


def test_the_command_line_prints_and_writes_it(origin, tmp_path):
    data = rows("chats", tmp_path / "mine.jsonl", 60)
    command = [sys.executable, str(SCRIPT.with_name("sft.py")), "--from", str(origin), "--data", str(data),
               "--cache-dir", str(tmp_path / "cache"), "--out", str(tmp_path / "out")]  # fmt: skip
    text = finish([*command, "--plan", "--plan-json", str(tmp_path / "plan.json")])
    figures = json.loads((tmp_path / "plan.json").read_text())
    assert f"steps {figures['steps']:,} of {figures['step_tokens']:,} tokens" in text
    assert text.startswith("plan of sft, custom, ") and not (tmp_path / "out").exists()
    for wrong, message in (
        (["--plan-gb", "2"], "--plan-gb: goes with --plan"),
        (["--plan-json", "x"], "--plan-json: goes with --plan"),
        (["--plan", "--plan-gb", "0"], "--plan-gb 0.0: must be above 0"),
    ):
        answer = run([*command, *wrong])
        assert answer.returncode == 2 and answer.stdout == f"error: {message}\n"
    answer = run([*command, "--plan"], ONE_THREAD | {"WORLD_SIZE": "2", "RANK": "0"})
    assert answer.returncode == 2 and "start it with python instead of torchrun" in answer.stdout


def test_bad_rows_are_named_by_the_users_file(origin, tmp_path):
    data = tmp_path / "mine.jsonl"
    data.write_text('{"conversations": 5}\n' * 9)
    where = {"from_": str(origin), "data": (str(data),), "cache_dir": str(tmp_path / "cache")}
    with pytest.raises(ValueError, match=f"^{re.escape(str(data))}:1: "):
        plan("sft", **where)
    with pytest.raises(ValueError, match=f"^{re.escape(str(data))}: no document .* as all 9 rows are bad"):
        plan("sft", **where, plan_gb=1.0)
    with pytest.raises(ValueError, match="--plan-gb: goes with files of --data"):
        plan("sft", from_=str(origin), plan_gb=1.0)


def test_two_standard_errors_hold_the_truth_nineteen_times_in_twenty():
    """400 samples of rows whose tokens are loosely proportional to their bytes. The count is binomial, and four
    deviations from 95% are allowed."""
    rng = np.random.default_rng(0)
    within = 0
    for _ in range(400):
        sizes = rng.geometric(0.002, 640) + 20
        tokens = sizes * rng.normal(0.3, 0.05, 640)
        within += abs(tokens.sum() / sizes.sum() / 0.3 - 1) < relative_error(tokens, sizes)
    assert abs(within / 400 - 0.95) < 4 * (0.95 * 0.05 / 400) ** 0.5


def test_step_bytes_agree_with_tokens_that_fit():
    for name in ("minimind2-small", "minimind2", "minimind2-moe", "minimind3"):
        config, memory = ModelConfig.preset(name), 24 << 30
        with torch.device("meta"):
            parameters = Model(config).num_parameters()
        tokens = tokens_that_fit(config, parameters, memory)
        size = step_bytes(config, parameters, parameters, tokens)
        assert size == pytest.approx(CONTEXT_BYTES + 0.9 * (memory - CONTEXT_BYTES), rel=1e-3)
        frozen = step_bytes(config, parameters, 1000, tokens)
        assert size - frozen == 12 * (parameters - 1000)


def test_operations_are_those_of_what_is_trained():
    """A third each for the forward, the gradients of activations, and the gradients of trained weights."""
    torch.manual_seed(0)
    model = Model(TINY)
    whole = model.flops_per_token(64)
    assert cost(model, 64, False, ()) == whole
    assert cost(model, 64, True, (model,)) == pytest.approx(whole * 5 / 3)
    add_adapter(model, LoRAConfig(rank=2))
    own = sum(p.numel() for p in model.parameters() if p.requires_grad)
    expected = model.flops_per_token(64) / 3 * (2 + own / model.num_parameters())
    assert cost(model, 64, False, ()) == pytest.approx(expected)


def test_hours_of_a_card():
    card = Card("a card", tflops=100.0, bandwidth=1000.0, memory=24, utilisation=0.5)
    assert card.training_seconds(50e12 * 3600) == pytest.approx(3600)
    # 0.6 of 1000 GB/s for 6 GB, and 47 launches of 2.5 us; and where arithmetic takes longer, that
    assert card.decode_step_seconds(5e9, 1e9, 1.0, 8) == pytest.approx(0.01 + 47 * 2.5e-6)
    assert card.decode_step_seconds(1.0, 1.0, 50e12, 8) == pytest.approx(1 + 47 * 2.5e-6)
