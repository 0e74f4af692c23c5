"""The engine's work around the model: scheduler, pages, batch, deltas, text, stop strings."""

from __future__ import annotations

import codecs
import itertools
from typing import Any

import pytest
import torch
from torch import Tensor

from bench.regression.ratios import Against, times
from minimind import ModelConfig, load_tokenizer
from minimind.inference.engine import Engine
from minimind.inference.request_state import Detokenizer
from minimind.inference.requests import Request, SamplingParams
from minimind.modeling import Model
from minimind.tokenization import Tokenizer

BATCH, NEW_TOKENS = 16, 48
STOPS = ("\nuser:", "###", "</answer>")
TEXT = "Stop strings begin like the text: \nuse # ## </ans 你好，世界 and go on. "


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return load_tokenizer()


def test_engine_bookkeeping(against: Against, tokenizer: Tokenizer) -> None:
    engine = engine_without_compute(tokenizer)
    params = SamplingParams(max_new_tokens=NEW_TOKENS, stop=STOPS, ignore_eos=True)
    shared = list(range(100, 148))  # three pages that all prompts begin with
    requests = [Request([*shared, *range(200, 201 + i)], params) for i in range(2 * BATCH)]
    tokens = len(requests) * NEW_TOKENS
    assert sum(len(output.completions[0].token_ids) for output in engine.generate(requests)) == tokens
    against("updates of a dict and a list", lambda: engine.generate(requests), lambda: plain_python(100 * tokens))


def engine_without_compute(tokenizer: Tokenizer) -> Engine:
    """An engine whose model returns one column of zeros as logits, and whose sampler returns the tokens of TEXT."""
    shape = ModelConfig(32, 1, 2, 1, 16, 48, tokenizer.vocab_size, max_position_embeddings=256)
    engine = Engine(Model(shape), tokenizer, max_batch=BATCH, max_context=256, backend="reference")
    logits, log_probs = torch.zeros(BATCH, 1), torch.zeros(BATCH)
    script = itertools.cycle([torch.full((BATCH,), i) for i in tokenizer.encode(TEXT)])

    def sample(logits: Tensor, first: int = 0) -> tuple[Tensor, Tensor]:
        return next(script)[: len(logits)], log_probs[: len(logits)]

    runner: Any = engine._runner
    runner._decode = lambda rows: logits[:rows]
    runner.prefill = lambda chunks: logits[: sum(chunk.last for chunk in chunks)]
    runner.sample = sample
    return engine


def plain_python(operations: int) -> dict[int, int]:
    """Updates of a short dictionary and a short list, so that the time does not depend on the state of the memory."""
    counts: dict[int, int] = {}
    latest = [0] * 97
    for i in range(operations):
        counts[i % 97] = counts.get(i % 97, 0) + 1
        latest[i % 97] = i
    return counts


def test_stop_strings(against: Against, tokenizer: Tokenizer) -> None:
    ids, table = tokenizer.encode(TEXT * 40), tokenizer.token_bytes()

    def ours() -> str:
        detokenizer = Detokenizer(table, STOPS)
        for i in ids:
            detokenizer.push(i)
        return detokenizer.text + detokenizer.flush()

    def plain() -> str:
        decode, text = codecs.getincrementaldecoder("utf-8")("replace").decode, ""
        for i in ids:
            text += decode(table[i])
            for stop in STOPS:
                text.endswith(stop)
        return text

    assert ours() == plain() == TEXT * 40
    against("an incremental UTF-8 decoder and str.endswith", times(2, ours), times(10, plain))
