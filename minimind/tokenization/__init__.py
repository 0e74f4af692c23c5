"""Byte-level BPE: loading, training, and the chat template."""

from minimind.tokenization.tokenizer import Tokenizer, load_tokenizer

__all__ = ["Tokenizer", "load_tokenizer"]
