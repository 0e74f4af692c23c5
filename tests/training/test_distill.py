"""train/distill.py as a user runs it, and whether a teacher helps."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minimind import ModelConfig, load_model, load_tokenizer
from minimind.data import Corpus, open_conversations, open_corpus
from minimind.data.split import split
from minimind.modeling import Model
from minimind.tokenization import ChatEncoder
from tests.training.runs import (
    SCRIPT,
    TINY,
    assert_continues_to_the_bit,
    assert_same_curve,
    call,
    finish,
    learn,
    reproducible,
    rows_of,
    save_origin,
)

DISTILL = SCRIPT.with_name("distill.py")
FLAGS = ["--tokens", str(512 * 6), "--seq-len", "128", "--batch-tokens", "512", "--evals", "1", "--eval-questions", "4",
         "--eval-tokens", "2048", "--log-every", "2", "--save-every", "2", "--precision", "fp32", "--alpha", "0.2",
         "--temperature", "2", "--divergence", "jsd"]  # fmt: skip
WIDE = ModelConfig(96, 3, 4, 2, 24, 192)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """(student, teacher): random weights, other sizes."""
    folder = tmp_path_factory.mktemp("models")
    return save_origin(TINY, folder / "student"), save_origin(WIDE, folder / "teacher")


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [[{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i} it is."}] for i in range(400)]
    path.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows))
    return path


def command(student: Path, teacher: Path, data: Path, out: Path, *extra: str) -> list[str]:
    return [sys.executable, str(DISTILL), "--from", str(student), "--teacher", str(teacher), "--data", str(data),
            "--out", str(out), "--cache-dir", str(data.parent / "cache"), *FLAGS, *extra]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(models, chats, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    text = finish(command(*models, chats, out))
    assert "teacher: custom" in text and "KL(teacher || student)" in text
    return out


def test_run_learns_from_the_teacher_and_says_how_far_it_is(unbroken, models, chats):
    for picture in ("loss.png", "gap.png"):
        assert (unbroken / picture).read_bytes().startswith(b"\x89PNG")
    losses = [row["loss"] for row in rows_of(unbroken, "train")]
    assert len(losses) == 6 and losses[-1] < losses[0]
    first, *_, last = rows_of(unbroken, "eval")
    assert first["heldout_kl"] != last["heldout_kl"]

    encoder = ChatEncoder(load_tokenizer())
    _, held_out = split(open_conversations([chats], encoder, chats.parent / "cache"))
    assert_gap(last, load_model(unbroken), load_model(models[1]), held_out)


def test_killed_and_started_again_the_curve_is_the_same_to_the_bit(unbroken, models, chats, tmp_path):
    out = tmp_path / "killed"
    assert_continues_to_the_bit(command(*models, chats, out), out, unbroken, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "flags"),
    [(2, ("--parallel", "ddp")), (2, ("--parallel", "fsdp")), (1, ("--micro-tokens", "128")), (1, ("--compile",))],
    ids=str,
)
def test_curve_is_that_of_one_process(processes, flags, models, chats, tmp_path):
    """The teacher is whole on every rank."""
    plain = ["--optimizer", "adamw", "--grad-clip", "1000", "--log-every", "1"]
    finish(command(*models, chats, tmp_path / "alone", *plain))
    arguments = command(*models, chats, tmp_path / "out", *plain, *flags)
    assert finish(arguments, processes).count("finished in") == 1
    assert_same_curve(reproducible(tmp_path / "out"), reproducible(tmp_path / "alone"), rel=1e-4)


def assert_gap(row: dict, student: Model, teacher: Model, held_out: Corpus) -> None:
    """The figures of `row` are those of whole logits, one document at a time."""
    kl = loss = count = 0.0
    for i in range(held_out.num_documents):
        ids = torch.tensor(held_out.document(i).astype("int64"))
        learnt = torch.ones(len(ids) - 1, dtype=torch.bool)
        if held_out.weighted:
            learnt = torch.tensor(held_out.codes(i) > 0)[1:]
        with torch.no_grad():
            q, p = (m(ids[None, :-1]).logits[0].log_softmax(-1)[learnt] for m in (student, teacher))
        kl += F.kl_div(q, p, log_target=True, reduction="sum").item()
        loss += F.nll_loss(p, ids[1:][learnt], reduction="sum").item()
        count += int(learnt.sum())
    assert row["heldout_all"] and row["heldout_tokens"] == count
    assert row["heldout_kl"] == pytest.approx(kl / count, rel=1e-4)
    assert row["teacher_loss"] == pytest.approx(loss / count, rel=1e-4)


def test_a_pretrained_teacher_teaches_text(data, tmp_path):
    """The student has half the teacher's size, which is the default."""
    shape = ModelConfig(96, 2, 4, 2, 24, 192, qk_norm=True)
    teacher = save_origin(shape, tmp_path / "teacher" / "checkpoints" / "step-00000001")
    (tmp_path / "teacher" / "config.json").write_text(json.dumps({"stage": "pretrain"}))
    out, cache = tmp_path / "run", tmp_path / "cache"
    call(DISTILL, teacher=str(tmp_path / "teacher"), data=(str(data),), out=str(out), cache_dir=str(cache),
         seq_len=128, batch_tokens=512, tokens=512 * 6, evals=1, heldout=0.02, lr=0.01,
         precision="fp32")  # fmt: skip
    losses = [row["loss"] for row in rows_of(out, "train")]
    assert len(losses) == 6 and losses[-1] < losses[0] - 0.2
    assert (out / "gap.png").exists() and " make" in (out / "samples.txt").read_text()
    student = load_model(out)
    assert student.config == ModelConfig(48, 1, 2, 1, 24, 96, qk_norm=True)
    _, held_out = split(open_corpus([data], load_tokenizer(), cache), 0.02)
    assert_gap(rows_of(out, "eval")[-1], student, load_model(teacher), held_out)


