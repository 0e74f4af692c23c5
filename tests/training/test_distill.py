"""train/distill.py as a user runs it, and whether a teacher helps."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from minimind import ModelConfig, load_model, load_tokenizer
from minimind.data import open_conversations
from minimind.tokenization import ChatEncoder
from tests.training.runs import SCRIPT, reproducible
from tests.training.test_lora import TINY, call, finish, rows_of, save_origin

DISTILL, SFT = SCRIPT.with_name("distill.py"), SCRIPT.with_name("sft.py")
FLAGS = ["--tokens", str(512 * 6), "--seq-len", "128", "--batch-tokens", "512", "--evals", "1", "--eval-questions", "4",
         "--eval-tokens", "2048", "--log-every", "2", "--precision", "fp32"]  # fmt: skip
WIDE = ModelConfig(96, 3, 4, 2, 24, 192)


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> tuple[Path, Path]:
    """(student, teacher): random weights, other sizes."""
    folder = tmp_path_factory.mktemp("models")
    return save_origin(TINY, folder / "student"), save_origin(WIDE, folder / "teacher")


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "chats.jsonl"
    rows = [
        [{"role": "user", "content": f"{i}?"}, {"role": "assistant", "content": f"{i} it is."}]
        for i in range(400)
    ]
    path.write_text("".join(json.dumps({"conversations": row}) + "\n" for row in rows))
    return path


def command(student: Path, teacher: Path, data: Path, out: Path, *extra: str) -> list[str]:
    return [sys.executable, str(DISTILL), "--from", str(student), "--teacher", str(teacher), "--data", str(data),
            "--out", str(out), "--cache-dir", str(data.parent / "cache"), *extra]  # fmt: skip


def test_run_learns_from_the_teacher_and_says_how_far_it_is(models, chats, tmp_path):
    out = tmp_path / "run"
    text = finish(
        command(*models, chats, out, *FLAGS, "--alpha", "0.2", "--temperature", "2", "--divergence", "jsd")
    )
    assert "teacher: custom" in text and "KL(teacher || student)" in text
    for picture in ("loss.png", "gap.png"):
        assert (out / picture).read_bytes().startswith(b"\x89PNG")
    losses = [row["loss"] for row in rows_of(out, "train")]
    assert len(losses) == 6 and losses[-1] < losses[0]
    first, *_, last = rows_of(out, "eval")
    assert first["heldout_kl"] != last["heldout_kl"]

    student, teacher, tokenizer = load_model(out), load_model(models[1]), load_tokenizer()
    _, held_out = open_conversations([chats], ChatEncoder(tokenizer), chats.parent / "cache").split(0.05)
    kl = loss = count = 0.0
    for i in range(held_out.num_documents):
        ids, codes = torch.tensor(held_out.document(i).astype("int64")), held_out.codes(i)
        spoken = torch.tensor(codes > 0)[1:]
        with torch.no_grad():
            q, p = (m(ids[None, :-1]).logits[0].log_softmax(-1)[spoken] for m in (student, teacher))
        kl += F.kl_div(q, p, log_target=True, reduction="sum").item()
        loss += F.nll_loss(p, ids[1:][spoken], reduction="sum").item()
        count += int(spoken.sum())
    assert last["heldout_all"] and last["heldout_tokens"] == count
    assert last["heldout_kl"] == pytest.approx(kl / count, rel=1e-4)
    assert last["teacher_loss"] == pytest.approx(loss / count, rel=1e-4)


def test_errors_are_one_line(models, chats, tmp_path):
    student, teacher = models
    small = save_origin(ModelConfig(64, 1, 4, 2, 16, 128, vocab_size=6500), tmp_path / "small")
    for place, flags, message in (
        (tmp_path / "absent", {}, f"--teacher {tmp_path / 'absent'}: no such folder"),
        (chats.parent, {}, f"--teacher {chats.parent}: neither a checkpoint"),
        (small, {}, "the student has a vocabulary of 6400 and the teacher one of 6500"),
        (teacher, {"alpha": 2.0}, "alpha=2.0: must lie in 0..1"),
    ):
        with pytest.raises(ValueError, match=re.escape(message)) as problem:
            call(DISTILL, from_=str(student), teacher=str(place), data=(str(chats),), out=str(tmp_path / "no"),
                 cache_dir=str(chats.parent / "cache"), seq_len=128, **flags)  # fmt: skip
        assert "\n" not in str(problem.value)


@pytest.mark.slow
def test_a_teacher_brings_a_smaller_student_closer_than_it_comes_alone(tmp_path):
    """The built-in conversations; the same student, data and number of steps, with the teacher and without."""
    cache, base = ["--cache-dir", str(tmp_path / "cache")], tmp_path / "teacher"
    origin = save_origin(ModelConfig.preset("nano"), tmp_path / "origin")
    learn = [
        sys.executable,
        str(SFT),
        "--from",
        str(origin),
        "--out",
        str(base),
        "--epochs",
        "6",
        "--evals",
        "1",
    ]
    answer = subprocess.run([*learn, *cache], capture_output=True, text=True, timeout=1800)
    assert answer.returncode == 0, answer.stdout + answer.stderr
    shape = dict(hidden_size=96, num_hidden_layers=2, num_attention_heads=3, num_key_value_heads=1)
    small = ModelConfig.preset("nano", **shape, intermediate_size=256)
    student = save_origin(small, tmp_path / "student")
    found = {}
    for alpha in (1.0, 0.2):
        out = tmp_path / f"alpha{alpha}"
        arguments = [
            sys.executable,
            str(DISTILL),
            "--from",
            str(student),
            "--teacher",
            str(base),
            "--out",
            str(out),
        ]
        arguments += ["--epochs", "2", "--evals", "1", "--alpha", str(alpha), *cache]
        answer = subprocess.run(arguments, capture_output=True, text=True, timeout=1800)
        assert answer.returncode == 0, answer.stdout + answer.stderr
        found[alpha] = reproducible(out)[-1]
    alone, taught = found[1.0], found[0.2]
    assert alone["step"] == taught["step"] and alone["teacher_loss"] == taught["teacher_loss"]
    assert taught["teacher_loss"] < taught["heldout_loss"] < alone["heldout_loss"], found
    assert taught["heldout_kl"] < alone["heldout_kl"], found
