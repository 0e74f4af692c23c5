"""8-bit weights in an engine as on a GPU: the step for a few sequences, and the layers for prompts, larger batches and
mixtures of experts, compute with the same rounded weights. The CUDA operators run under the emulator."""

from __future__ import annotations

import copy
from types import SimpleNamespace

import pytest
import torch

from minimind.inference import runner
from minimind.inference.decode import step
from minimind.inference.decode.int8 import rounded_rows, rounded_weights
from minimind.modeling import Model
from tests.csrc import emulated
from tests.inference.small import random_prompts, small_model
from tests.inference.test_engine import engine_of, greedily, new_ids

pytestmark = pytest.mark.skipif(emulated.COMPILER is None, reason="g++ is not on PATH")
INT8 = {"backend": "native", "weights_dtype": torch.int8, "prefix_cache": False}


@pytest.fixture
def steps(ops, monkeypatch) -> list[int]:
    """The engine on a CPU does what it does on a GPU; the rows of every native step of a whole model."""
    rows: list[int] = []

    def decode_step(weights, operands, tokens, *more):
        rows.append(len(tokens))
        *inputs, k_scale, v_scale = more
        return ops.decode_step(tokens, *inputs[:6], operands, *inputs[6:], *weights.settings, k_scale, v_scale)

    for module in (step, runner):
        monkeypatch.setattr(module, "packs", lambda device: False)
    monkeypatch.setattr(runner, "decode_step", decode_step)
    monkeypatch.setattr(runner, "_native_ops", lambda: (ops.rope_append_kv, ops.decode_attention, ops.sample))
    monkeypatch.setattr(runner, "why_not_native", lambda device, dtype: None)
    monkeypatch.setattr(runner, "native_prompt_rows", lambda device: 0)
    monkeypatch.setattr(runner.native, "build_info", lambda: SimpleNamespace(summary=lambda device: "emulated"))
    return rows


@torch.no_grad()
def log_probs(model: Model, prompt: list[int], new: list[int], rounded: bool) -> torch.Tensor:
    """log p of the new tokens by a whole forward."""
    ids = torch.tensor([prompt + new])
    if not rounded:
        logits = model(ids).logits
    else:
        with rounded_weights(model, activations=False):
            logits = model(ids).logits
    return logits[0, len(prompt) - 1 : -1].double().log_softmax(-1).gather(1, torch.tensor(new)[:, None])[:, 0]


def assert_rounded(model: Model, prompts, outputs) -> None:
    """The outputs' probabilities are those of the rounded weights: float32 noise is far below the rounding's effect."""
    error = effect = 0.0
    for prompt, output in zip(prompts, outputs, strict=True):
        mine = torch.tensor(output.log_probs, dtype=torch.float64)
        truth, plain = (log_probs(model, prompt, output.token_ids, rounded) for rounded in (True, False))
        error = max(error, float((mine - truth).abs().max()))
        effect = max(effect, float((plain - truth).abs().max()))
    assert effect > 1e-2 and error < effect / 100, (error, effect)


@pytest.mark.parametrize("variant", ["dense", "qk_norm, untied"])
def test_few_and_many_sequences_are_of_the_same_model(steps, variant):
    model = small_model(variant)
    before = copy.deepcopy(model.state_dict())
    prompts = random_prompts(9, 12, model.config.vocab_size)
    engine = engine_of(model, max_batch=9, **INT8)
    assert "8-bit weights; more than 8 sequences read the same in float32" in engine.describe()
    many = engine.generate(greedily(prompts, 5))
    assert not steps, "nine sequences go through the layers"
    few = [engine.generate(greedily([prompt], 5))[0] for prompt in prompts[:2]]
    assert steps and max(steps) == 1
    assert new_ids(few) == new_ids(many[:2])
    assert_rounded(model, prompts, many)
    assert_rounded(model, prompts[:2], few)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items()), "the model is its own"


def test_a_mixture_of_experts_decodes_with_rounded_weights(steps):
    model = small_model("moe")
    prompts = random_prompts(2, 9, model.config.vocab_size)
    engine = engine_of(model, **INT8)
    assert "weights rounded to 8 bits, but read in float32" in engine.describe()
    assert_rounded(model, prompts, engine.generate(greedily(prompts, 5)))
    assert not steps and engine._runner.packed_bytes == 0


@pytest.mark.parametrize("batch", [1, 9])
def test_new_weights_are_taken_up_by_both(steps, batch):
    model, other = small_model(), small_model(seed=1)
    requests = greedily(random_prompts(batch, 9, model.config.vocab_size), 4)
    engine = engine_of(model, max_batch=9, **INT8)
    before = new_ids(engine.generate(requests))
    places = [t.data_ptr() for t in engine._runner._operands]
    with torch.no_grad():
        for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
            mine.copy_(theirs)
    engine.refresh_weights()
    assert [t.data_ptr() for t in engine._runner._operands] == places, "CUDA graphs keep addresses"
    after = engine.generate(requests)
    assert new_ids(after) == new_ids(engine_of(other, max_batch=9, **INT8).generate(requests)) != before
    assert_rounded(other, [request.prompt for request in requests], after)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_what_the_engine_holds(steps, dtype):
    """The integers with their scales, and the rounded weights in the dtype of the computation; of a tied head too."""
    model = small_model().to(dtype)
    engine = engine_of(model, **INT8, dtype=dtype)
    layers = engine._replica.model
    assert layers.embed_tokens.weight.data_ptr() == model.embed_tokens.weight.data_ptr()
    assert torch.equal(layers.lm_head.weight, rounded_rows(model.embed_tokens.weight))
    assert torch.equal(layers.layers[1].mlp.down_proj.weight, rounded_rows(model.layers[1].mlp.down_proj.weight))
    matrices = [p for name, p in layers.named_parameters() if p.ndim > 1 and "embed" not in name]
    assert engine._replica.copied_bytes == sum(p.numel() for p in matrices) * dtype.itemsize
    padded = sum(p.shape[0] * (-(-p.shape[1] // 16) * 16 + 4) for p in matrices)
    assert engine._runner.packed_bytes == padded
