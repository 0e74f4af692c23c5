"""Conversations in the token cache and in packed batches."""

import json
import re
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimind.data import Corpus, PackedLoader, encoding, open_conversations
from minimind.data import build as build_module
from minimind.data.builtin.chat import builtin_conversations, conversations
from minimind.tokenization import ChatEncoder, load_tokenizer
from tests.data.fake import QUIET
from tests.data.test_cache import contents, listening

TOKENIZER = load_tokenizer()
ENCODER = ChatEncoder(TOKENIZER)


def chat(*words: str, system: str = "") -> list[dict[str, Any]]:
    """A conversation of alternating questions and answers."""
    turns = [{"role": ("user", "assistant")[i % 2], "content": w} for i, w in enumerate(words)]
    return [{"role": "system", "content": system}, *turns] if system else turns


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps({"conversations": row}) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def opened(folder: Path, rows: list[Any], *options: Any) -> Corpus:
    folder.mkdir(exist_ok=True)
    return open_conversations([write(folder / "a.jsonl", rows)], ENCODER, folder / "cache", *options, console=QUIET)


ROWS = [chat(*(f"{i} {'word ' * (i * k % 11)}." for k in range(2 * (1 + i % 3)))) for i in range(60)]
ROWS[7] = chat("long " * 30, "short", "and then?", "yes")


def test_whole_answers_leaves_out_conversations_cut_within_an_answer(tmp_path):
    """A conversation cut within its only answer would teach to begin but not to end; one cut after a turn is kept."""
    rows = [chat("a?", "yes"), chat("b?", "long " * 60), chat("c?", "yes", "d?", "long " * 60)]
    corpus = opened(tmp_path, rows)
    cut, whole = (PackedLoader(corpus, 48, 2, whole_answers=flag) for flag in (False, True))
    assert (cut.cuts.inside, cut.cuts.at_turn, cut.cuts.left_out) == (1, 1, 0)
    assert (whole.cuts.inside, whole.cuts.at_turn, whole.cuts.left_out) == (0, 1, 1)
    assert str(whole.cuts) == "1 cut after an earlier turn, 1 left out, as the first answer does not fit"
    named = {int(d) for batch in whole.epoch_batches() for row in batch.documents for d in row}
    assert named == {0, 2}
    ends = TOKENIZER.eos_token_id
    targets = np.concatenate([batch.targets.ravel() for batch in whole.epoch_batches()])
    assert (targets == ends).sum() == 2


def test_tokens_codes_and_bytes(tmp_path):
    corpus = opened(tmp_path, ROWS)
    assert corpus.weighted and corpus.num_documents == 60
    for i, row in enumerate(ROWS):
        (expected,) = ENCODER.encode([ENCODER.pieces(row)])
        assert corpus.document(i).tolist() == expected.ids.tolist()
        assert ((encoding.class_of(corpus.codes(i)) > encoding.NONE) == expected.trained).all()
        assert ((corpus.codes(i) & encoding.TURN_END > 0) == expected.ends).all()
    answers = [m["content"] + "<|im_end|>" for row in ROWS for m in row if m["role"] == "assistant"]
    assert corpus.num_bytes == len("".join(answers).encode())


def test_an_interrupted_build_resumes_and_the_cache_is_shared(tmp_path, monkeypatch):
    class Failing(ChatEncoder):
        left = 3

        def encode(self, rows):
            self.left -= 1
            if not self.left:
                raise KeyboardInterrupt
            return super().encode(rows)

    monkeypatch.setattr(build_module.build, "__defaults__", (build_module.PART_BYTES, 500))
    path = write(tmp_path / "a.jsonl", ROWS)
    with pytest.raises(KeyboardInterrupt):
        open_conversations([path], Failing(TOKENIZER), tmp_path / "cut", console=QUIET, part_bytes=1000)
    for file in (tmp_path / "cut").glob("tokens/*/*.bin"):
        with open(file, "ab") as torn:
            torn.write(b"half a part" * 1000)
    assert (tmp_path / "cut").glob("tokens/*/progress.json")
    open_conversations([path], ENCODER, tmp_path / "cut", console=QUIET)
    open_conversations([path], ENCODER, tmp_path / "whole", console=QUIET)
    assert contents(tmp_path / "cut") == contents(tmp_path / "whole")
    open_conversations([path], Failing(TOKENIZER), tmp_path / "whole", console=QUIET)  # encodes nothing
    other = ChatEncoder(TOKENIZER, enable_thinking=False)
    corpus = open_conversations([path], other, tmp_path / "whole", console=QUIET)
    assert "<think>" in TOKENIZER.decode(corpus.document(0))


