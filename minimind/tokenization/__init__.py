"""Byte-level BPE: loading, training, and the chat template."""

from minimind.tokenization.conversation import ChatEncoder
from minimind.tokenization.tokenizer import Tokenizer, load_tokenizer, require_same_ids, tokenizer_beside

__all__ = ["ChatEncoder", "Tokenizer", "load_tokenizer", "require_same_ids", "tokenizer_beside"]
