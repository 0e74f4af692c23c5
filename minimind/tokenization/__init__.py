"""Byte-level BPE: loading, training, and the chat template."""

from minimind.tokenization.conversation import ChatEncoder
from minimind.tokenization.tokenizer import Tokenizer, load_tokenizer

__all__ = ["ChatEncoder", "Tokenizer", "load_tokenizer"]
