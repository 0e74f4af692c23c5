"""BPE training and the script around it, end to end on tiny data."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import tracemalloc
from pathlib import Path

import pytest
from rich.progress import Progress
from tokenizers import pre_tokenizers

from minimind.data.reader import iter_texts
from minimind.tokenization import load_tokenizer
from minimind.tokenization.training import MIN_VOCAB_SIZE, SPECIAL_TOKENS, train_bpe

SCRIPT = Path(__file__).parents[2] / "train" / "tokenizer.py"
TEXTS = ["the cat sat on the mat with the other cat", "猫坐在垫子上，猫在睡觉。", "for i in range(10):\n    f(i)\n"] * 3


def test_same_data_same_bytes_and_size() -> None:
    first, second = (train_bpe(iter(TEXTS), 320) for _ in range(2))
    assert first.to_str() == second.to_str() == train_bpe(reversed(TEXTS), 320).to_str()
    assert first.get_vocab_size() == 320
    assert len(first.encode(TEXTS[0]).ids) < len(TEXTS[0]) / 2


def test_specials_come_first_and_every_byte_has_a_token() -> None:
    model = train_bpe(TEXTS, MIN_VOCAB_SIZE)
    assert [model.id_to_token(i) for i in range(16)] == list(SPECIAL_TOKENS)
    assert set(pre_tokenizers.ByteLevel.alphabet()) <= set(model.get_vocab())
    assert model.get_vocab_size() == MIN_VOCAB_SIZE == 272
    text = "".join(map(chr, range(0x250))) + "\U0001f600"
    assert model.decode(model.encode(text).ids) == text


def test_words_are_split_as_qwen2_splits_them() -> None:
    model = train_bpe(TEXTS, MIN_VOCAB_SIZE)
    text = "I'll pay 120 (or so)，真的!!\n\n  yes"
    pieces = [text[start:end] for _, (start, end) in model.pre_tokenizer.pre_tokenize_str(text)]
    assert pieces == ["I", "'ll", " pay", " ", "1", "2", "0", " (", "or", " so", ")，", "真的", "!!\n\n", " ", " yes"]


def test_small_data_gives_fewer_entries() -> None:
    assert MIN_VOCAB_SIZE < train_bpe(["aa aa"], 6400).get_vocab_size() < 300


def test_bad_requests() -> None:
    with pytest.raises(ValueError, match="need 272"):
        train_bpe(TEXTS, 271)
    with pytest.raises(ValueError, match="no text to train on"):
        train_bpe([])


def test_texts_are_streamed() -> None:
    tracemalloc.start()
    train_bpe((f"text {i} " * 1000 for i in range(400)), 300)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1_000_000  # of some 4 MB in all


def test_markup_stays_visible() -> None:
    model = train_bpe(TEXTS, 300)
    ids = model.encode("<|im_start|><think>a</think><|im_end|>").ids
    assert model.decode(ids, skip_special_tokens=True) == "<think>a</think>"


def run(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """The script, started in `folder`."""
    env = {**os.environ, "COLUMNS": "200"}
    env["PYTHONPATH"] = os.pathsep.join(filter(None, [str(SCRIPT.parents[1]), env.get("PYTHONPATH")]))
    command = [sys.executable, str(SCRIPT), *arguments]
    return subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, encoding="utf-8")


@pytest.fixture
def data(tmp_path: Path) -> Path:
    chat = {"conversations": [{"role": "user", "content": text} for text in TEXTS]}
    (tmp_path / "chat.jsonl").write_text(json.dumps(chat, ensure_ascii=False) + "\n", encoding="utf-8")
    (tmp_path / "book.txt").write_text("all the cats sat there\n" * 50, encoding="utf-8")
    return tmp_path


def test_script_end_to_end(data: Path) -> None:
    arguments = ("--data", "chat.jsonl", "*.txt", "--weights", "2", "0.5", "--vocab-size", "300", "--out", "sub/tok")
    result = run(data, *arguments)
    assert result.returncode == 0, result.stderr
    assert "300 entries" in result.stdout and "chat.jsonl: " in result.stdout and "bytes/token" in result.stdout
    tokenizer = load_tokenizer(data / "sub/tok")
    assert tokenizer.vocab_size == 300 and tokenizer.chat_template == load_tokenizer().chat_template
    assert sorted(os.listdir(data / "sub")) == ["tok"]
    before = (data / "sub/tok/tokenizer.json").read_bytes()

    refused = run(data, *arguments)
    assert refused.returncode == 1 and "--overwrite" in refused.stderr and "Traceback" not in refused.stderr
    assert run(data, *arguments, "--overwrite").returncode == 0
    assert (data / "sub/tok/tokenizer.json").read_bytes() == before
    assert sorted(os.listdir(data / "sub")) == ["tok"]


def test_script_leaves_out_texts_of_the_evaluation_data(data: Path) -> None:
    (data / "held.jsonl").write_text(json.dumps({"text": "zqzqzqzqzqzq zqzq"}) + "\n", encoding="utf-8")
    arguments = ("--data", "held.jsonl", "chat.jsonl", "--vocab-size", "340")
    assert run(data, *arguments, "--out", "with").returncode == 0
    result = run(data, *arguments, "--out", "without", "--eval-data", "held.jsonl")
    assert result.returncode == 0 and "held.jsonl: " in result.stdout and "chat.jsonl" not in result.stdout
    with_it, without = (load_tokenizer(data / name).token_to_id("zqzq") for name in ("with", "without"))
    assert with_it is not None and without is None


def test_script_repeats_and_thins_out_by_weight(tmp_path: Path) -> None:
    spec = importlib.util.spec_from_file_location("train_tokenizer_script", SCRIPT)
    assert spec is not None and spec.loader is not None
    script = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = script  # where dataclasses looks up annotations
    spec.loader.exec_module(script)
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(f'{{"text": "{i}"}}\n' for i in range(10)), encoding="utf-8")

    def texts(weight: float) -> list[str]:
        return list(script.stream([(file, weight)], iter_texts, {"3"}, Progress(disable=True)))

    assert texts(1) == list("012456789")
    assert texts(2.5) == list("0011122444556667788899")
    assert texts(0.25) == ["4", "8"]
    assert texts(0) == []


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--data", "nowhere.jsonl", "--out", "tok"), "nowhere.jsonl"),
        (("--data", "chat.jsonl", "--out", "book.txt"), "--out book.txt is a file"),
        (("--data", "chat.jsonl", "--out", ".", "--overwrite"), "choose another folder"),
        (("--data", "chat.jsonl", "--out", "tok", "--weights", "1", "2"), "--weights has 2 numbers for 1"),
        (("--data", "chat.jsonl", "--out", "tok", "--weights", "inf"), "--weights inf: give numbers of 0 or more"),
        (("--data", "chat.jsonl", "--out", "tok", "--vocab-size", "100"), "--vocab-size 100: bytes"),
        (("--data", "chat.jsonl", "--out", "tok", "--min-frequency", "-1"), "--min-frequency -1: must"),
    ],
)
def test_script_explains_mistakes_in_one_line(data: Path, arguments: tuple[str, ...], words: str) -> None:
    result = run(data, *arguments)
    assert result.returncode == 1 and words in result.stderr.splitlines()[-1]
    assert "Traceback" not in result.stderr
    assert not (data / "tok").exists()
