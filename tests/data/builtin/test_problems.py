"""The built-in problems with reasoning: correct, deterministic, usable, with separate training and held-out parts."""

import re

import numpy as np

from minimind.data import PackedLoader, encoding, open_conversations
from minimind.data.builtin.problems import builtin_reasoning, reasoning
from minimind.tokenization import load_tokenizer
from minimind.tokenization.reasoning import ReasoningEncoder
from tests.data.fake import QUIET

TOKENIZER = load_tokenizer()


def test_rows_are_the_same_each_time_and_no_question_is_in_both():
    train, heldout = reasoning()
    assert (train, heldout) == reasoning()
    asked = [{m["content"] for c in rows for m in c if m["role"] == "user"} for rows in (train, heldout)]
    assert not asked[0] & asked[1]
    reasoned = [sum("reasoning_content" in c[1] for c in rows) for rows in (train, heldout)]
    assert reasoned[0] > 2000 and reasoned[1] == 8 * 24
    assert sum(c[0]["content"].isascii() for c in heldout if "reasoning_content" in c[1]) == 4 * 24


def test_steps_and_answers_are_right():
    """Every equation holds, and each answer fits its question."""
    kinds = dict.fromkeys(("sum", "comparison", "count", "conversion"), 0)
    sizes = {"minutes": 60, "hours": 24, "days": 7, "centimeters": 100, "grams": 1000, "seconds": 60}
    for row in [c for rows in reasoning() for c in rows if "reasoning_content" in c[1]]:
        question, (steps, answer) = row[0]["content"], (row[1]["reasoning_content"], row[1]["content"])
        for left, sign, right, result in re.findall(r"(\d+)([+*])(\d+)=(\d+)", steps):
            value = int(left) + int(right) if sign == "+" else int(left) * int(right)
            assert value == int(result), steps
        numbers = [int(n) for n in re.findall(r"\d+", question)]
        told = int(re.findall(r"\d+", answer)[0])
        if re.search("larger|更大", question):
            kind, right_answer = "comparison", max(numbers)
        elif re.search("smaller|更小", question):
            kind, right_answer = "comparison", min(numbers)
        elif re.search("words are here|数一数", question):
            listed = re.split("[:：]", question)[1]
            kind, right_answer = "count", listed.count("、") + 1 if "、" in listed else len(listed.split())
        elif len(numbers) == 2:
            kind, right_answer = "sum", sum(numbers)
        else:
            kind, right_answer = "conversion", numbers[0] * int(re.findall(r"\d+", steps)[1])
            part = answer.split()[-1]
            assert part not in sizes or right_answer == numbers[0] * sizes[part]
        assert told == right_answer, row
        kinds[kind] += 1
    assert min(kinds.values()) > 300


def test_markers_alone_weigh_more(tmp_path):
    """In the cache and in batches, <think> and </think> have the marker weight, all other targets weight 1."""
    train, heldout = builtin_reasoning(tmp_path, QUIET)
    assert (train, heldout) == builtin_reasoning(tmp_path, QUIET)
    corpus = open_conversations([train], ReasoningEncoder(TOKENIZER, 0.3), tmp_path, console=QUIET)
    assert corpus.num_documents == len(reasoning()[0])
    markers = [TOKENIZER.special_tokens[name] for name in ("<think>", "</think>")]
    for i in range(0, corpus.num_documents, 37):
        ids, found = corpus.document(i), encoding.class_of(corpus.codes(i))
        assert ((found == encoding.MARKER) == (np.isin(ids, markers) & (found > encoding.NONE))).all()
    loader = PackedLoader(corpus, 512, 8, marker_weight=2.5)
    assert not str(loader.cuts)
    batch = loader.next_batch()
    expected = np.where(batch.targets < 0, 0, np.where(np.isin(batch.targets, markers), 2.5, 1))
    assert batch.loss_weights is not None and (batch.loss_weights == expected).all()
    assert batch.global_weight == expected.sum() and (expected == 2.5).sum() > 50
