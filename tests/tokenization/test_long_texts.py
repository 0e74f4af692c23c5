"""Encoding long texts in parts gives the same tokens."""

import random

import numpy as np
import pytest
import tokenizers

from minimind import load_tokenizer
from minimind.tokenization import tokenizer
from minimind.tokenization.tokenizer import Tokenizer

TOKENIZER = load_tokenizer()
RANDOM = random.Random(0)
TEXTS = {
    "prose": "".join(RANDOM.choice(["the ", "don't ", "end.\n\n", "12345 ", "  (so) ", "Über"]) for _ in range(9000)),
    "Chinese": "".join(RANDOM.choices("天地玄黃宇宙洪荒日月盈昃，。辰宿列張", k=30_000)),
    "one run of letters": "".join(RANDOM.choices("abcdefghij", k=30_000)),
    "digits": "".join(RANDOM.choices("0123456789", k=20_000)),
    "spaces": " " * 20_000,
    "line ends": "\n" * 9000 + "\r\n" * 5000,
    "characters of four bytes": "😀é字" * 9000,
    "markup": "<think>why</think>" * 2000,
    "control": "<|im_end|>" * 3000,
    "surrogates": "\ud83d\ude00 a\ud800b " * 3000,
}


@pytest.fixture
def in_parts(monkeypatch):
    monkeypatch.setattr(tokenizer, "PART", 2000)
    monkeypatch.setattr(tokenizer, "LONG", 4000)


@pytest.mark.parametrize("special", [True, False, "markup"])
@pytest.mark.parametrize("name", TEXTS)
def test_cuts_change_no_token(monkeypatch, in_parts, name, special):
    text = TEXTS[name]
    clean = tokenizer.without_surrogates(text)
    parts = list(tokenizer._parts(TOKENIZER._by_special[special], clean))
    assert "".join(parts) == clean and len(parts) > 4 and max(map(len, parts)) <= 12_000
    found = TOKENIZER.encode(text, special)
    places = TOKENIZER.offsets(text, special)
    batch = TOKENIZER.encode_batch(["short", text, "also short"], special)
    monkeypatch.undo()
    assert found == TOKENIZER.encode(text, special)
    assert (places == TOKENIZER.offsets(text, special)).all() and places.shape == (len(found), 2)
    assert [row.tolist() for row in batch] == [TOKENIZER.encode(t, special) for t in ("short", text, "also short")]
    assert all(row.dtype == np.uint16 for row in batch)


def test_a_tokenizer_that_sees_every_cut(monkeypatch, in_parts):
    """It marks the beginning of a text, so that no text can be cut; one that is too long is an error."""
    model = tokenizers.Tokenizer.from_str(TOKENIZER._model.to_str())
    model.normalizer = tokenizers.normalizers.Prepend("_")
    marking = Tokenizer(model, {}, None, "marking")
    text = TEXTS["prose"]
    found = marking.encode(text)
    with monkeypatch.context() as patched:
        patched.setattr(tokenizer, "LONG", 1 << 30)
        assert found == marking.encode(text)
    monkeypatch.setattr(tokenizer, "MOST_UNCUT", 10_000)
    with pytest.raises(ValueError, match="characters cannot be cut without changing its tokens; divide it"):
        marking.encode(text)
