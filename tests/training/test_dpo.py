"""train/dpo.py as a user runs it: figures, reference, resuming, and that it learns the preferred answers."""

from __future__ import annotations

import json
import math
import random
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from rich.console import Console

from minimind import load_model, load_tokenizer
from minimind.data import Corpus
from minimind.data.cache import open_preferences
from minimind.data.split import split
from minimind.modeling import Model
from minimind.tokenization import ChatEncoder
from minimind.training.parallel import Parallel
from minimind.training.stages import dpo
from minimind.training.stages.dpo import prompts, reference_log_probs
from tests.training.runs import (
    SCRIPT,
    TINY,
    assert_continues_to_the_bit,
    assert_same_curve,
    finish,
    learn,
    lines_of,
    reproducible,
    rows_of,
    run,
    save_origin,
)

DPO = SCRIPT.with_name("dpo.py")
FLAGS = ["--tokens", str(512 * 8), "--seq-len", "128", "--batch-tokens", "512", "--save-every", "3", "--log-every", "2",
         "--evals", "2", "--eval-tokens", "400", "--lr", "0.002", "--precision", "fp32"]  # fmt: skip
NEW = "reference log-probabilities of"


@pytest.fixture(scope="module")
def origin(tmp_path_factory) -> Path:
    return save_origin(TINY, tmp_path_factory.mktemp("origin"))


@pytest.fixture(scope="module")
def pairs(tmp_path_factory) -> Path:
    """Sums with right and wrong answers. One pair's prompt is too long for a row, and another pair's answer."""
    rng = random.Random(0)
    path = tmp_path_factory.mktemp("pairs") / "pairs.jsonl"
    with path.open("w", encoding="utf-8") as file:
        for i in range(300):
            a, b = rng.randrange(9), rng.randrange(9)
            asked = {"role": "user", "content": f"{a} and {b}?" + " please" * (200 if i == 5 else i % 4)}
            said = {"chosen": f"{a + b}", "rejected": f"{a + b + 1} or so, " * (99 if i == 8 else 1 + i % 3)}
            row = {k: [asked, {"role": "assistant", "content": v}] for k, v in said.items()}
            file.write(json.dumps(row) + "\n")
    return path


def command(origin: Path, data: Path, out: Path, *extra: str) -> list[str]:
    return [sys.executable, str(DPO), "--from", str(origin), "--data", str(data), "--out", str(out), "--cache-dir",
            str(data.parent / "cache"), *FLAGS, *extra]  # fmt: skip


