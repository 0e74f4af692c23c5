"""The tokenizer's part of a GGUF file: byte-level BPE with the pre-tokenizer that llama.cpp knows by name."""

from __future__ import annotations

import importlib
import json
import tempfile
from pathlib import Path
from typing import Any

from minimind.tokenization import Tokenizer
from minimind.tokenization.tokenizer import CONFIG_FILE, MODEL_FILE
from minimind.tokenization.training import GGUF_PRE_TOKENIZER, SPLIT_PATTERN

gguf: Any
try:
    gguf = importlib.import_module("gguf")
except ImportError:  # export_gguf says so
    gguf = None


def add_vocabulary(writer: Any, tokenizer: Tokenizer, vocab_size: int) -> None:
    """Tokens, their types, merges, special ids and the chat template. vocab_size: rows of the model; ids beyond the
    tokenizer's get names of padding, as llama.cpp's own conversion gives them. Raises ValueError for a tokenizer that
    llama.cpp cannot follow."""
    with tempfile.TemporaryDirectory() as folder:
        tokenizer.save(folder)
        content = json.loads((Path(folder) / MODEL_FILE).read_text(encoding="utf-8"))
        config = json.loads((Path(folder) / CONFIG_FILE).read_text(encoding="utf-8"))
    if content["model"]["type"] != "BPE" or content.get("normalizer"):
        raise ValueError("GGUF: only byte-level BPE without a normalizer can be written")
    tokens, types = _tokens(content, vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer_of(content))
    writer.add_token_list(tokens)
    writer.add_token_types(types)
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in content["model"]["merges"]])
    writer.add_bos_token_id(tokenizer.bos_token_id)
    writer.add_eos_token_id(tokenizer.eos_token_id)
    writer.add_pad_token_id(tokenizer.pad_token_id)
    # the chat template writes them itself, and llama.cpp would add a second one
    writer.add_add_bos_token(bool(config.get("add_bos_token", False)))
    writer.add_add_eos_token(bool(config.get("add_eos_token", False)))
    writer.add_add_space_prefix(False)
    if tokenizer.chat_template is not None:
        writer.add_chat_template(tokenizer.chat_template)


def pre_tokenizer_of(content: dict[str, Any]) -> str:
    """llama.cpp's name for the way a tokenizer.json cuts a text into words."""
    found = content.get("pre_tokenizer") or {}
    steps = found.get("pretokenizers", [found])
    last = steps[-1]
    if last.get("type") == "ByteLevel" and not last.get("add_prefix_space"):
        if len(steps) == 1 and last.get("use_regex", True):
            return "gpt-2"
        splits = [(s.get("type"), s.get("pattern"), s.get("behavior"), s.get("invert")) for s in steps[:-1]]
        if splits == [("Split", {"Regex": SPLIT_PATTERN}, "Isolated", False)] and not last.get("use_regex"):
            return GGUF_PRE_TOKENIZER
    kinds = ", ".join(str(step.get("type")) for step in steps)
    raise ValueError(f"GGUF: llama.cpp's split for this pre-tokenizer ({kinds}) is not known; GPT-2's and Qwen2's are")


def _tokens(content: dict[str, Any], vocab_size: int) -> tuple[list[str], list[int]]:
    kinds = gguf.TokenType
    tokens = [f"[PAD{i}]" for i in range(vocab_size)]
    types = [int(kinds.UNUSED)] * vocab_size
    for token, number in content["model"]["vocab"].items():
        tokens[number], types[number] = token, int(kinds.NORMAL)
    for added in content["added_tokens"]:
        tokens[added["id"]] = added["content"]
        types[added["id"]] = int(kinds.CONTROL if added["special"] else kinds.USER_DEFINED)
    return tokens, types
