"""train/lora.py as a user runs it: files, resuming, and that it teaches without undoing."""

from __future__ import annotations

import json
import runpy
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from minimind import load_model, load_tokenizer
from minimind.data.builtin.chat import identity
from minimind.lora import LoRAConfig, add_adapter, lora_linears
from minimind.lora_files import adapter_folder, load_adapter
from minimind.training.checkpoint import list_checkpoints
from minimind.weights import save_weights
from tests.training.runs import (
    SCRIPT,
    TINY,
    as_killed,
    assert_continues_to_the_bit,
    assert_same_curve,
    call,
    finish,
    learn,
    reproducible,
    rows_of,
    save_origin,
)

LORA = SCRIPT.with_name("lora.py")
FLAGS = ["--tokens", str(512 * 8), "--seq-len", "128", "--batch-tokens", "512", "--save-every", "3", "--log-every", "2",
         "--evals", "2", "--eval-questions", "4", "--dropout", "0.1", "--precision", "fp32"]  # fmt: skip


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    return save_origin(TINY, tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module")
def cache(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("cache")


def command(origin: Path, out: Path, cache: Path, *extra: str) -> list[str]:
    return [sys.executable, str(LORA), "--from", str(origin), "--out", str(out), "--cache-dir", str(cache),
            *FLAGS, *extra]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(origin, cache, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    text = finish(command(origin, out, cache))
    assert "rank 8, scale 2, q_proj k_proj" in text and "other answers exact" in text
    return out


def test_run_leaves_an_adapter_and_figures_of_what_is_kept(unbroken, origin):
    newest = list_checkpoints(unbroken)[-1]
    assert not (newest / "model.safetensors").exists() and (newest / "tokenizer.json").exists()
    raw = json.loads((newest / "adapter_config.json").read_text())
    assert raw["peft_type"] == "LORA" and raw["base_model_name_or_path"] == str(origin)
    assert any(t.any() for k, t in load_file(newest / "adapter_model.safetensors").items() if "lora_B" in k)
    for picture in ("loss.png", "answers.png"):
        assert (unbroken / picture).read_bytes().startswith(b"\x89PNG")
    losses = [row["loss"] for row in rows_of(unbroken, "train")]
    assert len(losses) == 8 and losses[-1] < losses[0]
    last = rows_of(unbroken, "eval")[-1]
    assert last["kept_questions"] > 400 and {"kept_exact", "base_exact", "heldout_exact"} <= last.keys()
    model = load_model(origin)
    ids = torch.arange(20)[None]
    before = model(ids).logits
    load_adapter(model, unbroken)  # a run folder is enough
    assert not torch.equal(model(ids).logits, before)


def test_killed_and_started_again_the_curve_is_the_same_to_the_bit(unbroken, origin, cache, tmp_path):
    out = tmp_path / "killed"
    assert_continues_to_the_bit(command(origin, out, cache), out, unbroken, 4)


def test_evaluations_do_not_change_dropout(unbroken, origin, cache, tmp_path):
    out = as_killed(unbroken, 6, tmp_path / "cut")
    finish(command(origin, out, cache, "--log-every", "1", "--evals", "8", "--eval-questions", "2"))
    assert rows_of(out, "train") == rows_of(unbroken, "train")


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        pytest.param(2, ("--parallel", "fsdp"), marks=pytest.mark.heavy),
        pytest.param(2, ("--parallel", "ddp"), marks=pytest.mark.slow),
        pytest.param(1, ("--micro-tokens", "128"), marks=pytest.mark.slow),
        pytest.param(1, ("--compile",), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_curve_is_that_of_one_process(processes, flags, origin, cache, tmp_path):
    """No dropout: each process would draw its own."""
    plain = ["--dropout", "0", "--grad-clip", "1000", "--log-every", "1"]
    finish(command(origin, tmp_path / "alone", cache, *plain))
    arguments = command(origin, tmp_path / "out", cache, *plain, *flags)
    assert finish(arguments, processes).count("finished in") == 1
    assert_same_curve(reproducible(tmp_path / "out"), reproducible(tmp_path / "alone"), rel=1e-4)


def test_an_adapter_can_be_trained_further(unbroken, origin, cache, tmp_path):
    out = tmp_path / "more"
    call(LORA, from_=str(origin), out=str(out), cache_dir=str(cache), adapter=str(unbroken), tokens=512, seq_len=128,
         batch_tokens=512, eval_questions=2, precision="fp32")  # fmt: skip
    assert rows_of(out, "train")[0]["loss"] < rows_of(unbroken, "train")[0]["loss"]


def test_an_adapter_of_another_base_is_reported(unbroken, origin, cache, tmp_path):
    """It may be the same model in another form, so that it is no error."""
    model = load_model(origin)
    with torch.no_grad():
        model.norm.weight.mul_(1.01)
    save_weights(model, tmp_path / "other")
    load_tokenizer().save(tmp_path / "other")
    for base, told in ((origin, False), (tmp_path / "other", True)):
        flags = ["--adapter", str(unbroken), "--tokens", "512", "--eval-questions", "2", "--evals", "1"]
        text = finish(command(base, tmp_path / f"run-{told}", cache, *flags))
        assert ("right if that is the same model in another form" in text) == told, text
        assert not told or f"--adapter {unbroken}: trained on" in text.replace("\n", " ")


def test_dora_trains_lengths_and_the_best_adapter_is_what_opens(origin, cache, tmp_path):
    out = tmp_path / "dora"
    call(LORA, from_=str(origin), out=str(out), cache_dir=str(cache), dora=True, lora_plus=4.0, keep_best=True,
         tokens=1024, seq_len=128, batch_tokens=512, eval_questions=2, evals=2, precision="fp32")  # fmt: skip
    (best,) = out.glob("checkpoints/best-*")
    model, fresh = load_model(origin), load_model(origin)
    assert adapter_folder(out) == best and load_adapter(model, out).dora
    add_adapter(fresh, LoRAConfig(dora=True))
    pairs = zip(lora_linears(model), lora_linears(fresh), strict=True)
    assert all(not torch.equal(a.adapter("default").M, b.adapter("default").M) for (_, a), (_, b) in pairs)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (dict(lora_plus=0.0), "--lora-plus 0.0: must be above 0"),
        (dict(embedding_lr=2.0), "--embedding-lr 2.0: the embedding is frozen"),
        (dict(optimizer="muon"), "--optimizer muon: adapters are trained with adamw"),
        (dict(rank=0), "LoRA rank=0: must be at least 1"),
        (dict(targets=("w1",)), "LoRA target 'w1': this model has no such projection"),
        (dict(adapter="absent"), r"absent/adapter_config.json: no such file"),
    ],
)
def test_errors_are_one_line(flags, message, origin, cache, tmp_path):
    with pytest.raises(ValueError, match=message) as problem:
        call(LORA, from_=str(origin), out=str(tmp_path / "no"), cache_dir=str(cache), seq_len=128, **flags)
    assert "\n" not in str(problem.value)


@pytest.mark.parametrize(
    ("usual", "ranks", "row", "tokens", "epochs", "expected"),
    [
        (65536, 1, 512, 8_500_000, 6.0, 32768),  # upstream's lora_medical on a GPU: 1,557 steps, not 50,000 of 1024
        (4096, 1, 512, 8_500_000, 6.0, 4096),  # no more than other stages take
        (65536, 1, 512, 20_000, 6.0, 1024),
        (65536, 4, 1024, 20_000, 6.0, 4096),  # a row for each process
        (65536, 1, 384, 8_500_000, 6.0, 49152),  # a multiple of a row that is no power of two
    ],
)
def test_default_batch_leaves_a_thousand_steps(usual, ranks, row, tokens, epochs, expected):
    rule = runpy.run_path(str(LORA))["batch_tokens"]
    args = SimpleNamespace(tokens=None, passes=epochs, row=row, scaled=round)
    device = "cuda" if usual > 4096 else "cpu"
    job = SimpleNamespace(
        args=args, default_device=device, initial=SimpleNamespace(preset="minimind2"),
        parallel=SimpleNamespace(world_size=ranks),
    )  # fmt: skip
    batch, reason = rule(job, SimpleNamespace(num_tokens=tokens))
    steps = -(-round(tokens * epochs) // expected)
    assert batch == expected and f"--batch-tokens {expected}: {steps:,} steps for" in reason


def test_built_in_rows_hold_out_wordings_and_nothing_else():
    train, heldout, kept = identity()
    texts = [{c[0]["content"] for c in rows} for rows in (train, heldout)]
    assert not texts[0] & texts[1] and all("Ada" in c[1]["content"] for c in heldout)
    answers = {c[1]["content"] for c in heldout}
    assert answers <= {c[-1]["content"] for c in train}
    assert len(kept) > 400 and not any("MiniMind, a" in m["content"] for c in kept for m in c)
    assert identity() == (train, heldout, kept)


@pytest.mark.slow
def test_an_adapter_teaches_a_name_and_keeps_other_answers(taught):
    out = learn("lora", taught, "--evals", "1")
    first, *_, last = rows_of(out, "eval")
    assert first["heldout_exact"] == 0 and last["heldout_exact"] > 0.9, last
    assert last["base_exact"] > 0.8 and last["kept_exact"] > last["base_exact"] - 0.02, last
