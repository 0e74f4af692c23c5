"""The engine generates the tokens of whole forwards, whatever else is in the batch."""

import pytest
import torch

from minimind.inference.engine import Engine
from minimind.inference.request_state import derive_seed
from minimind.inference.requests import Request, SamplingParams
from minimind.lora import LoRAConfig, add_adapter
from minimind.ops import native
from tests.inference.small import VARIANTS, greedy, is_greedy, random_prompts, small_model, small_tokenizer

MISSING = native.why_not(torch.device("cpu"))
BACKENDS = ["reference", pytest.param("native", marks=pytest.mark.skipif(MISSING is not None, reason=str(MISSING)))]


def engine_of(model, tokenizer=None, **options):
    options = {"kv_tokens": 4096, "max_batch": 8, "backend": "reference", **options}
    return Engine(model, tokenizer, **options)


def greedily(prompts, new_tokens=12, **options):
    params = SamplingParams(new_tokens, temperature=0, **options)
    return [Request(prompt, params) for prompt in prompts]


def new_ids(outputs):
    assert [o.error for o in outputs] == [None] * len(outputs)
    return [o.token_ids for o in outputs]


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("variant", VARIANTS)
def test_greedy_decoding_equals_the_argmax_of_whole_forwards(variant, backend):
    model = small_model(variant)
    prompts = random_prompts(10, 60, model.config.vocab_size)
    engine = engine_of(model, backend=backend, prefill_chunk=32)
    together = new_ids(engine.generate(greedily(prompts)))
    assert together[0] == greedy(model, prompts[0], 12)
    for prompt, ids in zip(prompts, together, strict=True):
        assert is_greedy(model, prompt, ids)
    alone = engine_of(model, backend=backend, max_batch=1, prefix_cache=False)
    assert new_ids(alone.generate(greedily(prompts))) == together


@pytest.mark.parametrize("backend", BACKENDS)
def test_positions_reach_yarns_scaled_maximum(backend):
    model = small_model("yarn")  # 64 positions, scaled to 256
    engine = engine_of(model, backend=backend)
    assert engine.max_context == 256
    (prompt,) = random_prompts(1, 1, model.config.vocab_size)
    (output,) = engine.generate([Request(prompt, SamplingParams(None, temperature=0))])
    assert (len(output.token_ids), output.finish_reason) == (255, "length")
    assert is_greedy(model, prompt, output.token_ids)


@pytest.mark.parametrize("backend", BACKENDS)
def test_log_probs_are_those_of_the_whole_forward(backend):
    model = small_model("moe")
    prompts = random_prompts(4, 20, model.config.vocab_size)
    params = SamplingParams(10, temperature=0.7, top_k=20, top_p=0.9, logprobs=3)
    outputs = engine_of(model, backend=backend).generate([Request(p, params) for p in prompts])
    for prompt, output in zip(prompts, outputs, strict=True):
        with torch.no_grad():
            logits = model(torch.tensor([prompt + output.token_ids])).logits[0, len(prompt) - 1 : -1]
        truth = (logits.double() / 0.7).log_softmax(-1)
        rounding = 64 * torch.finfo(torch.float32).eps * truth.abs().max()  # of two float32 forwards
        mine = truth.gather(1, torch.tensor(output.token_ids)[:, None])[:, 0]
        assert (mine - torch.tensor(output.log_probs)).abs().max() <= rounding
        values, ids = truth.topk(3)
        for row, top in enumerate(output.completions[0].top_logprobs):
            assert [i for i, _ in top] == ids[row].tolist()
            assert (torch.tensor([v for _, v in top]) - values[row]).abs().max() <= rounding


def test_a_seed_gives_the_same_sample_in_any_batch():
    model = small_model()
    prompts = random_prompts(6, 30, model.config.vocab_size)
    requests = [Request(p, SamplingParams(15, temperature=1.5, seed=i)) for i, p in enumerate(prompts)]
    together = new_ids(engine_of(model).generate(requests))
    assert together == [new_ids(engine_of(model).generate([r]))[0] for r in requests]
    other = [Request(p, SamplingParams(15, temperature=1.5, seed=100 + i)) for i, p in enumerate(prompts)]
    assert new_ids(engine_of(model).generate(other)) != together


