"""train/reason.py as a user runs it, its loss, and the format of replies."""

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
import torch.nn.functional as F

from minimind import load_model, load_tokenizer
from minimind.data import PackedLoader, open_conversations
from minimind.modeling import Model
from minimind.tokenization.reasoning import ReasoningEncoder, prompt_endings
from minimind.training.stages.chats import HeldOutQuestion, ReasoningQuestions, reasoning_figures, reply_of
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

REASON = SCRIPT.with_name("reason.py")
WORDS = ["zero", "one", "two", "three", "four"]


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    return save_origin(TINY, tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module")
def sums(tmp_path_factory) -> Path:
    """Sums in words: with reasoning beside the answer, in upstream's form, or without."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("sums") / "sums.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(300):
            a, b = rng.randrange(5), rng.randrange(5)
            steps, found = f"{a}+{b}={a + b}", str(a + b)
            reply = {"content": found}
            if i % 3 == 0:
                reply["reasoning_content"] = steps
            elif i % 3 == 1:
                reply["content"] = f"<think>\n{steps}\n</think>\n<answer>\n{found}\n</answer>"
            messages = [{"role": "user", "content": f"{i}: {WORDS[a]} and {WORDS[b]}?"}]
            file.write(json.dumps({"conversations": [*messages, {"role": "assistant", **reply}]}) + "\n")
    return path


def command(origin: Path, data: Path, out: Path, *extra: str) -> list[str]:
    flags = ["--from", str(origin), "--data", str(data), "--out", str(out), "--cache-dir",
             str(data.parent / "cache"), "--seq-len", "64", "--batch-tokens", "512", "--evals", "2",
             "--eval-questions", "4", "--tokens", str(512 * 9), "--heldout", "0.1", "--save-every", "3",
             "--log-every", "2", *extra]  # fmt: skip
    return [sys.executable, str(REASON), *flags]


@pytest.fixture(scope="module")
def unbroken(origin, sums, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    text = finish(command(origin, sums, out))
    assert "questions with reasoning" in text and "reasoning enable_thinking=false: " in text
    return out


def test_run_leaves_its_folder_and_figures(unbroken):
    for picture in ("loss.png", "format.png", "exact.png"):
        assert (unbroken / picture).read_bytes().startswith(b"\x89PNG")
    losses = [row["loss"] for row in rows_of(unbroken, "train")]
    assert len(losses) == 9 and losses[-1] < losses[0]
    evals = rows_of(unbroken, "eval")
    shares = {f"{mode}_{what}" for mode in ("auto", "on", "off") for what in ("format", "exact")}
    assert len(evals) == 3 and all(shares | {"plain_exact"} <= row.keys() for row in evals)
    assert evals[0]["reasoning_questions"] == evals[0]["plain_questions"] == 4
    assert evals[-1]["reasoning_questions"] > 4


def test_killed_and_started_again_the_curve_is_the_same_to_the_bit(unbroken, origin, sums, tmp_path):
    out = tmp_path / "killed"
    assert_continues_to_the_bit(command(origin, sums, out), out, unbroken, 4)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("processes", "flags"),
    [(2, ("--parallel", "ddp")), (2, ("--parallel", "fsdp")), (1, ("--micro-tokens", "128")), (1, ("--compile",))],
    ids=str,
)
def test_curve_is_that_of_one_process(processes, flags, origin, sums, tmp_path):
    """Ranks hold different numbers of markers, by whose weight the loss is divided."""
    plain = ["--precision", "fp32", "--optimizer", "adamw", "--grad-clip", "1000", "--log-every", "1"]
    finish(command(origin, sums, tmp_path / "alone", *plain))
    arguments = command(origin, sums, tmp_path / "out", *plain, *flags)
    assert finish(arguments, processes).count("finished in") == 1
    assert_same_curve(reproducible(tmp_path / "out"), reproducible(tmp_path / "alone"), rel=1e-4)


def train(origin: Path, sums: Path, out: Path, **changed) -> list[dict]:
    """Rows of a short run in float32, in this process."""
    flags = {"from_": str(origin), "data": (str(sums),), "cache_dir": str(sums.parent / "cache"), "out": str(out),
             "seq_len": 64, "batch_tokens": 1024, "tokens": 3072, "precision": "fp32", "optimizer": "adamw",
             "grad_clip": 1e3, "evals": 1, "heldout": 0.0}  # fmt: skip
    call(REASON, **{**flags, **changed})
    return rows_of(out, "train")


@pytest.mark.parametrize("marker_weight", [2.5, 10.0])
def test_loss_is_divided_by_the_weighted_sum_however_it_is_accumulated(origin, sums, marker_weight, tmp_path):
    """Step 1 against sum(w * nll) / sum(w) by hand, in float64 with full logits; later steps and the gradient norm
    against the same in one micro-batch."""
    flags = {"marker_weight": marker_weight}
    whole = train(origin, sums, tmp_path / "whole", **flags)
    parts = train(origin, sums, tmp_path / "parts", **flags, micro_tokens=128)

    tokenizer = load_tokenizer()
    encoder = ReasoningEncoder(tokenizer, runpy.run_path(str(REASON))["Args"]().direct)
    corpus = open_conversations([sums], encoder, sums.parent / "cache")
    batch = PackedLoader(corpus, 64, 16, seed=42).next_batch()
    targets = torch.from_numpy(batch.targets)
    scale = torch.from_numpy(weights_by_hand(tokenizer, batch.targets, marker_weight))
    losses = {}
    for dtype in (torch.float64, torch.float32):
        model = load_model(origin).to(dtype)
        with torch.no_grad():
            logits = model(torch.from_numpy(batch.input_ids), cu_seqlens=torch.from_numpy(batch.cu_seqlens)).logits
        nll = F.cross_entropy(logits.transpose(1, 2), targets, reduction="none")
        losses[dtype] = (
            ((nll * scale).sum() / scale.sum()).item(),
            ((nll * scale).sum() / (targets >= 0).sum()).item(),
        )
    truth, plain = losses[torch.float64][0], losses[torch.float32][0]
    bound = 2 * abs(plain - truth) + 4 * torch.finfo(torch.float32).eps * truth
    for rows in (whole, parts):
        assert abs(rows[0]["loss"] - truth) <= bound
    assert abs(whole[0]["loss"] - losses[torch.float64][1]) > 0.1  # what upstream divides by is another number
    for one, other in zip(whole, parts, strict=True):
        assert one["grad_norm"] == pytest.approx(other["grad_norm"], rel=1e-3)
        assert one["loss"] == pytest.approx(other["loss"], rel=2e-5)


def weights_by_hand(tokenizer, targets: np.ndarray, marker_weight: float) -> np.ndarray:
    """float64 like targets: no reply here has letters but in its markers."""
    texts = {int(i): tokenizer.decode([int(i)]) for i in np.unique(targets) if i >= 0}
    marked = [i for i, text in texts.items() if re.search("[a-z<>]", text) and i != tokenizer.eos_token_id]
    assert {"ans", "w", "er", "<think>", "</think>"} <= {texts[i] for i in marked}
    return np.where(targets < 0, 0.0, np.where(np.isin(targets, marked), marker_weight, 1.0))


@pytest.mark.parametrize(
    ("mode", "text", "answer"),
    [
        ("auto", "<think>\nso\n</think>\n\n4", "4"),
        ("auto", "<think>\nso\n</think>\n<answer>\n4\n</answer>", "4"),
        ("auto", "4", None),
        ("auto", "so\n</think>\n\n4", None),
        ("auto", "4 <think>so</think>", None),
        ("auto", "<think>\n\n</think>\n\n4", None),
        ("auto", "<think>\nso\n</think>\n\n", None),
        ("auto", "<think>\nso", None),
        ("auto", "<think>so</think>a<think>so</think>4", None),
        ("on", "so\n</think>\n\n4", "4"),
        ("on", "<think>so\n</think>\n\n4", None),
        ("on", "4", None),
        ("off", "4", "4"),
        ("off", "<think>so</think>4", None),
        ("off", "4</think>", None),
        ("off", " \n", None),
    ],
)
def test_the_format(mode, text, answer):
    reply = reply_of(text, True, mode)
    assert (reply and reply.answer) == answer
    assert reply_of(text, False, mode) is None  # cut off before its end token


def test_figures_are_those_of_what_was_written(monkeypatch):
    """Prepared replies replace those of a model: the shares in the format, of right answers, and the prompts are
    checked."""
    tokenizer = load_tokenizer()
    right, wrong, broken = "<think>\nso\n</think>\n\n4", "<think>\nso\n</think>\n\n5", "4"
    asked = [HeldOutQuestion([7 + i], tokenizer.encode(right)) for i in range(4)]
    written = {"auto": [right, right, wrong, broken], "off": ["4", "4", "4", right]}
    written["on"] = [text.removeprefix("<think>\n") for text in written["auto"]]
    endings = {mode: tokenizer.encode(text) for mode, text in prompt_endings(tokenizer).items()}

    def answer(model, tokenizer, questions, longest):
        ending = questions[0].prompt[1:]
        assert [q.prompt for q in questions] == [[7 + i, *ending] for i in range(4)]
        mode = next(m for m, e in endings.items() if e == ending)
        replies = [tokenizer.encode(text) for text in written[mode]]
        replies[0] += tokenizer.encode("!") * (longest - len(replies[0])) if mode == "on" else []
        return replies

    monkeypatch.setattr("minimind.training.stages.chats.answer", answer)
    figures = reasoning_figures(Model(TINY), tokenizer, ReasoningQuestions(asked, []))
    assert figures == {
        "auto_format": 0.75,
        "auto_exact": 0.5,
        "on_format": 0.5,
        "on_exact": 0.25,  # one of them never ended
        "off_format": 0.75,
        "off_exact": 0.75,
        "reasoning_questions": 4,
    }


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"marker_weight": 0.0}, "--marker-weight 0: must be above 0"),
        ({"marker_weight": float("nan")}, "--marker-weight nan: must be above 0"),
        ({"direct": 2.0}, "--direct 2: must be a share from 0 to 1"),
        ({"direct": 1.0}, "--data: no conversation has reasoning; give reasoning_content or <think>...</think>"),
        ({"from_": "nowhere"}, "--from nowhere: no such file or folder"),
        ({"data": ("{bad}",)}, "bad.jsonl:1: message 1, of the assistant, is not <think>reasoning</think> and an"),
    ],
)
def test_bad_flags_are_one_clear_line(changed, message, origin, sums, tmp_path):
    bad = tmp_path / "bad.jsonl"
    row = [{"role": "user", "content": "?"}, {"role": "assistant", "content": "<think>so"}]
    bad.write_text(json.dumps({"conversations": row}))
    if "data" in changed:
        changed = {"data": (str(bad),)}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        train(origin, sums, tmp_path / "out", **changed)
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_chat_model_learns_to_reason_when_asked(taught):
    first, *_, last = rows_of(learn("reason", taught, "--evals", "1"), "eval")
    assert first["auto_format"] < 0.1 and last["auto_format"] >= 0.8, (first, last)
    assert last["on_format"] >= 0.8 and last["off_format"] >= 0.8, last
    assert last["auto_exact"] > first["auto_exact"] + 0.1 and last["plain_exact"] > 0.8, last
