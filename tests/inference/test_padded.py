"""A padded vocabulary changes no token and no figure: they are those of the model without surplus rows."""

import numpy as np
import pytest
import torch

from minimind import ModelConfig
from minimind.inference.engine import Engine
from minimind.inference.generate import generate
from minimind.inference.requests import Request, SamplingParams
from minimind.objectives.next_token import TokenBatch, next_token_loss
from minimind.objectives.policy import token_log_probs
from minimind.ops import native
from tests.inference.padded import padded
from tests.inference.small import VARIANTS, random_prompts, small_model, small_tokenizer

MISSING = native.why_not(torch.device("cpu"))
BACKENDS = ["reference", pytest.param("native", marks=pytest.mark.skipif(MISSING is not None, reason=str(MISSING)))]
TOKENIZER = small_tokenizer()
WAYS = [
    {"temperature": 0},
    {"temperature": 1.0},
    {"temperature": 1.5, "top_k": 40},
    {"temperature": 1.0, "top_p": 0.9},
    {"temperature": 2.0, "min_p": 0.01, "repetition_penalty": 1.3, "presence_penalty": 0.5},
]


class Even:
    """A constraint that allows only even ids of the tokenizer."""

    def allowed(self):
        return np.arange(TOKENIZER.vocab_size) % 2 == 0

    def advance(self, token_id):
        assert token_id % 2 == 0


def answers(model, backend, dtype=None):
    engine = Engine(model, TOKENIZER, kv_tokens=4096, max_batch=8, backend=backend, dtype=dtype)
    prompts = random_prompts(len(WAYS) + 1, 20, TOKENIZER.vocab_size)
    params = [SamplingParams(16, seed=i, logprobs=5, ignore_eos=True, **way) for i, way in enumerate(WAYS)]
    requests = [Request(prompt, p) for prompt, p in zip(prompts, params, strict=False)]
    requests.append(Request(prompts[-1], params[1], constraint=Even))
    outputs = engine.generate(requests)
    assert [output.error for output in outputs] == [None] * len(outputs)
    return [output.completions for output in outputs]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
@pytest.mark.parametrize("known", [True, False], ids=["opened", "given to the engine"])
def test_the_engine_samples_and_scores_the_same(variant, backend, known):
    model = small_model(variant)
    assert answers(padded(model, known=known), backend) == answers(model, backend)


def test_without_a_mask_the_surplus_would_win():
    """The surplus rows of these models are not harmless."""
    model = padded(small_model(), known=False)
    (ids,) = generate(model, [[5, 6, 7]], 16, temperature=0.0)
    assert max(ids) >= TOKENIZER.vocab_size
    (ids,) = generate(padded(small_model()), [[5, 6, 7]], 16, temperature=0.0)
    assert max(ids) < TOKENIZER.vocab_size


@pytest.mark.skipif(MISSING is not None, reason=str(MISSING))
def test_in_bfloat16():
    model = small_model()
    assert answers(padded(model), "native", torch.bfloat16) == answers(model, "native", torch.bfloat16)


def test_a_prompt_of_surplus_ids_is_refused():
    size = TOKENIZER.vocab_size
    for tokenizer in (TOKENIZER, None):
        engine = Engine(padded(small_model()), tokenizer, kv_tokens=64, max_batch=1, backend="reference")
        with pytest.raises(ValueError, match=f"token id {size} of the prompt is outside the vocabulary of {size}"):
            engine.submit(Request([5, size]))


@pytest.mark.parametrize("variant", ["dense", "qk_norm, untied"])
def test_losses_and_log_probabilities_are_over_the_tokenizers_ids(variant):
    """The surplus rows get no gradient either."""
    model = small_model(variant)
    wide = padded(model)
    ids = torch.tensor(random_prompts(1, 1, 300, seed=1)[0] * 3 + [4, 9, 60, 120, 200])[None]
    targets, bounds = ids.roll(-1), torch.tensor([0, ids.numel()], dtype=torch.int32)
    given = TokenBatch(ids, targets, bounds, ids.numel())
    assert torch.equal(*(token_log_probs(m, ids, targets, bounds) for m in (model, wide)))
    losses = [next_token_loss(m, given)[0] for m in (model, wide)]
    assert torch.equal(*losses) and wide(ids).logits.shape[-1] == TOKENIZER.vocab_size
    for loss in losses:
        loss.backward()
    for name in ("embed_tokens.weight", "lm_head.weight"):
        if name in dict(model.named_parameters()):
            narrow, grad = model.get_parameter(name).grad, wide.get_parameter(name).grad
            assert torch.equal(grad[: len(narrow)], narrow) and not grad[len(narrow) :].any()


def test_a_config_says_which_ids_the_tokenizer_has():
    config = ModelConfig(vocab_size=6464)
    assert config.num_tokens == 6464 and "tokenizer_size" not in config.to_dict()
    assert config.with_tokenizer(6464, "x") == config
    narrow = config.with_tokenizer(6400, "x")
    assert (narrow.num_tokens, narrow.vocab_size) == (6400, 6464)
    assert ModelConfig.from_dict(narrow.to_dict()) == narrow
    assert narrow.with_tokenizer(6464, "x") == config
    assert "64 of the model's 6,464 rows" in (narrow.padding_note or "") and config.padding_note is None
    with pytest.raises(ValueError, match="--from X: the tokenizer has 6465 ids, the model 6464 rows for them"):
        config.with_tokenizer(6465, "--from X")
    for wrong in (0, 6464, 7000):
        with pytest.raises(ValueError, match="tokenizer_size"):
            ModelConfig(vocab_size=6464, tokenizer_size=wrong)