BAD = {
    "malformed": ('{"conversations": [', "malformed JSON"),
    "no field": ('{"text": "pretraining"}', 'no field "conversations" (fields: text)'),
    "no list": ('{"conversations": "hi"}', 'field "conversations" is a string, not a list of messages'),
    "empty": ('{"conversations": []}', 'field "conversations" is empty'),
    "no message": ('{"conversations": ["hi"]}', "message 0 is a string, not an object"),
    "no answer": (chat("hi"), "no assistant turn to train on"),
    "role": ([{"role": "narrator", "content": "once"}], "message 0 has the role 'narrator'; use system, user,"),
    "no role": ([{"content": "once"}], "message 0 has the role None; use"),
    "silent": (chat("hi", " "), "message 1, of the assistant, is empty"),
    "number": (chat("hi", 4), 'message 1: "content" is a number, not a string'),  # type: ignore[arg-type]
    "reasoning": (
        [*chat("hi"), {"role": "assistant", "content": "a", "reasoning_content": ["b"]}],
        'message 1: "reasoning_content" is a list, not a string',
    ),
    "tools": (
        [{"role": "system", "content": "", "tools": "[{"}, *chat("hi", "a")],
        "message 0: tools is a string but not JSON",
    ),
    "tools kind": (
        [{"role": "system", "content": "", "tools": 5}, *chat("hi", "a")],
        "message 0: tools is neither a list nor an object, but 5",
    ),
    "calls": (
        [*chat("hi"), {"role": "assistant", "content": "", "tool_calls": "{oops"}],
        "message 1: tool_calls is a string but not JSON",
    ),
    "surrogate": (
        '{"conversations": [{"role": "user", "content": "\\ud800"}, {"role": "assistant", "content": "a"}]}',
        "a lone surrogate",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_name_their_line(tmp_path, case):
    row, message = BAD[case]
    path = write(tmp_path / "bad.jsonl", [ROWS[0], row, ROWS[1], row])
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(message)) as caught:
        open_conversations([path], ENCODER, tmp_path / "cache", console=QUIET)
    assert str(caught.value).endswith("; fix the row or pass --on-bad-row skip")
    console = listening()
    assert open_conversations([path], ENCODER, tmp_path / "cache", "skip", console).num_documents == 2
    assert f"{path}: 2 bad rows left out, the first at {path}:2: " in console.export_text()


def test_other_files_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text("words")
    with pytest.raises(ValueError, match=r"a.txt: this kind of data comes as .jsonl; leave the file out"):
        open_conversations([tmp_path / "a.txt"], ENCODER, tmp_path / "cache", console=QUIET)


def segments(batch) -> list[tuple[list[int], list[int]]]:
    """(inputs, targets) of every piece, without padding."""
    ids, targets = batch.input_ids.ravel(), batch.targets.ravel()
    parts = [(ids[a:b].tolist(), targets[a:b].tolist()) for a, b in pairwise(batch.cu_seqlens.tolist())]
    return [part for part in parts if any(part[0])]


@pytest.mark.parametrize("seq_len", [24, 40, 512])
def test_packing_keeps_conversations_whole(tmp_path, seq_len):
    """A packed conversation is the longest prefix of whole turns that fits, and only its answers are targets."""
    corpus = opened(tmp_path, ROWS)
    loader = PackedLoader(corpus, seq_len, rows=3, seed=1)
    found = sorted(part for batch in loader.epoch_batches() for part in segments(batch))
    expected, at_turn, inside = [], 0, 0
    for row in ROWS:
        (whole,) = ENCODER.encode([ENCODER.pieces(row)])
        fitting = [int(end) for end in np.flatnonzero(whole.ends) if end <= seq_len]
        stop = fitting[-1] if fitting else seq_len
        ids, trained = whole.ids[: stop + 1].tolist(), whole.trained[: stop + 1].tolist()
        if any(trained[1:]):
            targets = [i if t else -100 for i, t in zip(ids[1:], trained[1:], strict=True)]
            expected.append((ids[:-1], targets))
            at_turn += bool(fitting) and fitting[-1] < len(whole.ids) - 1
            inside += not fitting
    assert found == sorted(expected)
    cuts = loader.cuts
    assert (cuts.at_turn, cuts.inside, cuts.left_out) == (at_turn, inside, len(ROWS) - len(expected))
    assert loader.tokens_per_epoch == cuts.pairs == sum(len(ids) for ids, _ in expected)
    assert (str(cuts) == "") == (seq_len == 512)
    assert seq_len != 24 or min(cuts.at_turn, cuts.inside, cuts.left_out) > 0


@pytest.mark.parametrize("world_size", [1, 2, 3])
def test_weights_and_their_sum_over_ranks(tmp_path, world_size):
    answers = ["plain", "<think>\nwhy\n</think>\n\n<answer>so</answer>", "<think>\n</think>\n\nno"]
    corpus = opened(tmp_path, [chat(f"{i}?", answers[i % 3]) for i in range(30)])
    ranks = [
        PackedLoader(corpus, 48, 6, 5, rank=r, world_size=world_size, marker_weight=10.0) for r in range(world_size)
    ]
    plain = PackedLoader(corpus, 48, 6, 5)
    for _ in range(4):
        parts, whole = [rank.next_batch() for rank in ranks], plain.next_batch()
        assert whole.loss_weights is None and whole.global_weight == whole.global_num_targets == whole.num_targets
        assert sum(part.num_targets for part in parts) == whole.num_targets
        for part in parts:
            assert part.loss_weights is not None and part.loss_weights.dtype == np.float32
            assert ((part.loss_weights > 0) == (part.targets >= 0)).all()
            assert part.global_num_targets == whole.num_targets
            assert set(np.unique(part.loss_weights)) == {0, 1, 10}
            assert part.loss_weights[part.targets == TOKENIZER.special_tokens["<think>"]].min() == 10
        total = sum(float(part.loss_weights.sum()) for part in parts)
        assert all(part.global_weight == total for part in parts) and total > whole.num_targets


def test_rows_too_short_for_any_answer(tmp_path):
    with pytest.raises(ValueError, match="--seq-len 4: every first question is longer; use longer rows"):
        PackedLoader(opened(tmp_path, ROWS), 4, 2)


def test_builtin_conversations(tmp_path):
    """They are deterministic and usable, and no held-out question occurs in training."""
    train, heldout = builtin_conversations(tmp_path, QUIET)
    assert (train, heldout) == builtin_conversations(tmp_path, QUIET)
    rows = conversations()
    assert rows == conversations()
    corpora = [open_conversations([path], ENCODER, tmp_path, console=QUIET) for path in (train, heldout)]
    assert [c.num_documents for c in corpora] == [len(r) for r in rows]
    assert not str(PackedLoader(corpora[0], 512, 8).cuts)
    asked = [{m["content"] for c in r for m in c if m["role"] == "user"} for r in rows]
    assert not asked[0] & asked[1] and len(asked[1]) > 300
    plain = [[c for c in r if c[0]["role"] == "user"] for r in rows]
    answers = [{m["content"] for c in r for m in c[1::2]} for r in plain]
    assert answers[1] <= answers[0]  # each fact was learnt, worded otherwise
