"""Preference pairs in the token cache and in packed batches."""

import json
import re
from collections import Counter
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from minimind.data import Corpus, encoding
from minimind.data.builtin.chat import MANNERS, MANNERS_ZH, builtin_preferences, preferences
from minimind.data.cache import open_preferences
from minimind.data.pair_loader import PairBatch, PairLoader
from tests.data.fake import QUIET
from tests.data.test_cache import listening
from tests.data.test_conversations import ENCODER, chat


def pair(chosen: list[Any], rejected: list[Any]) -> dict[str, Any]:
    return {"chosen": chosen, "rejected": rejected}


def some_pairs(n: int) -> list[dict[str, Any]]:
    """Pairs of different lengths; every third begins with a turn that both sides share."""
    rows = []
    for i in range(n):
        before = [f"{i}?", "well " * (i % 5 + 1)] if i % 3 == 0 else []
        answers = ("good " * (i * 7 % 13 + 1), "bad " * (i * 5 % 11 + 1))
        rows.append(pair(*(chat(*before, f"and {i}?", answer) for answer in answers)))
    return rows


ROWS = some_pairs(50)


def write(path: Path, rows: list[Any]) -> Path:
    lines = [row if isinstance(row, str) else json.dumps(row) for row in rows]
    path.write_text("\n".join(lines), encoding="utf-8")
    return path


def opened(folder: Path, rows: list[Any]) -> Corpus:
    folder.mkdir(exist_ok=True)
    return open_preferences([write(folder / "pairs.jsonl", rows)], ENCODER, folder / "cache", console=QUIET)


def encoded(row: dict[str, Any]) -> list[Any]:
    return ENCODER.encode([ENCODER.pieces(row[side]) for side in ("chosen", "rejected")])


def test_a_pair_is_both_conversations_and_marks_the_second(tmp_path):
    corpus = opened(tmp_path, ROWS)
    assert corpus.num_documents == len(ROWS)
    for i, row in enumerate(ROWS):
        sides = encoded(row)
        assert corpus.document(i).tolist() == [token for side in sides for token in side.ids]
        codes = corpus.codes(i)
        assert ((encoding.class_of(codes) > encoding.NONE) == np.concatenate([s.trained for s in sides])).all()
        assert np.flatnonzero(codes & encoding.SIDE).tolist() == [len(sides[0].ids)]
    answers = [m["content"] + "<|im_end|>" for row in ROWS for side in row.values() for m in side[1::2]]
    assert corpus.num_bytes == len("".join(answers).encode())


