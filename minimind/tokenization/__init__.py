"""Load and train byte-level BPE tokenizers, and encode conversations."""

from minimind.tokenization.chat_encoder import ChatEncoder
from minimind.tokenization.tokenizer import Tokenizer, load_tokenizer, require_same_ids, tokenizer_beside

__all__ = ["ChatEncoder", "Tokenizer", "load_tokenizer", "require_same_ids", "tokenizer_beside"]
