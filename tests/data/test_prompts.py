"""Prompts in upstream's format, and the built-in arithmetic."""

from __future__ import annotations

import gzip
import json
from pathlib import Path

import pytest

from minimind import load_tokenizer
from minimind.data.builtin.problems import SLIPS, arithmetic_prompts, problems, weak_arithmetic
from minimind.data.prompts import open_prompts
from minimind.tokenization.reasoning import ThinkingPrompts

ASKED = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello?"}]
EMPTY = {"role": "assistant", "content": ""}


@pytest.fixture(scope="module")
def encoder() -> ThinkingPrompts:
    return ThinkingPrompts(load_tokenizer(), None)


def written(path: Path, *rows) -> Path:
    text = "".join(row if isinstance(row, str) else json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(gzip.compress(text) if path.suffix == ".gz" else text)
    return path


def test_the_model_writes_the_last_turn(encoder, tmp_path):
    said = {"role": "assistant", "content": "Hi."}
    rows = [
        {"conversations": [*ASKED, EMPTY]},
        {"conversations": ASKED},
        {"conversations": [*ASKED, said]},
        {"conversations": [*ASKED, said], "reference": "Hey.", "level": 3},
        {"conversations": [*ASKED, said, {"role": "user", "content": "And?"}, EMPTY]},
    ]
    found = open_prompts([written(tmp_path / "p.jsonl.gz", *rows)], encoder, 100)
    assert [p.reference for p in found.prompts] == [None, None, "Hi.", "Hey.", None]
    assert found[3].metadata == {"level": 3} and found[0].messages == ASKED
    assert found[0].ids == found[1].ids == found[2].ids == encoder.prompt(ASKED)
    text = load_tokenizer().decode(found[4].ids)
    assert "Hi." in text and text.endswith("assistant\n")
    again = open_prompts([tmp_path / "p.jsonl.gz"], encoder, 100)
    assert again.identity == found.identity
    other = open_prompts([written(tmp_path / "q.jsonl", *rows[:4])], encoder, 100)
    assert other.identity != found.identity
    train, heldout = found.split(0.4, by_tail=True)
    assert (train.prompts, heldout.prompts) == (found.prompts[:3], found.prompts[3:])
    assert found.split(0.0) == (found, None)


@pytest.mark.parametrize("said", [None, "", " \n", "None", "none", "null", "无", "空"])
def test_an_empty_turn_is_not_a_reference(said, encoder, tmp_path):
    turn = {"role": "assistant", "content": said}
    rows = [{"conversations": [*ASKED, turn]}, {"conversations": [*ASKED, turn], "reference": said}]
    rows += [{"conversations": [*ASKED, {**turn, "content": "Hi."}], "reference": said}]
    found = open_prompts([written(tmp_path / "p.jsonl", *rows)], encoder, 100)
    assert [p.reference for p in found.prompts] == [None, None, "Hi."]


def test_no_copy_of_a_training_prompt_is_held_out(tmp_path, encoder):
    rows = [{"conversations": [{"role": "user", "content": f"{i % 40}?"}, EMPTY]} for i in range(60)]
    found = open_prompts([written(tmp_path / "p.jsonl", *rows)], encoder, 100)
    train, heldout = found.split(0.1)
    kept, held = ([prompt.messages[0]["content"] for prompt in part.prompts] for part in (train, heldout))
    assert not set(kept) & set(held) and len(kept) + len(held) == 60 and 3 <= len(held) <= 6
    texts = [row["conversations"][0]["content"] for row in rows]
    assert kept == [t for t in texts if t in kept] and held == [t for t in texts if t in held] != texts[-6:]
    same = open_prompts([written(tmp_path / "s.jsonl", *rows[:1] * 5)], encoder, 100)
    assert same.split(0.4) == (same, None)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"conversations": [EMPTY]}, "there is no message before the assistant's turn"),
        ({"text": "a"}, 'no field "conversations"'),
        ({"conversations": [*ASKED, EMPTY], "reference": 4}, "the reference is a number, not a string"),
        ({"conversations": [{"role": "user", "content": "word " * 200}, EMPTY]}, "more than --max-prompt 100"),
        ({"conversations": [{"role": "person", "content": "a"}, EMPTY]}, "has the role 'person'"),
        ("{not json\n", "malformed JSON"),
    ],
)
def test_bad_rows_are_named_or_left_out(row, message, encoder, tmp_path):
    path = written(tmp_path / "p.jsonl", {"conversations": ASKED}, row)
    with pytest.raises(ValueError, match=message) as error:
        open_prompts([path], encoder, 100)
    assert str(error.value).startswith(f"{path}:2: ") and "--on-bad-row skip" in str(error.value)
    assert len(open_prompts([path], encoder, 100, "skip")) == 1


def test_no_prompt_at_all_is_an_error(encoder, tmp_path):
    with pytest.raises(ValueError, match="no usable prompt"):
        open_prompts([written(tmp_path / "p.jsonl", "\n")], encoder, 100)
    with pytest.raises(ValueError, match=r"prompts come in \.jsonl files"):
        open_prompts([written(tmp_path / "p.txt", "hello")], encoder, 100)


def test_weak_answers_are_wrong_as_often_as_stated(encoder, tmp_path):
    train, heldout = problems()
    asked = {p.question for p in train}
    assert len(asked) == len(train) and not asked & {p.question for p in heldout}
    assert all(eval(p.question.removesuffix("=?")) == p.answer for p in train + heldout)
    right = {p.question: p.answer for p in train}
    path, _ = weak_arithmetic(tmp_path)
    slips: list[int] = []
    for line in path.read_text().splitlines():
        question, answer = (message["content"] for message in json.loads(line)["conversations"])
        slips.append(int(answer) - right[question])
    for slip in set(SLIPS):
        assert slips.count(slip) / len(slips) == pytest.approx(SLIPS.count(slip) / len(SLIPS), abs=0.01)
    prompts, held = (open_prompts([path], encoder, 30) for path in arithmetic_prompts(tmp_path))
    assert {p.messages[0]["content"]: int(p.reference) for p in prompts.prompts} == right
    assert len(held) == len(heldout)
