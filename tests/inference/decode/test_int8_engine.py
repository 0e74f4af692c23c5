"""8-bit weights in an engine: greedy answers, memory, the command line and the measured effect."""

from __future__ import annotations

import json
import re
from dataclasses import replace

import pytest
import torch

from minimind import cli
from minimind.apps import chat
from minimind.inference.decode.int8 import choose_weights_dtype
from minimind.inference.decode.step import DecodeWeights
from minimind.inference.runner import native_prompt_rows
from minimind.modeling import Model
from minimind.ops import native
from tests.inference.decode.cases import needs_native
from tests.inference.decode.test_step import Decoder
from tests.inference.small import VARIANTS, random_prompts, small_model
from tests.inference.test_engine import engine_of, greedily, new_ids


def continued(model: Model, prompt: list[int], new: list[int], weights_dtype) -> torch.Tensor:
    """log p of the new tokens, float64, with 8-bit weights or without; prompts too where they run natively."""
    decoder = Decoder.of(model, 1)
    prompts_too = native_prompt_rows(torch.device("cpu")) > 0
    if not prompts_too:
        logits = [decoder.step(torch.tensor([token])) for token in prompt][-1:]
    decoder.weights = DecodeWeights.from_model(model, None, weights_dtype)
    decoder.operands = decoder.weights.operands()
    if prompts_too:
        logits = [decoder.step(torch.tensor([token])) for token in prompt][-1:]
    logits += [decoder.step(torch.tensor([token])) for token in new[:-1]]
    return torch.cat(logits).double().log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0]


@needs_native
@pytest.mark.parametrize("variant", VARIANTS)
def test_the_engine_decodes_with_8_bits(variant):
    model = small_model(variant)
    prompts = random_prompts(6, 40, model.config.vocab_size)
    options = {"backend": "native", "weights_dtype": torch.int8}
    outputs = engine_of(model, **options).generate(greedily(prompts))
    error = effect = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        rounded = continued(model, prompt, output.token_ids, torch.int8)
        error = max(error, float((torch.tensor(output.log_probs) - rounded).abs().max()))
        effect = max(effect, float((continued(model, prompt, output.token_ids, None) - rounded).abs().max()))
    assert effect > 1e-3 and error < effect / 4
    alone = engine_of(model, max_batch=1, prefix_cache=False, **options)
    assert new_ids(alone.generate(greedily(prompts))) == new_ids(outputs)


@needs_native
def test_new_weights_are_taken_up():
    model, other = small_model(), small_model(seed=1)
    (request,) = greedily(random_prompts(1, 20, model.config.vocab_size))
    options = {"backend": "native", "weights_dtype": torch.int8, "prefix_cache": False}
    engine = engine_of(model, **options)
    before = new_ids(engine.generate([request]))
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    engine.refresh_weights()
    after = new_ids(engine.generate([request]))
    assert after == new_ids(engine_of(other, **options).generate([request])) != before


@needs_native
def test_a_copy_takes_a_quarter_of_float32s_memory():
    model = Model(replace(small_model().config, hidden_size=256)).eval()
    held = [engine_of(model, backend="native", weights_dtype=d)._runner.packed_bytes for d in (None, torch.int8)]
    assert 0.25 < held[1] / held[0] < 0.3
    assert "8-bit weights" in engine_of(model, backend="native", weights_dtype=torch.int8).describe()


def test_8_bits_without_native_decoding_are_refused():
    reason = native.why_not(torch.device("cpu")) or "the backend is 'reference'; decode with"
    with pytest.raises(ValueError, match=re.escape(f"8-bit weights need native decoding: {reason}")):
        engine_of(small_model(), backend="reference", weights_dtype=torch.int8)


@needs_native
def test_8_bits_in_float16_are_refused():
    with pytest.raises(ValueError, match=r"8-bit weights need native decoding: .*not float16"):
        engine_of(small_model(), backend="auto", weights_dtype=torch.int8, dtype=torch.float16)


@needs_native
def test_the_flag_reaches_chat_and_serve(folder):
    _, notes = chat.open_session(chat.Args(model=str(folder / "m"), weights_dtype="int8"))
    assert "8-bit weights" in notes[-1]
    for package in ("fastapi", "llguidance", "prometheus_client"):
        pytest.importorskip(package, reason="install minimind[serve]")
    from minimind.serving.command import Args, open_service

    _, notes = open_service(Args(model=str(folder / "m"), weights_dtype="int8", kv_tokens=1024))
    assert any("8-bit weights" in note for note in notes)


def test_evaluate_measures_what_8_bits_cost(folder, capsys):
    model = ["--model", str(folder / "m"), "--dtype", "fp32"]
    ppl = ["evaluate", *model, "--ppl", str(folder / "book.txt"), "--context", "64", "--tokens", "256",
           "--out", str(folder / "out")]  # fmt: skip
    assert cli.run([*ppl, "--weights-dtype", "int8"]) == 0
    scores = json.loads((folder / "out" / "perplexity.json").read_text())["scores"]
    found = {s["curve"]: s["perplexity"] for s in scores}
    assert list(found) == ["as it is", "as it is, weights in int8"]
    assert 0 < abs(found["as it is, weights in int8"] / found["as it is"] - 1) < 0.02
    capsys.readouterr()
    assert cli.run(["evaluate", *model, "--tasks", "arc_easy", "--weights-dtype", "int8"]) == 2
    assert "--weights-dtype int8: --tasks does not use it" in capsys.readouterr().err
    with pytest.raises(ValueError, match="--weights-dtype int8: 8-bit weights need a CPU or a CUDA GPU, not mps; drop"):
        choose_weights_dtype("int8", torch.device("mps"))
    assert choose_weights_dtype("int8", torch.device("cuda:0")) == torch.int8
