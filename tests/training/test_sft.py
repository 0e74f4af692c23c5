"""train/sft.py as a user runs it, and its loss."""

from __future__ import annotations

import json
import math
import random
import re
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from minimind import ModelConfig, load_model, load_tokenizer
from minimind.data import PackedLoader, open_conversations
from minimind.data.split import split
from minimind.export.command import export_pth
from minimind.export.hf import export_hf
from minimind.modeling import Model
from minimind.objectives.next_token import next_token_loss
from minimind.tokenization import ChatEncoder
from minimind.training.batches import to_device
from minimind.training.stages.chats import read_questions
from minimind.weights import save_weights
from tests import warm
from tests.training.runs import (
    ONE_THREAD,
    SCRIPT,
    TINY,
    assert_continues_to_the_bit,
    assert_same_curve,
    call,
    finish,
    lines_of,
    reproducible,
    rows_of,
    run,
    save_origin,
)

SFT = SCRIPT.with_name("sft.py")
STEPS = 24
LENGTH = ["--tokens", str(512 * STEPS), "--save-every", "7", "--lr", "0.01"]


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    return save_origin(TINY, tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    """Sums in words, some in two exchanges, some with markers of reasoning."""
    words = ["zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine"]
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("chats") / "sums.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(600):
            messages = []
            for _ in range(1 + (i % 5 == 0)):
                a, b = rng.randrange(5), rng.randrange(5)
                messages.append({"role": "user", "content": f"{words[a]} and {words[b]}?"})
                reply = f"<think>\nadd\n</think>\n\n{words[a + b]}" if i % 7 == 0 else words[a + b]
                messages.append({"role": "assistant", "content": reply})
            file.write(json.dumps({"conversations": messages}) + "\n")
    return path


def command(origin: Path, data: Path, out: Path, *extra: str) -> list[str]:
    flags = ["--from", str(origin), "--data", str(data), "--out", str(out), "--seq-len", "64", "--batch-tokens",
             "512", "--evals", "2", "--log-every", "3", "--cache-dir", str(data.parent / "cache"), *extra]  # fmt: skip
    return [sys.executable, str(SFT), *flags]


@pytest.fixture(scope="module")
def unbroken(origin, chats, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    text = finish(command(origin, chats, out, *LENGTH, "--eval-questions", "8"))
    assert f"weights: {origin}" in text and "answers exact" in text
    return out


def test_run_leaves_its_folder_and_learns(unbroken, origin):
    for name in ("config.json", "metrics.jsonl", "samples.txt", "versions.json", "finished"):
        assert (unbroken / name).exists(), name
    assert (unbroken / "loss.png").read_bytes().startswith(b"\x89PNG")
    rows = reproducible(unbroken)
    assert [row["step"] for row in rows if row["kind"] == "train"] == list(range(1, STEPS + 1))
    held_out = [row["heldout_loss"] for row in rows_of(unbroken, "eval")]
    assert held_out[0] > 8 and held_out[-1] < held_out[0] - 2
    samples = (unbroken / "samples.txt").read_text(encoding="utf-8")
    assert samples.count("=== step") == 3 and "user: " in samples and " | assistant: " in samples
    assert load_model(unbroken).config == TINY
    config = json.loads((unbroken / "config.json").read_text())
    assert config["args"]["from"] == str(origin) and config["weights"].startswith(origin.name)


def test_recorded_held_out_figures_are_those_of_the_answers(unbroken, chats):
    """From the weights on disk, one conversation at a time, with the mask made by hand from the text."""
    model, tokenizer = load_model(unbroken), load_tokenizer(unbroken)
    encoder = ChatEncoder(tokenizer)
    corpus = open_conversations([chats], encoder, chats.parent / "cache")
    held_out = split(corpus)[1]
    nats = targets = num_bytes = matches = 0.0
    asked = 0
    for row in (line["conversations"] for line in lines_of(held_out, chats)):
        text = ""
        ids, mask = [], []
        for message in row:
            head, body = f"<|im_start|>{message['role']}\n", f"{message['content']}<|im_end|>"
            spoken = message["role"] == "assistant"
            num_bytes += len(body.encode()) if spoken else 0
            for part, trained in ((head, False), (body, spoken), ("\n", False)):
                if part == body and spoken:
                    asked += 1
                    matches += greedy(model, ids, tokenizer) == tokenizer.encode(message["content"])
                ids += tokenizer.encode(part)
                mask += [trained] * (len(ids) - len(mask))
            text += head + body + "\n"
        assert tokenizer.apply_chat_template(row) == text
        with torch.no_grad():
            logits = model(torch.tensor([ids[:-1]])).logits[0]
        loss = F.cross_entropy(logits, torch.tensor(ids[1:]), reduction="none")
        nats += loss[torch.tensor(mask[1:])].sum().item()
        targets += sum(mask)
    row = rows_of(unbroken, "eval")[-1]
    assert row["heldout_all"] and row["heldout_tokens"] == targets and row["heldout_questions"] == asked
    # the recorded ones ran in this device's precision, here it is float32
    assert row["heldout_loss"] == pytest.approx(nats / targets, rel=0.01)
    assert row["heldout_bpb"] == pytest.approx(nats / math.log(2) / num_bytes, rel=0.01)
    assert row["heldout_exact"] == pytest.approx(matches / asked, abs=2 / asked)


def greedy(model: Model, ids: list[int], tokenizer) -> list[int]:
    out = list(ids)
    with torch.no_grad():
        while len(out) < len(ids) + 16:
            out.append(int(model(torch.tensor([out])).logits[0, -1].argmax()))
            if out[-1] == tokenizer.eos_token_id:
                return out[len(ids) : -1]
    return out[len(ids) :]


def test_killed_twice_the_curve_is_the_same_to_the_bit(unbroken, origin, chats, tmp_path):
    out = tmp_path / "killed"
    arguments = command(origin, chats, out, *LENGTH, "--eval-questions", "8")
    assert_continues_to_the_bit(arguments, out, unbroken, 3, 15)  # before any checkpoint, and after two


PLAIN = ["--tokens", "4096", "--precision", "fp32", "--optimizer", "adamw", "--grad-clip", "1000",
         "--log-every", "1", "--evals", "1", "--eval-questions", "4"]  # fmt: skip


@pytest.fixture(scope="module")
def alone(origin, chats, tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("runs") / "alone"
    finish(command(origin, chats, out, *PLAIN))
    return reproducible(out)


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (2, ("--parallel", "ddp")),
        pytest.param(2, ("--parallel", "fsdp", "--micro-tokens", "256"), marks=pytest.mark.slow),
        pytest.param(3, ("--parallel", "ddp"), marks=pytest.mark.slow),  # does not divide the 8 rows of a batch
        pytest.param(1, ("--micro-tokens", "128"), marks=pytest.mark.slow),
        pytest.param(1, ("--compile",), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_curve_is_that_of_one_process(processes, flags, origin, chats, alone, tmp_path):
    """Ranks hold different numbers of the assistant's tokens."""
    arguments = command(origin, chats, tmp_path / "out", *PLAIN, *flags)
    assert finish(arguments, processes).count("finished in") == 1
    assert_same_curve(reproducible(tmp_path / "out"), alone, rel=2e-5)


@pytest.mark.parametrize("marker_weight", [1.0, 10.0])
def test_packed_equals_padded(chats, marker_weight):
    """Loss and gradients of packed rows, against each conversation in a padded row of its own with full logits in
    float64: sum(w * nll) / sum(w)."""
    encoder = ChatEncoder(load_tokenizer())
    corpus = open_conversations([chats], encoder, chats.parent / "cache").head(900)
    torch.manual_seed(0)
    model = Model(TINY)
    loader = PackedLoader(corpus, 64, 1 + corpus.num_tokens // 40, marker_weight=marker_weight)
    batches = list(loader.epoch_batches())
    assert len(batches) == 1
    batch = to_device(batches[0], torch.device("cpu"))
    loss, _ = next_token_loss(model, batch)
    (loss / batch.global_weight).backward()
    grads = [p.grad for p in model.parameters()]

    longest = int(corpus.lengths(np.arange(corpus.num_documents)).max())
    ids = torch.zeros(corpus.num_documents, longest, dtype=torch.int64)
    scale = torch.zeros(ids.shape, dtype=torch.float64)
    for i, row in enumerate(map(json.loads, chats.read_text().splitlines()[: corpus.num_documents])):
        (chat,) = encoder.encode([encoder.pieces(row["conversations"])])
        ids[i, : len(chat.ids)] = torch.from_numpy(chat.ids.astype(np.int64))
        scale[i, : len(chat.ids)] = torch.from_numpy(np.where(chat.markers, marker_weight, chat.trained))
    losses = {}
    for dtype in (torch.float64, torch.float32):
        truth = Model(TINY).to(dtype)
        truth.load_state_dict({k: v.to(dtype) for k, v in model.state_dict().items()})
        logits = truth(ids[:, :-1]).logits
        nll = F.cross_entropy(logits.transpose(1, 2), ids[:, 1:], reduction="none")
        value = (nll * scale[:, 1:].to(dtype)).sum() / scale[:, 1:].sum().to(dtype)
        value.backward()
        losses[dtype] = [value.detach(), *(p.grad for p in truth.parameters())]
    assert batch.global_weight == scale[:, 1:].sum()
    packed = [loss.detach() / batch.global_weight, *grads]
    for ours, exact, plain in zip(packed, losses[torch.float64], losses[torch.float32], strict=True):
        error = (ours.double() - exact).abs().max()
        assert error <= 2 * (plain.double() - exact).abs().max() + 1e-6 * exact.abs().max()


def test_questions_are_every_assistant_turn(chats):
    tokenizer = load_tokenizer()
    corpus = open_conversations([chats], ChatEncoder(tokenizer), chats.parent / "cache")
    rows = [json.loads(line)["conversations"] for line in chats.read_text().splitlines()]
    expected = []
    for row in rows[:20]:
        for k, message in enumerate(row):
            if message["role"] == "assistant":
                prompt = tokenizer.apply_chat_template(row[:k], add_generation_prompt=True)
                expected.append((prompt, message["content"]))
    asked = read_questions(corpus, 512, len(expected))
    assert [(tokenizer.decode(q.prompt), tokenizer.decode(q.answer)) for q in asked] == expected
    assert max(len(q.prompt) + len(q.answer) for q in read_questions(corpus, 20)) < 20


def test_upstreams_weights_and_a_hugging_face_folder_begin_a_run_alike(chats, tmp_path):
    """The same weights as a .pth with a preset and a tokenizer, as what transformers loads, and as our checkpoint."""
    folder = save_origin(ModelConfig.preset("nano"), tmp_path / "checkpoint")
    model, tokenizer = load_model(folder), load_tokenizer(folder)
    export_pth(model, tmp_path / "full_sft.pth")
    export_hf(model, tokenizer, tmp_path / "hf")
    named = {"preset": "nano", "tokenizer": str(folder)}
    losses = []
    for place, more in ((folder, {}), (tmp_path / "full_sft.pth", named), (tmp_path / "hf", {})):
        out = tmp_path / "runs" / place.name
        call(SFT, from_=str(place), data=(str(chats),), out=str(out), cache_dir=str(chats.parent / "cache"), seq_len=64,
             batch_tokens=512, tokens=512, heldout=0.0, **more)  # fmt: skip
        losses.append([row["loss"] for row in rows_of(out, "train")])
    assert losses[0] == losses[1] == losses[2] and len(losses[0]) == 1


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"from_": "nowhere"}, "--from nowhere: no such file or folder"),
        ({"from_": "{data}"}, "sums.jsonl: a bare weight file has no shape; name it with --preset"),
        ({"from_": "{data}", "preset": "nano"}, "there is no tokenizer beside it; name its folder with --tokenizer"),
        ({"preset": "nano"}, "is a custom model; drop --preset"),
        ({"seq_len": 4, "batch_tokens": 32}, "--seq-len 4: every first question is longer"),
        ({"data": ("absent.jsonl",)}, "absent.jsonl: no such file"),
        ({"tokens": 0}, "--tokens 0: must be above 0"),
        ({"seq_len": 1 << 20}, "--seq-len 1048576: the model knows 32768 positions; take no more tokens"),
    ],
)
def test_bad_flags_are_one_clear_line(changed, message, origin, chats, tmp_path):
    changed = {k: v.format(data=chats) if isinstance(v, str) else v for k, v in changed.items()}
    flags = {"from_": str(origin), "data": (str(chats),), "cache_dir": str(chats.parent / "cache")}
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        call(SFT, **{**flags, "out": str(tmp_path / "out"), **changed})
    assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_without_a_pretraining_run_the_error_says_what_to_do(chats, tmp_path):
    arguments = [sys.executable, str(SFT), "--data", str(chats)]
    answer = warm.run(arguments, ONE_THREAD, tmp_path)
    assert answer.returncode == 2
    assert "--from: there is no finished run of train/pretrain.py under runs/; run it first" in answer.stdout


def test_other_weights_make_another_run(unbroken, origin, chats, tmp_path):
    out, other = tmp_path / "copy", tmp_path / origin.name
    shutil.copytree(unbroken, out)
    (out / "finished").unlink()
    shutil.copytree(origin, other)
    torch.manual_seed(1)
    save_weights(Model(TINY), other)
    answer = run(command(other, chats, out, *LENGTH, "--eval-questions", "8"))
    assert answer.returncode == 2
    assert f"started with from {origin} (now {other}); repeat that command (--from {origin})" in answer.stdout


@pytest.mark.slow
def test_a_pretrained_nano_learns_to_answer(taught):
    """It answers none before and most after, of questions worded unlike any training conversation."""
    exact = [row["heldout_exact"] for row in rows_of(taught / "runs" / "sft-nano-builtin", "eval")]
    assert exact[0] < 0.02 and exact[-1] > 0.9, exact
