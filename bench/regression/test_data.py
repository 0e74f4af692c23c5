"""Tokenizer, packing, loader."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import tokenizers

from bench.regression.ratios import Against, times
from minimind import load_tokenizer
from minimind.data import Corpus, PackedLoader
from minimind.data.corpus import TokenizedFile
from minimind.data.packing import assign_rows
from minimind.tokenization.tokenizer import DEFAULT_FOLDER, MODEL_FILE

SEQ_LEN, ROWS, BATCHES = 512, 32, 12
TEXT = (
    "the model returns a tensor of shape batch when def forward(self, x): import torch as value error "
    "gradient optimizer 语言模型 从零开始 训练 的 数据 attention 2024 3.14 tokens, and 'quoted' words.\n"
)


@pytest.fixture(scope="module")
def texts() -> list[str]:
    rng = np.random.default_rng(0)
    return [" ".join(rng.choice(TEXT.split(" "), 150)) for _ in range(48)]


@pytest.fixture(scope="module")
def library() -> tokenizers.Tokenizer:
    return tokenizers.Tokenizer.from_file(str(DEFAULT_FOLDER / MODEL_FILE))


def test_tokenizer_encode(against: Against, texts: list[str], library: tokenizers.Tokenizer) -> None:
    ours = load_tokenizer()
    against(
        "tokenizers: encode",
        lambda: [ours.encode(text) for text in texts],
        lambda: [library.encode(text, add_special_tokens=False).ids for text in texts],
    )


def test_tokenizer_encode_batch(against: Against, texts: list[str], library: tokenizers.Tokenizer) -> None:
    ours = load_tokenizer()
    against(
        "tokenizers: encode_batch_fast",
        lambda: ours.encode_batch(texts),
        lambda: library.encode_batch_fast(texts, add_special_tokens=False),
    )


def document_lengths(count: int) -> np.ndarray:
    """int64 [count], as of real text: most are short, a few fill a row."""
    lengths = np.random.default_rng(1).lognormal(4.5, 1.0, count)
    return np.clip(lengths, 2, SEQ_LEN).astype(np.int64)


def test_packing(against: Against) -> None:
    lengths = document_lengths(20_000)
    against(
        "next-fit in numpy and plain Python, 5 times",
        lambda: assign_rows(lengths, SEQ_LEN),
        times(5, lambda: next_fit(lengths, SEQ_LEN)),
    )


def next_fit(lengths: np.ndarray, capacity: int) -> np.ndarray:
    """The row of each length. Lengths are placed longest first, each into the newest row or a new one."""
    order = np.argsort(-lengths, kind="stable")
    room, row, placed = 0, -1, []
    for length in lengths[order].tolist():
        if length > room:
            room, row = capacity, row + 1
        room -= length
        placed.append(row)
    rows = np.empty(len(lengths), np.int64)
    rows[order] = placed
    return rows


def test_loader(against: Against) -> None:
    """A new loader, the packing of its window of 2,500 documents, and 12 batches of 32 x 512."""
    lengths = document_lengths(2_500)
    ends = np.append(0, lengths.cumsum())
    tokens = np.random.default_rng(2).integers(0, 6400, ends[-1]).astype(np.uint16)
    corpus = Corpus.from_files([TokenizedFile(Path("made-up"), "made-up", tokens, np.stack([ends, ends], axis=1), {})])
    places = np.random.default_rng(3).permutation(BATCHES * ROWS * SEQ_LEN) % len(tokens)

    def load() -> None:
        loader = PackedLoader(corpus, SEQ_LEN, ROWS)
        for _ in range(BATCHES):
            loader.next_batch()

    against(
        "numpy: gather the same number of tokens one by one, as int64, 20 times",
        load,
        times(20, lambda: tokens[places].astype(np.int64)),
    )
