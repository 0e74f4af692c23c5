"""Train a byte-level BPE tokenizer from a stream of texts.

Byte-pair encoding is from Sennrich et al. 2016, https://arxiv.org/abs/1508.07909. It works on bytes, as in GPT-2
(Radford et al. 2019), so that every string has an encoding and there is no unknown token.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers

PAD, BOS, EOS = "<|endoftext|>", "<|im_start|>", "<|im_end|>"
CONTROL_TOKENS = (PAD, BOS, EOS)
# decode(skip_special_tokens=True) keeps these, since a chat client shows reasoning and tool calls.
MARKUP_TOKENS = (
    "<think>",
    "</think>",
    "<tool_call>",
    "</tool_call>",
    "<tool_response>",
    "</tool_response>",
    "<tools>",
    "</tools>",
)
RESERVED_TOKENS = tuple(f"<|reserved_{i}|>" for i in range(5))
SPECIAL_TOKENS = CONTROL_TOKENS + MARKUP_TOKENS + RESERVED_TOKENS
MIN_VOCAB_SIZE = 256 + len(SPECIAL_TOKENS)

# Exactly Qwen2's pattern: a GGUF file does not store its pre-tokenizer but names it, "qwen2".
SPLIT_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
    r"|\s*[\r\n]+|\s+(?!\S)|\s+"
)
GGUF_PRE_TOKENIZER = "qwen2"
# Longer texts are cut, since the trainer needs many times the length of an item in memory.
MAX_CHARS = 1 << 20


def train_bpe(texts: Iterable[str], vocab_size: int = 6400, *, min_frequency: int = 2) -> Tokenizer:
    """Learn merges from `texts` and return a ready `tokenizers.Tokenizer`.

    texts: read once; memory grows with the number of distinct words, not with the corpus.
    vocab_size: entries in total, the special tokens and the 256 bytes included; at least MIN_VOCAB_SIZE. Small data
        may give fewer entries.
    min_frequency: rarer pairs are never merged.
    The result does not depend on the order of the texts. Raises ValueError if vocab_size is too small or there is no
    text.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"--vocab-size {vocab_size}: bytes and special tokens alone need {MIN_VOCAB_SIZE}")
    if min_frequency < 0:
        raise ValueError(f"--min-frequency {min_frequency}: must be 0 or more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(SPLIT_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=min_frequency,
        special_tokens=[AddedToken(token, normalized=False) for token in SPECIAL_TOKENS],
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=False,
    )
    pieces = _CountingIterator(_pieces(texts))
    tokenizer.train_from_iterator(pieces, trainer)
    if not pieces.count:
        raise ValueError("--data has no text to train on")
    return _with_visible_markup(tokenizer)


def _with_visible_markup(tokenizer: Tokenizer) -> Tokenizer:
    """The tokenizer with MARKUP_TOKENS that are not special: the trainer marks all, and there is no setter."""
    content = json.loads(tokenizer.to_str())
    for token in content["added_tokens"]:
        token["special"] = token["content"] not in MARKUP_TOKENS
    return Tokenizer.from_str(json.dumps(content))


def _pieces(texts: Iterable[str]) -> Iterator[str]:
    for text in texts:
        for start in range(0, len(text), MAX_CHARS):
            yield text[start : start + MAX_CHARS]


class _CountingIterator:
    """Counts the items, to detect an empty stream."""

    def __init__(self, items: Iterator[str]) -> None:
        self._items = items
        self.count = 0

    def __iter__(self) -> Iterator[str]:
        for item in self._items:
            self.count += 1
            yield item
