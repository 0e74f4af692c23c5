"""The engine as a service: load, preemption, streams, cancellation, refusals."""

import random

import pytest
import torch

from minimind.inference.engine import Engine
from minimind.inference.requests import Request, SamplingParams
from tests.inference.small import is_greedy, random_prompts, small_model, small_tokenizer
from tests.inference.test_engine import BACKENDS, engine_of, greedily, new_ids


@pytest.mark.parametrize("backend", BACKENDS)
def test_two_hundred_requests_at_random_with_too_little_memory(backend):
    model = small_model(vocab_size=64)
    chance = random.Random(0)
    prompts = random_prompts(200, 32, 64)
    wanted = [chance.randint(1, 32) for _ in prompts]
    engine = engine_of(model, kv_tokens=160, page_size=4, max_batch=16, prefill_chunk=64, backend=backend)
    waiting = list(enumerate(zip(prompts, wanted, strict=True)))
    chance.shuffle(waiting)
    outputs, streamed = {}, {}
    while waiting or engine.has_work:
        for _ in range(min(len(waiting), chance.choice((0, 0, 1, 3)))):
            number, (prompt, tokens) = waiting.pop()
            engine.submit(Request(prompt, SamplingParams(tokens, temperature=0), id=str(number)))
        for delta in engine.step():
            streamed.setdefault(delta.id, []).extend(delta.token_ids)
            if delta.output is not None:
                assert delta.id not in outputs
                outputs[delta.id] = delta.output
        stats = engine.stats()
        assert stats.pages_used <= stats.pages_total == 40
        assert stats.running <= 16
    assert sorted(map(int, outputs)) == list(range(200))
    for number, (prompt, tokens) in enumerate(zip(prompts, wanted, strict=True)):
        output = outputs[str(number)]
        assert output.prompt_token_ids == prompt
        assert len(output.token_ids) == tokens
        assert output.token_ids == streamed[str(number)]
        assert is_greedy(model, prompt, output.token_ids)
    stats = engine.stats()
    assert stats.preemptions > 10
    assert stats.pages_used == 0
    assert stats.finished == {"length": 200}
    assert stats.generated_tokens == sum(wanted)
    assert stats.prompt_tokens == sum(map(len, prompts))


def test_preemption_does_not_change_the_sample():
    model = small_model()
    prompts = random_prompts(6, 30, model.config.vocab_size)
    params = SamplingParams(40, temperature=1.3, top_p=0.9, repetition_penalty=1.2, logprobs=2)
    requests = [Request(p, params) for p in prompts]
    roomy, tight = engine_of(model), engine_of(model, kv_tokens=112, prefix_cache=False)
    expected, outputs = roomy.generate(requests), tight.generate(requests)
    assert roomy.stats().preemptions == 0 < tight.stats().preemptions
    assert new_ids(outputs) == new_ids(expected)
    assert [len(o.completions[0].top_logprobs) for o in outputs] == [40] * 6


def test_stream_gives_the_deltas_that_make_up_the_outputs():
    engine = engine_of(small_model(), small_tokenizer())
    params = SamplingParams(20, temperature=1.5, seed=1, n=2, logprobs=2)
    requests = [Request("hello", params, id="a"), Request("你好", params, id="b")]
    parts, outputs = {}, {}
    for delta in engine.stream(requests):
        text, ids, log_probs, top = parts.setdefault((delta.id, delta.index), ([], [], [], []))
        text.append(delta.text)
        ids.extend(delta.token_ids)
        log_probs.extend(delta.log_probs)
        top.extend(delta.top_logprobs)
        if delta.output:
            outputs[delta.id] = delta.output
    assert outputs.keys() == {"a", "b"}
    for name, output in outputs.items():
        for c in output.completions:
            text, ids, log_probs, top = parts[name, c.index]
            assert ("".join(text), ids, log_probs, top) == (c.text, c.token_ids, c.log_probs, c.top_logprobs)
        assert 0 < output.timing.queued <= output.timing.ttft <= output.timing.total


def test_closing_a_stream_cancels_and_leaves_the_others_alone():
    model = small_model()
    engine = engine_of(model)
    other = engine.submit(greedily([[9, 8]], 10)[0])
    stream = engine.stream(greedily([[1, 2, 3], [4]], 30))
    for _ in range(4):
        next(stream)
    stream.close()
    assert engine.stats().running == 1
    outputs = []
    while engine.has_work:
        outputs += [d.output for d in engine.step() if d.output]
    assert [o.id for o in outputs] == [other]
    assert is_greedy(model, [9, 8], outputs[0].token_ids)
    assert engine.stats().pages_used == 0


def test_deltas_that_come_during_generate_wait_for_step():
    model = small_model()
    engine = engine_of(model)
    other = engine.submit(greedily([[9, 8]], 4)[0])
    (output,) = engine.generate(greedily([[1, 2]], 8))
    assert is_greedy(model, [1, 2], output.token_ids)
    assert engine.has_work
    deltas = engine.step()
    assert [d.id for d in deltas] == [other] * 4
    assert is_greedy(model, [9, 8], deltas[-1].output.token_ids)
    assert not engine.has_work


@pytest.mark.parametrize("steps", [0, 1, 3])
def test_cancel_at_any_time_gives_the_pages_back(steps):
    model = small_model()
    engine = engine_of(model, prefill_chunk=24, max_batch=3)
    name = engine.submit(Request(list(range(30)), SamplingParams(20, temperature=1.0, n=4)))
    other = engine.submit(greedily([[5, 6]], 15)[0])
    for _ in range(steps):
        engine.step()
    assert engine.cancel(name)
    assert not engine.cancel(name)
    assert not engine.cancel("nobody")
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    mine = [d for d in deltas if d.id == name and d.finish_reason]
    assert [d.finish_reason for d in mine] == ["cancelled"] * 4
    assert [c.index for c in mine[-1].output.completions] == [0, 1, 2, 3]
    assert is_greedy(model, [5, 6], next(d.output.token_ids for d in deltas if d.id == other and d.output))
    stats = engine.stats()
    assert (stats.pages_used, stats.running, stats.waiting) == (0, 0, 0)
    assert stats.finished == {"cancelled": 4, "length": 1}