@pytest.fixture(scope="module")
def unbroken(origin, pairs, tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "unbroken"
    text = finish(command(origin, pairs, out, "--label-smoothing", "0.1"))
    assert text.count(NEW) == 3
    assert "longer than --seq-len 128: 1 of all pairs cut at the beginning of their prompt, 1 pairs left out" in text
    assert "held-out loss 0.6931 per pair" in text and "held-out pairs" in text
    return out


def by_hand(folder: Path, corpus: Corpus) -> np.ndarray:
    """float64 [pairs, 2]: log-probabilities of the answers, one conversation at a time, from whole logits."""
    model = load_model(folder)
    found = []
    for i in range(corpus.num_documents):
        ids, codes = torch.tensor(corpus.document(i).astype("int64")), torch.tensor(corpus.codes(i))
        middle = int((codes & 64).nonzero())
        for side in (slice(0, middle), slice(middle, None)):
            with torch.no_grad():
                log_p = model(ids[side][None, :-1]).logits[0].double().log_softmax(-1)
            said = log_p.gather(1, ids[side][1:, None])[:, 0]
            found.append(said[(codes[side][1:] & 3) > 0].sum().item())
    return np.array(found).reshape(-1, 2)


def held_out(pairs: Path) -> Corpus:
    encoder = ChatEncoder(load_tokenizer())
    return split(open_preferences([pairs], encoder, pairs.parent / "cache", longest=128))[1]


def test_figures_are_those_of_the_answers(unbroken, origin, pairs):
    for picture in ("loss.png", "accuracy.png", "rewards.png"):
        assert (unbroken / picture).read_bytes().startswith(b"\x89PNG")
    corpus = held_out(pairs)
    after, before = (by_hand(folder, corpus) for folder in (unbroken, origin))
    rewards = 0.1 * (after - before)
    margins = rewards[:, 0] - rewards[:, 1]
    losses = 0.9 * np.logaddexp(0, -margins) + 0.1 * np.logaddexp(0, margins)
    last = rows_of(unbroken, "eval")[-1]
    assert last["heldout_all"] and last["heldout_pairs"] == corpus.num_documents
    for name, values in (
        ("loss", losses),
        ("margin", margins),
        ("chosen_reward", rewards[:, 0]),
        ("rejected_reward", rewards[:, 1]),
    ):
        assert last[f"heldout_{name}"] == pytest.approx(values.mean(), rel=1e-4, abs=1e-5), name
    assert last["heldout_accuracy"] == pytest.approx((margins > 0).mean(), abs=1e-6)
    assert last["heldout_ranking"] == pytest.approx((after[:, 0] > after[:, 1]).mean(), abs=1e-6)
    rows = rows_of(unbroken, "train")
    assert rows[0]["loss"] == pytest.approx(math.log(2), abs=1e-4) and abs(rows[0]["margin"]) < 1e-3
    assert rows[-1]["margin"] > 0.1 and rows[-1]["loss"] < rows[0]["loss"]
    assert rows[-1]["margin"] == pytest.approx(rows[-1]["chosen_reward"] - rows[-1]["rejected_reward"], abs=1e-5)


def test_killed_and_started_again_the_curve_is_the_same_to_the_bit(unbroken, origin, pairs, tmp_path):
    out = tmp_path / "killed"
    arguments = command(origin, pairs, out, "--label-smoothing", "0.1")
    text = assert_continues_to_the_bit(arguments, out, unbroken, 4)
    assert NEW not in text  # the reference is worked out once


PLAIN = ["--optimizer", "adamw", "--grad-clip", "1000", "--log-every", "1"]


@pytest.fixture(scope="module")
def alone(origin, pairs, tmp_path_factory) -> list[dict]:
    out = tmp_path_factory.mktemp("runs") / "alone"
    finish(command(origin, pairs, out, *PLAIN))
    return reproducible(out)


@pytest.mark.parametrize(
    ("processes", "flags"),
    [
        (2, ("--parallel", "ddp", "--micro-tokens", "256")),
        pytest.param(3, ("--parallel", "ddp"), marks=pytest.mark.slow),  # does not divide the 4 rows of a batch
        pytest.param(2, ("--parallel", "fsdp"), marks=pytest.mark.slow),
        pytest.param(1, ("--micro-tokens", "128"), marks=pytest.mark.slow),
        pytest.param(1, ("--compile",), marks=pytest.mark.slow),
    ],
    ids=str,
)
def test_curve_is_that_of_one_process(processes, flags, origin, pairs, alone, tmp_path):
    """Ranks and micro-batches hold different numbers of pairs; each works out its part of a new reference."""
    arguments = command(origin, pairs, tmp_path / "out", *PLAIN, *flags, "--cache-dir", str(tmp_path / "cache"))
    text = finish(arguments, processes)
    assert text.count("finished in") == 1 and text.count(NEW) == 3
    # margins are differences of sums of some hundred nats in float32
    assert_same_curve(reproducible(tmp_path / "out"), alone, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("loss", ["ipo", "simpo", "orpo"])
def test_other_losses_learn_too(loss, origin, pairs, tmp_path):
    text = finish(command(origin, pairs, tmp_path / "out", "--loss", loss, "--evals", "1"))
    assert NEW not in text  # ipo finds that of dpo, the others need none
    rows = rows_of(tmp_path / "out", "train")
    assert rows[-1]["loss"] < rows[0]["loss"] and rows[-1]["margin"] > rows[0]["margin"]


def test_reference_is_computed_once_for_its_weights_and_data(origin, pairs, tmp_path, monkeypatch):
    corpus, model = held_out(pairs), load_model(origin)
    calls = []
    compute = dpo._compute
    monkeypatch.setattr(dpo, "_compute", lambda *args: calls.append(1) or compute(*args))

    def find(weights: str = "a", view: Corpus = corpus, seq_len: int = 128, of: Model = model) -> np.ndarray:
        console = Console(quiet=True)
        return reference_log_probs(of, weights, view, seq_len, 4, Parallel(), console, str(tmp_path))

    scores = find()
    assert isinstance(scores, np.memmap) and not scores.flags.writeable
    np.testing.assert_allclose(scores, by_hand(origin, corpus), rtol=1e-5)
    assert (find() == scores).all() and len(calls) == 1
    for number, changed in enumerate(({"weights": "b"}, {"view": corpus.head(200)}, {"seq_len": 64}), 2):
        find(**changed)
        assert len(calls) == number
    path = Path(scores.filename)
    path.write_bytes(path.read_bytes()[:50])  # damaged
    np.testing.assert_allclose(find(), by_hand(origin, corpus), rtol=1e-5)
    assert len(calls) == 5 and not list(tmp_path.glob("reference/.*"))


def test_prompts_end_where_the_chosen_answer_begins(pairs):
    tokenizer, corpus = load_tokenizer(), held_out(pairs)
    rows = lines_of(corpus, pairs)
    for asked, row in zip(prompts(corpus, corpus.num_documents), rows, strict=True):
        prompt = tokenizer.apply_chat_template(row["chosen"][:1], add_generation_prompt=True)
        assert (tokenizer.decode(asked.prompt), tokenizer.decode(asked.answer)) == (prompt, row["chosen"][1]["content"])


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--beta", "0"], "beta=0.0: must be above 0"),
        (["--gamma", "1"], "--gamma: --loss dpo has none; drop the flag"),
        (["--loss", "orpo", "--label-smoothing", "0.1"], "--label-smoothing: --loss orpo has none"),
        (["--loss", "orpo", "--sft-weight", "1"], "--sft-weight: --loss orpo has the chosen answer's own loss"),
        (["--seq-len", "8"], "--seq-len 8: a row holds both answers of a pair, and the shortest pair has"),
    ],
)
def test_errors_are_one_line(flags, message, origin, pairs, tmp_path):
    answer = run(command(origin, pairs, tmp_path / "no", *flags))
    assert answer.returncode == 2 and "Traceback" not in answer.stderr, answer.stderr
    assert f"error: {message}" in " ".join(answer.stdout.split()), answer.stdout
    assert not (tmp_path / "no").exists()


@pytest.mark.slow
def test_a_nano_learns_manners_and_keeps_its_facts(taught):
    """The form of the question decides between two answers. The model is right in half of the held-out pairs before and
    in most of them after, and gives whole answers like the chosen ones, facts included."""
    first, *_, last = rows_of(learn("dpo", taught, "--evals", "1"), "eval")
    assert 0.4 <= first["heldout_ranking"] <= 0.6 and last["heldout_ranking"] >= 0.9, (first, last)
    # a third of the answers are in the plain manner, as the model gave them before
    assert first["heldout_exact"] < 0.4 and last["heldout_exact"] > 0.9, (first, last)
