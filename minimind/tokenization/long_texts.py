"""Texts too long to be encoded at once: the Rust library takes some 130 bytes for each byte of a text.

They are cut where that changes no token: the tokens of a stretch around the cut are the same with and without it. Where
a word ends, which is where byte-level BPE divides a text before it merges anything, that holds for the text as a whole;
within a run without words (an encoded file, a genome) it holds for the thousand characters around.
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
LONG = 2 * PART  # what is shorter stays whole
TOGETHER = 4  # parts encoded at once
MOST_UNCUT = 1 << 22  # characters
_SURROGATE = re.compile("[\ud800-\udfff]")
_AROUND = 512  # characters on each side of a cut
_TRIES = 8  # stretches, one behind the other


def is_long(text: Any) -> bool:
    """Whether it is a text that `encode_long` is for."""
    return isinstance(text, str) and len(text) > LONG


def encode_many(model: tokenizers.Tokenizer, texts: Sequence[str], dtype: DTypeLike) -> list[np.ndarray]:
    """The ids of each of `texts`, dtype [length], on all cores."""
    try:
        encodings = model.encode_batch_fast(list(texts), add_special_tokens=False)
    except TypeError:  # what the Rust library makes of a lone surrogate
        clean = [without_surrogates(text) for text in texts]
        encodings = model.encode_batch_fast(clean, add_special_tokens=False)
    return [np.array(encoding.ids, dtype) for encoding in encodings]


def encode_long(model: tokenizers.Tokenizer, text: str, dtype: DTypeLike) -> np.ndarray:
    """The ids of a text of any length, dtype [length], in bounded memory beside it and them. Raises ValueError for more
    than MOST_UNCUT characters that cannot be cut: a tokenizer may treat the beginning of a text as no other."""
    text = without_surrogates(text) if _SURROGATE.search(text) else text
    parts, found = _parts(model, text), list[np.ndarray]()
    while group := list(islice(parts, TOGETHER)):
        found += encode_many(model, group, dtype)
    return np.concatenate(found)


def offsets_of(model: tokenizers.Tokenizer, text: str) -> np.ndarray:
    """int64 [length, 2]: where in a text of any length each token begins and ends."""
    begin, found = 0, list[np.ndarray]()
    for part in _parts(model, text):
        places = model.encode(part, add_special_tokens=False).offsets
        found.append(np.array(places, np.int64).reshape(-1, 2) + begin)
        begin += len(part)
    return np.concatenate(found)


def without_surrogates(text: str) -> str:
    """Join surrogate pairs and replace lone halves, which JSON escapes can hold and UTF-8 cannot."""
    if not isinstance(text, str):
        raise TypeError(f"a text to encode is a str, not {type(text).__name__}")
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
                f"a text of {len(text):,} characters cannot be cut so that this tokenizer sees no cut; "
                "divide it into several rows"
            )
    yield text[begin:]


def _cut(model: tokenizers.Tokenizer, text: str, near: int) -> int | None:
    """A place near `near` where a cut changes no token around it: the end of a word, or else between any two tokens;
    None where there is none."""
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
