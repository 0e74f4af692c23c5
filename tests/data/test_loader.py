import json
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from minimind.data import packing
from minimind.data.loader import Batch, PackedLoader
from minimind.data.mixture import Mixture, Weight
from minimind.data.split import split
from tests.data.fake import corpus_of, ids_of, some_texts

TEXTS = some_texts(150)
SEQ_LEN = 32


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    return corpus_of(tmp_path_factory.mktemp("loader"), TEXTS[:90], TEXTS[90:91], TEXTS[91:])


@pytest.fixture(autouse=True)
def _small_windows(monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_DOCUMENTS", 16)


def segments(batch: Batch) -> list[tuple[int, int, np.ndarray, np.ndarray]]:
    """(row, column, inputs, targets) of every segment."""
    ids, targets, bounds = batch.input_ids.ravel(), batch.targets.ravel(), batch.cu_seqlens
    width = batch.input_ids.shape[1]
    return [(a // width, a % width, ids[a:b], targets[a:b]) for a, b in pairwise(bounds.tolist())]


def pairs(batches: list[Batch]) -> list[tuple[int, ...]]:
    """Every run of inputs and targets, sorted: the content of an epoch in any order."""
    found = [segment for batch in batches for segment in segments(batch)]
    return sorted((*ids.tolist(), -1, *targets.tolist()) for _, _, ids, targets in found if targets[0] >= 0)


def expected_pairs(seq_len: int = SEQ_LEN, texts: list[str] = TEXTS) -> list[tuple[int, ...]]:
    runs = []
    for ids in map(ids_of, texts):
        for i in range(0, len(ids) - 1, seq_len):
            stop = min(i + seq_len, len(ids) - 1)
            runs.append((*ids[i:stop], -1, *ids[i + 1 : stop + 1]))
    return sorted(runs)


def same(a: Batch, b: Batch) -> bool:
    arrays = ("input_ids", "targets", "position_ids", "cu_seqlens")
    return all((getattr(a, name) == getattr(b, name)).all() for name in arrays) and a.num_bytes == b.num_bytes


def check_layout(batch: Batch) -> None:
    rows, width = batch.input_ids.shape
    bounds = batch.cu_seqlens
    assert batch.targets.shape == batch.position_ids.shape == (rows, width) and len(batch.documents) == rows
    assert {a.dtype for a in (batch.input_ids, batch.targets, batch.position_ids)} == {np.dtype(np.int64)}
    assert bounds.dtype == np.int32 and bounds[0] == 0 and bounds[-1] == rows * width
    assert (np.diff(bounds) > 0).all() and set(range(0, rows * width, width)) <= set(bounds.tolist())
    assert (batch.position_ids.ravel() == np.concatenate([np.arange(n) for n in np.diff(bounds)])).all()
    for _, _, ids, targets in segments(batch):
        assert (targets >= 0).all() or ((targets == -100).all() and (ids == 0).all())
    assert batch.num_targets == (batch.targets >= 0).sum()


@pytest.mark.parametrize("shuffle", [True, False])
@pytest.mark.parametrize("seq_len", [1, 7, SEQ_LEN, 500])
def test_an_epoch_has_every_pair_once(corpus, seq_len, shuffle):
    loader = PackedLoader(corpus, seq_len, rows=4, seed=1, shuffle=shuffle)
    batches = list(loader.epoch_batches())
    for batch in batches:
        check_layout(batch)
        assert batch.input_ids.shape == (4, seq_len) and batch.global_num_targets == batch.num_targets
    assert pairs(batches) == expected_pairs(seq_len)
    assert sum(batch.num_targets for batch in batches) == loader.tokens_per_epoch
    assert sum(batch.num_bytes for batch in batches) == corpus.num_bytes == len("".join(TEXTS).encode())


def test_endless_batches_drop_nothing(corpus):
    loader = PackedLoader(corpus, SEQ_LEN, rows=7, seed=1)
    stream = loader.streams[0]
    rows = sum(stream.pieces(epoch, w).num_rows for epoch in range(3) for w in range(stream.num_windows))
    runs = []
    for i in range(-(-rows // 7)):
        batch = loader.next_batch()
        check_layout(batch)
        for row, _, ids, targets in segments(batch):
            if 7 * i + row < rows and targets[0] >= 0:  # the last batch goes on into the fourth epoch
                runs.append((*ids.tolist(), -1, *targets.tolist()))
    assert sorted(runs) == sorted(expected_pairs() * 3)
    assert loader.epoch == 3 and loader.state()["row"] == -rows % 7


def test_batches_name_the_packed_documents(corpus):
    for batch in PackedLoader(corpus, SEQ_LEN, rows=4, seed=1).epoch_batches():
        pieces = [segment for segment in segments(batch) if segment[3][0] >= 0]
        named = [int(document) for row in batch.documents for document in row]
        assert [row for row, *_ in pieces] == [r for r, row in enumerate(batch.documents) for _ in row]
        for (_, _, ids, _), document in zip(pieces, named, strict=True):
            assert bytes(ids.astype(np.uint8)) in bytes(corpus.document(document).astype(np.uint8))


def test_order_depends_on_seed_and_epoch_alone(corpus):
    def first(seed, skip=0):
        loader = PackedLoader(corpus, SEQ_LEN, rows=4, seed=seed)
        while loader.epoch < skip:
            loader.next_batch()
        return loader.next_batch()

    assert same(first(1), first(1))
    assert not same(first(1), first(2)) and not same(first(1), first(1, skip=1))
    streams = [PackedLoader(corpus, SEQ_LEN, 4, seed).streams[0] for seed in (1, 1, 2)]
    documents = [set(stream.pieces(e, 0).document) for stream, e in zip(streams, (0, 1, 0), strict=True)]
    assert documents[0] != documents[1] and documents[0] != documents[2]
    assert first(-5).num_targets > 0 and first(2**70).num_targets > 0


def test_sequential_order_is_the_order_of_the_documents(corpus):
    batches = list(PackedLoader(corpus, 500, rows=1, shuffle=False).epoch_batches())
    firsts = [int(batch.documents[0][0]) for batch in batches]
    assert firsts == sorted(firsts)
    assert {int(d) // 16 for d in batches[0].documents[0]} == {0}


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 90), st.integers(1, 9), st.booleans())
def test_a_resumed_loader_gives_the_same_batches(corpus, steps, rows, shuffle):
    loader = PackedLoader(corpus, SEQ_LEN, rows, seed=5, shuffle=shuffle)
    for _ in range(steps):
        loader.next_batch()
    state = json.loads(json.dumps(loader.state()))
    other = PackedLoader(corpus, SEQ_LEN, rows, seed=5, shuffle=shuffle)
    other.load_state(state)
    for _ in range(12):
        assert same(loader.next_batch(), other.next_batch())
    assert loader.state() == other.state()


@pytest.mark.parametrize("mixed", [False, True])
def test_a_step_has_the_same_rows_in_other_micro_batches(corpus, mixed):
    """This also holds if the run used other micro-batches before."""
    half = corpus.num_documents // 2
    parts = Mixture(("a", "b"), (Weight(), Weight((0.0, 1.0), (0.0, 3.0))), ((0, half), (half, 2 * half)))

    def made(rows: int) -> PackedLoader:
        loader = PackedLoader(corpus, SEQ_LEN, rows, seed=5, mixture=parts if mixed else None)
        loader.horizon = 12 * 40
        return loader

    def rows_of(loader: PackedLoader, count: int) -> list[list[int]]:
        return sorted(row.tolist() for _ in range(count) for row in loader.next_batch().input_ids)

    whole, split_up = made(12), made(3)
    for step in range(8):
        if step == 4:
            state = whole.state()
            split_up = made(4)
            split_up.load_state(json.loads(json.dumps(state)))
        assert rows_of(whole, 1) == rows_of(split_up, 12 // split_up.rows)


@pytest.mark.parametrize("world_size", [2, 3, 4, 5, 6])
def test_ranks_together_have_the_rows_of_one(corpus, world_size):
    one = PackedLoader(corpus, SEQ_LEN, rows=6, seed=5)
    ranks = [PackedLoader(corpus, SEQ_LEN, 6, 5, rank=r, world_size=world_size) for r in range(world_size)]
    for _ in range(30):
        whole, parts = one.next_batch(), [rank.next_batch() for rank in ranks]
        for part in parts:
            check_layout(part)
            assert part.input_ids.shape == (-(-6 // world_size), SEQ_LEN)
            assert part.global_num_targets == whole.num_targets
        for row in range(6):
            part, at = parts[row % world_size], row // world_size
            assert (part.input_ids[at] == whole.input_ids[row]).all()
            assert (part.targets[at] == whole.targets[row]).all()
            assert (part.documents[at] == whole.documents[row]).all()
        assert sum(part.num_targets for part in parts) == whole.num_targets
        assert sum(part.num_bytes for part in parts) == whole.num_bytes
        assert all(rank.state() == one.state() for rank in ranks)
    assert pairs([b for rank in ranks for b in rank.epoch_batches()]) == expected_pairs()


def test_a_position_in_other_data_is_refused(corpus):
    loader = PackedLoader(corpus, SEQ_LEN, rows=4, seed=5)
    loader.next_batch()
    state = loader.state()
    for other in [
        PackedLoader(corpus, SEQ_LEN, rows=4, seed=6),
        PackedLoader(corpus, SEQ_LEN + 1, rows=4, seed=5),
        PackedLoader(corpus, SEQ_LEN, rows=4, seed=5, shuffle=False),
        PackedLoader(split(corpus, 0.2)[0], SEQ_LEN, rows=4, seed=5),
    ]:
        with pytest.raises(ValueError, match=r"the checkpoint does not fit this data: .* was .* and is .* now"):
            other.load_state(state)
    for change in [{"row": 10_000}, {"window": 99}, {"epoch": -1}]:
        with pytest.raises(ValueError, match="is damaged"):
            loader.load_state(state | change)
    with pytest.raises(ValueError, match="is damaged"):
        loader.load_state({k: v for k, v in state.items() if k != "row"})
    assert loader.state() == state


def test_sizes_that_cannot_work(corpus):
    cases: list[tuple[dict[str, Any], str]] = [
        ({"seq_len": 0}, "seq_len=0 and rows=4 must both be at least 1"),
        ({"rows": 0}, "must both be at least 1"),
        ({"rank": 2, "world_size": 2}, "rank=2 must be from 0 to below world_size=2"),
        ({"rank": 1, "world_size": 8}, "a batch of 4 rows cannot be shared by 8 ranks"),
    ]
    for options, message in cases:
        with pytest.raises(ValueError, match=message):
            PackedLoader(corpus, **({"seq_len": 8, "rows": 4} | options))
    with pytest.raises(ValueError, match="nothing to predict"):
        PackedLoader(split(corpus, 0)[1], 8, 4)


def test_windows_hold_few_documents_when_they_are_long(corpus, monkeypatch):
    monkeypatch.setattr(packing, "WINDOW_TOKENS", 500)
    loader = PackedLoader(corpus, SEQ_LEN, rows=4)
    assert 1 < loader.streams[0].window_documents < 16
    assert pairs(list(loader.epoch_batches())) == expected_pairs()
