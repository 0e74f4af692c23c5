"""What is held out: by the content, so that no copy of a training document is measured."""

from itertools import pairwise

import numpy as np
import pytest

from minimind.data import cache
from minimind.data import split as split_module
from minimind.data.cache import open_corpus
from minimind.data.corpus import HASHES, Corpus
from minimind.data.split import repeats, shared, split
from tests.data.fake import QUIET, ByteTokenizer, corpus_of, some_texts, text_of

TEXTS = some_texts(400)
COPIES = [*TEXTS[:300], *TEXTS[:100:2], *TEXTS[300:], *TEXTS[1:100:2]]  # every text below 100 twice, far apart


class WideTokenizer(ByteTokenizer):
    """Other ids for the same text."""

    fingerprint = "wide"

    def encode_batch(self, texts, allow_special=True):
        return [row + 100 for row in super().encode_batch(texts, allow_special)]


def texts_of(corpus: Corpus) -> list[str]:
    return [text_of(corpus.document(i)) for i in range(corpus.num_documents)]


@pytest.fixture(params=[(1 << 18, 1 << 21), (17, 20)], ids=["at once", "in parts"])
def passes(request, monkeypatch):
    monkeypatch.setattr(split_module, "_CHUNK", request.param[0])
    monkeypatch.setattr(split_module, "_SORTED", request.param[1])


@pytest.mark.parametrize("bounds", [(0, 500), (0, 130, 131, 500)])
def test_copies_stay_on_one_side_and_documents_in_order(tmp_path, passes, bounds):
    corpus = corpus_of(tmp_path, *(COPIES[a:b] for a, b in pairwise(bounds)))
    train, held = split(corpus, 0.2)
    kept, out = texts_of(train), texts_of(held)
    assert not set(kept) & set(out)
    assert kept == [t for t in COPIES if t in set(kept)] and out == [t for t in COPIES if t in set(out)]
    assert len(kept) + len(out) == 500 and train.num_tokens + held.num_tokens == corpus.num_tokens
    assert 0.18 < held.num_tokens / corpus.num_tokens <= 0.2
    again = split(corpus, 0.2)
    assert [part.identity for part in again] == [train.identity, held.identity]
    assert len({corpus.identity, train.identity, held.identity, split(corpus, 0.1)[1].identity}) == 4
    assert set(texts_of(split(corpus, 0.1)[1])) < set(out)


def test_the_choice_depends_on_the_texts_alone(tmp_path):
    """Not of the order of the documents, of the files, of the tokenizer, nor of where a file ends."""
    held = set(texts_of(split(corpus_of(tmp_path / "a", TEXTS), 0.2)[1]))
    assert set(texts_of(split(corpus_of(tmp_path / "b", TEXTS[::-1]), 0.2)[1])) == held
    assert set(texts_of(split(corpus_of(tmp_path / "c", TEXTS[:30], TEXTS[30:]), 0.2)[1])) == held
    wide = open_corpus([tmp_path / "a" / "0.jsonl"], WideTokenizer(), tmp_path / "cache", console=QUIET)
    numbers = split(wide, 0.2)[1]
    assert {TEXTS[numbers.locate(i)[1]] for i in range(numbers.num_documents)} == held
    places = np.array([TEXTS.index(text) for text in held])
    assert places.min() < 40 and abs(places.mean() - 200) < 60  # from all over, not the tail


def test_repeats_and_deduplication(tmp_path, passes):
    corpus = corpus_of(tmp_path, COPIES[:320], COPIES[320:])
    found = repeats(corpus)
    assert found.tolist() == [i for i, text in enumerate(COPIES) if text in COPIES[:i]] and len(found) == 100
    for fraction in (0.2, 0):
        train, held = split(corpus, fraction, dedupe=True)
        assert sorted(texts_of(train) + texts_of(held)) == sorted(TEXTS)
        assert held.num_documents == 0 if fraction == 0 else 0.18 < held.num_tokens / train.num_tokens < 0.27
    plain = split(corpus, 0)
    assert plain[0] is corpus and plain[1].num_documents == 0
    other = corpus_of(tmp_path / "other", TEXTS[90:110])
    assert shared(corpus, other).tolist() == [i for i, t in enumerate(COPIES) if t in TEXTS[90:110]]


def test_a_split_is_capped_and_never_empty(tmp_path):
    corpus = corpus_of(tmp_path, TEXTS[:100], TEXTS[100:])
    assert 500 < split(corpus, 0.5, 700)[1].num_tokens <= 700
    assert split(corpus, 0.5, 1)[1].num_documents == 1
    assert split(corpus, 0.999)[0].num_documents >= 1
    train, held = split(corpus_of(tmp_path / "two", TEXTS[:2]))
    assert sorted(texts_of(train) + texts_of(held)) == sorted(TEXTS[:2])
    for name, texts in (("one", TEXTS[:1]), ("same", TEXTS[:1] * 3)):
        one = corpus_of(tmp_path / name, texts)
        with pytest.raises(ValueError, match=r"the data is a single document or copies of one, .* pass --heldout 0"):
            split(one)
        assert split(one, 0)[0] is one
    with pytest.raises(ValueError, match="--heldout must be a fraction"):
        split(corpus, 1.5)


def test_a_cache_of_an_earlier_version_gets_its_hashes(tmp_path, monkeypatch):
    corpus = corpus_of(tmp_path, COPIES)
    folder = next(path.parent for path in (tmp_path / "cache").rglob(HASHES))
    wanted = (folder / HASHES).read_bytes()
    (folder / HASHES).unlink()
    before = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    assert corpus_of(tmp_path, COPIES).identity == corpus.identity
    assert (folder / HASHES).read_bytes() == wanted
    assert {path: path.stat().st_mtime_ns for path in before} == before  # the tokens are as they were
    (folder / HASHES).unlink()
    monkeypatch.setattr(cache, "_add_hashes", lambda *_: (_ for _ in ()).throw(PermissionError()))
    old = corpus_of(tmp_path, COPIES)
    assert old.num_documents == 500
    with pytest.raises(ValueError, match="its token cache is read-only and of an earlier version"):
        split(old)
