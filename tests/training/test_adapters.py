"""--lora-rank of the stages as a user runs them: what is trained and saved, the base as the reference model, several
processes, and the programs that open the result."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from minimind import load_model, load_tokenizer
from minimind.data.cache import open_preferences
from minimind.data.split import split
from minimind.inference.loading import WeightArgs, open_weights
from minimind.lora import LoRAConfig, adapters_off, lora_linears
from minimind.rewards.model import model_reward
from minimind.rewards.rules import Sample
from minimind.tokenization import ChatEncoder
from minimind.training.adapters import PEAK_LR, AdapterArgs, AdapterSetup
from minimind.training.checkpoint import list_checkpoints, load_trainer_state
from minimind.training.rl import stage as rl_stage
from minimind.training.rl.actor_critic import ActorCritic, critic_of, critic_parameters, with_value_head
from minimind.training.rl.collector import log_probs_of
from minimind.training.rl.loader import Shape, _restored
from minimind.value_head import HEAD
from tests.adapted import SHAPES, make, with_adapter
from tests.training.runs import (
    SCRIPT,
    TINY,
    assert_continues_to_the_bit,
    assert_same_curve,
    call,
    finish,
    lines_of,
    reproducible,
    rows_of,
    save_origin,
)
from tests.training.test_grpo import TOY, assert_same_rollouts

RL = ["--rollouts", "4", "--evals", "2", "--eval-prompts", "12", "--save-every", "3", "--minibatches", "2", "--lr",
      "0.01", "--precision", "fp32", "--max-new-tokens", "6", "--grad-clip", "1000", "--reward", TOY + "vowels",
      "--lora-rank", "4"]  # fmt: skip
STAGES = {
    "grpo": ("grpo", ["--prompts", "4", "--samples", "4"]),
    "spo": ("spo", ["--prompts", "12", "--beta", "0.01", "--lora-dora", "--reward-range", "0", "4"]),
    "ppo": ("ppo", ["--prompts", "12", "--inner-epochs", "1", "--lora-plus", "2", "--lora-rslora"]),
    "ppo shared": ("ppo", ["--prompts", "12", "--inner-epochs", "1", "--critic", "shared", "--kl-in", "loss"]),
}
some = pytest.mark.parametrize("name", STAGES)
few = pytest.mark.parametrize(
    "name", ["grpo", "ppo", *(pytest.param(n, marks=pytest.mark.slow) for n in ("spo", "ppo shared"))]
)


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    return save_origin(TINY, tmp_path_factory.mktemp("origin"))


def command(name: str, origin: Path, prompts: Path, out: Path, *extra: str) -> list[str]:
    script, flags = STAGES[name]
    return [sys.executable, str(SCRIPT.with_name(f"{script}.py")), "--from", str(origin), "--data", str(prompts),
            "--out", str(out), *RL, *flags, *extra]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(origin, prompts, tmp_path_factory):
    """The run of each stage, made when it is first asked for."""
    made: dict[str, Path] = {}

    def of(name: str) -> Path:
        if name not in made:
            out = made[name] = tmp_path_factory.mktemp("runs") / name.replace(" ", "-")
            text = finish(command(name, origin, prompts, out))
            assert "adapter: 0.0" in text and "parameters are trained" in text and "rank 4, scale" in text
        return made[name]

    return of


@some
def test_checkpoints_hold_the_adapter_alone_and_rollouts_are_of_the_policy(name, unbroken, origin):
    out = unbroken(name)
    for newest in list_checkpoints(out):
        assert not (newest / "model.safetensors").exists() and (newest / "tokenizer.json").exists()
        noted = json.loads((newest / "base_model.json").read_text())
        assert noted["path"] == str(origin) and noted["fingerprint"].startswith(origin.name)
    state = load_file(newest / "adapter_model.safetensors")
    assert any(t.any() for key, t in state.items() if "lora_B" in key)
    assert any("magnitude" in key for key in state) == (name == "spo")
    rollouts = rows_of(out, "rollout")
    for row in rollouts:
        assert row["drift_max"] < 2e-5  # float32 on both sides: a few roundings of numbers near 10
    assert rollouts[0]["kl"] < 1e-9 < 1e-6 < rollouts[-1]["kl"]
    critic = sorted(path.name for path in newest.glob("critic*"))
    assert critic == {"ppo": ["critic", "critic_head.pt"], "ppo shared": ["critic_head.pt"]}.get(name, [])
    if name == "ppo":
        assert not (newest / "critic" / "model.safetensors").exists()
        own = load_file(newest / "critic" / "adapter_model.safetensors")
        assert own.keys() == state.keys() and any(t.any() for key, t in own.items() if "lora_B" in key)


@some
def test_answers_were_compared_with_the_base(name, unbroken, origin):
    """When an adapter has been trained already, a rollout's reference log-probabilities still equal those of the
    initial model bit for bit, as the same operators run on the same weights."""
    state = load_trainer_state(list_checkpoints(unbroken(name))[0])["loader"]
    assert state["rollout"] == 3
    answers = [_restored(saved) for saved in state["answers"]]
    again = log_probs_of(load_model(origin), answers, Shape())
    for a, log_probs in zip(answers, again, strict=True):
        np.testing.assert_array_equal(a.reference, log_probs)
        assert np.abs(a.log_probs - log_probs).max() > 1e-4


@few
def test_killed_inside_a_rollout_and_started_again_the_run_is_the_same_to_the_bit(
    name, unbroken, origin, prompts, tmp_path
):
    out, whole = tmp_path / "killed", unbroken(name)
    assert_continues_to_the_bit(command(name, origin, prompts, out), out, whole, 4)
    for file in [*list_checkpoints(whole)[-1].rglob("critic/*.safetensors")]:
        assert (out / file.relative_to(whole)).read_bytes() == file.read_bytes()


@few
def test_curve_of_two_processes_is_that_of_one(name, unbroken, origin, prompts, tmp_path):
    finish(command(name, origin, prompts, tmp_path / "two"), 2)
    assert_same_rollouts(tmp_path / "two", unbroken(name))


def test_a_run_folder_opens_with_the_adapter_merged_or_not(unbroken, origin):
    ids = torch.arange(20)[None]
    runs = [open_weights(WeightArgs(str(unbroken("ppo"))), torch.device("cpu"), merge=m) for m in (True, False)]
    merged, beside = (opened.model(ids).logits for opened in runs)
    base = load_model(origin)(ids).logits
    torch.testing.assert_close(merged, beside, rtol=1e-4, atol=1e-4)
    assert (merged - base).abs().max() > 1e-2 and runs[0].stage == "ppo" and not lora_linears(runs[0].model)


def test_the_reference_needs_no_second_model(origin, prompts, tmp_path, monkeypatch):
    def refuse(job):
        raise AssertionError("a frozen copy")

    monkeypatch.setattr(rl_stage, "frozen", refuse)
    settings = {
        "from_": str(origin), "data": (str(prompts),), "max_new_tokens": 6, "rollouts": 1, "prompts": 4, "samples": 4,
        "evals": 1, "eval_prompts": 4, "precision": "fp32", "reward": (TOY + "vowels",),
    }  # fmt: skip
    with pytest.raises(AssertionError, match="a frozen copy"):
        call(SCRIPT.with_name("grpo.py"), out=str(tmp_path / "whole"), **settings)
    call(SCRIPT.with_name("grpo.py"), out=str(tmp_path / "adapter"), lora_rank=4, **settings)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("own", [True, False])
def test_policy_and_critic_are_adapters_on_one_base(shape, own):
    model = with_adapter(
        make(shape), LoRAConfig(rank=4, alpha=8, targets=("q_proj", "up_proj") if shape != "moe" else None)
    )
    ids = torch.arange(30)[None]
    before = model(ids).logits
    frozen = {p.data_ptr() for p in model.parameters() if not p.requires_grad}
    both = ActorCritic.from_policy(model) if own else with_value_head(model)
    assert torch.equal(both(ids, return_logits=True).logits, before)
    held = {p.data_ptr() for p in both.parameters() if not p.requires_grad}
    assert held <= frozen and {p.data_ptr() for p in model.parameters()} <= {p.data_ptr() for p in both.parameters()}
    critic = critic_of(both)
    assert not critic(ids).values.any()
    learns = {id(p) for p in critic_parameters(both)}
    assert id(critic.value_head.weight) in learns
    policy = [p for p in model.parameters() if p.requires_grad]
    assert not learns & {id(p) for p in policy}
    assert len(learns) == (len(policy) + 1 if own else 1)
    with torch.no_grad():
        critic.value_head.weight.normal_()
    critic(ids).values.sum().backward()
    assert all((p.grad is None) == own for p in policy)
    if own:
        with adapters_off(model):
            assert torch.equal(critic.norm(torch.ones(1, 64))[0], model.norm(torch.ones(1, 64))[0])


def test_an_adapter_off_is_its_base_until_the_end():
    model, base = with_adapter(make(), LoRAConfig(dora=True)), make()
    ids = torch.arange(30)[None]
    adapted = model(ids).logits
    with pytest.raises(KeyError), adapters_off(model):
        assert torch.equal(model(ids).logits, base(ids).logits)
        raise KeyError
    assert torch.equal(model(ids).logits, adapted) and not torch.equal(adapted, base(ids).logits)


PAIRS = ["--tokens", str(512 * 6), "--seq-len", "128", "--batch-tokens", "512", "--save-every", "2", "--log-every", "1",
         "--evals", "2", "--eval-tokens", "400", "--lr", "0.005", "--precision", "fp32", "--grad-clip", "1000",
         "--lora-rank", "4", "--lora-dora"]  # fmt: skip


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(200):
            asked = {"role": "user", "content": f"{i} and {i % 7}?"}
            said = {"chosen": f"{i + i % 7}", "rejected": f"{i + 1} or so"}
            row = {side: [asked, {"role": "assistant", "content": text}] for side, text in said.items()}
            file.write(json.dumps(row) + "\n")
    return path


def dpo(origin: Path, pairs: Path, out: Path, *extra: str) -> list[str]:
    return [sys.executable, str(SCRIPT.with_name("dpo.py")), "--from", str(origin), "--data", str(pairs), "--out",
            str(out), "--cache-dir", str(pairs.parent / "cache"), *PAIRS, *extra]  # fmt: skip


SIDES = ("chosen", "rejected")


def held_out(pairs: Path) -> list[dict]:
    encoder = ChatEncoder(load_tokenizer())
    return lines_of(split(open_preferences([pairs], encoder, pairs.parent / "cache", longest=128))[1], pairs)


@pytest.fixture(scope="module")
def preferred(origin, pairs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "dpo"
    text = finish(dpo(origin, pairs, out))
    assert "--optimizer adamw: the one for adapters" in text and "DoRA, all projections but routed experts" in text
    return out


def test_dpo_moves_the_adapter_away_from_its_base(preferred, origin, pairs, tmp_path):
    rows = rows_of(preferred, "train")
    assert abs(rows[0]["margin"]) < 1e-3 and rows[-1]["margin"] > 0.01
    assert not list(preferred.rglob("model.safetensors")) and list(preferred.rglob("adapter_model.safetensors"))
    whole = dpo(origin, pairs, tmp_path / "whole")
    text = finish(whole[: whole.index("--lora-rank")])
    assert "reference log-probabilities of" not in text  # those of the base: the whole model's run finds them


def test_dpo_killed_and_started_again_the_curve_is_the_same_to_the_bit(preferred, origin, pairs, tmp_path):
    out = tmp_path / "killed"
    assert_continues_to_the_bit(dpo(origin, pairs, out), out, preferred, 3)


@pytest.mark.parametrize("strategy", [pytest.param("ddp", marks=pytest.mark.slow), "fsdp"])
def test_dpo_on_two_processes_is_that_on_one(strategy, preferred, origin, pairs, tmp_path):
    """Each works out its part of the reference, with the adapter off."""
    out, cache = tmp_path / "two", str(tmp_path / "cache")
    finish(dpo(origin, pairs, out, "--parallel", strategy, "--cache-dir", cache), 2)
    assert_same_curve(reproducible(out), reproducible(preferred), rel=1e-3, abs=2e-5)


@pytest.mark.heavy
def test_a_sharded_run_resumes_on_one_process(preferred, origin, pairs, tmp_path):
    out = tmp_path / "out"
    finish(dpo(origin, pairs, out, "--parallel", "fsdp"), 2)
    for later in list_checkpoints(out)[1:]:
        for file in later.iterdir():
            file.unlink()
        later.rmdir()
    (out / "finished").unlink()
    text = finish(dpo(origin, pairs, out))
    assert "continuing after step 4" in text
    assert_same_curve(reproducible(out), reproducible(preferred), rel=1e-3, abs=2e-5)


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(100):
            answer = {"role": "assistant", "reasoning_content": f"{i} and one", "content": f"{i + 1}"}
            file.write(json.dumps({"conversations": [{"role": "user", "content": f"{i}?"}, answer]}) + "\n")
    return path


def test_reasoning_and_distillation_take_an_adapter_too(origin, chats, tmp_path):
    common = {"from_": str(origin), "cache_dir": str(tmp_path / "cache"), "data": (str(chats),), "tokens": 1024,
              "seq_len": 128, "batch_tokens": 512, "eval_questions": 2, "evals": 1, "eval_tokens": 400,
              "precision": "fp32", "lora_rank": 2}  # fmt: skip
    call(SCRIPT.with_name("reason.py"), out=str(tmp_path / "reason"), **common)
    call(SCRIPT.with_name("distill.py"), out=str(tmp_path / "distill"), teacher=str(origin), **common)
    for name in ("reason", "distill"):
        assert list((tmp_path / name).rglob("adapter_model.safetensors"))
        assert not list((tmp_path / name).rglob("model.safetensors"))


@pytest.mark.heavy
def test_a_reward_model_is_an_adapter_with_a_head(origin, pairs, tmp_path):
    """--reward model= scores like the run's last figures; a resumed run is the same to the bit."""
    flags = ["--from", str(origin), "--data", str(pairs), "--cache-dir", str(pairs.parent / "cache")]
    arguments = [sys.executable, str(SCRIPT.with_name("reward.py")), *flags, *PAIRS, "--lora-targets", "q_proj"]
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    finish([*arguments, "--out", str(whole)])
    newest = list_checkpoints(whole)[-1]
    assert not (newest / "model.safetensors").exists() and (newest / HEAD).is_file()
    assert_continues_to_the_bit([*arguments, "--out", str(killed)], killed, whole, 3)
    assert (newest / HEAD).read_bytes() == (list_checkpoints(killed)[-1] / HEAD).read_bytes()
    reward, last = model_reward(str(whole), torch.device("cpu")), rows_of(whole, "eval")[-1]
    reward.model.compute_dtype = None
    held = held_out(pairs)
    scores = reward([Sample(row[side][:1], row[side][1]["content"], [], "stop") for row in held for side in SIDES])
    chosen, rejected = scores.reshape(-1, 2).T
    assert last["heldout_chosen_score"] == pytest.approx(chosen.mean(), abs=1e-4)
    assert last["heldout_margin"] == pytest.approx((chosen - rejected).mean(), abs=1e-4)
    assert abs(last["heldout_margin"]) > 1e-2


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        ({"lora_dora": True}, "--lora-dora: goes with --lora-rank"),
        ({"lora_alpha": 3.0}, "--lora-alpha: goes with --lora-rank"),
        ({"lora_rank": 0}, "LoRA rank=0: must be at least 1"),
        ({"lora_rank": 4, "lora_plus": 0.0}, r"--lora-plus 0.0: must be above 0"),
        ({"lora_rank": 4, "embedding_lr": 2.0}, "--embedding-lr 2.0: the embedding is frozen"),
        ({"lora_rank": 4, "lora_dropout": 0.1}, "--lora-dropout 0.1: answers are sampled without"),
        ({"lora_rank": 4, "lora_targets": ("w1",)}, "LoRA target 'w1': this model has no such projection"),
    ],
)
def test_errors_are_one_line_and_leave_no_folder(flags, message, origin, prompts, tmp_path):
    settings = {"from_": str(origin), "data": (str(prompts),), "out": str(tmp_path / "no"), "reward": (TOY + "vowels",)}
    with pytest.raises(ValueError, match=message) as error:
        call(SCRIPT.with_name("grpo.py"), **settings, **flags)
    assert "\n" not in str(error.value) and not (tmp_path / "no").exists()


def test_random_weights_take_no_adapter(origin, chats, tmp_path):
    settings = {"teacher": str(origin), "preset": "nano", "data": (str(chats),), "out": str(tmp_path / "no"),
                "cache_dir": str(tmp_path / "cache")}  # fmt: skip
    with pytest.raises(ValueError, match="--lora-rank: the frozen model would be random"):
        call(SCRIPT.with_name("distill.py"), lora_rank=4, **settings)
    assert not (tmp_path / "no").exists()


def test_the_rate_is_ten_times_the_whole_models_where_that_is_low():
    whole, adapter = (AdapterSetup(None, config) for config in (None, AdapterArgs(lora_rank=4).lora()))
    assert whole.peak_lr(5e-5) == 5e-5 and adapter.peak_lr(5e-5) == pytest.approx(5e-4)
    assert adapter.peak_lr(2e-3) == PEAK_LR