@pytest.mark.parametrize("share", [False, True])
@pytest.mark.parametrize("world_size", [1, 3])
def test_every_pair_is_in_an_epoch_once_and_whole(tmp_path, world_size, share):
    """On every rank, inputs, targets and boundaries of each side are those of the conversation by itself."""
    corpus = opened(tmp_path, ROWS)
    seen: Counter[int] = Counter()
    ranks = [
        PairLoader(corpus, 192, 5, 3, rank=r, world_size=world_size, share=share).epoch_batches()
        for r in range(world_size)
    ]
    for parts in zip(*ranks, strict=True):
        counts = {(b.global_num_pairs, b.global_weight, b.global_num_targets, b.input_ids.shape) for b in parts}
        pairs = sum(len(b.pairs) for b in parts)
        targets = sum(b.num_targets for b in parts)
        assert counts == {(pairs, pairs, targets, (-(-5 // world_size), 192))}
        for batch in parts:
            check(batch, share)
            seen.update(batch.pairs.tolist())
    assert seen == Counter(range(len(ROWS)))


def check(batch: PairBatch, share: bool) -> None:
    ids, targets, places = batch.input_ids.ravel(), batch.targets.ravel(), batch.position_ids.ravel()
    bounds = batch.cu_seqlens
    assert bounds[0] == 0 and bounds[-1] == ids.size and (np.diff(bounds) >= 0).all()
    assert set(range(0, ids.size, batch.input_ids.shape[1])) <= set(bounds.tolist())
    used = sorted([*batch.prompt, *batch.chosen, *batch.rejected])
    for k, (a, b) in enumerate(pairwise(bounds)):
        assert k in used or not (ids[a:b].any() or (targets[a:b] >= 0).any())
        assert k in used or (places[a:b] == np.arange(b - a)).all()
    assert len(set(used)) == len(used) == 3 * len(batch.pairs)
    shared = 0
    for number, *segments in zip(batch.pairs, batch.prompt, batch.chosen, batch.rejected, strict=True):
        rows = {int(bounds[k]) // batch.input_ids.shape[1] for k in segments}
        assert len(rows) == 1  # a row belongs to one micro-batch of one rank
        prompt, *answers = (np.arange(bounds[k], bounds[k + 1]) for k in segments)
        sides = encoded(ROWS[number])
        alike = next(i for i, (a, b) in enumerate(zip(sides[0].ids, sides[1].ids, strict=False)) if a != b)
        assert len(prompt) == (alike - 1 if share else 0)
        shared += len(prompt)
        for answer, side in zip(answers, sides, strict=True):
            at = np.concatenate([prompt, answer])
            wanted = np.where(side.trained[1:], side.ids[1:].astype(np.int64), -100)
            assert ids[at].tolist() == side.ids[:-1].tolist() and targets[at].tolist() == wanted.tolist()
            assert (places[at] == np.arange(len(at))).all()
    assert (batch.share, batch.shared) == (share, shared)


def test_the_stream_of_rows_resumes(tmp_path):
    corpus = opened(tmp_path, ROWS)
    whole, late = (PairLoader(corpus, 96, 4, 1, share=True) for _ in range(2))
    for _ in range(7):  # beyond a pass
        whole.next_batch()
    late.load_state(json.loads(json.dumps(whole.state())))
    a, b = whole.next_batch(), late.next_batch()
    assert isinstance(a, PairBatch) and isinstance(b, PairBatch)
    for name in ("input_ids", "targets", "cu_seqlens", "chosen", "pairs"):
        assert (getattr(a, name) == getattr(b, name)).all()
    assert len(a.cu_seqlens) <= whole.max_segments + 1
    with pytest.raises(ValueError, match="share was 1 and is 0 now"):
        PairLoader(corpus, 96, 4, 1).load_state(whole.state())


def test_a_pair_longer_than_a_row_is_left_out_whole_and_counted(tmp_path):
    lengths = [sum(len(side.ids) - 1 for side in encoded(row)) for row in ROWS]
    seq_len = sorted(lengths)[len(ROWS) // 2]
    loader = PairLoader(opened(tmp_path, ROWS), seq_len, 4)
    fit = [i for i, n in enumerate(lengths) if n <= seq_len]
    assert 0 < len(fit) < len(ROWS) and loader.left_out == len(ROWS) - len(fit) and loader.num_pairs == len(fit)
    assert loader.tokens_per_epoch == sum(lengths[i] for i in fit)
    assert sorted(i for batch in loader.epoch_batches() for i in batch.pairs) == fit
    with pytest.raises(ValueError, match=rf"--seq-len 9: .* the shortest pair has {min(lengths)} tokens"):
        PairLoader(loader.view, 9, 4)


LONG = [
    pair(*(chat(*before, answer, system=system) for answer in ("yes. " * 9, "no. " * 7)))
    for system in ("", "Be brief. ")
    for before in (
        ["word " * 150],
        ["first " * 20, "said " * 30, "second " * 25, "more " * 5, "third " * 90],
        ["first " * 70, "said " * 20, "second " * 5],
        ["千里之行，始于足下。" * 30 + "🙂" * 20],
        ["一 " * 40, "二", "🙂" * 60, "四", "why?"],
    )
]
TURN = re.compile(r"<\|im_start\|>(\w+)\n(.*?)<\|im_end\|>\n?", re.DOTALL)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("longest", [96, 128, 200])
def test_a_long_prompt_loses_its_beginning_and_stays_a_conversation(tmp_path, longest, share):
    """System message, headers, the prompt's end and both answers stay; the rest renders to the same text."""
    path = write(tmp_path / "pairs.jsonl", LONG)
    whole = open_preferences([path], ENCODER, tmp_path / "cache", console=QUIET)
    cut = open_preferences([path], ENCODER, tmp_path / "cache", console=QUIET, longest=longest, share=share)
    assert (whole.hashes(0, len(LONG)) == cut.hashes(0, len(LONG))).all() and cut.identity != whole.identity
    sizes = PairLoader(cut, 1000, 1, share=share).tokens
    assert (sizes <= longest).all() and PairLoader(cut, longest, 4, share=share).num_pairs == len(LONG)
    trimmed = 0
    for i, row in enumerate(LONG):
        ids, codes, kept = cut.document(i), cut.codes(i), []
        middle = int(np.flatnonzero(codes & encoding.SIDE)[0])
        for side, part in (("chosen", slice(middle)), ("rejected", slice(middle, None))):
            text = ENCODER.tokenizer.decode(ids[part].tolist())
            messages = [{"role": role, "content": content} for role, content in TURN.findall(text)]
            kept.append(messages)
            (expected,) = ENCODER.encode([ENCODER.pieces(messages)])
            assert "".join(p.text for p in ENCODER.pieces(messages)) == text
            trained = encoding.class_of(codes[part]) > encoding.NONE
            assert trained.sum() == expected.trained.sum()
            system = row[side][0]["role"] == "system"
            assert not system or messages[0] == row[side][0]
            later = messages[system:]
            mine = row[side][len(row[side]) - len(later) :]
            assert later[0]["role"] == "user" and later[1:] == mine[1:]
            assert later[0]["content"] and mine[0]["content"].endswith(later[0]["content"])
            shorter = later[0]["content"] != mine[0]["content"]
            dropped = len(messages) < len(row[side])
        assert kept[0][:-1] == kept[1][:-1]
        trimmed += shorter
        if whole.lengths(np.array([i])) == cut.lengths(np.array([i])):
            assert not shorter and not dropped
        else:
            assert shorter or dropped
            assert dropped or sizes[i] > longest - (8 if share else 16)  # no more than it takes
    assert trimmed > 2


def test_a_pair_of_long_answers_is_not_cut(tmp_path):
    rows = [pair(chat("why?", "because " * 90), chat("why?", "no " * 90)), pair(chat("hi", "a"), chat("hi", "b"))]
    path = write(tmp_path / "pairs.jsonl", rows)
    cut = open_preferences([path], ENCODER, tmp_path / "cache", console=QUIET, longest=64)
    assert cut.document(0).tolist() == [t for side in encoded(rows[0]) for t in side.ids]
    assert PairLoader(cut, 64, 1, share=True).left_out == 1


GOOD, WORSE = chat("hi", "hello"), chat("hi", "go away")
BAD = {
    "missing": (
        '{"chosen": [{"role": "user", "content": "hi"}, {"role": "assistant", "content": "a"}]}',
        'no field "rejected" (fields: chosen)',
    ),
    "other format": ('{"conversations": []}', 'no field "chosen" (fields: conversations)'),
    "same": (pair(GOOD, GOOD), "chosen and rejected are the same"),
    "looks the same": (pair(GOOD, [GOOD[0], {**GOOD[1], "note": 1}]), "chosen and rejected are the same"),
    "other prompt": (pair(GOOD, chat("ho", "go away")), "first differ in message 0, of the user"),
    "goes on": (pair(GOOD, chat("hi", "hello", "more", "no")), "first differ in message 2, of the user"),
    "no answer": (pair(GOOD, chat("hi")), "rejected: the last message is of the user, not of the assistant"),
    "role": (pair([{"role": "narrator", "content": "once"}], GOOD), "chosen: message 0 has the role 'narrator'"),
    "silent": (pair(GOOD, chat("hi", " ")), "rejected: message 1, of the assistant, is empty"),
    "no list": (pair("hi", GOOD), 'chosen: field "chosen" is a string, not a list of messages'),  # type: ignore[arg-type]
}


@pytest.mark.parametrize("case", BAD)
def test_bad_rows_name_their_line(tmp_path, case):
    row, message = BAD[case]
    path = write(tmp_path / "bad.jsonl", [pair(GOOD, WORSE), row, pair(WORSE, GOOD), row])
    with pytest.raises(ValueError, match=re.escape(f"{path}:2: ") + ".*" + re.escape(message)) as caught:
        open_preferences([path], ENCODER, tmp_path / "cache", console=QUIET)
    assert str(caught.value).endswith("; fix the row or pass --on-bad-row skip")
    console = listening()
    assert open_preferences([path], ENCODER, tmp_path / "cache", "skip", console).num_documents == 2
    assert f"{path}: 2 bad rows left out, the first at {path}:2: " in console.export_text()


def test_built_in_manners_favour_no_reply_and_hold_out_wordings(tmp_path):
    train, heldout = preferences()
    assert (train, heldout) == preferences() and 200 < len(heldout) < len(train) < 1000
    for rows in (train, heldout):
        won: Counter[tuple[int, int]] = Counter()
        for row in rows:
            asked = row["chosen"][0]["content"]
            assert row["rejected"][0]["content"] == asked
            manner = next(i for i, m in enumerate(_manners(asked)) if any(_worded(asked, w) for w in m[0]))
            better, worse = (_manner_of(row[side][1]["content"], asked) for side in ("chosen", "rejected"))
            assert better == manner != worse
            won[better, worse] += 1
        # a model that ignores the question is right in half of the pairs, whichever manner it prefers
        assert len(won) == 6 and all(abs(n - won[b, a]) <= 1 for (a, b), n in won.items()), won
    asked = [{row["chosen"][0]["content"] for row in rows} for rows in (train, heldout)]
    assert not asked[0] & asked[1]
    first, second = builtin_preferences(tmp_path, QUIET)
    assert [json.loads(line) for line in first.read_text().splitlines()] == train
    assert len(open_preferences([first, second], ENCODER, tmp_path, console=QUIET).sources) == 2


def _manners(asked: str) -> tuple:
    return MANNERS if asked.isascii() else MANNERS_ZH


def _manner_of(said: str, asked: str) -> int:
    """An answer in none of the other manners is in the last, plain one."""
    endings = [m[1].removeprefix("{}") for m in _manners(asked)[:-1]]
    return next((i for i, ending in enumerate(endings) if said.endswith(ending)), len(endings))


def _worded(asked: str, wording: str) -> bool:
    before, after = wording.split("{}")
    return asked.startswith(before) and asked.endswith(after)