def test_bad_requests_say_why_and_the_others_are_served():
    model = small_model()
    engine = engine_of(model, small_tokenizer(), kv_tokens=64)
    good = SamplingParams(4, temperature=0, ignore_eos=True)
    bad = {
        "the prompt is empty": Request([], good),
        "the prompt has 512 tokens, the context 512: shorten it to at most 511": Request([1] * 512, good),
        "may need 83 tokens of cache, which holds 64": Request([1] * 80, good),
        "may need 102 tokens of cache, which holds 64": Request([1] * 3, SamplingParams(100)),
        "token id 5000 of the prompt is outside the vocabulary": Request([1, 5000], good),
        "token id -1": Request([-1], good),
        "neither a str nor a sequence": Request(None, good),
    }
    requests = [Request([1, 2], good)]
    for request in bad.values():
        requests += [request, Request([1, 2], good)]
    outputs = engine.generate(requests)
    for why, output in zip(bad, outputs[1::2], strict=True):
        assert output.finish_reason == "error"
        assert why in output.error and "\n" not in output.error
    assert len(set(map(tuple, new_ids(outputs[::2])))) == 1
    assert is_greedy(model, [1, 2], outputs[0].token_ids)
    with pytest.raises(ValueError, match="the prompt is empty"):
        engine.submit(Request("", good))
    engine.submit(Request([1], good, id="twice"))
    with pytest.raises(ValueError, match="'twice' is that of an unfinished request"):
        engine.submit(Request([1], good, id="twice"))
    (refused,) = engine.stream([Request([], good, id="x")])
    assert (refused.id, refused.finish_reason, refused.output.id) == ("x", "error", "x")


def test_without_a_limit_all_tokens_that_fit_are_generated():
    engine = engine_of(small_model(), kv_tokens=64, max_batch=2)
    outputs = engine.generate([Request([1] * 50, SamplingParams(None, temperature=0))] * 3)
    assert [len(o.token_ids) for o in outputs] == [15] * 3  # the last one is drawn, not stored
    (full,) = engine.generate([Request([1] * 64, SamplingParams(None, temperature=0))])
    assert len(full.token_ids) == 1


def test_text_needs_a_tokenizer():
    engine = engine_of(small_model())
    for request in (Request("hello"), Request([1], SamplingParams(stop="a"))):
        with pytest.raises(ValueError, match="this engine has no tokenizer"):
            engine.submit(request)
    (output,) = engine.generate([Request([1, 2], SamplingParams(3))])
    assert (output.text, len(output.token_ids)) == ("", 3)


def test_invalid_engine_arguments():
    model, tokenizer = small_model(), small_tokenizer()
    size = tokenizer.vocab_size
    with pytest.raises(ValueError, match=f"the tokenizer has {size} ids, the model 64 rows"):
        Engine(small_model(vocab_size=64), tokenizer)
    for options, why in (
        ({"kv_tokens": 3}, "kv_tokens=3 is less than one page"),
        ({"max_batch": 0}, "max_batch=0 must be at least 1"),
        ({"prefill_chunk": 0}, "prefill_chunk=0"),
        ({"page_size": -1}, "page_size=-1"),
        ({"max_context": 513}, "max_context=513 must lie in 2..512"),
        ({"backend": "fast"}, "unknown backend 'fast'"),
        ({"dtype": torch.float16, "backend": "native"}, "on a CPU the native operators compute in"),
        ({"dtype": torch.int8}, "dtype=torch.int8"),
    ):
        with pytest.raises(ValueError, match=why):
            engine_of(model, **options)


@pytest.mark.parametrize("backend", BACKENDS)
def test_nan_weights_end_a_request_with_an_error(backend):
    model = small_model()
    engine = engine_of(model, backend=backend)
    name = engine.submit(greedily([[1, 2]], 8)[0])
    engine.step()
    with torch.no_grad():
        model.norm.weight.fill_(float("nan"))
    deltas = []
    while engine.has_work:
        deltas += engine.step()
    assert (deltas[-1].id, deltas[-1].finish_reason) == (name, "error")
    assert "not finite" in deltas[-1].output.error
    assert len(deltas[-1].output.token_ids) == 1
    assert engine.stats().pages_used == 0


def test_a_step_that_fails_costs_no_request(monkeypatch):
    model = small_model()
    engine = engine_of(model, prefill_chunk=16)
    prompts = random_prompts(5, 30, model.config.vocab_size)
    names = [engine.submit(request) for request in greedily(prompts)]
    for failing in ("prefill", "step", "sample"):
        engine.step()
        with monkeypatch.context() as patch:
            patch.setattr(engine._runner, failing, lambda *_: 1 / 0)
            with pytest.raises(ZeroDivisionError):
                for _ in range(9):
                    engine.step()
        assert engine.stats().pages_used == 0
    outputs = {}
    while engine.has_work:
        outputs |= {d.id: d.output for d in engine.step() if d.output}
    assert all(is_greedy(model, p, outputs[n].token_ids) for p, n in zip(prompts, names, strict=True))


def test_no_global_random_state_is_touched():
    model = small_model()
    before = torch.get_rng_state()
    outputs = engine_of(model).generate([Request([1, 2], SamplingParams(5, temperature=1.0))])
    assert len(outputs[0].token_ids) == 5
    assert torch.equal(torch.get_rng_state(), before)