def test_requests_without_a_seed_differ_and_repeat_with_the_engines():
    model, request = small_model(), Request([1, 2], SamplingParams(12, temperature=1.5))
    first = new_ids(engine_of(model, seed=3).generate([request, request]))
    assert first[0] != first[1]
    assert first == new_ids(engine_of(model, seed=3).generate([request, request]))
    assert first != new_ids(engine_of(model, seed=4).generate([request, request]))


def test_sampling_follows_the_models_distribution():
    model = small_model(seed=1)
    prompt = [5, 6, 7]
    params = SamplingParams(1, temperature=1.0, n=400, seed=0)
    (output,) = engine_of(model, max_batch=100).generate([Request(prompt, params)])
    with torch.no_grad():
        p = model(torch.tensor([prompt])).logits[0, -1].softmax(-1)
    drawn = torch.tensor([c.token_ids[0] for c in output.completions]).bincount(minlength=len(p)) / 400
    likely = p > 0.02
    assert ((drawn - p).abs()[likely] <= 5 * (p * (1 - p) / 400).sqrt()[likely]).all()


def test_completions_of_a_prompt_share_its_pages_and_differ():
    model = small_model()
    prompt = random_prompts(1, 1, 9)[0] + list(range(36))  # 37 tokens: two pages and five tokens of a third
    engine = engine_of(model, max_batch=4)
    params = SamplingParams(6, temperature=1.5, seed=7, n=4)
    name = engine.submit(Request(prompt, params))
    engine.step()
    assert engine.stats().pages_used == 3
    engine.step()
    assert engine.stats().pages_used == 2 + 4
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    output = next(d.output for d in deltas if d.output)
    assert output.id == name
    assert [c.index for c in output.completions] == [0, 1, 2, 3]
    assert len({tuple(c.token_ids) for c in output.completions}) == 4
    for i, completion in enumerate(output.completions):  # each is what a request with its seed would be
        seed = 7 if i == 0 else derive_seed(7, i)
        alone = Request(prompt, SamplingParams(6, temperature=1.5, seed=seed))
        assert new_ids(engine_of(model).generate([alone]))[0] == completion.token_ids


def test_more_completions_than_the_batch_holds():
    model = small_model()
    params = SamplingParams(5, temperature=1.5, seed=1, n=7)
    (output,) = engine_of(model, max_batch=3).generate([Request([1, 2, 3], params)])
    (wide,) = engine_of(model, max_batch=8).generate([Request([1, 2, 3], params)])
    assert [c.index for c in output.completions] == list(range(7))
    assert [c.token_ids for c in output.completions] == [c.token_ids for c in wide.completions]


@pytest.mark.parametrize("backend", BACKENDS)
def test_a_shared_beginning_is_computed_once(backend):
    model = small_model()
    system = random_prompts(1, 1, 9)[0] + list(range(50))
    prompts = [system + tail for tail in random_prompts(5, 20, model.config.vocab_size, seed=2)]
    engine = engine_of(model, backend=backend)
    outputs = engine.generate(greedily(prompts))
    assert [o.cached_tokens for o in outputs] == [0, 48, 48, 48, 48]
    assert engine.stats().cached_tokens == 4 * 48
    assert all(is_greedy(model, p, o.token_ids) for p, o in zip(prompts, outputs, strict=True))
    # a conversation goes on: what was generated is found as well
    turn = prompts[0] + outputs[0].token_ids + [3]
    (output,) = engine.generate(greedily([turn]))
    assert output.cached_tokens == (len(turn) - 2) // 16 * 16
    assert is_greedy(model, turn, output.token_ids)


def test_penalties_count_the_prompt():
    model = small_model()
    prompt = [4, 5]
    (first,) = new_ids(engine_of(model).generate(greedily([prompt], 8)))
    strict = greedily([prompt + first], 8, presence_penalty=1e4)
    (output,) = engine_of(model).generate(strict)
    assert not set(output.token_ids) & set(prompt + first)
    assert len(set(output.token_ids)) == 8


@pytest.mark.parametrize("backend", BACKENDS)
def test_new_weights_take_effect_in_the_next_step(backend):
    model, changed = small_model(), small_model(seed=1)
    prompts = random_prompts(5, 40, model.config.vocab_size)
    engine = engine_of(model, backend=backend)
    engine.generate(greedily(prompts))  # fills the prefix cache with the old weights
    names = [engine.submit(request) for request in greedily(prompts)]
    for _ in range(4):
        engine.step()
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), changed.parameters(), strict=True):
            parameter.copy_(value)
    engine.refresh_weights()
    assert engine.stats().pages_cached == 0
    outputs = {}
    while engine.has_work:
        outputs |= {d.id: d.output for d in engine.step() if d.output}
    for name, prompt in zip(names, prompts, strict=True):
        old, new = outputs[name].token_ids[:4], outputs[name].token_ids[4:]
        assert is_greedy(changed, prompt + old, new)


