"""Decode a batch of rows greedily with llama.cpp, through llama-cpp-python's low-level interface.

Every row is a sequence of its own in one context. The arrays of a llama_batch are filled through NumPy views, so that
Python adds only some tens of microseconds to a step.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

PREFILL = 2048  # tokens in a batch of the prompt
_GGML_F32 = 0
_log_callbacks: list[Any] = []  # a callback that drops llama.cpp's log; it must outlive every model


class LlamaCpp:
    """A context of `batch` sequences of up to `length` tokens. float32_cache: keys and values in f32 instead of f16."""

    def __init__(self, path: Path, batch: int, length: int, threads: int, float32_cache: bool) -> None:
        import llama_cpp

        self.api, self.batch = llama_cpp, batch
        if not _log_callbacks:
            _log_callbacks.append(llama_cpp.llama_log_callback(lambda level, text, data: None))
        llama_cpp.llama_log_set(_log_callbacks[0], ctypes.c_void_p(0))
        llama_cpp.llama_backend_init()
        self.model = llama_cpp.llama_model_load_from_file(str(path).encode(), llama_cpp.llama_model_default_params())
        if self.model is None:
            raise ValueError(f"{path}: llama.cpp cannot load it")
        params = llama_cpp.llama_context_default_params()
        params.n_ctx = batch * (-(-length // 256) * 256)
        params.n_seq_max = batch
        params.n_batch, params.n_ubatch = max(PREFILL, batch), 512
        params.n_threads = params.n_threads_batch = threads
        if float32_cache:
            params.type_k = params.type_v = _GGML_F32
            # flash attention always computes in f16: logits are off by 3e-3 with it, by 1e-6 without
            params.flash_attn_type = 0
        self.context = llama_cpp.llama_init_from_model(self.model, params)
        if self.context is None:
            raise ValueError(f"{path}: llama.cpp cannot make a context for {batch} rows of {length} tokens")
        self.vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self.model))
        self.inputs = llama_cpp.llama_batch_init(max(PREFILL, batch), 0, 1)
        self.position = 0

    def close(self) -> None:
        self.api.llama_batch_free(self.inputs)
        self.api.llama_free(self.context)
        self.api.llama_model_free(self.model)

    def prefill(self, prompts: np.ndarray) -> np.ndarray:
        """prompts int64 [B, P] -> the next token of each row, int64 [B]. The cache is emptied first."""
        self.api.llama_memory_clear(self.api.llama_get_memory(self.context), True)
        rows, length = prompts.shape
        rows_per_call = max(1, PREFILL // length)
        tokens = []
        for start in range(0, rows, rows_per_call):
            chunk = prompts[start : start + rows_per_call]
            sequences = np.repeat(np.arange(start, start + len(chunk)), length)
            positions = np.tile(np.arange(length), len(chunk))
            tokens.append(self._decode(chunk.reshape(-1), positions, sequences, positions == length - 1))
        self.position = length
        return np.concatenate(tokens)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """The newest token of each row -> the next one, both int64 [B]."""
        positions = np.full(self.batch, self.position)
        self.position += 1
        return self._decode(tokens, positions, np.arange(self.batch), np.ones(self.batch, bool))

    def _decode(self, tokens: Any, positions: Any, sequences: Any, wanted: Any) -> np.ndarray:
        count, inputs = len(tokens), self.inputs
        inputs.n_tokens = count
        view = np.ctypeslib.as_array
        view(inputs.token, (count,))[:] = tokens
        view(inputs.pos, (count,))[:] = positions
        view(inputs.n_seq_id, (count,))[:] = 1
        view(inputs.logits, (count,))[:] = wanted
        for i, sequence in enumerate(sequences.tolist()):
            inputs.seq_id[i][0] = sequence
        status = self.api.llama_decode(self.context, inputs)
        if status != 0:
            raise ValueError(f"llama_decode returned {status}")
        logits = self.api.llama_get_logits(self.context)
        return view(logits, (int(wanted.sum()), self.vocab)).argmax(axis=1)
