"""Constrained answers are JSON even from a model with random weights."""

import json

import numpy as np
import pytest

from minimind.inference.engine import Engine
from minimind.inference.requests import Request, SamplingParams
from minimind.serving.grammar import ANY_OBJECT, Grammars
from minimind.serving.protocol import ApiError
from tests.inference.small import small_model, small_tokenizer
from tests.serving.service import WEATHER

SCHEMA = {
    "type": "object",
    "properties": {"city": {"type": "string", "maxLength": 4}, "warm": {"type": "boolean"}},
    "required": ["city", "warm"],
    "additionalProperties": False,
}


@pytest.mark.parametrize("backend", ["reference", "auto"])
@pytest.mark.parametrize("temperature", [0, 1.0])
def test_answers_match_the_schema(temperature, backend):
    tokenizer = small_tokenizer()
    engine = Engine(small_model(), tokenizer, kv_tokens=4096, max_batch=4, backend=backend)
    constraint = Grammars(tokenizer).json_schema(SCHEMA, reasoning=False)
    params = SamplingParams(80, temperature=temperature, n=3, seed=5)
    free, bound = engine.generate([Request([1, 5, 9], params), Request([1, 5, 9], params, constraint=constraint)])
    for completion in bound.completions:
        assert completion.finish_reason == "stop"
        value = json.loads(completion.text)
        assert set(value) == {"city", "warm"} and len(value["city"]) <= 4
        assert all(np.isfinite(completion.log_probs))
    alone = engine.generate([Request([1, 5, 9], params)])[0]
    assert [c.token_ids for c in alone.completions] == [c.token_ids for c in free.completions], "others do not notice"
    assert "{" not in {c.text[:1] for c in free.completions}, "without the grammar the model writes something else"


def test_a_preempted_sequence_continues_its_grammar():
    tokenizer = small_tokenizer()
    constraint = Grammars(tokenizer).json_schema(SCHEMA, reasoning=False)
    requests = [Request([1, 5, 9 + i], SamplingParams(60, seed=i), constraint=constraint) for i in range(4)]
    tight = Engine(small_model(), tokenizer, kv_tokens=96, max_batch=4, backend="reference", prefix_cache=False)
    for output in tight.generate(requests):
        assert set(json.loads(output.text)) == {"city", "warm"}
    assert tight.stats().preemptions > 0


@pytest.mark.parametrize("backend", ["reference", "auto"])
def test_a_grammar_without_an_end_fails_only_its_answer(backend):
    """An object that must contain another such object: no finite text can match it."""
    tokenizer = small_tokenizer()
    endless = {"type": "object", "properties": {"a": {"$ref": "#"}}, "required": ["a"]}
    constraint = Grammars(tokenizer).json_schema(endless, reasoning=False)
    requests = [Request([1, 5, 9], SamplingParams(20, seed=1), constraint=c) for c in (None, constraint, None)]
    engine = Engine(small_model(), tokenizer, kv_tokens=4096, max_batch=4, backend=backend)
    free, bound, other = engine.generate(requests)
    assert bound.finish_reason == "error" and bound.error.startswith("the grammar cannot continue: parser error")
    assert free.token_ids == other.token_ids == engine.generate(requests[:1])[0].token_ids


def test_the_grammar_begins_after_the_reasoning():
    constraint = Grammars(small_tokenizer()).json_schema(ANY_OBJECT, reasoning=True)()
    assert constraint.allowed() is None
    constraint.advance(300)
    assert constraint.allowed() is None
    constraint.advance(small_tokenizer().special_tokens["</think>"])
    allowed = constraint.allowed()
    assert allowed is not None
    assert {small_tokenizer().decode([i])[:1] for i in np.flatnonzero(allowed)} == {"{"}


def test_a_complete_value_can_only_end():
    tokenizer = small_tokenizer()
    constraint = Grammars(tokenizer).tool_calls([WEATHER["function"]], several=False, reasoning=False)()
    for token in tokenizer.encode('<tool_call>\n{"name": "weather", "arguments": {"city": "a"}}\n</tool_call>'):
        assert constraint.allowed()[token]
        constraint.advance(token)
    assert np.flatnonzero(constraint.allowed()).tolist() == [tokenizer.eos_token_id]


def test_a_call_may_take_the_place_of_json_and_nothing_else():
    tokenizer = small_tokenizer()
    grammar = Grammars(tokenizer).tool_calls([WEATHER["function"]], several=True, reasoning=False, form=SCHEMA)
    call = '<tool_call>\n{"name": "weather", "arguments": {"city": "a"}}\n</tool_call>'
    for text in (call, f"{call}\n{call}", '{"city": "a", "warm": true}'):
        constraint = grammar()
        starts = {tokenizer.decode([i])[:1] for i in np.flatnonzero(constraint.allowed())}
        assert starts == {"{", "<"}
        for token in tokenizer.encode(text):
            assert constraint.allowed()[token]
            constraint.advance(token)
        assert constraint.allowed()[tokenizer.eos_token_id]


@pytest.mark.parametrize(
    ("schema", "reason"),
    [
        ({"type": "objekt"}, "objekt"),
        ({"$ref": "https://example.com/schema.json"}, "retriev"),
        ({"type": "string", "format": "poem"}, "poem"),
        ({"title": "\ud800"}, "hex escape"),
        ({"type": "string", "pattern": "["}, "unclosed character class$"),
        ({"$ref": "#"}, "nothing can match it"),
        ({"allOf": [{"type": "string"}, {"type": "object"}]}, "nsatisfiable"),
    ],
)
def test_a_schema_that_cannot_be_enforced_is_refused(schema, reason):
    with pytest.raises(ApiError, match=reason) as caught:
        Grammars(small_tokenizer()).json_schema(schema, reasoning=False)
    assert caught.value.status_code == 400 and "\n" not in str(caught.value)