def test_live_weights_are_shared_and_the_model_is_not_changed():
    model = small_model("moe").train()
    engine = engine_of(model, backend="reference")
    assert "weights shared" in engine.describe()
    engine.generate(greedily([[1, 2, 3]]))
    assert model.training and all(p.requires_grad for p in model.parameters())
    with torch.no_grad():
        model.norm.weight.zero_()
    (output,) = engine.generate(greedily([[1, 2, 3]], logprobs=1))
    assert output.token_ids == [0] * 12  # all logits are zero: no refresh was needed


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_keeps_a_copy_that_follows_the_model(backend):
    model = small_model()
    engine = engine_of(model, dtype=torch.bfloat16, backend=backend)
    assert "MiB of weights copied" in engine.describe()
    before = new_ids(engine.generate(greedily([[1, 2, 3]])))
    with torch.no_grad():
        model.embed_tokens.weight.neg_()
    assert new_ids(engine.generate(greedily([[1, 2, 3]]))) == before
    engine.refresh_weights()
    after = new_ids(engine.generate(greedily([[1, 2, 3]])))
    fresh = engine_of(model, dtype=torch.bfloat16, backend=backend)
    assert after == new_ids(fresh.generate(greedily([[1, 2, 3]])))


@pytest.mark.parametrize("backend", BACKENDS)
def test_low_rank_adapters_count(backend):
    model = small_model()
    add_adapter(model, LoRAConfig(rank=2, dropout=0.5))
    model.train()
    engine = engine_of(model, backend=backend)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if name.endswith(".B"):
                parameter.normal_(std=0.5)
    engine.refresh_weights()
    prompts = random_prompts(3, 20, model.config.vocab_size)
    outputs = new_ids(engine.generate(greedily(prompts)))
    assert model.training
    model.eval()
    assert all(is_greedy(model, p, ids) for p, ids in zip(prompts, outputs, strict=True))
    plain = new_ids(engine_of(small_model()).generate(greedily(prompts)))
    assert outputs != plain


def test_special_tokens_and_text():
    model, tokenizer = small_model(), small_tokenizer()
    engine = engine_of(model, tokenizer)
    free = engine.generate([Request("hello", SamplingParams(30, temperature=0, ignore_eos=True))])[0]
    assert free.prompt_token_ids == tokenizer.encode("hello")
    assert free.text == tokenizer.decode(free.token_ids, skip_special_tokens=True)
    stop = free.token_ids[7]
    request = Request("hello", SamplingParams(30, temperature=0, ignore_eos=True, stop_token_ids=(stop,)))
    (output,) = engine.generate([request])
    cut = free.token_ids[: free.token_ids.index(stop) + 1]
    assert (output.token_ids, output.finish_reason) == (cut, "stop")
    assert output.completions[0].stop == stop
    assert output.text == tokenizer.decode(cut[:-1], skip_special_tokens=True)
    assert len(output.log_probs) == len(cut)


def test_a_stop_string_cuts_the_text():
    model, tokenizer = small_model(), small_tokenizer()
    engine = engine_of(model, tokenizer)
    params = {"max_new_tokens": 40, "temperature": 1.5, "seed": 5, "ignore_eos": True}
    text = engine.generate([Request("hello", SamplingParams(**params))])[0].text
    stop = text[12:15]
    deltas = list(engine.stream([Request("hello", SamplingParams(**params, stop=stop))]))
    assert "".join(d.text for d in deltas) == text[: text.index(stop)]
    assert deltas[-1].finish_reason == "stop"
    assert deltas[-1].stop == stop
    assert deltas[-1].output.text == text[: text.index(stop)]


def test_a_stop_string_that_names_a_special_token_is_that_token():
    model, tokenizer = small_model(), small_tokenizer()
    engine = engine_of(model, tokenizer)
    params = {"max_new_tokens": 400, "temperature": 50.0, "seed": 5, "ignore_eos": True}
    (output,) = engine.generate([Request("hello", SamplingParams(**params, stop="<|im_start|>"))])
    assert output.completions[0].stop == tokenizer.special_tokens["<|im_start|>"]
