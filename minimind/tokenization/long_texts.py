"""Encode long texts in parts, since the Rust library needs some 130 bytes of memory for each byte of a text.

A text is cut only where the tokens of the surrounding stretch are the same with and without the cut. At the end of a
word, where byte-level BPE divides a text before merging, this holds for the whole text; within a long run without words
(an encoded file, a genome) it holds for the thousand characters around.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import islice
from typing import Any

import numpy as np
import tokenizers
from numpy.typing import DTypeLike

PART = 1 << 15  # characters from cut to cut
LONG = 2 * PART  # a shorter text is not cut
TOGETHER = 4  # parts encoded at once
MOST_UNCUT = 1 << 22  # characters
_SURROGATE = re.compile("[\ud800-\udfff]")
_AROUND = 512  # characters on each side of a cut
_TRIES = 8  # consecutive stretches in which to look for a cut


def is_long(text: Any) -> bool:
    """Whether `text` needs `encode_long`."""
    return isinstance(text, str) and len(text) > LONG


def encode_many(model: tokenizers.Tokenizer, texts: Sequence[str], dtype: DTypeLike) -> list[np.ndarray]:
    """The ids of each of `texts`, dtype [length], on all cores."""
    try:
        encodings = model.encode_batch_fast(list(texts), add_special_tokens=False)
    except TypeError:  # the Rust library rejects lone surrogates
        clean = [without_surrogates(text) for text in texts]
        encodings = model.encode_batch_fast(clean, add_special_tokens=False)
    return [np.array(encoding.ids, dtype) for encoding in encodings]


def encode_long(model: tokenizers.Tokenizer, text: str, dtype: DTypeLike) -> np.ndarray:
    """The ids of a text of any length, dtype [length], in bounded memory besides text and ids. Raises ValueError if
    more than MOST_UNCUT characters cannot be cut, as with a tokenizer that treats the beginning of a text specially."""
    text = without_surrogates(text) if _SURROGATE.search(text) else text
    parts, ids = _parts(model, text), list[np.ndarray]()
    while group := list(islice(parts, TOGETHER)):
        ids += encode_many(model, group, dtype)
    return np.concatenate(ids)


def offsets_of(model: tokenizers.Tokenizer, text: str) -> np.ndarray:
    """int64 [length, 2]: begin and end of each token in a text of any length, in characters."""
    begin, offsets = 0, list[np.ndarray]()
    for part in _parts(model, text):
        pairs = model.encode(part, add_special_tokens=False).offsets
        offsets.append(np.array(pairs, np.int64).reshape(-1, 2) + begin)
        begin += len(part)
    return np.concatenate(offsets)


def without_surrogates(text: str) -> str:
    """Join surrogate pairs and replace lone surrogates, which JSON escapes can produce and UTF-8 cannot hold."""
    if not isinstance(text, str):
        raise TypeError(f"a text must be a str, not {type(text).__name__}")
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _parts(model: tokenizers.Tokenizer, text: str) -> Iterator[str]:
    begin = near = 0
    while len(text) - near > LONG:
        near += PART
        tries = (_cut(model, text, near + 2 * _AROUND * i) for i in range(_TRIES))
        cut = next((place for place in tries if place), None)
        if cut is not None:
            yield text[begin:cut]
            begin = near = cut
        elif near - begin > MOST_UNCUT:
            raise ValueError(
                f"a text of {len(text):,} characters cannot be cut without changing its tokens; "
                "divide it into several rows"
            )
    yield text[begin:]


def _cut(model: tokenizers.Tokenizer, text: str, near: int) -> int | None:
    """A place near `near` where a cut changes no token: the end of a word, or else between any two tokens, or None."""
    first = near - _AROUND
    stretch = text[first : near + _AROUND]
    whole = model.encode(stretch, add_special_tokens=False)
    ids, ends = whole.ids, [end for _, end in whole.offsets[:-1]]
    inner = [i for i, end in enumerate(ends) if _AROUND // 2 <= end <= 3 * _AROUND // 2]
    words = [i for i in inner if stretch[ends[i] - 1].isalpha() and stretch[ends[i]] in " \n,.;，。；"]
    for i in [*words[:4], *inner[:4]]:
        sides = encode_many(model, [stretch[: ends[i]], stretch[ends[i] :]], np.int64)
        if np.concatenate(sides).tolist() == ids:
            return first + ends[i]
    return None
