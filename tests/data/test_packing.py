import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from minimind.data.packing import Permutation, assign_rows, cut_documents, row_length, tokens_in_rows
from tests.data.fake import corpus_of, ids_of, some_texts


def packed(lengths: np.ndarray, capacity: int) -> list[np.ndarray]:
    """The pieces of each row."""
    rows = assign_rows(lengths, capacity)
    return [np.flatnonzero(rows == row) for row in range(rows.max(initial=-1) + 1)]


@given(st.lists(st.integers(0, 40), max_size=30), st.integers(1, 12))
def test_every_pair_is_in_exactly_one_piece(lengths, seq_len):
    pairs = []
    for document, start, length in zip(*cut_documents(np.array(lengths, int), seq_len), strict=True):
        assert 1 <= length <= seq_len
        pairs += [(document, i) for i in range(start, start + length)]
    assert pairs == [(d, i) for d, n in enumerate(lengths) for i in range(n - 1)]


@given(st.integers(1, 50).flatmap(lambda c: st.tuples(st.just(c), st.lists(st.integers(1, c), max_size=60))))
def test_every_piece_is_in_one_row_within_capacity(case):
    capacity, lengths = case
    rows = packed(np.array(lengths, int), capacity)
    assert sorted(i for row in rows for i in row) == list(range(len(lengths)))
    sums = [sum(lengths[i] for i in row) for row in rows]
    assert all(0 < s <= capacity for s in sums)
    assert sum(2 * s <= capacity for s in sums) <= 1  # or two rows would have been one


def test_a_piece_goes_where_the_least_room_is_left():
    assert [row.tolist() for row in packed(np.array([6, 7, 3, 4, 10]), 10)] == [[4], [1, 2], [0, 3]]
    assert [row.tolist() for row in packed(np.array([8, 6, 2]), 10)] == [[0, 2], [1]], "both have room for the last"


@pytest.mark.parametrize("lengths", [[3, 11], [0, 3], [-1]])
def test_pieces_that_fit_no_row(lengths):
    with pytest.raises(ValueError, match=r"lengths from -?\d+ to \d+ cannot be packed into 10|lengths from -1"):
        assign_rows(np.array(lengths), 10)


def test_packing_takes_linear_time_and_is_deterministic():
    lengths = np.random.default_rng(0).integers(1, 513, 100_000)
    seconds = []
    for count in (10_000, 100_000):
        began = time.process_time()
        rows = assign_rows(lengths[:count], 512)
        seconds.append(time.process_time() - began)
    assert seconds[1] < 40 * seconds[0], "10 times in linear time, 100 times in quadratic"
    assert rows.max() + 1 <= 1.01 * lengths.sum() / 512
    assert (rows == assign_rows(lengths, 512)).all()


@pytest.mark.parametrize("n", [*range(1, 70), 255, 256, 257, 1000, 4096, 4097, 99_991])
def test_a_permutation_is_a_bijection(n):
    order = Permutation(n, 3, 1)(np.arange(n))
    assert (np.sort(order) == np.arange(n)).all()


def test_a_permutation_in_parts_is_the_same_and_keys_differ():
    whole = Permutation(5000, 3, 1)(np.arange(5000))
    parts = [Permutation(5000, 3, 1)(np.arange(i, min(i + 700, 5000))) for i in range(0, 5000, 700)]
    assert (np.concatenate(parts) == whole).all()
    for key in [(3, 2), (4, 1), (31,), (-3, 1)]:
        assert (Permutation(5000, *key)(np.arange(5000)) == whole).mean() < 0.01


def test_a_permutation_looks_random():
    n = 100_000
    order = Permutation(n, 0, 0)(np.arange(n))
    assert abs(np.corrcoef(order[:-1], order[1:])[0, 1]) < 0.02
    assert abs(np.corrcoef(order, np.arange(n))[0, 1]) < 0.02
    counts = np.histogram(order[: n // 10], bins=20)[0]  # a window draws documents from the whole corpus
    assert np.abs(counts / counts.mean() - 1).max() < 0.2
    firsts = [int(Permutation(5, seed)(np.array([0]))[0]) for seed in range(400)]
    assert np.bincount(firsts, minlength=5).min() > 50


@pytest.mark.parametrize(
    ("long", "row", "reason"),
    [
        (0, 512, "--seq-len 512: 0.0% of 1,000 chats are longer; shorter rows fill worse"),
        (10, 512, "--seq-len 512: 1.0% of 1,000 chats are longer; shorter rows fill worse"),
        (11, 1024, "--seq-len 1024: 0.0% of 1,000 chats are longer, 1.1% than 512"),
    ],
)
def test_one_document_in_a_hundred_may_be_longer(long, row, reason):
    lengths = np.full(1000, 512)
    lengths[:long] = 513
    assert row_length(lengths, 512, 4096, "chats") == (row, reason)


def test_rows_stay_within_their_bounds():
    assert row_length(np.full(10, 9000), 512, 4096, "chats")[0] == 4096
    assert row_length(np.full(10, 9000), 512, 512, "chats")[0] == 512
    assert row_length(np.full(10, 9), 256, 4096, "chats")[0] == 256


def test_a_document_takes_a_position_for_each_token_it_predicts(tmp_path):
    texts = some_texts(50)
    corpus = corpus_of(tmp_path, texts)
    assert tokens_in_rows(corpus).tolist() == [len(ids_of(text)) - 1 for text in texts]
