from itertools import pairwise

import numpy as np
import pytest

from minimind.data.cache import open_corpus
from minimind.data.corpus import Corpus
from minimind.data.split import split_tail
from tests.data.fake import ByteTokenizer, corpus_of, ids_of, some_texts, text_of

TEXTS = some_texts(300)


def test_documents_tokens_and_bytes(tmp_path):
    corpus = corpus_of(tmp_path, TEXTS[:100], TEXTS[100:101], TEXTS[101:])
    assert corpus.num_documents == 300 and corpus.num_bytes == len("".join(TEXTS).encode())
    assert corpus.num_tokens == corpus.num_bytes + 600
    for i, text in enumerate(TEXTS):
        assert corpus.document(i).tolist() == ids_of(text)
    assert corpus.document(5).dtype == np.uint16 and corpus.document(5).base is not None
    some = np.array([299, 0, 100, 101, 99, 100])
    assert corpus.lengths(some).tolist() == [len(ids_of(TEXTS[i])) for i in some]
    assert corpus.bytes_of(some).tolist() == [len(TEXTS[i].encode()) for i in some]
    starts, lengths = corpus.addresses(some), corpus.lengths(some)
    assert corpus.gather(starts + 1, lengths - 1).tolist() == [t for i in some for t in ids_of(TEXTS[i])[1:]]
    assert corpus.locate(100) == (tmp_path / "1.jsonl", 0) and corpus.locate(299)[1] == 198
    for i in (-1, 300):
        with pytest.raises(IndexError):
            corpus.document(i)
    empty = np.array([], np.int64)
    assert len(corpus.lengths(empty)) == len(corpus.gather(empty, empty)) == 0


def tail(corpus: Corpus) -> list[str]:
    numbers = np.arange(corpus.num_documents)
    lengths = corpus.lengths(numbers)
    ids = np.split(corpus.gather(corpus.addresses(numbers), lengths), lengths.cumsum()[:-1])
    assert all((row == corpus.document(i)).all() for i, row in enumerate(ids))
    return [text_of(row) for row in ids]


def test_the_split_of_earlier_versions_holds_out_the_last_documents_of_every_source(tmp_path):
    files = TEXTS[:150], TEXTS[150:152], TEXTS[152:153], TEXTS[153:]
    corpus = corpus_of(tmp_path, *files)
    train, held = split_tail(corpus, 0.1)
    assert train.num_documents + held.num_documents == 300
    assert train.num_tokens + held.num_tokens == corpus.num_tokens
    assert train.num_bytes + held.num_bytes == corpus.num_bytes
    kept, out = tail(train), tail(held)
    for texts in files:
        n = sum(text in out for text in texts)
        assert texts == [t for t in kept if t in texts] + [t for t in out if t in texts]
        assert [t for t in out if t in texts] == texts[len(texts) - n :]
        total, part = sum(len(ids_of(t)) for t in texts), sum(len(ids_of(t)) for t in texts[len(texts) - n :])
        if len(texts) > 2:
            assert 0.09 * total < part <= 0.1 * total
        else:
            assert n == len(texts) - 1
    assert train.identity != held.identity != corpus.identity
    whole, none = split_tail(corpus, 0)
    assert whole is corpus and none.num_documents == none.num_tokens == none.num_bytes == 0


def test_the_split_of_earlier_versions_is_capped(tmp_path):
    corpus = corpus_of(tmp_path, TEXTS[:100], TEXTS[100:])
    _, held = split_tail(corpus, 0.5, 700)
    assert 500 < held.num_tokens <= 700 and len(held.sources) == 2
    assert split_tail(corpus, 0.5, 1)[1].num_documents == 1
    train, held = split_tail(corpus_of(tmp_path / "two", TEXTS[:1], TEXTS[1:2]), 0.05)
    assert (tail(train), tail(held)) == (TEXTS[:1], TEXTS[1:2])


@pytest.mark.parametrize("files", [(300,), (100, 101, 299)])
def test_a_part_of_a_corpus_is_a_corpus(tmp_path, files):
    """With one document or most, picked or left out, every function agrees with a corpus of just those texts."""
    bounds = [0, *files] if files[-1] == 300 else [0, *files, 300]
    corpus = corpus_of(tmp_path, *(TEXTS[a:b] for a, b in pairwise(bounds)))
    rng = np.random.default_rng(0)
    for count in (1, 7, 150, 299):
        numbers = np.sort(rng.choice(300, count, replace=False))
        rest = np.setdiff1d(np.arange(300), numbers)
        for view, mine in ((corpus.only(numbers, "a"), numbers), (corpus.without(numbers, "a"), rest)):
            texts = [TEXTS[i] for i in mine]
            assert tail(view) == texts and view.num_documents == len(texts)
            assert view.num_bytes == len("".join(texts).encode())
            assert view.num_tokens == view.num_bytes + 2 * len(texts)
            some = rng.permutation(len(texts))
            lengths = view.lengths(some)
            assert lengths.tolist() == [len(ids_of(texts[i])) for i in some]
            ids = [token for i in some for token in ids_of(texts[i])]
            assert view.gather(view.addresses(some), lengths).tolist() == ids
            assert [view.locate(i) for i in range(len(texts))] == [corpus.locate(int(i)) for i in mine]
            assert (view.hashes(0, len(texts)) == corpus.hashes(0, 300)[mine]).all()
            head = view.head(max(1, view.num_tokens // 3))
            assert set(tail(head)) <= set(texts) and (
                len(texts) < 50 or 0.8 < 3 * head.num_tokens / view.num_tokens <= 1
            )
            assert len({view.identity, corpus.identity, corpus.only(numbers, "b").identity}) == 3
            assert head.identity != view.identity or len(texts) == 1


def test_head_is_the_first_documents_of_every_source(tmp_path):
    texts = some_texts(400)
    corpus = corpus_of(tmp_path, texts[:300], texts[300:])
    head = corpus.head(corpus.num_tokens // 4)
    taken = [text_of(head.document(i)) for i in range(head.num_documents)]
    second = taken.index(texts[300])
    assert taken == texts[:second] + texts[300 : 300 + len(taken) - second]
    assert 0.9 < head.num_tokens / (corpus.num_tokens // 4) <= 1
    assert corpus.head(corpus.num_tokens) is corpus
    assert corpus.head(1).num_documents == 1


def test_a_book_in_one_txt_file_is_held_out_in_the_right_proportion(tmp_path):
    lines = "".join(f"{text}\n" for text in some_texts(20_000))
    (tmp_path / "book.txt").write_text(lines, encoding="utf-8")
    corpus = open_corpus([tmp_path / "book.txt"], ByteTokenizer(), tmp_path / "cache")
    train, held_out = split_tail(corpus, 0.05)
    assert 0.025 < held_out.num_tokens / corpus.num_tokens <= 0.05
    assert train.num_tokens + held_out.num_tokens == corpus.num_tokens
