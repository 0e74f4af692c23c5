"""A byte tokenizer and small files, for the tests of data."""

import json
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from rich.console import Console

from minimind.data.cache import open_corpus
from minimind.data.corpus import Corpus

QUIET = Console(quiet=True)


class ByteTokenizer:
    """Every UTF-8 byte is a token, 3 above its value."""

    vocab_size = 259
    bos_token_id = 1
    eos_token_id = 2
    fingerprint = "bytes"

    def encode_batch(self, texts: Sequence[str], allow_special: bool = True) -> list[np.ndarray]:
        assert allow_special is False
        return [np.frombuffer(text.encode(), np.uint8).astype(np.uint16) + 3 for text in texts]


def ids_of(text: str) -> list[int]:
    """The tokens of a document in the cache."""
    return [1, *(byte + 3 for byte in text.encode()), 2]


def text_of(ids: np.ndarray) -> str:
    """The inverse of `ids_of`."""
    return bytes(int(i) - 3 for i in ids[1:-1]).decode()


def some_texts(n: int, seed: int = 0, longest: int = 60) -> list[str]:
    """n different texts of 1 to about `longest` characters, some of 3 bytes."""
    rng = np.random.default_rng(seed)
    alphabet = list("abcdefgh xyz字說é")
    return [f"{i} " + "".join(rng.choice(alphabet, rng.integers(1, longest))) + "." for i in range(n)]


def write_jsonl(path: Path, texts: Sequence[str]) -> Path:
    """A file of pretraining rows."""
    path.write_text("".join(json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts))
    return path


def corpus_of(folder: Path, *files: Sequence[str]) -> Corpus:
    """A corpus of one source for each list of texts."""
    folder.mkdir(exist_ok=True)
    paths = [write_jsonl(folder / f"{i}.jsonl", texts) for i, texts in enumerate(files)]
    return open_corpus(paths, ByteTokenizer(), folder / "cache", console=QUIET)