def test_errors_are_one_line(models, chats, tmp_path):
    student, teacher = models
    for place, flags, message in (
        (tmp_path / "absent", {}, f"--teacher {tmp_path / 'absent'}: no such folder"),
        (chats.parent, {}, f"--teacher {chats.parent}: neither a checkpoint"),
        (student / "model.safetensors", {}, "a bare weight file has no shape; run minimind export --model"),
        (teacher, {"alpha": 2.0}, "alpha=2.0: must lie in 0..1"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as problem:
            call(DISTILL, from_=str(student), teacher=str(place), data=(str(chats),), out=str(tmp_path / "no"),
                 cache_dir=str(chats.parent / "cache"), seq_len=128, **flags)  # fmt: skip
        assert "\n" not in str(problem.value) and not (tmp_path / "no").exists()


def test_a_teacher_that_cannot_be_halved_needs_a_named_student(models, chats, tmp_path):
    with pytest.raises(ValueError, match="its shape cannot be halved; name the student's with --preset"):
        call(DISTILL, teacher=str(models[1]), data=(str(chats),), out=str(tmp_path / "odd"),
             cache_dir=str(chats.parent / "cache"), seq_len=128)  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize("seed", ["1", "2"])
def test_a_teacher_brings_a_smaller_student_closer_than_it_comes_alone(seed, taught):
    """The same student, text and number of steps, with the teacher and without."""
    flags = ["--tokens", "300_000", "--heldout", "0.01", "--evals", "1", "--seed", seed]
    runs = learn("distill", taught, *flags, "--alpha", "1"), learn("distill", taught, *flags)
    alone, helped = (rows_of(run, "eval")[-1] for run in runs)
    assert alone["step"] == helped["step"] and alone["teacher_loss"] == helped["teacher_loss"]
    assert helped["teacher_loss"] < helped["heldout_loss"] < alone["heldout_loss"], (alone, helped)
    assert helped["heldout_kl"] < alone["heldout_kl"], (alone, helped)
